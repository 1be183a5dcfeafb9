# SPDX-License-Identifier: Apache-2.0
"""Which plan of a mask is fastest: lists of its blocks' own, unions, or lists in parts. All of these are exact; coarser
slices are not.

The cost model prices each with mean list lengths, which takes one read-back for all of them, as making a plan does.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from . import gpu as _gpu
from . import orders, parts, roofline
from .errors import UnsupportedError
from .gpu import Gpu
from .kernels.spec import PARTS_BLOCKS, WGMMA_ROWS
from .mask import SliceMask
from .parts import PartsPlan
from .plan import Plan
from .problem import Problem
from .select import facts_for, select
from .unions import UnionPlan, rows_for

OWN = "own lists"
PARTS = "lists in parts"
# Random masks on an H200, S = 16384 (perf/results/h200/2026-11-23-peers.jsonl): the model is 9 to 16 % slow for lists
# of blocks' own and 4 to 13 % fast for unions, so what it expects of unions must win by more than both.
UNION_MARGIN = 0.8
# The model is right to 6 % about lists in parts. It expected 0.84 and 0.85 of the time where they took 0.96 and 0.92,
# and 0.90 where they took 1.06 (slice_m 64, S = 16,384 and 75,600, perf/results/h200/2026-11-23-parts.jsonl).
PARTS_MARGIN = 0.87
COARSER_ROWS = (64, 128, 192)


@dataclasses.dataclass(frozen=True)
class PlanOption:
    """A way to run a mask, and what the cost model expects of it.

    name: "own lists", "unions of 128 rows", "slices of 128 x 1", ...
    rows: query rows that share a list.
    exact: whether it keeps the mask's pairs and no others; coarser slices keep more and are advice only.
    union_factor: pairs computed over pairs kept; in parts those of the block that keeps most count for all.
    seconds: predicted. kernel: name of the spec.
    loads_per_key: keys loaded over keys that blocks keep, where lists come in parts; None elsewhere.
    """

    name: str
    rows: int
    exact: bool
    union_factor: float
    seconds: float
    kernel: str
    loads_per_key: float | None = None

    def __str__(self) -> str:
        more = "" if self.exact else f", NOT exact: keeps {self.union_factor:.2f} x the pairs (mask.coarsen)"
        factor = f", union factor {self.union_factor:.2f}" if self.exact and self.name != OWN else ""
        if self.loads_per_key is not None:
            factor = f", {self.loads_per_key:.2f} loads per kept key"
        return f"{self.name}: model {1e3 * self.seconds:.3g} ms{factor}{more}"


@dataclasses.dataclass(frozen=True)
class PlanChoice:
    """The options of a mask. chosen: name of the fastest exact one. why: one sentence."""

    options: tuple[PlanOption, ...]
    chosen: str
    why: str

    @property
    def option(self) -> PlanOption:
        """The chosen one."""
        return next(option for option in self.options if option.name == self.chosen)

    def plan(self, mask: SliceMask, order: torch.Tensor | None = None) -> Plan | UnionPlan | PartsPlan:
        """Makes the chosen plan. order: the one that the choice was made with."""
        if self.chosen == OWN:
            return Plan.from_mask(mask)
        if self.chosen == PARTS:
            return PartsPlan.from_mask(mask, order)
        return UnionPlan.from_mask(mask, order, rows=self.option.rows)


def best_plan(
    mask: SliceMask,
    *,
    heads: int | None = None,
    batch: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    order: torch.Tensor | str | None = None,
    gpu: Gpu | None = None,
) -> Plan | UnionPlan | PartsPlan:
    """The plan of a mask that should be fastest: a Plan, or where sharing lists pays a UnionPlan or a PartsPlan.

    The result of attention is exact with each. Reads back what making a plan reads, plus one row of numbers where
    slice_m allows sharing at all (16, 32, 48, 64, 96).

    Args:
        mask: the kept slices.
        heads, batch: of q; by default the mask's own.
        head_dim, dtype: of q.
        order: which blocks would share a list, as for ``UnionPlan.from_mask``.
        gpu: whose kernels are priced; by default the mask's own, or for a mask on the CPU that of FGATTN_GPU.

    Raises:
        UnsupportedError: no kernel runs on the GPU.
    """
    if not rows_for(mask.slice_m):
        return Plan.from_mask(mask)
    sizes = (batch or mask.batch, mask.seqlen_q, heads or mask.heads, head_dim)
    q = torch.empty(sizes, dtype=dtype, device="meta")
    k = torch.empty((sizes[0], mask.seqlen_k, *sizes[2:]), dtype=dtype, device="meta")
    order = permutation(mask, order)
    gpu = gpu or (_gpu.current(mask.device) if mask.device.type == "cuda" else _gpu.assumed())
    return choose(mask, Problem.of(q, k, k, mask), gpu, order).plan(mask, order)


def permutation(mask: SliceMask, order: torch.Tensor | str | None) -> torch.Tensor | None:
    """An order by name as a tensor; "similar" is found for the first rows that the blocks can share."""
    if not (isinstance(order, str) and order == "similar"):
        return order
    rows = PARTS_BLOCKS * WGMMA_ROWS if parts.shareable(mask) else rows_for(mask.slice_m)[0]
    return orders.similar(mask, rows)


def choose(
    mask: SliceMask,
    problem: Problem,
    gpu: Gpu,
    order: torch.Tensor | None = None,
    *,
    coarser: bool = False,
    reused: bool = True,
) -> PlanChoice:
    """Prices the ways to run a mask and picks the fastest exact one. Reads one row of numbers back.

    Args:
        problem: of the call, as for the mask; its unions are varied here.
        order: which blocks would share a list.
        coarser: also price coarser slices, as advice.
        reused: as for ``price``.
    """
    stands = orders.sequence(mask.blocks_q, mask.device)
    loads = []  # of lists in parts, where they are among the ways
    found = {way: mask.kept_pairs() for way in ways(mask.slice_m, mask.slice_n, coarser)}
    for way in found:
        if way.lists == "parts":
            found[way], *loads = parts.cost(mask, order)
        elif way.rows != mask.slice_m:
            asked = order if way.exact and order is not None else stands
            found[way] = orders.union_pairs(mask, asked, way.rows)
    numbers = torch.stack([pairs.sum() for pairs in (*found.values(), *loads)]).tolist()
    kept, loads = numbers[0], numbers[len(found) :]
    factors = [total / kept if kept else 1.0 for total in numbers[: len(found)]]
    density = kept / (mask.batch * mask.heads * mask.seqlen_q * mask.seqlen_k)
    return price(problem, gpu, density, dict(zip(found, factors, strict=True)), *loads, reused=reused)


class Way(NamedTuple):
    """A kind of plan. rows share a list; blocks of the mask serve it, 1 where they are merged or alone. lists: as
    ``union_lists`` of a FwdSpec."""

    name: str
    rows: int
    blocks: int
    exact: bool
    lists: str = "bits"

    def asked(self, problem: Problem) -> Problem:
        """The call with such a plan in place of lists of the blocks' own."""
        slice_m = self.rows // self.blocks
        return dataclasses.replace(problem, union_blocks=self.blocks, slice_m=slice_m, union_lists=self.lists)


