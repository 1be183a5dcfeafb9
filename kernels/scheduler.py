# SPDX-License-Identifier: Apache-2.0
"""Which (query block, head, batch) a CTA takes, and which takes it next.

A work item is a 16-byte descriptor of the plan, heaviest first inside a group of heads that share the L2:
``[m_block, head | batch << 16, keys, list start / 8]``. Where slice_m exceeds tile_m, ``ctas_per_block`` CTAs share an
item's list.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from .ptx import unsigned_divmod


class WorkItem:
    """A decoded descriptor. ``row`` is the first query row of the CTA, ``row_end`` the end of its query block."""

    def __init__(self, row, row_end, head, batch, num_keys, list_start):
        self.row, self.row_end = row, row_end
        self.head, self.batch = head, batch
        self.num_keys, self.list_start = num_keys, list_start


class Scheduler:
    """Grid: CTA c takes item c. Persistent: round r gives CTA c item r * G + c, odd rounds counting from the other end.

    The items descend in weight, so the zigzag keeps the CTAs' sums within one heaviest item of each other without a
    counter in global memory: nothing to reset, nothing shared between launches or streams.
    """

    def __init__(self, spec, mWork, slice_m, ctas_per_block, seqlen_q):
        self.spec = spec
        self.mWork = mWork
        self.slice_m, self.ctas_per_block, self.seqlen_q = slice_m, ctas_per_block, seqlen_q

    @cute.jit
    def item_index(self, step: Int32) -> Int32:
        cta, _, _ = cute.arch.block_idx()
        if const_expr(self.spec.scheduler == "persistent"):
            num_ctas, _, _ = cute.arch.grid_dim()
            cta = step * num_ctas + (cta if step % 2 == 0 else num_ctas - 1 - cta)
        return cta

    @cute.jit
    def is_valid(self, index: Int32) -> Boolean:
        return index < self.mWork.shape[0] * self.ctas_per_block

    @cute.jit
    def fetch(self, index: Int32) -> WorkItem:
        words = cute.make_rmem_tensor((4,), Int32)
        item, part = unsigned_divmod(index, self.ctas_per_block)
        address = self.mWork.iterator.toint() + Int64(item) * 16
        source = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=16)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), words)
        block_row = words[0] * self.slice_m
        row = block_row + part * self.spec.tile_m
        row_end = cutlass.min(block_row + self.slice_m, self.seqlen_q)
        return WorkItem(row, row_end, words[1] & 0xFFFF, words[1] >> 16, words[2], Int64(words[3]) * 8)
