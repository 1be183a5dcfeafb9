# SPDX-License-Identifier: Apache-2.0
"""FgAttnForwardSm90: attention of M queries to their own gathered list of keys, for Hopper (sm_90a).

This file lays out operands, makes the TMA atoms, launches, and gives each warp its role; the roles have files of their
own. Reading order: spec.py, schedule.py, phases.py, scheduler.py, gather.py, loader.py, boxes.py, octets.py,
softmax.py, mainloop.py, parts.py, halves.py, epilogue.py.
"""

import math

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_utils
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from .boxes import Boxes, BoxLoader, RunLoader, make_box_atom
from .consumer import Consumer
from .epilogue import Epilogue
from .loader import GatherLoader
from .mainloop import Mainloop
from .octets import OctetLoader
from .schedule import make_pipes
from .scheduler import Scheduler
from .smem import element_type, operand_layouts, operand_tile, storage_struct
from .spec import ELEMENT_BYTES, WARP_ROWS, WARPGROUP_THREADS, WGMMA_ROWS, FwdSpec

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 2.0**-126


def sequence_first(t: cute.Tensor) -> cute.Tensor:
    """(B, S, H, D) -> (S, D, H, B)."""
    return cute.make_tensor(t.iterator, cute.select(t.layout, mode=[1, 3, 2, 0]))