def ways(slice_m: int, slice_n: int, coarser: bool) -> list[Way]:
    """The kinds of plan that slices can have, lists of their own first. Blocks that fill a warpgroup have no unions:
    one of the others was faster on every mask that was measured."""
    found = [Way(OWN, slice_m, 1, True)]
    if slice_m != WGMMA_ROWS:
        found += [Way(f"unions of {rows} rows", rows, rows // slice_m, True) for rows in rows_for(slice_m)]
    elif slice_n == 1:
        found.append(Way(PARTS, PARTS_BLOCKS * slice_m, PARTS_BLOCKS, True, "parts"))
    wider = [rows for rows in COARSER_ROWS if coarser and rows % slice_m == 0 and rows > slice_m]
    return found + [Way(f"slices of {rows} x {slice_n}", rows, 1, False) for rows in wider]


def price(
    problem: Problem,
    gpu: Gpu,
    density: float,
    factors: dict[Way, float],
    loads_per_key: float = 1.0,
    *,
    reused: bool = True,
) -> PlanChoice:
    """Prices ways to run a mask and picks the fastest exact one.

    Args:
        problem: of the call with lists of the blocks' own.
        density: kept fraction of the pairs.
        factors: pairs computed over pairs kept, by way, lists of their own first.
        loads_per_key: of lists in parts, keys loaded over keys that blocks keep.
        reused: whether the plan will serve many calls, as lists in parts must: before there were kernels for it, making
            them took 14 ms where they save 0.3 ms a call (S = 16,384, 24 heads, 30 %, one H200,
            perf/results/h200/2026-11-23-unions.jsonl).

    Raises:
        UnsupportedError: no kernel runs on the GPU.
    """
    found = []
    for way, factor in factors.items():
        asked, loads = way.asked(problem), None
        try:
            spec = select(asked, gpu).spec
        except UnsupportedError:
            if way.name == OWN:
                raise
            continue  # no preset has a kernel for such lists
        work = roofline.Workload.uniform(asked, density, union_factor=factor)
        if way.lists == "parts":
            loads = loads_per_key
            work = dataclasses.replace(work, loads=way.blocks * loads / factor)
        # Not what the kernel cache happens to know: a mask must get the same plan, and so the same bits, every time.
        seconds = roofline.predict(spec, facts_for(gpu), work, roofline.known_instructions(spec)).seconds
        found.append(PlanOption(way.name, way.rows, way.exact, factor, seconds, spec.name, loads))
    return _decide(found, reused)


def _decide(found: list[PlanOption], reused: bool) -> PlanChoice:
    own, *rest = found
    shared = [option for option in rest if option.exact]
    best = min(shared, key=lambda option: option.seconds, default=None)
    if best is None:
        return PlanChoice(tuple(found), OWN, "no kernel shares lists among such blocks")
    share = best.seconds / own.seconds if own.seconds else 1.0
    if best.name == PARTS:
        said = f"lists in parts should take {share:.2f} x the time of own lists: {best.loads_per_key:.2f} loads per key"
        margin = PARTS_MARGIN
    else:
        said = f"unions should take {share:.2f} x the time of own lists at union factor {best.union_factor:.2f}"
        margin = UNION_MARGIN
    if share < margin and best.name == PARTS and not reused:
        return PlanChoice(
            tuple(found), OWN, f"{said}; making them pays over some dozens of calls: fg.best_plan(mask) does"
        )
    if share < margin:
        return PlanChoice(tuple(found), best.name, said)
    return PlanChoice(tuple(found), OWN, f"{said}; less than {margin:g} x is asked for")
