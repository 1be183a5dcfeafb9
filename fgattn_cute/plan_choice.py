# SPDX-License-Identifier: Apache-2.0
"""Which plan of a mask is fastest: lists of its blocks' own, unions, whole or in halves, or lists in parts. All of
these are exact; coarser slices are not.

The cost model prices each with mean list lengths, which takes one read-back for all of them, as making a plan does.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from . import gpu as _gpu
from . import halves, orders, parts, roofline
from .errors import UnsupportedError
from .gpu import Gpu
from .halves import HalvesPlan
from .kernels.spec import HALVES, HALVES_ROWS, HALVES_TILE_N, PARTS_BLOCKS, WGMMA_ROWS
from .mask import SliceMask
from .parts import PartsPlan
from .plan import Plan
from .problem import Problem
from .select import facts_for, select
from .shared import SharedLists
from .unions import UnionPlan, rows_for

OWN = "own lists"
PARTS = "lists in parts"
IN_HALVES = "unions in halves"
# Random masks on an H200, S = 16384 (perf/results/h200/2026-11-23-peers.jsonl): the model is 9 to 16 % slow for lists
# of blocks' own and 4 to 13 % fast for unions, so what it expects of unions must win by more than both.
UNION_MARGIN = 0.8
# The model is right to 6 % about lists in parts. It expected 0.84 and 0.85 of the time where they took 0.96 and 0.92,
# and 0.90 where they took 1.06 (slice_m 64, S = 16,384 and 75,600, perf/results/h200/2026-11-23-parts.jsonl).
PARTS_MARGIN = 0.87
# Unions in halves over whole ones on an H200, slice_m 16 and 32, union factors 1.05 to 3.1: the model expected 0.97
# where they took 1.00 of the time, 0.95 where 0.97 and 0.87 where 0.89 to 0.91
# (perf/results/h200/2026-11-24-halves.jsonl).
HALVES_MARGIN = 0.96
COARSER_ROWS = (64, 128, 192)
COSTS = {"parts": parts.cost, "halves": halves.cost}  # pairs computed, and keys loaded over keys that blocks keep


@dataclasses.dataclass(frozen=True)
class PlanOption:
    """A way to run a mask, and what the cost model expects of it.

    name: "own lists", "unions of 128 rows", "slices of 128 x 1", ...
    rows: query rows that share a list.
    exact: whether it keeps the mask's pairs and no others; coarser slices keep more and are advice only.
    union_factor: pairs computed over pairs kept; in parts those of the block that keeps most count for all.
    seconds: predicted. kernel: name of the spec.
    loads_per_key: keys loaded over keys that blocks keep, in parts and in halves; None elsewhere.
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
            loads = f", {self.loads_per_key:.2f} loads per kept key"
            factor = loads if self.name == PARTS else factor + loads
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

    def plan(self, mask: SliceMask, order: torch.Tensor | None = None) -> Plan | SharedLists:
        """Makes the chosen plan. order: the one that the choice was made with."""
        if self.chosen == OWN:
            return Plan.from_mask(mask)
        if self.chosen == PARTS:
            return PartsPlan.from_mask(mask, order)
        if self.chosen == IN_HALVES:
            return HalvesPlan.from_mask(mask, order)
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
) -> Plan | SharedLists:
    """The plan of a mask that should be fastest: a Plan, or where sharing pays a UnionPlan, HalvesPlan or PartsPlan.

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
) -> PlanChoice:
    """Prices the ways to run a mask and picks the fastest exact one. Reads one row of numbers back.

    Args:
        problem: of the call, as for the mask; its unions are varied here.
        order: which blocks would share a list.
        coarser: also price coarser slices, as advice.
    """
    stands = orders.sequence(mask.blocks_q, mask.device)
    found, loads = {}, {}
    for way in ways(mask.slice_m, mask.slice_n, coarser):
        if way.lists in COSTS:
            found[way], loads[way] = COSTS[way.lists](mask, order)
        elif way.rows == mask.slice_m:
            found[way] = mask.kept_pairs()
        else:
            asked = order if way.exact and order is not None else stands
            found[way] = orders.union_pairs(mask, asked, way.rows)
    numbers = torch.stack([pairs.sum().double() for pairs in (*found.values(), *loads.values())]).tolist()
    kept = numbers[0]
    factors = [total / kept if kept else 1.0 for total in numbers[: len(found)]]
    density = kept / (mask.batch * mask.heads * mask.seqlen_q * mask.seqlen_k)
    loads = dict(zip(loads, numbers[len(found) :], strict=True))
    return price(problem, gpu, density, dict(zip(found, factors, strict=True)), loads)


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
        if slice_n == 1 and HALVES_ROWS % slice_m == 0:
            found.append(Way(IN_HALVES, HALVES_ROWS, HALVES_ROWS // slice_m, True, "halves"))
    elif slice_n == 1:
        found.append(Way(PARTS, PARTS_BLOCKS * slice_m, PARTS_BLOCKS, True, "parts"))
    wider = [rows for rows in COARSER_ROWS if coarser and rows % slice_m == 0 and rows > slice_m]
    return found + [Way(f"slices of {rows} x {slice_n}", rows, 1, False) for rows in wider]


def share_of_pool(factor: float, blocks: int) -> float:
    """Fraction of a common pool that each block must keep, at random, for ``blocks`` of them to have a union factor.

    The union of n blocks that each keep a share p of a pool is 1 - (1 - p)^n of it.

    Raises:
        ValueError: no share does, because even disjoint blocks have a smaller factor.
    """
    if not 1 <= factor < blocks:
        raise ValueError(f"{blocks} blocks have a union factor from 1 to {blocks}, not {factor}")
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        if share == 0 or (1 - (1 - share) ** blocks) / share > factor:
            low = share
        else:
            high = share
    return high


def expected(kinds: list[Way], factor: float, keys: float) -> tuple[dict[Way, float], dict[Way, float]]:
    """Factors and loads, as ``price`` wants them, where blocks draw their keys at random from a pool of their own.

    Args:
        factor: union factor of the blocks that share a CTA, of two neighbours where lists come in parts; as many as
            there are blocks counts as disjoint ones.
        keys: that a block keeps.
    """
    factors, loads = {}, {}
    for way in kinds:
        factors[way] = factor if way.lists == "bits" and way.blocks > 1 else 1.0
        if way.lists == "parts":
            loads[way] = parts.expected_loads(factor, keys)
        elif way.lists == "halves":
            share = share_of_pool(factor, way.blocks) if factor < way.blocks else 0.0
            blocks = way.blocks // HALVES
            own = (1 - (1 - share) ** blocks) / share if share else blocks
            # On average half a tile of a half is empty, and the common keys that fill none are loaded twice.
            tile = HALVES_TILE_N / max(1.0, keys)
            factors[way] = own + tile / 2
            loads[way] = (min(factor, way.blocks) + 1.5 * tile) / way.blocks
    return factors, loads


def price(
    problem: Problem,
    gpu: Gpu,
    density: float,
    factors: dict[Way, float],
    loads: dict[Way, float],
) -> PlanChoice:
    """Prices ways to run a mask and picks the fastest exact one.

    Args:
        problem: of the call with lists of the blocks' own.
        density: kept fraction of the pairs.
        factors: pairs computed over pairs kept, by way, lists of their own first.
        loads: of lists in parts and unions in halves, keys loaded over keys that blocks keep.

    Raises:
        UnsupportedError: no kernel runs on the GPU.
    """
    found = []
    for way, factor in factors.items():
        asked = way.asked(problem)
        try:
            spec = select(asked, gpu).spec
        except UnsupportedError:
            if way.name == OWN:
                raise
            continue  # no preset has a kernel for such lists
        work = roofline.Workload.uniform(asked, density, union_factor=factor)
        if way in loads:
            work = dataclasses.replace(work, loads=way.blocks * loads[way] / factor)
        # Not what the kernel cache happens to know: a mask must get the same plan, and so the same bits, every time.
        seconds = roofline.predict(spec, facts_for(gpu), work, roofline.known_instructions(spec)).seconds
        found.append(PlanOption(way.name, way.rows, way.exact, factor, seconds, spec.name, loads.get(way)))
    return _decide(found)


def _handicapped(option: PlanOption) -> float:
    """Seconds, as ways of sharing a list are compared with each other."""
    return option.seconds / HALVES_MARGIN if option.name == IN_HALVES else option.seconds


def _decide(found: list[PlanOption]) -> PlanChoice:
    own, *rest = found
    shared = [option for option in rest if option.exact]
    best = min(shared, key=_handicapped, default=None)
    if best is None:
        return PlanChoice(tuple(found), OWN, "no kernel shares lists among such blocks")
    share = best.seconds / own.seconds if own.seconds else 1.0
    if best.name == PARTS:
        said = f"lists in parts should take {share:.2f} x the time of own lists: {best.loads_per_key:.2f} loads per key"
        margin = PARTS_MARGIN
    else:
        said = f"{best.name} should take {share:.2f} x the time of own lists at union factor {best.union_factor:.2f}"
        margin = UNION_MARGIN
    if share < margin:
        return PlanChoice(tuple(found), best.name, said)
    return PlanChoice(tuple(found), OWN, f"{said}; less than {margin:g} x is asked for")