class FgAttnForwardSm90:
    """One compiled forward kernel. All extents and strides but the head dim are dynamic."""

    def __init__(self, spec: FwdSpec):
        reasons = spec.reasons()
        if reasons:
            raise ValueError(f"{spec.name} cannot run: " + "; ".join(reasons))
        self.spec = spec
        self.dtype = element_type(spec)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (B, Sq, Hq, D)
        mK: cute.Tensor,  # (B, Sk, Hkv, D)
        mV: cute.Tensor,  # (B, Sk, Hkv, D)
        mO: cute.Tensor,  # (B, Sq, Hq, D)
        mLSE: cute.Tensor,  # (B, Hq, Sq) fp32, natural log
        mIds: cute.Tensor,  # (nnz,) int32 segment ids, every list 32-byte aligned, one tile of slack at the end
        mWork: cute.Tensor,  # (num_work, 4) int32 descriptors, see scheduler.py
        softmax_scale: Float32,
        slice_m: Int32,
        ctas_per_block: Int32,  # ceil(slice_m / tile_m)
        num_ctas: Int32,
        ctas_per_wave: Int32,  # that fit the GPU at once; only the phases of a persistent kernel depend on it
        mMembers: cute.Tensor,  # unions only: int32, see masking.KeepBits or parts.Parts
        mBlocks: cute.Tensor,  # unions only: (num_unions, union_blocks) int32 query blocks
        stream: cuda.CUstream,
    ):
        spec = self.spec
        mQ, mK, mV, mO = (sequence_first(t) for t in (mQ, mK, mV, mO))
        layouts = operand_layouts(spec, spec.atoms_first)
        mma_qk = sm90_utils.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (WGMMA_ROWS, spec.tile_n),
            a_source=warpgroup.OperandSource.RMEM if spec.q_source == "registers" else warpgroup.OperandSource.SMEM,
        )
        mma_pv = sm90_utils.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (WGMMA_ROWS, spec.head_dim),
            a_source=warpgroup.OperandSource.RMEM,
        )
        q_box, rows = (operand_tile(spec, n) for n in (spec.q_box_rows, WARP_ROWS))
        tma_q, mQ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), mQ, q_box, (spec.q_box_rows, spec.head_dim)
        )
        tma_o, mO = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mO, rows, (WARP_ROWS, spec.head_dim))
        tma_k, tma_v, boxK, boxV = None, None, None, None
        if const_expr(spec.kv_loads != "gather"):
            tma_k, boxK = make_box_atom(spec, mK)
            tma_v, boxV = make_box_atom(spec, mV)
        self.Storage = storage_struct(spec, layouts)
        # min_blocks_per_mp > 1 makes the compiler ask the driver for the carve-out unless it is given.
        carveout = {"preferred_smem_carveout": 100} if spec.ctas_per_sm > 1 else {}
        self.kernel(
            tma_q,
            mQ,
            tma_o,
            mO,
            mK,
            mV,
            tma_k,
            boxK,
            tma_v,
            boxV,
            mLSE,
            mIds,
            mWork,
            mMembers,
            mBlocks,
            # At scale 0 a masked score, -inf * 0, would be NaN; any scale this small weighs all keys alike.
            cutlass.max(softmax_scale * LOG2_E, Float32(SMALLEST_SCALE)),
            slice_m,
            ctas_per_block,
            ctas_per_wave,
            cute.ceil_div(mWork.shape[0] * ctas_per_block, ctas_per_wave),
            # Scalar parameters live in the constant bank, where the producer's 32 registers are not spent on them.
            Int32(mK.stride[0] * ELEMENT_BYTES),
            Int32(mV.stride[0] * ELEMENT_BYTES),
            Int32(mK.shape[0] - 1),
            layouts.q,
            layouts.kv,
            mma_qk,
            mma_pv,
        ).launch(
            grid=(num_ctas, 1, 1),
            block=[spec.num_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=spec.ctas_per_sm,
            **carveout,
        )

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_o: cute.CopyAtom,
        mO: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        tma_k: cute.CopyAtom,
        boxK: cute.Tensor,
        tma_v: cute.CopyAtom,
        boxV: cute.Tensor,
        mLSE: cute.Tensor,
        mIds: cute.Tensor,
        mWork: cute.Tensor,
        mMembers: cute.Tensor,
        mBlocks: cute.Tensor,
        scale_log2: Float32,
        slice_m: Int32,
        ctas_per_block: Int32,
        ctas_per_wave: Int32,
        rounds: Int32,
        k_row_bytes: Int32,
        v_row_bytes: Int32,
        last_key: Int32,
        q_layout: cute.ComposedLayout,
        kv_layout: cute.ComposedLayout,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        spec = self.spec
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        scheduler = Scheduler(spec, mWork, mBlocks, slice_m, ctas_per_block, ctas_per_wave, rounds, mQ.shape[0])
        storage = SmemAllocator().allocate(self.Storage)
        if const_expr(spec.redo):
            scheduler.flag_poisoned(mLSE, storage.flags.get_tensor(cute.make_layout(spec.num_flags)), thread, warp)
        sQ = storage.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sK = storage.sK.get_tensor(kv_layout.outer, swizzle=kv_layout.inner)
        sV = storage.sV.get_tensor(kv_layout.outer, swizzle=kv_layout.inner)
        if const_expr(spec.stages_output):
            sO = storage.sO.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        else:
            sO = sQ
        pipes = make_pipes(spec, storage.barriers.data_ptr())
        if warp == 0:
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_o)
            with cute.arch.elect_one():
                for pipe in pipes:
                    pipe.init()
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp >= 4 * spec.consumer_warpgroups:
            cute.arch.setmaxregister_decrease(spec.producer_registers)
            producer_thread = thread - WARPGROUP_THREADS * spec.consumer_warpgroups
            producer_warp = warp - 4 * spec.consumer_warpgroups
            role = (spec, scheduler, pipes, producer_thread, producer_warp)
            boxes = Boxes(spec, tma_k, boxK, sK), Boxes(spec, tma_v, boxV, sV)
            if const_expr(spec.kv_loads == "boxes"):
                loader = BoxLoader(*role)
                loader.bind_kv(*boxes, mIds)
            elif const_expr(spec.kv_loads != "gather"):
                loader = (OctetLoader if spec.kv_loads == "octets" else RunLoader)(*role)
                loader.bind_kv((mK, sK, k_row_bytes), (mV, sV, v_row_bytes), mIds, last_key)
                loader.bind_boxes(*boxes)
            else:
                loader = GatherLoader(*role)
                loader.bind_kv((mK, sK, k_row_bytes), (mV, sV, v_row_bytes), mIds, last_key)
            loader.bind_q(tma_q, mQ, sQ)
            loader.walk()
        else:
            cute.arch.setmaxregister_increase(spec.consumer_registers)
            warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP_THREADS)
            wg_thread = thread % WARPGROUP_THREADS
            mainloop = Mainloop(
                spec, mma_qk, mma_pv, sQ, sK, sV, pipes, mMembers, wg_thread, warpgroup_index, scale_log2
            )
            epilogue = Epilogue(spec, scheduler, tma_o, mO, mLSE, sO, mma_pv, wg_thread, warpgroup_index)
            Consumer(spec, scheduler, mainloop, epilogue).run()
