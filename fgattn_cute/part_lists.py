# SPDX-License-Identifier: Apache-2.0
"""Mask bits to lists in parts, on whatever device holds the mask.

Counting and filling are kernels on a Hopper GPU (``device_masks``) and plain torch elsewhere, with the same result bit
for bit. A list has seven parts, each of whole tiles: of the blocks A, B and C; of AB, AC and BC; of each alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import device_masks
from fgattn_cute.compaction import PLAN_SLACK, write_ids
from fgattn_cute.kernels.mask_spec import (
    PARTS_COMMON,
    PARTS_DOUBLES,
    PARTS_MOST,
    PARTS_OWN,
    PARTS_TILES,
)
from fgattn_cute.kernels.spec import PARTS_AHEAD, PARTS_BLOCKS, PARTS_PLACES, PARTS_TILE_N
from fgattn_cute.shared import rows_of

PAIRS = ((0, 1), (0, 2), (1, 2))  # of the three blocks, in the order of their tiles; block b's are 0 1, 0 2 and 1 2
SHARED = 1 + len(PAIRS)  # parts of more than one block
SPARE_STEPS = 1 + PARTS_AHEAD  # a warpgroup reads places ahead, and one where nobody keeps anything


class PartLists(NamedTuple):
    """Output of ``compact``.

    ids: int32 (80 tiles + PLAN_SLACK,); zero past the last list.
    offset: int64 (lists,), start of each list in ids.
    keys: int32 (lists,), ids of each list.
    members: int32 (lists, 3, PARTS_PLACES + steps), see ``PartsPlan``.
    """

    ids: torch.Tensor
    offset: torch.Tensor
    keys: torch.Tensor
    members: torch.Tensor


class TileCounts(NamedTuple):
    """How many tiles lists have of each part.

    keys: (lists, 3), that each block keeps. common: (lists,), tiles of all three. doubles: (lists,), tiles of each two:
    as many of each, because a pair that has more would make the third warpgroup wait. own: (lists, 3), of each alone.
    """

    keys: torch.Tensor
    common: torch.Tensor
    doubles: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, mask, blocks: torch.Tensor, backend: str | None = None) -> TileCounts:
        """Of a mask's lists. blocks, backend: as for ``compact``."""
        backend = device_masks.backend_for_lists(mask, backend)
        if backend == "torch":
            return cls.of_rows(rows_of(mask, blocks))
        sums = device_masks.measure_parts(mask.bits.contiguous(), blocks, backend)
        return cls(
            sums[:, :PARTS_BLOCKS], sums[:, PARTS_COMMON], sums[:, PARTS_DOUBLES], sums[:, PARTS_OWN:PARTS_TILES]
        )

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> TileCounts:
        """rows: int32 (lists, 3, words), mask rows."""
        together = _bits.count(_in_common(rows))
        return cls.from_keys(_bits.count(rows), together[:, 0], together[:, 1:])

    @classmethod
    def from_keys(cls, keys: torch.Tensor, three: torch.Tensor, two: torch.Tensor) -> TileCounts:
        """keys: (lists, 3), of blocks. three: (lists,), of all blocks. two: (lists, 3), of PAIRS and no third."""
        common = (three // PARTS_TILE_N).long()
        doubles = (two.amin(-1) // PARTS_TILE_N).long()
        own = ((keys + PARTS_TILE_N - 1) // PARTS_TILE_N).long() - (common + 2 * doubles)[:, None]
        return cls(keys, common, doubles, own)

    def tiles(self) -> torch.Tensor:
        """(lists,): of all parts."""
        return self.common + 3 * self.doubles + self.own.sum(-1)

    def rounds(self) -> torch.Tensor:
        """(lists,): tiles of the block that has most."""
        return self.common + 2 * self.doubles + self.own.amax(-1)

    def by_part(self, own: torch.Tensor) -> torch.Tensor:
        """(lists, 7): tiles of the shared parts, and ``own`` (lists, 3) or (lists, 1) of the others."""
        shared = [self.common, *[self.doubles] * len(PAIRS)]
        return torch.cat([torch.stack(shared, 1), own.expand(-1, PARTS_BLOCKS)], 1)


def compact(mask, blocks: torch.Tensor, backend: str | None = None) -> PartLists:
    """Lists in parts of a mask. Allocating them reads two numbers back, once.

    Args:
        mask: a SliceMask of slice_m 64, slice_n 1.
        blocks: int32 (lists, 3), contiguous: the query blocks of each list, ceil(blocks_q / 3) lists to each batch
            entry and head; blocks_q or more means none.
        backend: "cuda" or "emulator" for the kernels, "torch"; None takes the kernels where the mask lies on a GPU
            that runs them.
    """
    backend = device_masks.backend_for_lists(mask, backend)
    words, device = mask.bits.contiguous(), mask.device
    if backend == "torch":
        rows = rows_of(mask, blocks)
        count = TileCounts.of_rows(rows)
        tiles, rounds = count.tiles(), count.rounds()
    else:
        sums = device_masks.measure_parts(words, blocks, backend)
        tiles, rounds = sums[:, PARTS_TILES], sums[:, PARTS_MOST]
    ends = tiles.cumsum(0)
    total, most = torch.stack([ends[-1], rounds.amax()]).tolist()
    offset = (ends - tiles) * PARTS_TILE_N
    ids = torch.empty(total * PARTS_TILE_N + PLAN_SLACK, dtype=torch.int32, device=device)
    members = torch.empty(
        len(blocks), PARTS_BLOCKS, PARTS_PLACES + most + SPARE_STEPS, dtype=torch.int32, device=device
    )
    if backend == "torch":
        _write(rows, count, offset, ids, members)
    else:
        device_masks.write_parts(words, blocks, sums, offset, ids, members, backend)
    return PartLists(ids, offset, (tiles * PARTS_TILE_N).to(torch.int32), members)


def _in_common(rows: torch.Tensor) -> torch.Tensor:
    """int32 (lists, 4, words): keys of all blocks, and of each two and no third. rows: (lists, 3, words)."""
    a, b, c = rows.unbind(1)
    return torch.stack([a & b & c, a & b & ~c, a & c & ~b, b & c & ~a], 1)


# ---- the kernels' work in plain torch ------------------------------------------------------------------------------
def _write(rows, count: TileCounts, offset: torch.Tensor, ids: torch.Tensor, members: torch.Tensor) -> None:
    """Fills ids and members; see ``PartLists``. rows: int32 (lists, 3, words), mask rows."""
    number = count.by_part(count.own)
    place, step, real = _places(count, number, members.shape[-1] - PARTS_PLACES)
    _write_members(count, place, step, real, members)
    shared = _bits.first(_in_common(rows), number[:, :SHARED] * PARTS_TILE_N)
    taken = shared[:, 0] | shared[:, 1] | shared[:, 2] | shared[:, 3]
    words = torch.cat([shared, rows & ~taken[:, None]], 1)
    # Part after part first, each in whole tiles, a block's last one filled up with its last key; then tile by tile.
    held, spare = _bits.count(words), ids.numel() - 1
    tile = (number.flatten().cumsum(0) - number.flatten()).view_as(number)
    listed = torch.zeros_like(ids)
    write_ids(words, tile * PARTS_TILE_N, held, listed)
    last = listed[(tile * PARTS_TILE_N + held - 1)[:, SHARED:].clamp(min=0)]
    rest = (held[:, SHARED:] % PARTS_TILE_N)[..., None]
    cell = torch.arange(PARTS_TILE_N, device=ids.device)
    behind = ((tile + number - 1)[:, SHARED:] * PARTS_TILE_N)[..., None] + cell
    behind = torch.where((rest > 0) & (cell >= rest), behind, spare)
    listed[behind] = last[..., None].expand_as(behind)
    total = (ids.numel() - PLAN_SLACK) // PARTS_TILE_N
    target = torch.where(real, (offset // PARTS_TILE_N)[:, None, None] + place, total)
    source = tile[..., None] + torch.arange(place.shape[-1], device=ids.device)
    origin = torch.zeros(total + 1, dtype=torch.int64, device=ids.device)
    origin.scatter_(0, target.flatten(), source.flatten())
    ids[: total * PARTS_TILE_N] = listed[: total * PARTS_TILE_N].view(-1, PARTS_TILE_N)[origin[:-1]].flatten()
    ids[total * PARTS_TILE_N :] = 0


def _places(count: TileCounts, number: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the tiles of parts go; ``kernels/part_lists_sm90.py`` says in what order (``Part``).

    Args:
        number: (lists, 7), tiles of each part. steps: as many as a part may have, or more.

    Returns:
        (lists, 7, steps), of the n-th tile of each part: its place in the list; the step in which its block takes it,
        or in which its block takes the first of its two pairs; whether there is such a tile.
    """
    kind = torch.tensor([0] + [1] * len(PAIRS) + [2] * PARTS_BLOCKS, device=number.device)[:, None]
    tile = torch.arange(steps, device=number.device)
    most = count.own.amin(1, keepdim=True)
    slots = count.by_part(most).clamp(min=1)[..., None]
    common, doubles, mixed = count.common[:, None, None], count.doubles[:, None, None], most[..., None]
    when = 2 * tile + 1 + (kind == 2)
    before = [
        (when * common + slots - (kind < 1).long()) // (2 * slots),
        (when * doubles + slots - (kind < 2).long()) // (2 * slots),
        ((when * mixed).clamp(min=1) - 1) // (2 * slots),
    ]
    late = (kind == 2) & (tile >= mixed)
    c, d, m = (torch.where(late, end, n) for end, n in zip((common, doubles, tile), before, strict=True))
    own = sum(torch.minimum(count.own[:, i, None, None], m) for i in range(PARTS_BLOCKS))
    also = (count.own[..., None] > tile).long()  # blocks with a tile in the same slot
    zero = torch.zeros_like(also[:, 0])
    inside = [zero, zero, zero + 1, zero + 2, zero, also[:, 0], also[:, 0] + also[:, 1]]
    return c + 3 * d + own + torch.stack(inside, 1), c + 2 * d + m, tile < number[..., None]


def _write_members(count: TileCounts, place, step, real, members: torch.Tensor) -> None:
    steps = members.shape[-1] - PARTS_PLACES
    # Past its last tile a block waits for the others: as far as they are by then.
    shared = (count.common + 2 * count.doubles)[:, None]
    own = torch.arange(steps, device=members.device) - shared
    furthest = (shared + count.doubles[:, None] + torch.minimum(count.own[..., None], own[:, None]).sum(1) - 1).clamp(0)
    places = furthest[:, None].repeat(1, PARTS_BLOCKS, 1)
    for block in range(PARTS_BLOCKS):
        pairs = [1 + i for i, pair in enumerate(PAIRS) if block in pair]
        for part, later in ((0, 0), (pairs[0], 0), (pairs[1], 1), (SHARED + block, 0)):
            # The last step is nobody's: it takes what is none, and gets its own value back.
            at = torch.where(real[:, part], step[:, part] + later, steps - 1)
            places[:, block].scatter_(1, at, place[:, part])
    places[..., -1] = furthest[:, None, -1]
    members[..., :PARTS_PLACES] = torch.stack([count.keys, count.rounds()[:, None].expand_as(count.keys)], -1)
    members[..., PARTS_PLACES:] = places
