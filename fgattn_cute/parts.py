# SPDX-License-Identifier: Apache-2.0
"""PartsPlan: three query blocks of 64 rows that share a CTA and the loads of common keys, and compute nothing more.

A union computes every key for every block. Here a list comes in parts (``kernels/parts.py``): whole tiles of keys that
all three blocks keep, tiles that two of them keep, and tiles of one block's own keys, which the other warpgroups pass
over. Common keys that do not fill a tile count as each block's own, so that a block computes what a list of its own
would make it compute.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.compaction import PLAN_SLACK
from fgattn_cute.errors import PlanError
from fgattn_cute.kernels.spec import PARTS_BLOCKS, PARTS_KEYS, PARTS_PLACES, PARTS_ROUNDS, PARTS_TILE_N, WGMMA_ROWS
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from fgattn_cute.shared import SharedLists, grouped

PAIRS = ((0, 1), (0, 2), (1, 2))  # of the three blocks, in the order of their tiles; block b's are 0 1, 0 2 and 1 2
_CHUNK_CELLS = 1 << 26  # (block, key) pairs unpacked at a time: bounds the temporaries to about a GiB


def shareable(mask: SliceMask) -> bool:
    """Whether the slices of a mask are those that lists in parts are made of."""
    return (mask.slice_m, mask.slice_n) == (WGMMA_ROWS, 1)


class PartsPlan(SharedLists):
    """Lists in parts. Fits every kernel of ``union_lists`` "parts", whatever its head dim.

    lists: a Plan of the lists as the producer walks them: all their tiles, ``PARTS_TILE_N`` keys each. A block's last
        tile is filled up with a key of its own, which is masked there.
    members: int32 (lists, 3, n), by block: its keys, the tiles of the block that has most, and the places of its tiles
        in the list (``kernels.spec.PARTS_KEYS``, ``PARTS_ROUNDS``, ``PARTS_PLACES``). Past its last tile: how far the
        furthest of the others is.
    blocks: int32 (lists, 3), the query blocks of each list; ceil(seqlen_q / 64) or more means none.
    slice_m: 64.
    """

    union_lists = "parts"

    @classmethod
    def from_mask(cls, mask: SliceMask, order: torch.Tensor | str | None = None) -> PartsPlan:
        """Builds the lists of a mask on its device, in plain torch: 14 ms for S = 16,384, 24 heads, 30 % on an H200.

        Unpacks some hundred MiB of the mask at a time and reads a few numbers back for each.

        Args:
            mask: slice_m 64, slice_n 1.
            order: which three blocks share a list, as for ``UnionPlan.from_mask``.

        Raises:
            PlanError: other slices, or ``order`` is not a permutation's shape and type.
        """
        if not isinstance(mask, SliceMask):
            raise PlanError(f"a plan of lists in parts is made from a SliceMask, not from {type(mask).__name__}")
        if not shareable(mask):
            raise PlanError(
                f"lists in parts want slices of {WGMMA_ROWS} x 1, not {mask.slice_m} x {mask.slice_n}: a block is a "
                "warpgroup's rows, and a tile holds single keys; Plan.from_mask takes any, UnionPlan.from_mask slice_m "
                "16, 32, 48, 64 and 96"
            )
        blocks, rows = grouped(mask, order, PARTS_BLOCKS)
        rows = rows.flatten(0, 2)
        count = TileCounts.of(rows)
        layout = _Layout.of(count)
        shape = blocks.shape[:3]
        keys = (layout.tiles * PARTS_TILE_N).view(shape)
        offset = (keys.flatten().cumsum(0) - keys.flatten()).view(shape)
        ids = _fill(rows, count, layout, offset.flatten(), layout.total * PARTS_TILE_N, mask.blocks_k)
        geometry = {**mask.geometry, "slice_m": PARTS_BLOCKS * mask.slice_m}
        lists = Plan(ids, offset, keys.to(torch.int32), **geometry)
        rounds = count.rounds()[:, None].expand_as(count.keys)
        members = torch.cat([count.keys[..., None], rounds[..., None], layout.places], -1).to(torch.int32)
        return cls(lists, members, blocks.flatten(0, 2).to(torch.int32).contiguous(), mask.slice_m)

    def kept_keys(self) -> torch.Tensor:
        """Kept keys of each block: int64 (lists, 3), on the plan's device."""
        return self.members[..., PARTS_KEYS].long()

    @functools.cached_property
    def computed(self) -> Plan:
        """What a CTA computes of each list, as a Plan of no use but its lengths: the tiles of the block with most."""
        rounds = self.members[:, 0, PARTS_ROUNDS] * PARTS_TILE_N
        return dataclasses.replace(self.lists, keys=rounds.view_as(self.lists.keys).contiguous())

    @property
    def loads_per_key(self) -> float:
        """Keys loaded over keys that blocks keep, the rest of each block's last tile among the former: a third where
        three blocks keep the same keys, about 1 where they share none, and where nothing is kept. Reads back."""
        loaded, kept = torch.stack([self.lists.keys.sum(), self.kept_keys().sum()]).tolist()
        return loaded / kept if kept else 1.0

    def describe(self):
        """What the plan keeps, shares and costs, as a printable mapping; see ``fgattn_cute.describe``."""
        from fgattn_cute.describe import describe_parts_plan

        return describe_parts_plan(self)

    def validate(self) -> list[str]:
        """Every way in which the stored values break the plan's rules, as sentences. Reads them back."""
        tiles = (self.lists.keys.flatten() // PARTS_TILE_N)[:, None, None]
        keys, places = self.kept_keys(), self.members[..., PARTS_PLACES:]
        taken = torch.arange(places.shape[-1], device=self.device) * PARTS_TILE_N < keys[..., None]
        ids = self.ids[: self.lists.capacity]
        end = self.lists.offset + self.lists.keys
        checks = {
            f"key count outside 0..{self.seqlen_k}": (keys >= 0) & (keys <= self.seqlen_k),
            "block of more tiles than its list has rounds": keys <= self.computed.keys.flatten()[:, None],
            "tile outside its list": ~taken | ((places >= 0) & (places < tiles)),
            "list outside the id buffer": (self.lists.offset >= 0) & (end <= self.lists.capacity),
            f"id outside 0..{self.seqlen_k - 1}": (ids >= 0) & (ids < self.seqlen_k),
        }
        why = [sentence for sentence, good in checks.items() if not bool(good.all())]
        if not why and not torch.equal(_bits.count(self._rows()), keys):
            why.append("duplicate ids")
        return why

    def to_mask(self) -> SliceMask:
        """The mask that the lists were made of."""
        return self.mask_of(self._rows())

    def _rows(self) -> torch.Tensor:
        """int32 (lists, 3, words): the keys of each block as bits."""
        offset, places = self.lists.offset.flatten(), self.members[..., PARTS_PLACES:].long()
        cells = torch.arange(PARTS_TILE_N, device=self.device)
        rank = torch.arange(places.shape[-1], device=self.device)[:, None] * PARTS_TILE_N + cells
        words = []
        for part in _chunks(len(offset), max(self.seqlen_k, rank.numel())):
            position = (offset[part, None, None] + places[part] * PARTS_TILE_N)[..., None] + cells
            inside = rank < self.members[part, :, PARTS_KEYS, None, None]
            ids = torch.where(inside, self.ids[torch.where(inside, position, 0)].long(), self.seqlen_k).flatten(2)
            keep = torch.zeros(*ids.shape[:2], self.seqlen_k + 1, dtype=torch.bool, device=self.device)
            words.append(_bits.pack(keep.scatter_(2, ids, True)[..., :-1]))
        return torch.cat(words)


def cost(mask: SliceMask, order: torch.Tensor | str | None = None) -> torch.Tensor:
    """What lists in parts would cost, from counts of bits: no plan is made, and nothing read back.

    Args:
        mask, order: as for ``PartsPlan.from_mask``.

    Returns:
        float64 (2,), on the mask's device: pairs computed, with those of the block that keeps most for all three; and
        keys loaded over keys that blocks keep.
    """
    count = TileCounts.of(grouped(mask, order, PARTS_BLOCKS)[1].flatten(0, 2))
    kept = count.keys.sum().clamp(min=1).double()
    loads = count.tiles().sum() * PARTS_TILE_N / kept
    excess = count.keys.amax(-1).sum() * PARTS_BLOCKS / kept
    return torch.stack([mask.kept_pairs().sum() * excess, loads])


def expected_loads(factor: float, keys: float) -> float:
    """Keys loaded per key kept where blocks draw their keys at random from a pool of their own.

    Args:
        factor: keys that one of two such blocks or both keep, over those that one keeps on average: 1 to 2, and more
            counts as 2. Each keeps 2 - factor of the pool.
        keys: that a block keeps.
    """
    share = max(0.0, 2 - factor)
    three = keys * share**2
    count = TileCounts.from_keys(*(torch.tensor([n]) for n in ([keys] * 3, three, [keys * share - three] * 3)))
    return float(count.tiles()) * PARTS_TILE_N / (3 * keys) if keys else 1.0


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
    def of(cls, rows: torch.Tensor) -> TileCounts:
        """rows: int32 (lists, 3, words), mask rows."""
        a, b, c = rows.unbind(1)
        three = _bits.count(a & b & c)
        two = torch.stack([_bits.count(rows[:, i] & rows[:, j]) for i, j in PAIRS], -1) - three[:, None]
        return cls.from_keys(_bits.count(rows), three, two)

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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the tiles of lists go.

    A list is a row of slots: a tile of all blocks; of the blocks A, B, C the tiles AB, AC, BC, two steps of each block;
    or a tile of every block's own. The kinds are spread evenly, so that a list asks the same of the L2 everywhere. Own
    tiles that not all blocks have come last, and so does a block's partial one among its own.

    total: tiles of all lists. tiles: (lists,), of each.
    common, doubles, own: (lists, n), (lists, n), (lists, 3, n): place of the n-th tile of all, of the n-th AB, of each
        block's n-th own.
    places: (lists, 3, steps): place of the tile that a block takes in each step; past its last, of the tile that is
        furthest in the step before.
    """

    total: int
    tiles: torch.Tensor
    common: torch.Tensor
    doubles: torch.Tensor
    own: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, count: TileCounts) -> _Layout:
        _, common, doubles, own = count
        tiles = count.tiles()
        sizes = [common.amax(), doubles.amax(), own.amax(), count.rounds().amax(), tiles.sum()]
        *most, rounds, total = torch.stack(sizes).tolist()  # the layout's only read-back
        widths = [n + 1 for n in most]
        lists, device = len(common), own.device
        slots = [torch.arange(width, device=device).expand(lists, -1) for width in widths]
        has = slots[2][:, None] < own[..., None]  # (lists, blocks, n): which blocks a slot of own tiles serves
        mixed = own.amin(1)[:, None]
        evenly = torch.where(slots[2] < mixed, (slots[2] + 1) / mixed, 2.0 + slots[2])
        when = torch.cat([(slots[0] + 0.5) / common[:, None], (slots[1] + 0.5) / doubles[:, None], evenly], 1)
        real = torch.cat([slots[0] < common[:, None], slots[1] < doubles[:, None], has.any(1)], 1)
        order = torch.where(real, when, torch.inf).argsort(dim=1, stable=True)

        def before(each: list) -> tuple[torch.Tensor, ...]:
            """Sums of what each slot has over the slots that come before it, by kind."""
            each = (torch.cat(each, 1) * real).gather(1, order)
            return torch.zeros_like(each).scatter_(1, order, each.cumsum(1) - each).split(widths, 1)

        one = [torch.ones_like(n) for n in slots]
        tile = before([one[0], 3 * one[1], has.sum(1)])
        step = before([one[0], 2 * one[1], one[2]])
        own_tile = tile[2][:, None] + has.cumsum(1) - has.long()
        valid = real.split(widths, 1)
        spare = rounds + 1  # a column for slots that are none
        places = torch.full((lists, PARTS_BLOCKS, spare + 1), -1, device=device)
        for block in range(PARTS_BLOCKS):
            pairs = [i for i, pair in enumerate(PAIRS) if block in pair]
            for at, where, taken in (
                (step[0], valid[0], tile[0]),
                *((step[1] + i, valid[1], tile[1] + pair) for i, pair in enumerate(pairs)),
                (step[2], has[:, block], own_tile[:, block]),
            ):
                places[:, block].scatter_(1, torch.where(where, at, spare), taken)
        places[..., spare] = -1
        furthest = places.amax(1).cummax(-1).values.roll(1, -1).clamp(min=0)
        furthest[:, 0] = 0
        places = torch.where(places < 0, furthest[:, None], places)
        return cls(total, tiles, tile[0], tile[1], own_tile, places)


def _fill(
    rows: torch.Tensor, count: TileCounts, layout: _Layout, start: torch.Tensor, total: int, columns: int
) -> torch.Tensor:
    """The ids of all lists: int32 (total + PLAN_SLACK,).

    Args:
        rows: int32 (lists, 3, words), mask rows. start: (lists,), where lists begin. columns: keys of a row.
    """
    ids = torch.zeros(total + PLAN_SLACK, dtype=torch.int32, device=rows.device)
    cells = torch.arange(PARTS_TILE_N, device=rows.device)
    key = torch.arange(columns, device=rows.device, dtype=torch.int32)
    own_keys = count.keys - ((count.common + 2 * count.doubles) * PARTS_TILE_N)[:, None]
    for part in _chunks(len(rows), columns):
        keep = _bits.unpack(rows[part], columns)
        # A block's partial tile holds its last key throughout, before its keys are written over that.
        tile = layout.own[part].gather(2, (own_keys[part] // PARTS_TILE_N)[..., None])
        partial = (own_keys[part] % PARTS_TILE_N > 0)[..., None]
        base = torch.where(partial, start[part, None, None] + tile * PARTS_TILE_N, total)
        ids[base + cells] = torch.where(keep, key, 0).amax(-1, keepdim=True)
        kept_by = keep.to(torch.uint8)
        pattern = kept_by[:, 0] | kept_by[:, 1] << 1 | kept_by[:, 2] << 2
        for number, (kind, tiles, most) in enumerate(
            (
                (0b111, layout.common, count.common),
                *((1 << i | 1 << j, layout.doubles + n, count.doubles) for n, (i, j) in enumerate(PAIRS)),
            )
        ):
            shared = _first(pattern == kind, most[part] * PARTS_TILE_N)
            _place(ids, shared, tiles[part], start[part])
            for block in range(PARTS_BLOCKS) if number == 0 else PAIRS[number - 1]:
                keep[:, block] &= ~shared
        for block in range(PARTS_BLOCKS):
            _place(ids, keep[:, block], layout.own[part, block], start[part])
    ids[total:] = 0
    return ids


def _first(part: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The first ``number`` (lists,) keys of bool (lists, keys)."""
    return part & (part.cumsum(-1, dtype=torch.int32) <= number[:, None])


def _place(ids: torch.Tensor, keep: torch.Tensor, tiles: torch.Tensor, start: torch.Tensor) -> None:
    """Writes the kept keys of bool (lists, keys), in order, into the tiles whose places (lists, n) are given."""
    row, key = keep.nonzero(as_tuple=True)
    number = torch.zeros(len(keep), dtype=torch.long, device=keep.device).index_add_(0, row, torch.ones_like(row))
    rank = torch.arange(len(row), device=keep.device) - (number.cumsum(0) - number)[row]
    ids[start[row] + tiles[row, rank // PARTS_TILE_N] * PARTS_TILE_N + rank % PARTS_TILE_N] = key.to(torch.int32)


def _chunks(lists: int, columns: int) -> list[slice]:
    """Slices of so many lists that a bool of each block's keys stays within _CHUNK_CELLS."""
    step = max(1, _CHUNK_CELLS // (PARTS_BLOCKS * max(1, columns)))
    return [slice(first, first + step) for first in range(0, lists, step)]
