# SPDX-License-Identifier: Apache-2.0
"""MassSm90: Q K^T recomputed on WGMMA and reduced to mask bits, histograms of scores, or log-sum-exp.

Scores of (query, key) pairs never leave the registers and scores of slices never leave shared memory. Reading order:
mask_spec.py (``Cut``), mass_loader.py (``Route``), mass_consumer.py, then what becomes of a tile's scores:
mass_slices.py, mass_rows.py, mass_histogram.py.
"""

from typing import Optional

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_utils
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync
from cutlass.memory import SmemAllocator

from .fwd_sm90 import LOG2_E, sequence_first
from .mask_spec import WORD_BITS, MassSpec
from .mass_histogram import Histogram
from .mass_loader import MassLoader, Route
from .mass_rows import RowLse, RowScores
from .mass_slices import SliceScores
from .schedule import Edge, Pipe
from .smem import OPERAND_ALIGN_BYTES, element_type, operand_layouts
from .spec import WGMMA_ROWS


class MassSm90:
    """One compiled mass kernel. All extents and strides but the head dim are dynamic."""

    def __init__(self, spec: MassSpec):
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
        mLSE: cute.Tensor,  # (B, Hq, Sq) fp32, natural log; the result where the output is "lse"
        mEdge: Optional[cute.Tensor],  # (B, Hq, blocks): fp32 thresholds, or int32 bits of the lowest score to count
        mOut: Optional[cute.Tensor],  # (B, Hq, blocks, words) int32 bits, or (B, Hq, blocks, BINS) int32 counts
        softmax_scale: Float32,
        bin_shift: Int32,  # histogram: see mass_histogram.py
        weight_unit: Float32,
        weight_base: Float32,
        words_per_cta: Int32,  # range of one CTA along the keys, a multiple of a batch
        slice_m: Int32,  # from here on: the fields of mask_spec.Cut
        slice_n: Int32,
        slices: Int32,
        parts: Int32,
        group_slices: Int32,
        group_tiles: Int32,
        words: Int32,
        columns: Int32,
        stream: cuda.CUstream,
    ):
        spec = self.spec
        mQ, mK = sequence_first(mQ), sequence_first(mK)
        layouts = operand_layouts(spec)
        mma = sm90_utils.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (WGMMA_ROWS, spec.tile_n),
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        slab, tile = cute.select(layouts.q, mode=[0, 1]), cute.select(layouts.kv, mode=[0, 1])
        tma_q, mQ_tma = cpasync.make_tiled_tma_atom(load, mQ, slab, (WGMMA_ROWS, spec.head_dim))
        tma_k, mK_tma = cpasync.make_tiled_tma_atom(load, mK, tile, (spec.tile_n, spec.head_dim))
        self.Storage = self.storage_struct(layouts)
        # min_blocks_per_mp > 1 makes the compiler ask the driver for the carve-out unless it is given.
        carveout = {"preferred_smem_carveout": 100} if spec.ctas_per_sm > 1 else {}
        self.kernel(
            tma_q,
            mQ_tma,
            tma_k,
            mK_tma,
            mLSE,
            mEdge,
            mOut,
            softmax_scale * LOG2_E,
            (bin_shift, weight_unit, weight_base),
            words_per_cta,
            (slice_m, slice_n, slices, parts, group_slices, group_tiles, words, columns),
            layouts.q,
            layouts.kv,
            mma,
        ).launch(
            grid=(
                cute.ceil_div(mQ.shape[0], slices * slice_m),
                cute.ceil_div(cute.ceil_div(columns, WORD_BITS), words_per_cta),
                mQ.shape[2] * mQ.shape[3],
            ),
            block=[spec.num_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=spec.ctas_per_sm,
            **carveout,
        )

    def storage_struct(self, layouts):
        """The CTA's shared memory. Its size is ``spec.smem_bytes()``."""
        spec, dtype = self.spec, self.dtype
        operand = lambda n: cute.struct.Align[cute.struct.MemRange[dtype, n], OPERAND_ALIGN_BYTES]  # noqa: E731

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, spec.num_barriers]
            sQ: operand(cute.cosize(layouts.q))
            sK: operand(cute.cosize(layouts.kv))
            slots: cute.struct.MemRange[Float32, spec.slot_elements]
            histogram: cute.struct.MemRange[Int32, spec.histogram_elements]

        return Storage

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        mK: cute.Tensor,
        mLSE: cute.Tensor,
        mEdge: Optional[cute.Tensor],
        mOut: Optional[cute.Tensor],
        scale_log2: Float32,
        binning: tuple,
        words_per_cta: Int32,
        cut: tuple,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        mma: cute.TiledMma,
    ):
        spec = self.spec
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.Storage)
        sQ = storage.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sK = storage.sK.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        pipes = self.make_pipes(storage.barriers.data_ptr())
        if warp == 0:
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_k)
            with cute.arch.elect_one():
                for pipe in pipes:
                    pipe.init()
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        route = Route(spec, cut, mQ.shape[0], mK.shape[0], mQ.shape[2], words_per_cta)
        if warp == spec.consumer_warps:
            MassLoader(spec, route, pipes, tma_q, mQ, sQ, tma_k, mK, sK).run()
        else:
            consumer = self.consumer_class()(spec, route, pipes, mma, sQ, sK, mLSE, thread, scale_log2)
            self.bind(consumer, storage, mEdge, mOut, binning)
            consumer.run()

    def make_pipes(self, barriers) -> tuple:
        """(Q, K) pipes over consecutive mbarriers; a TMA load completes a full barrier by its bytes."""
        spec = self.spec
        q = Edge("q", 1, 1, spec.consumer_warps)
        k = Edge("k", spec.kv_stages, 1, spec.consumer_warps)
        return Pipe(q, barriers), Pipe(k, barriers + 2 * q.stages)

    def consumer_class(self):
        if self.spec.output == "lse":
            return RowLse
        return RowScores if self.spec.rows else SliceScores

    def bind(self, consumer, storage, mEdge, mOut, binning):
        """Give a consumer what its output needs."""
        spec = self.spec
        if spec.output == "lse":
            consumer.bind()
            return
        histogram = None
        if spec.output == "histogram":
            counts = storage.histogram.get_tensor(cute.make_layout(spec.histogram_elements))
            histogram = Histogram(spec, consumer.route, counts, *binning)
        if spec.rows:
            consumer.bind(histogram, mEdge, mOut)
        else:
            slots = storage.slots.get_tensor(cute.make_layout((spec.slots, spec.consumer_warps)))
            consumer.bind(slots, histogram, mEdge, mOut)
