# SPDX-License-Identifier: Apache-2.0
"""SharedLists: what plans have in common whose query blocks share a CTA and a list: unions.py, halves.py, parts.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch

from fgattn_cute import orders
from fgattn_cute.errors import PlanError
from fgattn_cute.mask import SliceMask, block_rows, blocks_of
from fgattn_cute.plan import Plan, number_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SharedLists:
    """Lists of several query blocks each, and what each block keeps of them.

    lists: a Plan of the lists as the producer walks them: ``union_blocks * slice_m`` rows each.
    members: int32, who keeps what; the subclass says how. Its second dimension is ``union_blocks``.
    blocks: int32 (lists, union_blocks), the query blocks of each list; ceil(seqlen_q / slice_m) or more means none.
    slice_m: queries of a block.
    """

    lists: Plan
    members: torch.Tensor
    blocks: torch.Tensor
    slice_m: int
    _work: dict = dataclasses.field(default_factory=dict, init=False)

    union_lists: ClassVar[str] = "bits"  # of the kernels that read them

    # ---- facts, as a Plan has them --------------------------------------------------------------------------------
    @property
    def union_blocks(self) -> int:
        """Query blocks that share a list."""
        return self.blocks.shape[1]

    @property
    def ids(self) -> torch.Tensor:
        return self.lists.ids

    @property
    def slice_n(self) -> int:
        return self.lists.slice_n

    @property
    def seqlen_q(self) -> int:
        return self.lists.seqlen_q

    @property
    def seqlen_k(self) -> int:
        return self.lists.seqlen_k

    @property
    def batch(self) -> int:
        return self.lists.batch

    @property
    def heads(self) -> int:
        return self.lists.heads

    @property
    def device(self) -> torch.device:
        return self.lists.device

    @functools.cached_property
    def signature(self) -> tuple:
        """Everything about the plan that the soundness of a call depends on, besides the stored values."""
        return (type(self), self.slice_m, *self.lists.signature)

    @functools.cached_property
    def signature_number(self) -> int:
        """As of a Plan."""
        return number_of(self.signature)

    @property
    def nbytes(self) -> int:
        return self.lists.nbytes + sum(t.numel() * t.element_size() for t in (self.members, self.blocks))

    def kept_keys(self) -> torch.Tensor:
        """Kept keys of each block: int64 (lists, union_blocks), on the plan's device."""
        raise NotImplementedError

    def kept_pairs(self) -> torch.Tensor:
        """Kept (query, key) pairs: int64 (), on the plan's device."""
        count = blocks_of(self.seqlen_q, self.slice_m)
        rows = torch.zeros(count + 1, dtype=torch.int64, device=self.device)  # the last: a block that is none
        rows[:count] = block_rows(self.seqlen_q, self.slice_m, self.device)
        return (self.kept_keys() * rows[self.blocks.long().clamp(max=count)]).sum()

    @property
    def density(self) -> float:
        """Exact fraction of (query, key) pairs that are kept. Reads one number back from the device."""
        return int(self.kept_pairs()) / (self.batch * self.heads * self.seqlen_q * self.seqlen_k)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.union_blocks} blocks of {self.slice_m} queries to a list, slice_n "
            f"{self.slice_n}, seqlen {self.seqlen_q} x {self.seqlen_k}, batch {self.batch}, heads {self.heads}, "
            f"{self.device})"
        )

    # ---- use ------------------------------------------------------------------------------------------------------
    def work(self, batch: int, heads: int) -> torch.Tensor:
        """``Plan.work`` of the lists, with the list's number in place of a query block."""
        cached = self._work.get((batch, heads))
        if cached is None:
            work = self.lists.work(batch, heads)
            head, entry = work[:, 1] & 0xFFFF, work[:, 1] >> 16
            stored = (entry if self.batch > 1 else 0) * self.heads + (head if self.heads > 1 else 0)
            number = stored * self.lists.blocks_q + work[:, 0]
            cached = torch.cat([number[:, None].to(torch.int32), work[:, 1:]], dim=1).contiguous()
            self._work[batch, heads] = cached
        return cached

    def mask_of(self, words: torch.Tensor) -> SliceMask:
        """The mask whose rows are the blocks'. words: int32 (lists, union_blocks, words of a mask row)."""
        blocks_q = blocks_of(self.seqlen_q, self.slice_m)
        width = words.shape[-1]
        bits = torch.zeros(self.batch, self.heads, blocks_q + 1, width, dtype=torch.int32, device=self.device)
        place = self.blocks.long().clamp(max=blocks_q).view(self.batch, self.heads, -1)
        bits.scatter_(2, place[..., None].expand(-1, -1, -1, width), words.view(*place.shape, width))
        return SliceMask(bits[:, :, :blocks_q].contiguous(), **{**self.lists.geometry, "slice_m": self.slice_m})


def listed(mask: SliceMask, order: torch.Tensor | str | None, size: int) -> torch.Tensor:
    """The query blocks of each list: int64 (batch, heads, lists, size), past the mask's where the last one lacks some.

    Args:
        order: int64 permutation of the query blocks, (blocks_q,) or (batch, heads, blocks_q): consecutive ones share a
            list. None takes them as they stand, "similar" those that keep most of the same keys, head by head.
        size: blocks of a list.

    Raises:
        PlanError: ``order`` is not a permutation's shape and type.
    """
    if isinstance(order, str):
        if order != "similar":
            raise PlanError(f'order {order!r} is neither a permutation nor "similar"')
        order = orders.similar(mask, size * mask.slice_m)
    batch, heads, count = mask.bits.shape[:3]
    lists = blocks_of(count, size)
    if order is None:
        return torch.arange(lists * size, device=mask.device).view(lists, size).expand(batch, heads, -1, -1)
    good = isinstance(order, torch.Tensor) and order.dtype == torch.int64
    if not good or order.shape not in ((count,), (batch, heads, count)):
        raise PlanError(f"order is not an int64 permutation of {count} query blocks, ({count},) or per batch and head")
    order = order.to(mask.device).expand(batch, heads, count)
    missing = torch.arange(count, lists * size, device=mask.device).expand(batch, heads, -1)
    return torch.cat([order, missing], dim=-1).unflatten(-1, (lists, size))


def rows_of(mask: SliceMask, blocks: torch.Tensor) -> torch.Tensor:
    """The mask rows of blocks, as ``listed`` returns them or by list: int32 (*blocks.shape, words), zero for none."""
    # One row of zeros stands for the blocks that the last list lacks.
    words = torch.nn.functional.pad(mask.bits, (0, 0, 0, 1))
    row = blocks.long().clamp(max=mask.blocks_q).reshape(*words.shape[:2], -1, 1).expand(-1, -1, -1, words.shape[-1])
    return words.gather(2, row).view(*blocks.shape, -1)


def grouped(mask: SliceMask, order: torch.Tensor | str | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``listed``, and the mask rows of its blocks: int32 (batch, heads, lists, size, words)."""
    blocks = listed(mask, order, size)
    return blocks, rows_of(mask, blocks)
