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

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import part_lists
from fgattn_cute.errors import PlanError
from fgattn_cute.kernels.spec import PARTS_BLOCKS, PARTS_KEYS, PARTS_PLACES, PARTS_ROUNDS, PARTS_TILE_N, WGMMA_ROWS
from fgattn_cute.mask import SliceMask
from fgattn_cute.part_lists import TileCounts
from fgattn_cute.plan import Plan
from fgattn_cute.shared import SharedLists, listed

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
    def from_mask(
        cls, mask: SliceMask, order: torch.Tensor | str | None = None, backend: str | None = None
    ) -> PartsPlan:
        """Builds the lists of a mask on its device. Allocating them reads two numbers back, once.

        Args:
            mask: slice_m 64, slice_n 1.
            order: which three blocks share a list, as for ``UnionPlan.from_mask``.
            backend: "cuda" or "emulator" for the kernels that count and fill, "torch"; None takes the kernels where the
                mask lies on a GPU that runs them.

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
        blocks = listed(mask, order, PARTS_BLOCKS)
        shape, numbers = blocks.shape[:3], blocks.flatten(0, 2).to(torch.int32).contiguous()
        found = part_lists.compact(mask, numbers, backend)
        geometry = {**mask.geometry, "slice_m": PARTS_BLOCKS * mask.slice_m}
        lists = Plan(found.ids, found.offset.view(shape), found.keys.view(shape), **geometry)
        return cls(lists, found.members, numbers, mask.slice_m)

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
    count = TileCounts.of(mask, listed(mask, order, PARTS_BLOCKS).flatten(0, 2).to(torch.int32).contiguous())
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


def _chunks(lists: int, columns: int) -> list[slice]:
    """Slices of so many lists that a bool of each block's keys stays within _CHUNK_CELLS."""
    step = max(1, _CHUNK_CELLS // (PARTS_BLOCKS * max(1, columns)))
    return [slice(first, first + step) for first in range(0, lists, step)]
