# SPDX-License-Identifier: Apache-2.0
"""MagiAttention's ``q_ranges``, ``k_ranges`` and ``attn_type_map`` of ``flex_flash_attn_func``.

Several heads are folded into the token axis, as its ``flatten_block_mask`` does: query head ``h`` holds queries
``h * seqlen_q`` onwards and kv head ``g`` keys ``g * seqlen_k`` onwards.
"""

from __future__ import annotations

import math

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.convert.common import single
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask, blocks_of

FULL = 0  # attn_type_map entry of a range pair that is kept whole


def from_magi_ranges(
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    attn_type_map: torch.Tensor | None = None,
    *,
    slice_m: int | None = None,
    slice_n: int | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
) -> SliceMask:
    """Exact or refused.

    Args:
        q_ranges, k_ranges: integer (n, 2), half-open token ranges; pair ``i`` keeps q_ranges[i] x k_ranges[i]. Pairs
            must not overlap.
        attn_type_map: integer (n,); only 0 (full) has an exact form in slices.
        slice_m, slice_n: granularity; None takes the coarsest that cuts no range.
        seqlen_q, seqlen_k: tokens of one head; by default the largest end, divided by the heads.
        num_heads, num_kv_heads: heads folded into the token axis.
    """
    for name, ranges in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        if not isinstance(ranges, torch.Tensor) or ranges.ndim != 2 or ranges.shape[1] != 2:
            raise MaskError(f"{name} is not an integer tensor of shape (n, 2)")
    if q_ranges.shape != k_ranges.shape:
        raise MaskError(f"{q_ranges.shape[0]} q_ranges and {k_ranges.shape[0]} k_ranges do not pair up")
    if attn_type_map is not None and bool((attn_type_map != FULL).any()):
        raise MaskError("attn_type_map holds causal ranges, which cut slices: split them into full ranges first")
    kv_heads = num_kv_heads or num_heads
    q, k = q_ranges.long(), k_ranges.long()
    head, q, seqlen_q = _unfold("q_ranges", q, seqlen_q, num_heads)
    kv_head, k, seqlen_k = _unfold("k_ranges", k, seqlen_k, kv_heads)
    if bool((head // (num_heads // kv_heads) != kv_head).any()):
        raise MaskError("a range pair joins a query head with the keys of another group")
    slice_m = _granularity("q_ranges", q, seqlen_q, slice_m, "slice_m")
    slice_n = _granularity("k_ranges", k, seqlen_k, slice_n, "slice_n")
    rows, columns = blocks_of(seqlen_q, slice_m), blocks_of(seqlen_k, slice_n)
    # Each pair adds 1 to a rectangle of slices: four corners of a difference map, summed along both axes.
    corners = torch.zeros(num_heads, rows + 1, columns + 1, dtype=torch.int32, device=q.device)
    m, n = -(-q // slice_m), -(-k // slice_n)
    for i in (0, 1):
        for j in (0, 1):
            sign = torch.full_like(head, 1 if i == j else -1, dtype=torch.int32)
            corners.index_put_((head, m[:, i], n[:, j]), sign, accumulate=True)
    times = corners.cumsum(1).cumsum(2)[:, :rows, :columns]
    if int(times.max()) > 1:
        raise MaskError("range pairs overlap: MagiAttention would count those keys twice")
    keep = times.bool()[None]
    return SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def to_magi_ranges(mask: SliceMask, num_kv_heads: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q_ranges, k_ranges, attn_type_map): one pair per query block and run of kept keys; exact.

    Args:
        mask: equal in all batch entries. Its heads are folded into the token axis.
        num_kv_heads: kv heads of the call; by default as many as the mask has heads.

    Returns:
        int32 (n, 2), int32 (n, 2) and int32 (n,) of zeros, in the order of heads, query blocks and keys.
    """
    bits = single(mask, "MagiAttention", ("batch",))[0]
    heads = bits.shape[0]
    kv_heads = num_kv_heads or heads
    if heads % kv_heads:
        raise MaskError(f"the mask's {heads} heads are not a multiple of {kv_heads} kv heads")
    keep = torch.nn.functional.pad(_bits.unpack(bits, mask.blocks_k), (1, 1))
    starts = (keep[..., 1:-1] & ~keep[..., :-2]).nonzero()
    last = (keep[..., 1:-1] & ~keep[..., 2:]).nonzero()[:, 2]
    head, row = starts[:, 0], starts[:, 1]
    q = torch.stack([row * mask.slice_m, ((row + 1) * mask.slice_m).clamp(max=mask.seqlen_q)], -1)
    k = torch.stack([starts[:, 2] * mask.slice_n, ((last + 1) * mask.slice_n).clamp(max=mask.seqlen_k)], -1)
    q = q + (head * mask.seqlen_q).unsqueeze(-1)
    k = k + (head // (heads // kv_heads) * mask.seqlen_k).unsqueeze(-1)
    return q.to(torch.int32), k.to(torch.int32), torch.zeros_like(head, dtype=torch.int32)


def _unfold(name: str, ranges: torch.Tensor, seqlen: int | None, heads: int):
    """(head of each range, ranges inside the head, tokens of one head)."""
    if seqlen is None:
        end = int(ranges.max()) if ranges.numel() else 0
        if end == 0 or end % heads:
            raise MaskError(
                f"{name} end at {end}, from which the length of {heads} heads cannot be told: pass the seqlen"
            )
        seqlen = end // heads
    start, stop = ranges.unbind(-1)
    head = start.div(seqlen, rounding_mode="floor")
    bad = (start < 0) | (stop <= start) | (stop > heads * seqlen) | (head != (stop - 1) // seqlen)
    if bool(bad.any()):
        first = ranges[bad][0].tolist()
        raise MaskError(f"{name} holds {first}, which is empty, outside 0..{heads * seqlen} or spans two heads")
    return head, ranges - (head * seqlen).unsqueeze(-1), seqlen


def _granularity(name: str, ranges: torch.Tensor, seqlen: int, step: int | None, what: str) -> int:
    cuts = [edge for edge in ranges.unique().tolist() if edge not in (0, seqlen)]
    coarsest = math.gcd(*cuts) if cuts else seqlen
    if step is None:
        return coarsest
    if step < 1 or any(edge % step for edge in cuts):
        raise MaskError(f"{name} have edges that {what}={step} would cut: divisors of {coarsest} are exact")
    return step
