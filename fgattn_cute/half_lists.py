# SPDX-License-Identifier: Apache-2.0
"""Mask bits to unions in halves, on whatever device holds the mask.

Counting and filling are kernels on a Hopper GPU (``device_masks``) and plain torch elsewhere, with the same result bit
for bit. A list has tiles of three kinds: of both halves; of A alone; of B alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import device_masks
from fgattn_cute.compaction import PLAN_SLACK, write_ids
from fgattn_cute.kernels.mask_spec import HALVES_COMMON, HALVES_KEYS, HALVES_TILES
from fgattn_cute.kernels.spec import HALVES, HALVES_TILE_N, HALVES_TILE_WORDS, halves_start
from fgattn_cute.shared import rows_of

KINDS = 1 + HALVES
SLACK_ROWS = 32  # of members: a warp reads tiles ahead
_CHUNK_TILES = 1 << 16  # looked up at a time: bounds the temporaries to a few hundred MiB


class HalfLists(NamedTuple):
    """Output of ``compact``.

    ids: int32 (128 tiles + PLAN_SLACK,); zero past the last list.
    offset: int64 (lists,), start of each list in ids.
    keys: int32 (lists,), ids of each list.
    members: int32 (words, union_blocks), see ``HalvesPlan``.
    """

    ids: torch.Tensor
    offset: torch.Tensor
    keys: torch.Tensor
    members: torch.Tensor


class TileCounts(NamedTuple):
    """How much lists have of each kind.

    keys: (lists, 2), that blocks of each half keep. common: (lists,), tiles of both. own: (lists, 2), of each alone.
    """

    keys: torch.Tensor
    common: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, mask, blocks: torch.Tensor, backend: str | None = None) -> TileCounts:
        """Of a mask's lists. blocks, backend: as for ``compact``."""
        backend = device_masks.backend_for_lists(mask, backend)
        if backend == "torch":
            return cls.of_halves(_halves(rows_of(mask, blocks)))
        return cls.of_sums(device_masks.measure_halves(mask.bits.contiguous(), blocks, backend))

    @classmethod
    def of_halves(cls, halves: torch.Tensor) -> TileCounts:
        """halves: int32 (lists, 2, words), keys of each half."""
        return cls.of_counts(_bits.count(halves), _bits.count(halves[:, 0] & halves[:, 1]) // HALVES_TILE_N)

    @classmethod
    def of_sums(cls, sums: torch.Tensor) -> TileCounts:
        return cls.of_counts(sums[:, HALVES_KEYS : HALVES_KEYS + HALVES], sums[:, HALVES_COMMON])

    @classmethod
    def of_counts(cls, keys: torch.Tensor, common: torch.Tensor) -> TileCounts:
        """keys: (lists, 2). common: (lists,), tiles."""
        keys, common = keys.long(), common.long()
        return cls(keys, common, (keys + HALVES_TILE_N - 1) // HALVES_TILE_N - common[:, None])

    def tiles(self) -> torch.Tensor:
        """(lists,): of all kinds."""
        return self.common + self.own.sum(-1)

    def taken(self) -> torch.Tensor:
        """(lists, 2): tiles that each half computes."""
        return self.common[:, None] + self.own


def compact(mask, blocks: torch.Tensor, backend: str | None = None) -> HalfLists:
    """Unions in halves of a mask. Allocating them reads a number back, once.

    Args:
        mask: a SliceMask of slice_m 16, 32 or 64, slice_n 1.
        blocks: int32 (lists, 128 / slice_m), contiguous: the query blocks of each list, as many lists to each batch
            entry and head as hold its blocks; blocks_q or more means none.
        backend: "cuda" or "emulator" for the kernels, "torch"; None takes the kernels where the mask lies on a GPU
            that runs them.
    """
    backend = device_masks.backend_for_lists(mask, backend)
    words, device = mask.bits.contiguous(), mask.device
    if backend == "torch":
        rows = rows_of(mask, blocks)
        count = TileCounts.of_halves(_halves(rows))
        tiles = count.tiles()
    else:
        sums = device_masks.measure_halves(words, blocks, backend)
        tiles = sums[:, HALVES_TILES]
    ends = tiles.cumsum(0)
    total = int(ends[-1])
    offset = (ends - tiles) * HALVES_TILE_N
    ids = torch.empty(total * HALVES_TILE_N + PLAN_SLACK, dtype=torch.int32, device=device)
    words_in_all = halves_start(len(blocks), total * HALVES_TILE_N) + SLACK_ROWS
    members = torch.empty(words_in_all, blocks.shape[1], dtype=torch.int32, device=device)
    if backend == "torch":
        _write(rows, count, offset, total, ids, members)
    else:
        device_masks.write_halves(words, blocks, sums, offset, ids, members, backend)
    return HalfLists(ids, offset, (tiles * HALVES_TILE_N).to(torch.int32), members)


def _halves(rows: torch.Tensor) -> torch.Tensor:
    """int32 (lists, 2, words): keys that some block of each half keeps. rows: (lists, union_blocks, words)."""
    return functools.reduce(torch.bitwise_or, rows.unflatten(1, (HALVES, -1)).unbind(2))


# ---- the kernels' work in plain torch ------------------------------------------------------------------------------
def _write(rows, count: TileCounts, offset, total: int, ids: torch.Tensor, members: torch.Tensor) -> None:
    """Fills ids and members; see ``HalfLists``. rows: int32 (lists, union_blocks, words), mask rows."""
    a, b = _halves(rows).unbind(1)
    common = _bits.first(a & b, count.common * HALVES_TILE_N)
    words = torch.stack([common, a & ~common, b & ~common], 1)
    # Kind after kind first, each in whole tiles, a half's last one filled up with its last key; then tile by tile.
    held, number = _bits.count(words), torch.cat([count.common[:, None], count.own], 1)
    start = (number.flatten().cumsum(0) - number.flatten()).view_as(number)
    listed = torch.zeros_like(ids)
    write_ids(words, start * HALVES_TILE_N, held, listed)
    _fill_up(listed, start[:, 1:] * HALVES_TILE_N, held[:, 1:])
    listed = listed[: total * HALVES_TILE_N].view(-1, HALVES_TILE_N)
    group = torch.repeat_interleave(number.flatten(), output_size=total)
    owner, kind, tile = group // KINDS, group % KINDS, torch.arange(total, device=ids.device) - start.flatten()[group]
    place, ranks = _places(count, owner, kind, tile)
    ids[: total * HALVES_TILE_N].view(-1, HALVES_TILE_N)[offset[owner] // HALVES_TILE_N + place] = listed
    ids[total * HALVES_TILE_N :] = 0

    first = halves_start(torch.arange(len(rows), device=ids.device), offset)
    members.zero_()
    members[first, :HALVES] = count.keys.to(torch.int32)
    # A row of members past its end stands for those of a half that does not take a tile.
    spare = members.new_empty(HALVES_TILE_WORDS, members.shape[1])
    target = torch.cat([members, spare])
    size, lane = rows.shape[1] // HALVES, torch.arange(HALVES_TILE_N, device=ids.device)
    for half in range(HALVES):
        mine = (kind == 0) | (kind == 1 + half)
        at = torch.where(mine, first[owner] + 1 + HALVES_TILE_WORDS * ranks[:, half], len(members))
        target[at, half] = (2 * place + (kind != 0)).to(torch.int32)
        left = count.keys[owner, half] - ranks[:, half] * HALVES_TILE_N
        for some in torch.arange(total, device=ids.device).split(_CHUNK_TILES):
            key, inside = listed[some].long(), lane < left[some, None]
            for block in range(half * size, (half + 1) * size):
                kept = (rows[owner[some, None], block, key // 32] >> key % 32) & 1
                target[at[some, None] + 1 + lane[: HALVES_TILE_WORDS - 1], block] = _bits.pack(kept.bool() & inside)
    members.copy_(target[: len(members)])


def _places(count: TileCounts, owner, kind, tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tiles go; ``kernels/half_lists_sm90.py`` says in what order (``Tiles``).

    Args:
        owner, kind, tile: int64 (n,), the ``tile``-th tile of a kind of list ``owner``.

    Returns:
        int64 (n,), place in the list; int64 (n, 2), number among the tiles that each half takes. The latter is of no
        meaning where a half does not take it.
    """
    spread = torch.minimum(count.own, torch.maximum(count.common[:, None], count.own.flip(1)))
    common, a, b = (x[owner] for x in (count.common, *spread.unbind(1)))
    of_common, of_a, of_b = kind == 0, kind == 1, kind == 2
    slots = torch.where(of_common, 2 * common, torch.where(of_a, a, b)).clamp(min=1)
    when = torch.where(of_common, 2 * tile + 1, tile + 1)  # over slots: where it stands, common ones before the others
    late = ~of_common & (tile >= slots)
    before_common = torch.where(late, common, (2 * when * common + slots) // (2 * slots))
    # At the same point common tiles precede A's, and these B's.
    before_a = torch.where(of_b, when * a // slots, ((when * a).clamp(min=1) - 1) // slots)
    before_b = ((when * b).clamp(min=1) - 1) // slots
    before_common = torch.where(of_common, tile, before_common)
    before_a = torch.where(of_a, tile, torch.where(late, a, before_a))
    before_b = torch.where(of_b, tile, torch.where(late, b, before_b))
    ranks = torch.stack([before_common + before_a, before_common + before_b], 1)
    return before_common + before_a + before_b, ranks


def _fill_up(ids: torch.Tensor, start: torch.Tensor, held: torch.Tensor) -> None:
    """The rest of the last tile of lists becomes their last id. start, held: int64 (...), of each list in ids."""
    cell, spare = torch.arange(HALVES_TILE_N, device=ids.device), ids.numel() - 1
    rest = (held % HALVES_TILE_N)[..., None]
    behind = (start + held // HALVES_TILE_N * HALVES_TILE_N)[..., None] + cell
    behind = torch.where((rest > 0) & (cell >= rest), behind, spare)
    ids[behind] = ids[(start + held - 1).clamp(min=0)][..., None].expand_as(behind)
