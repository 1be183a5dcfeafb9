# SPDX-License-Identifier: Apache-2.0
"""A small Hopper GEMM written for the tests: C = A B^T with TMA, an mbarrier ring, WGMMA and a staged TMA store.

It has one of everything that goes wrong in a pipelined kernel, in few lines, so the mutation suite breaks its PTX too.
Warps 0-3 consume, warp 4 loads. With `cluster` = 2 the two CTAs of a cluster work on neighbouring
row tiles, and rank 0 loads B for both by multicast.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_utils
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

THREADS = 256
TILE_M, TILE_N = 64, 64


class Gemm:
    """A (M, K), B (N, K), C (M, N) in fp16; M and N may be ragged, K a multiple of the tile's."""

    def __init__(self, dtype, a_major="k", b_major="k", a_source="smem", stages=2, cluster=1):
        self.dtype, self.stages, self.cluster, self.a_source = dtype, stages, cluster, a_source
        self.tile_k = 1024 // dtype.width  # one 128-byte row
        majors = {"k": OperandMajorMode.K, "mn": OperandMajorMode.MN}
        self.a_major, self.b_major = majors[a_major], majors[b_major]
        self.a_layout = LayoutEnum.ROW_MAJOR if a_major == "k" else LayoutEnum.COL_MAJOR
        self.b_layout = LayoutEnum.ROW_MAJOR if b_major == "k" else LayoutEnum.COL_MAJOR

    @cute.jit
    def __call__(self, mA: cute.Tensor, mB: cute.Tensor, mC: cute.Tensor, stream: cuda.CUstream):
        tile = (TILE_M, TILE_N, self.tile_k)
        mma = sm90_utils.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            self.a_major,
            self.b_major,
            Float32,
            (1, 1, 1),
            (TILE_M, TILE_N),
            a_source=warpgroup.OperandSource.RMEM if self.a_source == "registers" else warpgroup.OperandSource.SMEM,
        )
        a_smem = sm90_utils.make_smem_layout_a(self.a_layout, tile, self.dtype, self.stages)
        b_smem = sm90_utils.make_smem_layout_b(self.b_layout, tile, self.dtype, self.stages)
        c_atom = warpgroup.make_smem_layout_atom(
            sm90_utils.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, cutlass.Float16, TILE_N), cutlass.Float16
        )
        c_smem = cute.tile_to_shape(c_atom, (TILE_M, TILE_N), order=(0, 1))
        load = cpasync.CopyBulkTensorTileG2SOp()
        b_load = cpasync.CopyBulkTensorTileG2SMulticastOp() if self.cluster > 1 else load
        tma_a, mA = cpasync.make_tiled_tma_atom(load, mA, cute.select(a_smem, mode=[0, 1]), (TILE_M, self.tile_k))
        tma_b, mB = cpasync.make_tiled_tma_atom(
            b_load, mB, cute.select(b_smem, mode=[0, 1]), (TILE_N, self.tile_k), num_multicast=1
        )
        tma_c, mC = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mC, c_smem, (TILE_M, TILE_N))
        self.storage(a_smem, b_smem, c_smem)
        grid = (cute.ceil_div(mC.shape[0], TILE_M), cute.ceil_div(mC.shape[1], TILE_N), 1)
        if const_expr(self.cluster > 1):
            grid = (cute.round_up(grid[0], self.cluster), grid[1], 1)
        self.kernel(mma, tma_a, mA, tma_b, mB, tma_c, mC, a_smem, b_smem, c_smem).launch(
            grid=grid,
            block=[THREADS, 1, 1],
            cluster=[self.cluster, 1, 1],
            stream=stream,
            min_blocks_per_mp=2,  # 128 registers per thread at launch; ptxas ignores setmaxnreg where it cannot tell
            preferred_smem_carveout=100,
        )

    def storage(self, a_smem, b_smem, c_smem):
        tile = lambda dtype, layout: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, self.stages]
            empty: cute.struct.MemRange[cutlass.Int64, self.stages]
            a: tile(self.dtype, a_smem)
            b: tile(self.dtype, b_smem)
            c: tile(cutlass.Float16, c_smem)

        self.Storage = Storage

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        tma_a: cute.CopyAtom,
        mA: cute.Tensor,
        tma_b: cute.CopyAtom,
        mB: cute.Tensor,
        tma_c: cute.CopyAtom,
        mC: cute.Tensor,
        a_smem: cute.ComposedLayout,
        b_smem: cute.ComposedLayout,
        c_smem: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        bm, bn, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        storage = SmemAllocator().allocate(self.Storage)
        sA = storage.a.get_tensor(a_smem.outer, swizzle=a_smem.inner)
        sB = storage.b.get_tensor(b_smem.outer, swizzle=b_smem.inner)
        sC = storage.c.get_tensor(c_smem.outer, swizzle=c_smem.inner)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        if warp_index == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 4 * self.cluster if const_expr(self.cluster > 1) else 4)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
        steps = mA.shape[1] // self.tile_k
        gA = cute.local_tile(mA, (TILE_M, self.tile_k), (bm, None))
        gB = cute.local_tile(mB, (TILE_N, self.tile_k), (bn, None))
        if warp_index >= 4:
            cute.arch.setmaxregister_decrease(40)
            if warp_index == 4:
                self.produce(steps, tma_a, gA, sA, tma_b, gB, sB, full, empty, rank)
        else:
            cute.arch.setmaxregister_increase(216)
            self.consume(steps, mma, sA, sB, sC, tma_c, mC, full, empty, thread, warp_index, rank, bm, bn)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def produce(self, steps, tma_a, gA, sA, tma_b, gB, sB, full, empty, rank):
        one = cute.make_layout(1)
        tAs, tAg = cpasync.tma_partition(tma_a, 0, one, cute.group_modes(sA, 0, 2), cute.group_modes(gA, 0, 2))
        tBs, tBg = cpasync.tma_partition(tma_b, 0, one, cute.group_modes(sB, 0, 2), cute.group_modes(gB, 0, 2))
        nbytes = (TILE_M + TILE_N) * 128
        for i in cutlass.range(steps, unroll=1):
            slot, phase = i % self.stages, i // self.stages % 2
            cute.arch.mbarrier_wait(empty + slot, phase ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, nbytes)
            cute.copy(tma_a, tAg[None, i], tAs[None, slot], tma_bar_ptr=full + slot)
            if const_expr(self.cluster > 1):
                if rank == 0:
                    mask = cutlass.Int16((1 << self.cluster) - 1)
                    cute.copy(tma_b, tBg[None, i], tBs[None, slot], tma_bar_ptr=full + slot, mcast_mask=mask)
            else:
                cute.copy(tma_b, tBg[None, i], tBs[None, slot], tma_bar_ptr=full + slot)

    @cute.jit
    def consume(self, steps, mma, sA, sB, sC, tma_c, mC, full, empty, thread, warp_index, rank, bm, bn):
        thr = mma.get_slice(thread)
        acc = cute.make_rmem_tensor(thr.partition_shape_C((TILE_M, TILE_N)), Float32)
        acc.fill(0.0)
        tB = thr.make_fragment_B(thr.partition_B(sB))
        if const_expr(self.a_source == "registers"):
            rA = thr.make_fragment_A(thr.partition_shape_A((TILE_M, self.tile_k)))
            atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
            copy = cute.make_tiled_copy_A(atom, mma).get_slice(thread)
            tAs = copy.partition_S(sA)
        else:
            tA = thr.make_fragment_A(thr.partition_A(sA))
        for i in cutlass.range(steps, unroll=1):
            slot, phase = i % self.stages, i // self.stages % 2
            cute.arch.mbarrier_wait(full + slot, phase)
            if const_expr(self.a_source == "registers"):
                cute.copy(atom, tAs[None, None, None, slot], copy.retile(rA))
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(tB.shape[2])):
                a = rA[None, None, k] if const_expr(self.a_source == "registers") else tA[None, None, k, slot]
                mma.set(warpgroup.Field.ACCUMULATE, True)
                cute.gemm(mma, acc, a, tB[None, None, k, slot], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            with cute.arch.elect_one():
                if const_expr(self.cluster > 1):
                    for peer in cutlass.range_constexpr(self.cluster):
                        cute.arch.mbarrier_arrive(empty + slot, Int32(peer))
                else:
                    cute.arch.mbarrier_arrive(empty + slot)
        rC = cute.make_rmem_tensor(acc.layout.shape, cutlass.Float16)
        rC.store(acc.load().to(cutlass.Float16))
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), cutlass.Float16)
        copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
        cute.copy(atom, copy.retile(rC), copy.partition_D(sC))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=1, number_of_threads=128)
        if warp_index == 0:
            gC = cute.local_tile(mC, (TILE_M, TILE_N), (bm, bn))
            tCs, tCg = cpasync.tma_partition(
                tma_c, 0, cute.make_layout(1), cute.group_modes(sC, 0, 2), cute.group_modes(gC, 0, 2)
            )
            cute.copy(tma_c, tCs, tCg)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def compile_gemm(dtype, a_major="k", b_major="k", **options):
    """Compiled for any M, N, K: `f(a, b, c)` with tensors a (M, K), b (N, K) of the given majors and c (M, N) fp16."""

    def fake(element, major):
        rows, cols = cute.sym_int(), cute.sym_int()
        stride = cute.sym_int64(divisibility=128 // element.width)
        strides = (stride, 1) if major == "k" else (1, stride)
        return cute.runtime.make_fake_tensor(element, (rows, cols), strides, assumed_align=16)

    kernel = Gemm(dtype, a_major, b_major, **options)
    args = fake(dtype, a_major), fake(dtype, b_major), fake(cutlass.Float16, "k")
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *args, stream, options="--enable-tvm-ffi")
