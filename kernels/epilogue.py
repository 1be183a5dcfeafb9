# SPDX-License-Identifier: Apache-2.0
"""O through shared memory to global memory, LSE straight from registers: each consumer warp on its own.

A warp owns 16 rows of its warpgroup's slab and stores them with a TMA box of its own. The box is what makes any slice_m
that is a multiple of 16 work without a special case: 16 rows never straddle the end of a query block, and TMA clips at
Sq. No warp waits for another one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warp

from .fragments import convert
from .smem import element_type
from .softmax import ROWS
from .spec import WARP_ROWS, WGMMA_ROWS

WARPS = WGMMA_ROWS // WARP_ROWS  # of a consumer warpgroup


class Epilogue:
    def __init__(self, spec, scheduler, tma_o, mO, mLSE, sO, mma_pv, thread, warpgroup_index):
        self.spec = spec
        self.scheduler = scheduler
        self.tma_o, self.mO, self.mLSE = tma_o, mO, mLSE
        self.sO = sO
        self.mma_pv = mma_pv
        self.thread = thread
        self.warp = cute.arch.make_warp_uniform(thread // 32)
        self.warpgroup_index = warpgroup_index
        self.dtype = element_type(spec)

    @cute.jit
    def store(self, work, acc_O: cute.Tensor, softmax):
        """Normalise and store this warp's 16 rows of one work item."""
        lse = cute.make_rmem_tensor((ROWS,), cutlass.Float32)
        softmax.finalize(acc_O, lse)
        row = self.scheduler.warp_row(work, self.warpgroup_index * WARPS + self.warp)
        self.store_lse(work, row, lse)
        self.write_slab(acc_O)
        if row < work.row_end:
            self.store_rows(work, row)

    @cute.jit
    def store_lse(self, work, row: Int32, lse: cute.Tensor):
        """The first lane of each quad owns a row's first column, and the row eight further down (PTX ISA: wgmma, D)."""
        mLSE = self.mLSE
        for r in cutlass.range_constexpr(ROWS):
            r_row = row + self.thread % 32 // 4 + 8 * r
            if self.thread % 4 == 0 and r_row < work.row_end:
                mLSE[work.batch, work.head, r_row] = lse[r]

    @cute.jit
    def write_slab(self, acc_O: cute.Tensor):
        """Registers -> this warp's rows of the slab, visible to TMA."""
        if const_expr(self.spec.stages_output):
            self.wait_stored()
        rO = cute.make_rmem_tensor(acc_O.layout.shape, self.dtype)
        convert(acc_O, rO, self.dtype)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, self.mma_pv).get_slice(self.thread)
        cute.copy(atom, copy.retile(rO), copy.partition_D(self.sO[None, None, self.warpgroup_index]))
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()

    @cute.jit
    def store_rows(self, work, row: Int32):
        box = (WARP_ROWS, self.spec.head_dim)
        sO = cute.local_tile(self.sO[None, None, self.warpgroup_index], box, (self.warp, 0))
        mO = cute.domain_offset((row, 0), self.mO[None, None, work.head, work.batch])
        gO = cute.local_tile(mO, box, (0, 0))
        tOs, tOg = cpasync.tma_partition(
            self.tma_o, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2)
        )
        cute.copy(self.tma_o, tOs, tOg)
        cute.arch.cp_async_bulk_commit_group()
        if const_expr(not self.spec.stages_output):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def wait_stored(self):
        """Shared memory must outlive the reads of this warp's last TMA store."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()
