# SPDX-License-Identifier: Apache-2.0
"""UnionPlan: query blocks of fewer than 128 rows that share a CTA of 128 or 192 and one list, the union of theirs.

A gather without sharing is bound by the L2 at slice_m below 64: M queries use each gathered byte M times. Blocks that
keep similar keys are better served together: every key of their union is gathered once for all of them, and one bit per
block says whose it is. The result is each block's own softmax, exactly.
"""

from __future__ import annotations

import functools

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import device_masks
from fgattn_cute.errors import PlanError
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from fgattn_cute.shared import SharedLists, grouped

CTA_ROWS = (128, 192)  # query rows of a CTA that blocks may share
ROW_STEP = 16  # rows of a warp, which serves one block
SLACK_WORDS = 8  # a tail tile reads words past its list's end
_CHUNK_WORDS = 1 << 16  # words packed at a time: bounds the temporaries


class UnionPlan(SharedLists):
    """Lists of unions, and which block keeps what of them.

    lists: a Plan of the union mask: its query blocks are the unions, ``union_blocks * slice_m`` rows each.
    members: int32 (words, union_blocks), bit i of word w of a union: whether the block keeps list position 32 w + i, in
        keys. Words of union u start at ``lists.offset[u] * slice_n // 32 + u``, unions counted through (batch, heads).
    blocks: int32 (unions, union_blocks), the query blocks of each union; ceil(seqlen_q / slice_m) or more means none.
    slice_m: queries of a block.
    """

    @classmethod
    def from_mask(
        cls,
        mask: SliceMask,
        order: torch.Tensor | str | None = None,
        backend: str | None = None,
        *,
        rows: int | None = None,
    ) -> UnionPlan:
        """Builds the unions of a mask on its device. Allocating the lists reads one number back.

        Args:
            mask: slice_m 16, 32, 48, 64 or 96.
            order: int64 permutation of the query blocks, (blocks_q,) or (batch, heads, blocks_q): consecutive ones
                share a union. None takes them as they stand, "similar" those that keep most of the same keys, head
                by head (``orders.similar``); ``orders`` has more. Outputs stay where the queries are.
            backend: "cuda" or "emulator" for the kernel that packs the keep-bits, "torch"; None takes the kernel where
                the mask lies on a GPU that runs it.
            rows: query rows of a CTA, one of ``rows_for(mask.slice_m)``; None takes the first, which was measured
                faster at slice_m 16 and 32.

        Raises:
            PlanError: slice_m does not divide the rows, or ``order`` is not a permutation's shape and type.
        """
        if not isinstance(mask, SliceMask):
            raise PlanError(f"a union plan is made from a SliceMask, not from {type(mask).__name__}")
        legal = rows_for(mask.slice_m)
        if not legal or rows not in (None, *legal):
            raise PlanError(
                f"slice_m {mask.slice_m} does not share a CTA of {rows or ' or '.join(map(str, CTA_ROWS))} rows; "
                "16, 32 and 64 share 128 or 192, 48 and 96 share 192, and Plan.from_mask takes any multiple of 16"
            )
        rows = rows or legal[0]
        size = rows // mask.slice_m
        blocks, parts = grouped(mask, order, size)
        union = functools.reduce(torch.bitwise_or, parts.unbind(3))
        geometry = {**mask.geometry, "slice_m": rows}
        lists = Plan.from_mask(SliceMask(union.contiguous(), **geometry), grouped=False)
        words = parts.flatten(0, 2).contiguous()
        members = _pack(lists, words, backend or device_masks.backend_of(mask.bits))
        return cls(lists, members, blocks.flatten(0, 2).to(torch.int32).contiguous(), mask.slice_m)

    def kept_keys(self) -> torch.Tensor:
        """Kept keys of each block: int64 (unions, union_blocks), on the plan's device."""
        starts = word_starts(self.lists)
        ends = starts + (self.lists.keys.flatten().long() + 31) // 32
        total = torch.zeros(self.members.shape[0] + 1, self.union_blocks, dtype=torch.int64, device=self.device)
        torch.cumsum(_bits.popcount(self.members), 0, out=total[1:])
        return total[ends] - total[starts]

    @property
    def union_factor(self) -> float:
        """Pairs that the unions compute over pairs that are kept: 1 where blocks of a union keep the same keys, and
        where nothing is kept. Reads back from the device."""
        kept = self.density
        return self.lists.density / kept if kept else 1.0

    def describe(self):
        """What the plan keeps, shares and costs, as a printable mapping; see ``fgattn_cute.describe``."""
        from fgattn_cute.describe import describe_union_plan

        return describe_union_plan(self)

    def validate(self) -> list[str]:
        """What is wrong with the stored lists, one sentence each. Reads them back."""
        return self.lists.validate()

    def to_mask(self) -> SliceMask:
        """The mask that the unions were made of."""
        columns = self.lists.blocks_k
        starts = word_starts(self.lists)
        keep = torch.zeros(starts.numel(), self.union_blocks, columns, dtype=torch.bool, device=self.device)
        for union, (start, offset, keys) in enumerate(
            zip(starts.tolist(), self.lists.offset.flatten().tolist(), self.lists.keys.flatten().tolist(), strict=True)
        ):
            position = torch.arange(0, keys, self.slice_n, device=self.device)
            word = self.members[start + position // 32].T
            ids = self.ids[offset + position // self.slice_n].long()
            keep[union, :, ids] = (word >> (position % 32) & 1).bool()
        return self.mask_of(_bits.pack(keep))


def rows_for(slice_m: int) -> tuple[int, ...]:
    """Rows of a CTA that blocks of ``slice_m`` queries can share; empty where they cannot."""
    return tuple(n for n in CTA_ROWS if slice_m % ROW_STEP == 0 and n % slice_m == 0 and slice_m < n and slice_m < 128)


def word_starts(lists: Plan) -> torch.Tensor:
    """int64 (unions,): first word of each union. One word more per union than the lists need keeps them apart."""
    flat = lists.offset.flatten()
    return flat * lists.slice_n // 32 + torch.arange(flat.numel(), device=flat.device)


def _pack(lists: Plan, rows: torch.Tensor, backend: str) -> torch.Tensor:
    """Keep-bits by list position: int32 (words, union_blocks), see UnionPlan.

    Args:
        rows: int32 (unions, union_blocks, words of a mask row).
    """
    starts = word_starts(lists)
    total = lists.capacity * lists.slice_n // 32 + starts.numel() + SLACK_WORDS
    members = torch.zeros(total, rows.shape[1], dtype=torch.int32, device=rows.device)
    offset, keys = lists.offset.flatten(), lists.keys.flatten()
    if backend != "torch":
        device_masks.pack_members(rows, lists.ids, offset, keys, starts, members, lists.slice_n, backend)
        return members
    lane = torch.arange(32, device=rows.device)
    for first in range(0, total, _CHUNK_WORDS):
        word = torch.arange(first, min(first + _CHUNK_WORDS, total), device=rows.device)
        union = (torch.searchsorted(starts, word, right=True) - 1).clamp(min=0)
        position = (word - starts[union])[:, None] * 32 + lane
        inside = (position < keys[union][:, None]) & (word >= starts[0])[:, None]
        ids = lists.ids[(offset[union][:, None] + position // lists.slice_n).clamp(max=lists.ids.numel() - 1)].long()
        ids = torch.where(inside, ids, 0)
        for block in range(rows.shape[1]):
            bit = (rows[union[:, None], block, ids // 32] >> (ids % 32)) & 1 & inside
            members[word, block] = _bits.pack(bit.bool())[:, 0]
    return members
