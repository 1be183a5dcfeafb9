# SPDX-License-Identifier: Apache-2.0
"""O through this warpgroup's slab of shared memory to global memory; LSE straight from registers.

Slabs that lie inside their query block go out by one TMA store, which clips at Sq. Where slice_m is not a multiple of
64 a slab's last rows belong to the next query block (``FwdSpec.partial_rows``), so its rows are stored one by one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp

from .fragments import convert, rows_and_columns
from .schedule import NamedBarrier
from .smem import element_type, swizzled_chunk
from .softmax import ROWS
from .spec import ELEMENT_BYTES, WARPGROUP_THREADS, WGMMA_ROWS


class Epilogue:
    def __init__(self, spec, tma_o, mO, mO_tma, mLSE, sO, mma_pv, thread, warpgroup_index):
        self.spec = spec
        self.tma_o, self.mO, self.mO_tma, self.mLSE = tma_o, mO, mO_tma, mLSE
        self.sO = sO
        self.mma_pv = mma_pv
        self.thread, self.warpgroup_index = thread, warpgroup_index
        self.dtype = element_type(spec)

    @cute.jit
    def store(self, work, acc_O: cute.Tensor, softmax):
        row = work.row + self.warpgroup_index * WGMMA_ROWS
        lse = cute.make_rmem_tensor((ROWS,), Float32)
        softmax.finalize(acc_O, lse)
        self.store_lse(work, row, lse)
        self.write_slab(acc_O)
        if const_expr(self.spec.partial_rows):
            self.store_rows(work, row)
        else:
            self.store_slab(work, row)

    @cute.jit
    def store_lse(self, work, row: Int32, lse: cute.Tensor):
        thr_mma = self.mma_pv.get_slice(self.thread)
        coords = cute.make_identity_tensor((WGMMA_ROWS, self.spec.head_dim))
        coords = rows_and_columns(thr_mma.partition_C(coords))
        mLSE = self.mLSE
        for r in cutlass.range_constexpr(ROWS):
            r_row = row + coords[r, 0][0]
            if coords[r, 0][1] == 0 and r_row < work.row_end:
                mLSE[work.batch, work.head, r_row] = lse[r]

    @cute.jit
    def write_slab(self, acc_O: cute.Tensor):
        """Registers -> this warpgroup's slab, visible to all its threads and to TMA."""
        if const_expr(self.spec.stages_output):
            if self.is_first_warp():
                cute.arch.cp_async_bulk_wait_group(0, read=True)  # the item before has left the slab
            self.sync()
        rO = cute.make_rmem_tensor(acc_O.layout.shape, self.dtype)
        convert(acc_O, rO, self.dtype)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, self.mma_pv).get_slice(self.thread)
        cute.copy(atom, copy.retile(rO), copy.partition_D(self.sO[None, None, self.warpgroup_index]))
        cute.arch.fence_view_async_shared()
        self.sync()

    @cute.jit
    def store_slab(self, work, row: Int32):
        if self.is_first_warp() and row < work.row_end:
            mO = cute.domain_offset((row, 0), self.mO_tma[None, None, work.head, work.batch])
            gO = cute.local_tile(mO, (WGMMA_ROWS, self.spec.head_dim), (0, 0))
            tOs, tOg = cpasync.tma_partition(
                self.tma_o, 0, cute.make_layout(1), cute.group_modes(self.sO, 0, 2), cute.group_modes(gO, 0, 2)
            )
            cute.copy(self.tma_o, tOs[None, self.warpgroup_index], tOg)
            cute.arch.cp_async_bulk_commit_group()
            if const_expr(not self.spec.stages_output):
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def store_rows(self, work, row: Int32):
        """16-byte stores of the slab's rows that belong to this query block."""
        spec = self.spec
        chunk_elements = 16 // ELEMENT_BYTES
        chunks = spec.head_dim // chunk_elements
        slab_bytes = WGMMA_ROWS * spec.head_dim * ELEMENT_BYTES
        slab = Int32(self.sO.iterator.toint()) + self.warpgroup_index * slab_bytes
        gO = self.mO[None, None, work.head, work.batch]
        for i in cutlass.range_constexpr(WGMMA_ROWS * chunks // WARPGROUP_THREADS):
            index = self.thread + i * WARPGROUP_THREADS
            r, c = index // chunks, index % chunks
            if row + r < work.row_end:
                atom, chunk = c // spec.lanes_per_row, c % spec.lanes_per_row
                place = (atom * WGMMA_ROWS + r) * spec.swizzle_bytes + swizzled_chunk(spec, r, chunk) * 16
                source = cute.make_ptr(self.dtype, slab + place, cute.AddressSpace.smem, assumed_align=16)
                offset = Int64(row + r) * Int64(self.mO.stride[0]) + c * chunk_elements
                target = (gO.iterator + offset).align(16)
                layout = cute.make_layout(chunk_elements)
                cute.autovec_copy(cute.make_tensor(source, layout), cute.make_tensor(target, layout))

    @cute.jit
    def is_first_warp(self):
        return cute.arch.make_warp_uniform(self.thread // 32) == 0

    @cute.jit
    def sync(self):
        """Barrier of this consumer warpgroup."""
        cute.arch.barrier(
            barrier_id=int(NamedBarrier.EPILOGUE) + self.warpgroup_index, number_of_threads=WARPGROUP_THREADS
        )

    @cute.jit
    def drain(self):
        """Shared memory must outlive the reads of the last TMA store."""
        if const_expr(self.spec.stages_output):
            if self.is_first_warp():
                cute.arch.cp_async_bulk_wait_group(0, read=True)
