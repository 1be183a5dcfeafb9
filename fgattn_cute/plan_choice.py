# SPDX-License-Identifier: Apache-2.0
"""Which plan of a mask is fastest: lists of its blocks' own, or unions. Both are exact; coarser slices are not.

The cost model prices each with mean list lengths, which takes one read-back for all of them, as making a plan does.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from . import gpu as _gpu
from . import orders, roofline
from .errors import UnsupportedError
from .gpu import Gpu
from .mask import SliceMask
from .plan import Plan
from .problem import Problem
from .select import facts_for, select
from .unions import UnionPlan, rows_for

OWN = "own lists"
# Random masks on an H200, S = 16384 (perf/results/h200/2026-11-23-peers.jsonl): the model is 9 to 16 % slow for lists
# of blocks' own and 4 to 13 % fast for unions, so what it expects of unions must win by more than both.
UNION_MARGIN = 0.8
COARSER_ROWS = (64, 128, 192)


@dataclasses.dataclass(frozen=True)
class PlanOption:
    """A way to run a mask, and what the cost model expects of it.

    name: "own lists", "unions of 128 rows", "slices of 128 x 1", ...
    rows: query rows that share a list.
    exact: whether it keeps the mask's pairs and no others; coarser slices keep more and are advice only.
    union_factor: pairs computed over pairs kept.
    seconds: predicted. kernel: name of the spec.
    """

    name: str
    rows: int
    exact: bool
    union_factor: float
    seconds: float
    kernel: str

    def __str__(self) -> str:
        more = "" if self.exact else f", NOT exact: keeps {self.union_factor:.2f} x the pairs (mask.coarsen)"
        factor = f", union factor {self.union_factor:.2f}" if self.exact and self.name != OWN else ""
        return f"{self.name}: model {1e3 * self.seconds:.3g} ms{factor}{more}"


@dataclasses.dataclass(frozen=True)
class PlanChoice:
    """The options of a mask. chosen: name of the fastest exact one. why: one sentence."""

    options: tuple[PlanOption, ...]
    chosen: str
    why: str

    def plan(self, mask: SliceMask, order: torch.Tensor | None = None) -> Plan | UnionPlan:
        """Makes the chosen plan. order: the one that the choice was made with."""
        option = next(option for option in self.options if option.name == self.chosen)
        if option.name == OWN:
            return Plan.from_mask(mask)
        return UnionPlan.from_mask(mask, order, rows=option.rows)


def best_plan(
    mask: SliceMask,
    *,
    heads: int | None = None,
    batch: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    order: torch.Tensor | str | None = None,
    gpu: Gpu | None = None,
) -> Plan | UnionPlan:
    """The plan of a mask that the cost model expects to be fastest: a Plan, or a UnionPlan where sharing lists pays.

    The result of attention is exact with either. Reads back what making a plan reads, plus one row of numbers where
    slice_m allows unions at all (16, 32, 48, 64, 96).

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
    return orders.similar(mask, rows_for(mask.slice_m)[0]) if order == "similar" and isinstance(order, str) else order


def choose(
    mask: SliceMask, problem: Problem, gpu: Gpu, order: torch.Tensor | None = None, coarser: bool = False
) -> PlanChoice:
    """Prices the ways to run a mask and picks the fastest exact one. Reads one row of numbers back.

    Args:
        problem: of the call, as for the mask; its unions are varied here.
        order: which blocks would share a list.
        coarser: also price coarser slices, as advice.
    """
    stands = orders.sequence(mask.blocks_q, mask.device)
    found = {way: mask.kept_pairs() for way in ways(mask.slice_m, mask.slice_n, coarser)}
    for way in found:
        if way.rows != mask.slice_m:
            asked = order if way.exact and order is not None else stands
            found[way] = orders.union_pairs(mask, asked, way.rows)
    kept, *rest = torch.stack([pairs.sum() for pairs in found.values()]).tolist()
    factors = [total / kept if kept else 1.0 for total in (kept, *rest)]
    density = kept / (mask.batch * mask.heads * mask.seqlen_q * mask.seqlen_k)
    return price(problem, gpu, density, dict(zip(found, factors, strict=True)))


class Way(NamedTuple):
    """A kind of plan. rows share a list; blocks of the mask serve it, 1 where they are merged or alone."""

    name: str
    rows: int
    blocks: int
    exact: bool


def ways(slice_m: int, slice_n: int, coarser: bool) -> list[Way]:
    """The kinds of plan that slices can have, lists of their own first."""
    found = [Way(OWN, slice_m, 1, True)]
    found += [Way(f"unions of {rows} rows", rows, rows // slice_m, True) for rows in rows_for(slice_m)]
    wider = [rows for rows in COARSER_ROWS if coarser and rows % slice_m == 0 and rows > slice_m]
    return found + [Way(f"slices of {rows} x {slice_n}", rows, 1, False) for rows in wider]


def price(problem: Problem, gpu: Gpu, density: float, factors: dict[Way, float]) -> PlanChoice:
    """Prices ways to run a mask and picks the fastest exact one.

    Args:
        problem: of the call with lists of the blocks' own.
        density: kept fraction of the pairs.
        factors: pairs computed over pairs kept, by way, lists of their own first.

    Raises:
        UnsupportedError: no kernel runs on the GPU.
    """
    found = []
    for way, factor in factors.items():
        asked = dataclasses.replace(problem, union_blocks=way.blocks, slice_m=way.rows // way.blocks)
        try:
            spec = select(asked, gpu).spec
        except UnsupportedError:
            if way.name == OWN:
                raise
            continue  # no preset has a kernel for such unions
        work = roofline.Workload.uniform(asked, density, union_factor=factor)
        # Not what the kernel cache happens to know: a mask must get the same plan, and so the same bits, every time.
        seconds = roofline.predict(spec, facts_for(gpu), work, roofline.known_instructions(spec)).seconds
        found.append(PlanOption(way.name, way.rows, way.exact, factor, seconds, spec.name))
    return _decide(found)


def _decide(found: list[PlanOption]) -> PlanChoice:
    own, *rest = found
    unions = [option for option in rest if option.exact]
    best = min(unions, key=lambda option: option.seconds, default=None)
    if best is None:
        return PlanChoice(tuple(found), OWN, "no kernel shares lists among such blocks")
    share = best.seconds / own.seconds if own.seconds else 1.0
    said = f"unions should take {share:.2f} x the time of own lists at union factor {best.union_factor:.2f}"
    if share < UNION_MARGIN:
        return PlanChoice(tuple(found), best.name, said)
    return PlanChoice(tuple(found), OWN, f"{said}; less than {UNION_MARGIN:g} x is asked for")
