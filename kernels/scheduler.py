# SPDX-License-Identifier: Apache-2.0
"""Which (query block, head, batch) a CTA takes, and which takes it next.

A work item is a 16-byte descriptor of the plan, heaviest first inside a group of heads that share the L2:
``[m_block, head | batch << 16, keys, list start / 8]``. Where slice_m exceeds tile_m, ``ctas_per_block`` CTAs share an
item's list. Where blocks share a union list, an item is a union and ``mBlocks`` names its blocks, in any order.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from .phases import span
from .ptx import exit_if_zero, unsigned_divmod
from .spec import WARP_ROWS, WARP_THREADS


class WorkItem:
    """A decoded descriptor. ``first`` is the first query row of the CTA, or the union's number."""

    def __init__(self, first, row_end, head, batch, num_keys, list_start):
        self.first, self.row_end = first, row_end
        self.head, self.batch = head, batch
        self.num_keys, self.list_start = num_keys, list_start


class Scheduler:
    """Grid: CTA c takes item c. Persistent: a CTA takes its share of a phase, see phases.py. Zigzag: of G CTAs, CTA c
    takes item r * G + c of round r, odd rounds counting from the other end. The items descend in weight, so that this
    keeps the CTAs' sums within one heaviest item of each other where neighbours weigh nearly the same.

    The redo pass is persistent too, and its CTAs stride over all items: they first flag those of theirs that have a
    poisoned row, and most often there is none.
    """

    def __init__(self, spec, mWork, mBlocks, slice_m, ctas_per_block, ctas_per_wave, rounds, seqlen_q):
        self.spec = spec
        self.mWork, self.mBlocks = mWork, mBlocks
        self.slice_m, self.ctas_per_block, self.seqlen_q = slice_m, ctas_per_block, seqlen_q
        self.ctas_per_wave, self.rounds = ctas_per_wave, rounds

    @cute.jit
    def only_item(self) -> Int32:
        """Grid: this CTA's item."""
        cta, _, _ = cute.arch.block_idx()
        return cta

    @cute.jit
    def share(self) -> tuple:
        """Persistent: this CTA's first item, and where its items end. They are ``ctas_per_wave`` apart."""
        cta, _, _ = cute.arch.block_idx()
        phase, place = unsigned_divmod(cta, self.ctas_per_wave)
        first, end = span(self.rounds, phase)
        return first * self.ctas_per_wave + place, cutlass.min(end * self.ctas_per_wave, self.num_items())

    @cute.jit
    def zigzag_item(self, step: Int32) -> Int32:
        """Zigzag: this CTA's item of round ``step``."""
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        return step * num_ctas + (cta if step % 2 == 0 else num_ctas - 1 - cta)

    @cute.jit
    def strided_item(self, step: Int32) -> Int32:
        """Redo pass: this CTA's item of round ``step``."""
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        return step * num_ctas + cta

    def num_items(self) -> Int32:
        return self.mWork.shape[0] * self.ctas_per_block

    @cute.jit
    def is_valid(self, index: Int32) -> Boolean:
        return index < self.num_items()

    @cute.jit
    def flag_poisoned(self, mLSE: cute.Tensor, flags: cute.Tensor, thread: Int32, warp: Int32):
        """Redo pass: flag each of this CTA's items if a fixed_ref launch has left one of its rows with LSE = +inf or
        NaN, and end the CTA if there is none. All warps, before the CTA's first barrier.

        Looked at before any is redone, because a warp stores LSEs while others may still be at an earlier item. An item
        to a warp at a time, so that hundreds of blocks cost a few round trips to memory: measured on an H200, a CTA to
        a block cost 23 us for 2,064 blocks.
        """
        self.flags = flags
        lane = thread % WARP_THREADS
        step = warp
        index = self.strided_item(step)
        while self.is_valid(index):
            work = self.fetch(index)
            poisoned = Int32(0)
            for i in cutlass.range_constexpr(self.spec.tile_m // WARP_THREADS):
                row = self.warp_row(work, 2 * i + lane // WARP_ROWS) + lane % WARP_ROWS
                if row < work.row_end:
                    lse = mLSE[work.batch, work.head, row]
                    if lse != lse or lse == Float32.inf:
                        poisoned = Int32(1)
            found = Int32(cute.arch.vote_any_sync(poisoned != 0))
            if lane == 0:
                flags[step] = found
            step += self.spec.num_threads // WARP_THREADS
            index = self.strided_item(step)
        cute.arch.sync_threads()
        found = Int32(0)
        for i in cutlass.range_constexpr(self.spec.num_flags // WARP_THREADS):
            step = WARP_THREADS * i + lane
            if self.is_valid(self.strided_item(step)):
                found = found | flags[step]
        exit_if_zero(Int32(cute.arch.vote_any_sync(found != 0)))

    @cute.jit
    def wants(self, step: Int32) -> Boolean:
        """Redo pass: whether this CTA's item of round ``step`` is to be computed again."""
        return self.flags[step] != 0

    @cute.jit
    def fetch(self, index: Int32) -> WorkItem:
        words = cute.make_rmem_tensor((4,), Int32)
        item, part = unsigned_divmod(index, self.ctas_per_block)
        address = self.mWork.iterator.toint() + Int64(item) * 16
        source = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=16)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), words)
        if const_expr(self.spec.union_blocks > 1):
            first, row_end = words[0], self.seqlen_q
        else:
            block_row = words[0] * self.slice_m
            first = block_row + part * self.spec.tile_m
            row_end = cutlass.min(block_row + self.slice_m, self.seqlen_q)
        return WorkItem(first, row_end, words[1] & 0xFFFF, words[1] >> 16, words[2], Int64(words[3]) * 8)

    @cute.jit
    def warp_row(self, work, piece: Int32) -> Int32:
        """First query row of the CTA's ``piece``-th 16 rows; at or past ``work.row_end`` where it has none."""
        if const_expr(self.spec.union_blocks > 1):
            pieces = self.spec.tile_m // self.spec.union_blocks // WARP_ROWS
            block = self.mBlocks[work.first, piece // pieces]
            row = block * self.slice_m + piece % pieces * WARP_ROWS
        else:
            row = work.first + piece * WARP_ROWS
        return row


class Walker:
    """A role that takes the CTA's items one after the other. A subclass has ``spec``, ``scheduler`` and ``take``.

    All roles of a CTA walk alike, so that they agree on every item without a word.
    """

    @cute.jit
    def walk(self):
        """All items of this CTA. ``take(index, tiles, items)`` returns the number of tiles and items so far."""
        tiles, items = Int32(0), Int32(0)
        if const_expr(self.spec.scheduler == "grid"):
            self.take(self.scheduler.only_item(), tiles, items)
        elif const_expr(self.spec.redo):
            step = Int32(0)
            index = self.scheduler.strided_item(step)
            while self.scheduler.is_valid(index):
                if self.scheduler.wants(step):
                    tiles, items = self.take(index, tiles, items)
                step += 1
                index = self.scheduler.strided_item(step)
        elif const_expr(self.spec.scheduler == "zigzag"):
            step = Int32(0)
            index = self.scheduler.zigzag_item(step)
            while self.scheduler.is_valid(index):
                tiles, items = self.take(index, tiles, items)
                step += 1
                index = self.scheduler.zigzag_item(step)
        else:
            index, end = self.scheduler.share()
            while index < end:
                tiles, items = self.take(index, tiles, items)
                index += self.scheduler.ctas_per_wave
