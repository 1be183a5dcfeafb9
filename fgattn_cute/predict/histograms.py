# SPDX-License-Identifier: Apache-2.0
"""Selection by the mass kernel: every rule becomes a threshold, found from histograms of scores instead of by sorting.

A histogram of 8 bins per octave says which bin holds the score that a rule asks for; a second one divides that bin by
256. The threshold is the lower end of what is left, so slices whose scores lie within a share of 2^-11 above it are
kept as well: a top-k may keep a few more than k, and equal scores are kept or skipped together. Nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgattn_cute import device_masks
from fgattn_cute.mask import blocks_of
from fgattn_cute.predict.select import Budget, Threshold, TopK, TopP

# Bits of 2^-31 as a float: smaller scores do not count as mass. 256 bins of 2^20 reach from there past 1.
LOWEST = (127 - 31) << 23
SHIFTS = (20, 12)
MASS_ONE = 2.0**30  # fixed point of summed scores: a query block's total stays below 2^31


def select_bits(q, k, lse, select, *, slice_m, slice_n, scale, statistic, backend: str) -> torch.Tensor:
    """Keep-bits int32 (batch, heads, query blocks, words) by any rule.

    Args:
        q: (batch, seqlen_q, heads, head_dim), k: (batch, seqlen_k, kv_heads, head_dim), 16-bit floats.
        lse: fp32 (batch, heads, seqlen_q), or None to compute it first.
        select: Threshold, TopK, TopP or Budget.
        slice_m, slice_n, scale, statistic: as for ``mass``.
        backend: "cuda" or "emulator".
    """
    if lse is None:
        lse = device_masks.row_lse(q, k, scale=scale, backend=backend)
    options = {"slice_m": slice_m, "slice_n": slice_n, "scale": scale, "statistic": statistic, "backend": backend}
    tau = _threshold(q, k, lse, select, options)
    return device_masks.slice_bits(q, k, lse.float(), tau, **options)


def _threshold(q, k, lse, select, options: dict) -> torch.Tensor:
    """fp32 (batch, heads or 1, query blocks or 1)."""
    heads = q.shape[2]
    columns = blocks_of(k.shape[1], options["slice_n"])
    if isinstance(select, Threshold):
        return select.of_heads(heads, q.device).view(1, -1, 1)
    if isinstance(select, TopK):
        number = select.of_heads(heads, q.device).view(1, -1, 1)
        tau = _search(lambda edge, shift: _counts(q, k, lse, edge, shift, None, options), lambda _: number, q.device)
        return tau.masked_fill(number >= columns, 0.0)
    if isinstance(select, TopP):
        share = select.of_heads(heads, q.device).double().view(1, -1, 1)
        unit = MASS_ONE if options["statistic"] == "mean" else MASS_ONE / options["slice_m"]
        return _search(
            lambda edge, shift: _counts(q, k, lse, edge, shift, unit, options), lambda total: share * total, q.device
        )
    return _budget(q, k, lse, select, columns, options)


def _budget(q, k, lse, select: Budget, columns: int, options: dict) -> torch.Tensor:
    """The score that a share of the slices of a sample of query blocks reach; shared by the heads unless each has its
    own share."""
    slice_m, heads = options["slice_m"], q.shape[2]
    blocks = blocks_of(q.shape[1], slice_m)
    sample = min(blocks, select.sample)
    if sample < blocks:
        chosen = torch.arange(sample, device=q.device) * blocks // sample
        rows = (chosen.unsqueeze(1) * slice_m + torch.arange(slice_m, device=q.device)).flatten()
        q, lse = q.index_select(1, rows), lse.index_select(2, rows)
    pooled_heads = (2,) if len(select.values) > 1 else (1, 2)
    per_head = sample * columns * (1 if len(select.values) > 1 else heads)
    number = torch.round(select.of_heads(heads, q.device).double() * per_head).view(1, -1, 1)
    number = number if len(select.values) > 1 else number[:, :1]

    def counts(edge, shift):
        return _counts(q, k, lse, edge, shift, None, options).sum(pooled_heads, keepdim=True)

    return _search(counts, lambda _: number, q.device)


def _counts(q, k, lse, edge, shift: int, unit: float | None, options: dict) -> torch.Tensor:
    """int64 (batch, heads, query blocks, BINS)."""
    return device_masks.histogram(q, k, lse.float(), edge, shift=shift, unit=unit, **options).long()


def _search(counts: Callable, wanted_of: Callable, device) -> torch.Tensor:
    """Lower ends of the bins in which the weight from the top reaches what is wanted.

    Args:
        counts: (edges int32, shift) -> int64 (..., BINS), the weights of the bins from the edges on.
        wanted_of: total weight (...) -> weight wanted from the top (...).

    Returns:
        fp32 (...) thresholds.
    """
    edge = torch.full((1, 1, 1), LOWEST, dtype=torch.int32, device=device)
    wanted = None
    for shift in SHIFTS:
        found = counts(edge, shift)
        from_top = found.flip(-1).cumsum(-1).flip(-1)
        wanted = wanted_of(from_top[..., 0]) if wanted is None else wanted
        # Sums from the top fall from bin to bin, so the bins that reach the wanted weight are the first ones.
        place = ((from_top >= wanted.unsqueeze(-1)).sum(-1) - 1).clamp(min=0)
        above = (from_top - found).gather(-1, place.unsqueeze(-1)).squeeze(-1)
        wanted = wanted - above
        edge = edge + (place << shift).to(torch.int32)
    return edge.view(torch.float32)
