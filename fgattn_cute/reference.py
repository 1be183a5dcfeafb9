# SPDX-License-Identifier: Apache-2.0
"""The oracle: attention over exactly the kept keys, in plain torch at high precision.

Written to be read, not to be fast. It gathers the listed rows, so rows that no list names are never touched, and it
shares no code with the kernels, the compaction or the host path.
"""

from __future__ import annotations

import math

import torch

_CHUNK_ELEMENTS = 1 << 22  # gathered K elements (and about as many scores) held at a time


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    dtype: torch.dtype = torch.float32,
):
    """Softmax attention of each query over the keys that its block keeps.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or (batch, heads, seqlen_q, head_dim) with layout "bhsd"; any float dtype
            and any head_dim, any device.
        k, v: the same with seqlen_k and kv_heads, heads % kv_heads == 0.
        plan: a Plan or a SliceMask on the same device; its batch or heads may be 1 (shared).
        scale: factor on q.k; None means head_dim ** -0.5.
        return_lse: also return the logarithm of the sum of exponentials.
        layout: "bshd" or "bhsd", for inputs and output.
        dtype: float32 or float64, the precision of everything computed and of the results.

    Returns:
        out shaped like q, in ``dtype``; with ``return_lse`` also lse (batch, heads, seqlen_q), natural logarithm. A
        query block that keeps nothing gives out 0 and lse -inf.
    """
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads, seqlen_q, head_dim = q.shape
    group = heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            for start, index, valid in _key_lists(plan, b, h, head_dim):
                stop = min(seqlen_q, start + index.shape[0] * plan.slice_m)
                rows = slice(start, stop)
                out[b, h, rows], lse[b, h, rows] = _blocks(
                    q[b, h, rows], keys, values, index, valid, scale, dtype, plan
                )
    out = out.transpose(1, 2).contiguous() if layout == "bshd" else out
    return (out, lse) if return_lse else out


def _blocks(q, k, v, index, valid, scale, dtype, plan):
    """Out (rows, D) and lse (rows,) of consecutive query blocks; index and valid are (blocks, longest list)."""
    count, longest = index.shape
    padded = torch.zeros(count * plan.slice_m, q.shape[-1], dtype=dtype, device=q.device)
    padded[: q.shape[0]] = q.to(dtype)
    if longest == 0:
        return torch.zeros_like(padded[: q.shape[0]]), torch.full_like(padded[: q.shape[0], 0], -math.inf)
    # Cells past a list's end point at some row that may hold NaN: they become exact zeros before anything multiplies.
    hole = ~valid.unsqueeze(-1)
    kept_k = k[index].to(dtype).masked_fill_(hole, 0)
    kept_v = v[index].to(dtype).masked_fill_(hole, 0)
    scores = padded.view(count, plan.slice_m, -1) @ kept_k.transpose(1, 2) * scale
    scores = scores.masked_fill_(~valid.unsqueeze(1), -math.inf)
    lse = torch.logsumexp(scores, -1)
    # Where nothing is kept, every score is -inf and so is lse: subtracting 0 instead keeps exp at 0 rather than NaN.
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1))
    out = weights @ kept_v
    return out.flatten(0, 1)[: q.shape[0]], lse.flatten()[: q.shape[0]]


def _key_lists(plan, b: int, h: int, head_dim: int):
    """Yields (first query, key rows (blocks, L) int64, valid (blocks, L) bool) over chunks of query blocks."""
    source = plan.bits if hasattr(plan, "bits") else plan.keys
    b, h = (b if source.shape[0] > 1 else 0), (h if source.shape[1] > 1 else 0)
    lists = _rows_of_mask(plan, b, h) if hasattr(plan, "bits") else _rows_of_plan(plan, b, h)
    first, longest = 0, 0
    for m, row in enumerate(lists):
        # A chunk ends before the block that would make its padded size too large.
        wider = max(longest, row.numel())
        if m > first and (m + 1 - first) * wider * max(head_dim, plan.slice_m) > _CHUNK_ELEMENTS:
            yield first * plan.slice_m, *_padded(lists[first:m])
            first, longest = m, row.numel()
        else:
            longest = wider
    yield first * plan.slice_m, *_padded(lists[first:])


def _rows_of_mask(mask, b: int, h: int) -> list[torch.Tensor]:
    """Key rows of each query block, read off the packed bits."""
    words = mask.bits[b, h]
    columns = torch.arange(mask.seqlen_k, device=words.device) // mask.slice_n
    return [((row[columns // 32] >> (columns % 32)) & 1).nonzero().flatten() for row in words]


def _rows_of_plan(plan, b: int, h: int) -> list[torch.Tensor]:
    """Key rows of each query block, read off the id lists; ids out of range are clamped as the kernel clamps them."""
    rows = []
    for start, keys in zip(plan.offset[b, h].tolist(), plan.keys[b, h].tolist(), strict=True):
        place = torch.arange(keys, device=plan.ids.device)
        row = plan.ids[start + place // plan.slice_n].long() * plan.slice_n + place % plan.slice_n
        rows.append(row.clamp(0, plan.seqlen_k - 1))
    return rows


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([row.numel() for row in rows], device=index.device)
    return index, torch.arange(index.shape[1], device=index.device) < lengths.unsqueeze(1)
