# SPDX-License-Identifier: Apache-2.0
"""HalvesPlan: unions of which each warpgroup passes over the tiles that none of its blocks keeps.

In a union of 128 rows a warpgroup computes its 64 for every key of the list. Keys that only the blocks of the other
half keep are wasted on it: with slices that keep keys at random, 6 % of the list at slice_m 16 and union factor 2, 20 %
at 3, and at slice_m 32 a quarter at 2. Here a list has whole tiles of keys that both halves keep, and tiles of each
half's own (``kernels/halves.py``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import half_lists
from fgattn_cute.errors import PlanError
from fgattn_cute.half_lists import TileCounts
from fgattn_cute.kernels.spec import (
    HALVES,
    HALVES_ROWS,
    HALVES_STAGES,
    HALVES_TILE_N,
    HALVES_TILE_WORDS,
    WGMMA_ROWS,
    halves_start,
)
from fgattn_cute.mask import SliceMask, block_rows
from fgattn_cute.plan import Plan
from fgattn_cute.shared import SharedLists, listed

SIZES = (16, 32, 64)  # slice_m of masks that have such plans: blocks of whole warps, and whole ones to a warpgroup
_CHUNK_CELLS = 1 << 26  # (block, key) pairs unpacked at a time: bounds the temporaries to about a GiB


def shareable(mask: SliceMask) -> bool:
    """Whether the slices of a mask are those that unions in halves are made of."""
    return mask.slice_m in SIZES and mask.slice_n == 1


class HalvesPlan(SharedLists):
    """Unions in halves: of 128 rows, the first and the second half of whose blocks are A and B.

    lists: a Plan of the lists as the producer walks them: all their tiles, ``HALVES_TILE_N`` keys each. A half's last
        tile is filled up with its last key, which is masked there.
    members: int32 (words, union_blocks). The rows of union u start at ``kernels.spec.halves_start`` with one that holds
        the keys of A and of B. Then come five for each tile of the list. Of the t-th five, the first says in column h
        which tile the half takes as its t-th: 2 * place in the list, plus 1 if it is the half's own. Bit i of row
        1 + w tells of each block whether it keeps the key at position 32 w + i of the t-th tile of its half. Past the
        half's tiles and keys all is zero, and so is the row that ends the union's.
    blocks: int32 (unions, union_blocks), the query blocks of each union; ceil(seqlen_q / slice_m) or more means none.
    slice_m: 16, 32 or 64.
    """

    union_lists = "halves"

    @classmethod
    def from_mask(
        cls, mask: SliceMask, order: torch.Tensor | str | None = None, backend: str | None = None
    ) -> HalvesPlan:
        """Builds the unions of a mask on its device. Allocating the lists reads one number back.

        Args:
            mask: slice_m 16, 32 or 64, slice_n 1.
            order: which blocks share a union, as for ``UnionPlan.from_mask``. Of those the earlier are A.
            backend: "cuda" or "emulator" for the kernels that count and fill, "torch"; None takes the kernels where the
                mask lies on a GPU that runs them.

        Raises:
            PlanError: other slices, or ``order`` is not a permutation's shape and type.
        """
        if not isinstance(mask, SliceMask):
            raise PlanError(f"a plan of unions in halves is made from a SliceMask, not from {type(mask).__name__}")
        if not shareable(mask):
            raise PlanError(
                f"unions in halves want slices of {', '.join(map(str, SIZES))} x 1, not {mask.slice_m} x "
                f"{mask.slice_n}: a half is a warpgroup's {WGMMA_ROWS} rows, and a tile holds single keys; "
                "Plan.from_mask takes any, UnionPlan.from_mask slice_m 16, 32, 48, 64 and 96"
            )
        blocks = listed(mask, order, HALVES_ROWS // mask.slice_m)
        shape, numbers = blocks.shape[:3], blocks.flatten(0, 2).to(torch.int32).contiguous()
        found = half_lists.compact(mask, numbers, backend)
        geometry = {**mask.geometry, "slice_m": HALVES_ROWS}
        lists = Plan(found.ids, found.offset.view(shape), found.keys.view(shape), **geometry)
        return cls(lists, found.members, numbers, mask.slice_m)

    @functools.cached_property
    def _first(self) -> torch.Tensor:
        """int64 (unions,): row of members in which each union's begin."""
        offset = self.lists.offset.flatten()
        return halves_start(torch.arange(offset.numel(), device=self.device), offset)

    def half_keys(self) -> torch.Tensor:
        """Keys that blocks of each half keep: int64 (unions, 2), on the plan's device."""
        return self.members[self._first, :HALVES].long()

    def kept_keys(self) -> torch.Tensor:
        """Kept keys of each block: int64 (unions, union_blocks), on the plan's device."""
        row = torch.arange(len(self.members), device=self.device)
        union = (torch.searchsorted(self._first, row, right=True) - 1).clamp(min=0)
        row = row - self._first[union] - 1
        of_bits = (row % HALVES_TILE_WORDS > 0) & (row < self._list_tiles()[union] * HALVES_TILE_WORDS) & (row > 0)
        kept = torch.zeros(len(self._first), self.union_blocks, dtype=torch.int64, device=self.device)
        return kept.index_add_(0, union, torch.where(of_bits[:, None], _bits.popcount(self.members), 0).long())

    @functools.cached_property
    def computed(self) -> Plan:
        """What a CTA computes of each list, as a Plan of no use but its lengths: the tiles of a half on average."""
        taken = _tiles(self.half_keys()).sum(1) * (HALVES_TILE_N // HALVES)
        return dataclasses.replace(self.lists, keys=taken.to(torch.int32).view_as(self.lists.keys))

    @property
    def union_factor(self) -> float:
        """Pairs that the halves compute, whole tiles, over pairs that are kept: 1 where nothing is kept. Reads back
        from the device."""
        kept = self.density
        return self.computed.density / kept if kept else 1.0

    @property
    def loads_per_key(self) -> float:
        """Keys loaded over keys that blocks keep, the rest of each half's last tile among the former; 1 where nothing
        is kept. Reads back from the device."""
        loaded, kept = torch.stack([self.lists.keys.sum(), self.kept_keys().sum()]).tolist()
        return loaded / kept if kept else 1.0

    def describe(self):
        """What the plan keeps, shares and costs, as a printable mapping; see ``fgattn_cute.describe``."""
        from fgattn_cute.describe import describe_halves_plan

        return describe_halves_plan(self)

    def to_mask(self) -> SliceMask:
        """The mask that the unions were made of."""
        return self.mask_of(self._rows())

    # ---- what is stored, looked through ----------------------------------------------------------------------------
    def validate(self) -> list[str]:
        """Every way in which the stored values break the plan's rules, as sentences. Reads them back."""
        keys, tiles = self.half_keys(), self._list_tiles()
        ids, end = self.ids[: self.lists.capacity], self.lists.offset + self.lists.keys
        why = _broken(
            {
                f"key count outside 0..{self.seqlen_k}": (keys >= 0) & (keys <= self.seqlen_k),
                "list of parts of tiles": self.lists.keys % HALVES_TILE_N == 0,
                "half of more tiles than its list": _tiles(keys) <= tiles[:, None],
                "list outside the id buffer": (self.lists.offset >= 0) & (end <= self.lists.capacity),
                f"id outside 0..{self.seqlen_k - 1}": (ids >= 0) & (ids < self.seqlen_k),
            }
        )
        return why or self._broken_tiles() or self._broken_bits()

    def _broken_tiles(self) -> list[str]:
        places, own, taken = self._taken()
        # Where a half takes nothing more it stands past the list, one tile after the other.
        tiles, number = self._list_tiles()[:, None, None], torch.arange(places.shape[-1], device=self.device)
        places = torch.where(taken, places, tiles + number)
        why = _broken({"tile outside its list": ~taken | ((places >= 0) & (places < tiles))})
        if why:
            return why
        before = torch.nn.functional.pad(places[..., :-1], (1, 0), value=-1)
        # Bit h of a tile: whether half h takes it; bit 2 + h: whether it calls it its own.
        users = torch.zeros(len(self._first), 2 * places.shape[-1] + 1, dtype=torch.int64, device=self.device)
        for half in range(HALVES):
            users.scatter_add_(1, places[:, half], (1 << half) + (own[:, half] << (HALVES + half)))
        users = users[:, : places.shape[-1]]
        legal = functools.reduce(torch.bitwise_or, [users == n for n in (0b0011, 0b0101, 0b1010)])
        step = places - before
        return _broken(
            {
                "tiles of a half out of order": ~taken | (step > 0),
                f"more than {HALVES_STAGES - 1} tiles between two of a half": ~taken | (step <= HALVES_STAGES),
                "tile of nobody, or of both halves and called one's own": legal | (number >= tiles[:, 0]),
            }
        )

    def _broken_bits(self) -> list[str]:
        if any(bool((bits & ~inside).any()) for bits, _, inside in self._unpacked()):
            return ["keep-bit past the keys of its half"]
        return _broken({"duplicate ids": _bits.count(self._rows()) == self.kept_keys()})

    def _list_tiles(self) -> torch.Tensor:
        """int64 (unions,)."""
        return self.lists.keys.flatten().long() // HALVES_TILE_N

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(unions, 2, tiles), of each half's tiles: places in the list; whether they are its own, 1 or 0; whether there
        are so many."""
        number = torch.arange(max(1, int(self._list_tiles().amax())), device=self.device)
        taken = number < _tiles(self.half_keys())[..., None]
        row = (self._first[:, None] + 1 + HALVES_TILE_WORDS * number).clamp(max=len(self.members) - 1)
        said = self.members[row, :HALVES].transpose(1, 2).long()
        return said >> 1, said & 1, taken

    def _unpacked(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of the blocks of some unions after others, (unions, union_blocks, keys of the tiles): keep-bits; ids; whether
        the half has so many keys."""
        places, _, taken = self._taken()
        keys, size = self.half_keys(), self.union_blocks // HALVES
        number, lane = (torch.arange(n, device=self.device) for n in (places.shape[-1], HALVES_TILE_N))
        in_list = number < self._list_tiles()[:, None]
        position = torch.where(taken, self.lists.offset.flatten()[:, None, None] + places * HALVES_TILE_N, 0)
        columns = max(self.seqlen_k, lane.numel() * number.numel())
        # A bool of each block's keys stays within _CHUNK_CELLS.
        for part in torch.arange(len(keys), device=self.device).split(
            max(1, _CHUNK_CELLS // (self.union_blocks * columns))
        ):
            ids = torch.where(taken[part, ..., None], self.ids[position[part, ..., None] + lane].long(), 0).flatten(2)
            inside = torch.arange(ids.shape[-1], device=self.device) < keys[part, :, None]
            row = self._first[part, None, None] + 2 + HALVES_TILE_WORDS * number[:, None]
            row = row + lane[: HALVES_TILE_WORDS - 1]
            word = torch.where(in_list[part, :, None, None], self.members[row.clamp(max=len(self.members) - 1)], 0)
            bits = _bits.unpack(word.flatten(1, 2).transpose(1, 2), ids.shape[-1])
            yield bits, ids.repeat_interleave(size, 1), inside.repeat_interleave(size, 1)

    def _rows(self) -> torch.Tensor:
        """int32 (unions, union_blocks, words): the keys of each block as bits."""
        words = []
        for bits, ids, inside in self._unpacked():
            keep = torch.zeros(*bits.shape[:2], self.seqlen_k + 1, dtype=torch.bool, device=self.device)
            keep.scatter_(2, torch.where(bits & inside, ids, self.seqlen_k), True)
            words.append(_bits.pack(keep[..., :-1]))
        return torch.cat(words)


def cost(mask: SliceMask, order: torch.Tensor | str | None = None) -> torch.Tensor:
    """What unions in halves would cost, from counts of bits: no plan is made, and nothing read back.

    Args:
        mask, order: as for ``HalvesPlan.from_mask``.

    Returns:
        float64 (2,), on the mask's device: pairs computed, whole tiles; and keys loaded over keys that blocks keep.
    """
    blocks = listed(mask, order, HALVES_ROWS // mask.slice_m)
    count = TileCounts.of(mask, blocks.flatten(0, 2).to(torch.int32).contiguous())
    computed = count.taken().sum(-1).view(blocks.shape[:3]) * (HALVES_TILE_N // HALVES)
    pairs = (computed * block_rows(mask.seqlen_q, HALVES_ROWS, mask.device)).sum().double()
    return torch.stack([pairs, count.tiles().sum() * HALVES_TILE_N / mask.kept_keys().sum().clamp(min=1).double()])


def _tiles(keys: torch.Tensor) -> torch.Tensor:
    return (keys + HALVES_TILE_N - 1) // HALVES_TILE_N


def _broken(checks: dict[str, torch.Tensor]) -> list[str]:
    """The sentences whose condition does not hold everywhere."""
    return [sentence for sentence, good in checks.items() if not bool(good.all())]
