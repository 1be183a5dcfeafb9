# SPDX-License-Identifier: Apache-2.0
"""Softmax mass of slices, some query blocks at a time: the (query, key) scores of a head are never held at once.

``slice_mass_bits`` is the fused form, scores straight to keep-bits. ``device_masks`` has the kernel that does the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.mask import block_rows, blocks_of

STATISTICS = ("mean", "max")
_CHUNK_SCORES = 1 << 24  # fp32 scores held at a time


def slice_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    slice_m: int,
    slice_n: int,
    scale: float,
    statistic: str = "mean",
    blocks: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Scores of the slices of one head.

    Args:
        q: (seqlen_q, head_dim); k: (seqlen_k, head_dim); any float dtype, computed in fp32.
        lse: fp32 (seqlen_q,), natural log, or None to take it from the scores themselves.
        slice_m, slice_n: size of a slice.
        scale: factor on q.k.
        statistic: "mean", the share of a query's probability that falls into the slice, averaged over the queries of
            the block; "max", the largest single probability in the slice.
        blocks: int64 (n,), the query blocks wanted; None means all, in order.

    Yields:
        (position of the first block, fp32 (some blocks, ceil(seqlen_k / slice_n))).
    """
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    device = q.device
    rows = block_rows(seqlen_q, slice_m, device)
    count = rows.numel() if blocks is None else blocks.numel()
    columns = blocks_of(seqlen_k, slice_n)
    keys = k.float().T * scale
    within = torch.arange(slice_m, device=device)
    step = max(1, _CHUNK_SCORES // (slice_m * seqlen_k))
    for first in range(0, count, step):
        last = min(count, first + step)
        chosen = torch.arange(first, last, device=device) if blocks is None else blocks[first:last]
        query = (chosen * slice_m).unsqueeze(1) + within
        inside = query < seqlen_q
        query = query.clamp(max=seqlen_q - 1)
        scores = q[query.flatten()].float() @ keys
        own = torch.logsumexp(scores, -1) if lse is None else lse[query.flatten()]
        share = torch.exp(scores - own.unsqueeze(-1)).unflatten(0, (last - first, slice_m))
        share = share * inside.unsqueeze(-1)
        if statistic == "mean":
            per_key = share.sum(1) / rows[chosen].unsqueeze(-1)
        else:
            per_key = share.amax(1)
        if slice_n > 1:
            padded = torch.nn.functional.pad(per_key, (0, columns * slice_n - seqlen_k)).unflatten(
                -1, (columns, slice_n)
            )
            per_key = padded.sum(-1) if statistic == "mean" else padded.amax(-1)
        yield first, per_key


def slice_mass_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    tau: torch.Tensor,
    *,
    slice_m: int,
    slice_n: int,
    scale: float,
    statistic: str = "mean",
) -> torch.Tensor:
    """Keep-bits of all slices whose score is at least ``tau``.

    Args:
        q: (batch, seqlen_q, heads, head_dim); k: (batch, seqlen_k, kv_heads, head_dim).
        lse: fp32 (batch, heads, seqlen_q), natural log, or None.
        tau: fp32 (batch, heads).
        slice_m, slice_n, scale, statistic: as in ``slice_mass``.

    Returns:
        int32 (batch, heads, ceil(seqlen_q / slice_m), words), as SliceMask holds them.
    """
    batch, seqlen_q, heads, _ = q.shape
    group = heads // k.shape[2]
    shape = (batch, heads, blocks_of(seqlen_q, slice_m), _bits.num_words(blocks_of(k.shape[1], slice_n)))
    words = torch.empty(shape, dtype=torch.int32, device=q.device)
    for b in range(batch):
        for h in range(heads):
            row = None if lse is None else lse[b, h]
            for first, scores in slice_mass(
                q[b, :, h],
                k[b, :, h // group],
                row,
                slice_m=slice_m,
                slice_n=slice_n,
                scale=scale,
                statistic=statistic,
            ):
                words[b, h, first : first + scores.shape[0]] = _bits.pack(scores >= tau[b, h])
    return words
