# SPDX-License-Identifier: Apache-2.0
"""Orders of query blocks under which neighbours keep more of the same keys, for ``UnionPlan.from_mask(mask, order)``.

An order decides which blocks share a list and nothing else: every block keeps its own softmax, and outputs stay where
the queries are.
"""

from __future__ import annotations

import functools

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.errors import InputError
from fgattn_cute.mask import SliceMask, blocks_of

SKETCH_COLUMNS = 1024  # slice columns on which blocks are compared
_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 hit every stretch of the columns and no period of theirs
_CHUNK_CELLS = 1 << 27  # sketch cells held at a time
_CHUNK_WORDS = 1 << 24  # mask words copied at a time


def sequence(blocks_q: int, device="cpu") -> torch.Tensor:
    """The blocks as they stand: int64 (blocks_q,)."""
    return torch.arange(blocks_q, device=device)


def neighbours(video, slice_m: int, rows: int) -> torch.Tensor:
    """Blocks that are close in frames, rows and columns next to each other.

    Cuts the longest extent of the token grid in two, again and again, until ``rows`` queries are left of a part. Knows
    positions only, so one order serves all heads and masks of a video.

    Args:
        video: a ``predict.Video``, with the order of tokens that q has. Blocks of text stay together at the end.
        slice_m: queries of a block.
        rows: query rows of a CTA, as for ``UnionPlan.from_mask``.

    Returns:
        int64 (ceil(video.seqlen / slice_m),) on the CPU, kept for later calls.
    """
    if rows % slice_m:
        raise InputError(f"blocks of {slice_m} queries do not fill {rows} rows")
    return _neighbours(video, slice_m, rows // slice_m).clone()


@functools.lru_cache(maxsize=32)
def _neighbours(video, slice_m: int, size: int) -> torch.Tensor:
    count = blocks_of(video.seqlen, slice_m)
    middle = (torch.arange(count) * slice_m + slice_m // 2).clamp(max=video.seqlen - 1)
    place = video.coordinates()[:, middle].T
    text = place[:, 0] < 0
    parts = []

    def cut(blocks: torch.Tensor) -> None:
        if blocks.numel() <= size:
            parts.append(blocks)
            return
        here = place[blocks]
        axis = int((here.amax(0) - here.amin(0)).argmax())
        ordered = blocks[here[:, axis].argsort(stable=True)]
        whole = blocks_of(blocks.numel(), size)
        half = whole // 2 * size  # whole unions to the left, so that only the last one may be short
        cut(ordered[:half])
        cut(ordered[half:])

    blocks = torch.arange(count)
    if not text.all():
        cut(blocks[~text])
    return torch.cat([*parts, blocks[text]])


def similar(mask: SliceMask, rows: int) -> torch.Tensor:
    """Blocks that keep the same keys next to each other, head by head: a greedy grouping.

    The first block that has no union yet takes those that are most like it (Jaccard, on a sample of the columns), and
    so on. A head whose unions would not become smaller keeps its blocks as they stand. Takes
    ``ceil(blocks_q / blocks of a union)`` short steps on the mask's device and reads nothing back.

    Args:
        mask: as for ``UnionPlan.from_mask``.
        rows: query rows of a CTA.

    Returns:
        int64 (batch, heads, blocks_q), on the mask's device.
    """
    size = rows // mask.slice_m
    columns = _sampled_columns(mask.blocks_k, mask.device)
    words, shift = mask.bits.flatten(0, 1), (columns % _bits.WORD_BITS).to(torch.int32)
    step = max(1, _CHUNK_CELLS // (mask.blocks_q * columns.numel()))
    dtype = torch.bfloat16 if words.is_cuda else torch.float32
    found = []
    for first in range(0, words.shape[0], step):
        sketch = (words[first : first + step, :, columns // _bits.WORD_BITS] >> shift) & 1
        found.append(_greedy(sketch.to(dtype), size))
    order = torch.cat(found).unflatten(0, mask.bits.shape[:2])
    return cheapest(mask, [sequence(mask.blocks_q, mask.device), order], rows)


def _sampled_columns(columns: int, device) -> torch.Tensor:
    if columns <= SKETCH_COLUMNS:
        return torch.arange(columns, device=device)
    index = torch.arange(SKETCH_COLUMNS, dtype=torch.float64, device=device)
    return ((index * _GOLDEN) % 1.0 * columns).long()


def _greedy(sketch: torch.Tensor, size: int) -> torch.Tensor:
    """int64 (heads, blocks): seeds in order of the sequence, each followed by the free blocks that are most like it.

    Args:
        sketch: 0 or 1, (heads, blocks, columns).
    """
    heads, count, _ = sketch.shape
    kept = sketch.sum(-1, dtype=torch.float32)
    free = torch.ones(heads, count, dtype=torch.bool, device=sketch.device)
    order = []
    for _ in range(blocks_of(count, size) - 1):
        seed = free.int().argmax(-1, keepdim=True)  # the first maximum
        row = sketch.gather(1, seed[..., None].expand(-1, -1, sketch.shape[2]))
        both = torch.bmm(sketch, row.mT)[..., 0].float()
        likeness = both / (kept + kept.gather(1, seed) - both).clamp(min=1)
        # The seed itself comes first even if it keeps nothing, and blocks that are taken come last.
        likeness = torch.where(free, likeness, -1.0).scatter(1, seed, 2.0)
        chosen = likeness.topk(size, -1).indices
        free.scatter_(1, chosen, False)
        order.append(chosen)
    order.append(free.int().topk(count - size * len(order), -1).indices.sort(-1).values)
    return torch.cat(order, -1)


def union_pairs(mask: SliceMask, order: torch.Tensor, rows: int) -> torch.Tensor:
    """(query, key) pairs that unions compute, kept by a block or not: int64 (batch, heads), on the mask's device.

    Args:
        order: (blocks_q,) or (batch, heads, blocks_q).
        rows: query rows that share a list, a multiple of slice_m.
    """
    size = rows // mask.slice_m
    order = order.to(mask.device).expand(*mask.bits.shape[:2], -1)
    short = blocks_of(mask.blocks_q, size) * size - mask.blocks_q
    pairs = []
    # This copies bits, so as many heads at a time as fit 64 MiB. One at a time would launch hundreds of small kernels.
    step = max(1, _CHUNK_WORDS // max(1, mask.bits[:, 0].numel()))
    for bits, places in zip(mask.bits.split(step, 1), order.split(step, 1), strict=True):
        words = bits.gather(2, places[..., None].expand(-1, -1, -1, bits.shape[-1]))
        words = torch.nn.functional.pad(words, (0, 0, 0, short))
        union = functools.reduce(torch.bitwise_or, words.unflatten(2, (-1, size)).unbind(3))
        pairs.append(SliceMask(union, **{**mask.geometry, "slice_m": rows}).kept_pairs())
    return torch.cat(pairs, 1)


def cheapest(mask: SliceMask, candidates: list[torch.Tensor], rows: int) -> torch.Tensor:
    """For every head the order with the smallest unions, the first of equals. Reads nothing back.

    Args:
        candidates: orders, (blocks_q,) or (batch, heads, blocks_q).

    Returns:
        int64 (batch, heads, blocks_q), on the mask's device.
    """
    shape = (*mask.bits.shape[:2], mask.blocks_q)
    orders = torch.stack([order.to(mask.device).expand(shape) for order in candidates])
    best = torch.stack([union_pairs(mask, order, rows) for order in candidates]).argmin(0)
    return orders.gather(0, best[None, ..., None].expand(1, *shape))[0]
