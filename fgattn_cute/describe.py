# SPDX-License-Identifier: Apache-2.0
"""What a mask or plan keeps, how regular it is and what it costs, in numbers that a terminal or a JSON file can hold.

Everything here reads results back from the device: it is for people, not for the run path.
"""

from __future__ import annotations

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import orders
from fgattn_cute.compaction import LIST_ALIGN, PLAN_SLACK, align_up
from fgattn_cute.mask import SliceMask, blocks_of
from fgattn_cute.unions import rows_for

# Cost of a list relative to dense attention: (keys + OVERHEAD_KEYS) / (rate * seqlen_k). The rates are packed FLOP
# rates against dense FA4 on full lists and the overhead fits lists of 4900 to 23000 keys (one H200, head_dim 128, bf16,
# 2026-11-23); other GPUs, head dims and lengths are estimates from the same numbers.
OVERHEAD_KEYS = 330
RATE_OF_TILE_M = {192: 1.09, 128: 1.00, 64: 0.88}
_CHUNK_CELLS = 1 << 25


class Description(dict):
    """A mapping of plain numbers and strings that prints as lines."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key.replace('_', ' '):<{width}}  {_shown(value)}" for key, value in self.items())


def describe_mask(mask: SliceMask, q=None, k=None, lse=None, **options) -> Description:
    """Facts of a mask.

    Args:
        mask: the mask.
        q, k, lse, options: with q and k also the softmax mass that the mask keeps, as ``predict.recall`` takes them.

    Returns:
        slices, seqlen, batch, heads; density and the range of it over heads; kept_mass (with q and k);
        keys_per_block, the quantiles over query blocks; empty_blocks and full_blocks; imbalance, the longest list
        over the mean one; runs_per_block and run_length_share, the share of kept slices that stand in runs of at
        least so many; union_factors (slice_m 16 to 96), by the rows of a CTA that neighbouring blocks would share:
        pairs that it computes over pairs kept; bytes_as_bits and bytes_as_lists; estimated_speedup over dense
        attention and break_even_density, at which that is 1.
    """
    keys = mask.kept_keys().double()
    pairs = mask.kept_pairs().double() / (mask.seqlen_q * mask.seqlen_k)
    flat = keys.flatten()
    facts = Description(
        slices=f"{mask.slice_m} x {mask.slice_n}",
        seqlen=f"{mask.seqlen_q} x {mask.seqlen_k}",
        batch=mask.batch,
        heads=mask.heads,
        density=mask.density,
        density_of_heads=[float(pairs.min()), float(pairs.max())],
    )
    if q is not None and k is not None:
        from fgattn_cute.predict import recall

        kept = recall(mask, q, k, lse, **options)
        facts["kept_mass"] = float(kept.mean())
        facts["kept_mass_of_heads"] = [float(kept.min()), float(kept.max())]
    ordered = flat.sort().values
    places = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    facts["keys_per_block"] = {n: int(ordered[round(at * (flat.numel() - 1))]) for n, at in places.items()}
    facts["empty_blocks"] = int((flat == 0).sum())
    facts["full_blocks"] = int((flat == mask.seqlen_k).sum())
    mean = float(flat.mean())
    facts["imbalance"] = float(flat.max()) / mean if mean else 1.0
    facts |= _runs(mask)
    kept = int(mask.kept_pairs().sum())
    stands = orders.sequence(mask.blocks_q, mask.device)
    shared = {f"{rows} rows": int(orders.union_pairs(mask, stands, rows).sum()) for rows in rows_for(mask.slice_m)}
    if shared and kept:
        facts["union_factors"] = {name: pairs / kept for name, pairs in shared.items()}
    lists = int(align_up(mask.kept_slices(), LIST_ALIGN).sum()) + PLAN_SLACK
    facts["bytes_as_bits"] = mask.nbytes
    facts["bytes_as_lists"] = 4 * lists + 12 * flat.numel()
    rate = tile_rate(mask.slice_m)
    facts["estimated_speedup"] = rate * mask.seqlen_k / (mean + OVERHEAD_KEYS) if mean else float("inf")
    facts["break_even_density"] = min(1.0, max(0.0, rate - OVERHEAD_KEYS / mask.seqlen_k))
    return facts


def describe_plan(plan) -> Description:
    """Facts of a plan's mask, with the plan's own memory and whether a capacity cut its lists."""
    facts = describe_mask(plan.to_mask())
    facts["bytes_as_lists"] = plan.nbytes
    facts["capacity_ids"] = plan.capacity
    facts["even"] = plan.even
    facts["overflow"] = plan.overflow is not None and bool(plan.overflow)
    return facts


def describe_union_plan(plan) -> Description:
    """Facts of a union plan's mask, with the factor of its own unions, their size and the plan's own memory."""
    facts = describe_mask(plan.to_mask())
    facts["blocks_of_a_union"] = plan.union_blocks
    facts["union_factor"] = plan.union_factor
    facts["bytes_as_lists"] = plan.nbytes
    return facts


def describe_halves_plan(plan) -> Description:
    """As ``describe_union_plan``, with the keys that the unions load for each that a block keeps."""
    facts = describe_union_plan(plan)
    facts["loads_per_key"] = plan.loads_per_key
    return facts


def describe_parts_plan(plan) -> Description:
    """Facts of the mask of lists in parts, with what they load and the plan's own memory."""
    facts = describe_mask(plan.to_mask())
    facts["blocks_of_a_list"] = plan.union_blocks
    facts["loads_per_key"] = plan.loads_per_key
    facts["bytes_as_lists"] = plan.nbytes
    return facts


def tile_rate(slice_m: int) -> float:
    """Rate of useful FLOPs against dense attention, before per-list overhead.

    A block runs on the widest tile that divides it. One that is no multiple of 64 is padded to whole 64-row tiles.
    """
    for tile_m, rate in RATE_OF_TILE_M.items():
        if slice_m % tile_m == 0:
            return rate
    return RATE_OF_TILE_M[64] * slice_m / (64 * blocks_of(slice_m, 64))


def _runs(mask: SliceMask) -> Description:
    """Runs of neighbouring kept slices: how many per query block, and the share of slices in long ones."""
    rows = mask.bits.flatten(0, 2)
    lengths = []
    step = max(1, _CHUNK_CELLS // mask.blocks_k)
    for first in range(0, rows.shape[0], step):
        keep = torch.nn.functional.pad(_bits.unpack(rows[first : first + step], mask.blocks_k), (1, 1))
        # Starts and ends come out in the same order, row by row, so that they pair up one to one.
        starts = (keep[:, 1:] & ~keep[:, :-1]).nonzero()[:, 1]
        ends = (~keep[:, 1:] & keep[:, :-1]).nonzero()[:, 1]
        lengths.append(ends - starts)
    length = torch.cat(lengths).double()
    total = max(1.0, float(length.sum()))
    share = {f">={n}": float(length[length >= n].sum()) / total for n in (2, 4, 8, 16, 64)}
    return Description(runs_per_block=length.numel() / rows.shape[0], run_length_share=share)


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " to ".join(_shown(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
