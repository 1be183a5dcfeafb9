# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of global -> shared copies: how fast boxes by TMA and 16-byte pieces by cp.async arrive.

Nothing else happens: no product, no id list. Places come from a linear congruential generator in a register, so that
neither list reads nor their latency are measured. What lies in shared memory at the end goes to memory once, so that a
test can tell whether the right bytes came; at the lengths that are timed that is less than 1 % of the traffic.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, Uint64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from .copy_spec import LINE_ROWS, ROW_WORDS, CopySpec
from .ptx import cp_async_16, mbarrier_wait

SEED_STEP = 2654435761  # the first state of stream s is s times this
LCG_FACTOR, LCG_SUMMAND = 1664525, 1013904223
CHUNKS_PER_ROW = ROW_WORDS // 4
ALIGN_BYTES = 128  # of a box in shared memory (PTX ISA: cp.async.bulk.tensor)


def following(state: Uint32) -> Uint32:
    """The generator's next state."""
    return state * Uint32(LCG_FACTOR) + Uint32(LCG_SUMMAND)


def place(state: Uint32, number: Int32) -> Int32:
    """0 to number - 1, from the state's upper bits."""
    return Int32((Uint64(state) * Uint64(number)) >> 32)


def storage_struct(spec: CopySpec):
    """The CTA's shared memory. Its size is ``spec.smem_bytes()``."""
    num_barriers = spec.stages if spec.path == "tma" else 0

    @cute.struct
    class Storage:
        barriers: cute.struct.MemRange[Int64, num_barriers]
        stages: cute.struct.Align[cute.struct.MemRange[Int32, spec.stages * spec.step_bytes // 4], ALIGN_BYTES]

    return Storage


class CopyRate:
    """One kernel of a CopySpec. All extents are dynamic."""

    def __init__(self, spec: CopySpec):
        self.spec = spec

    @cute.jit
    def __call__(
        self,
        mRows: cute.Tensor,  # (n, 64) int32
        mLast: cute.Tensor,  # (ctas, stages * rows * 64) int32 out: what each stage held at the end
        steps: Int32,  # of each CTA, at least `stages`
        places: Int32,  # rows, or boxes of neighbouring rows, among which is drawn
        stream: cuda.CUstream,
    ):
        spec = self.spec
        tile = cute.make_layout((spec.rows, ROW_WORDS), stride=(ROW_WORDS, 1))
        tma = None
        if const_expr(spec.path == "tma"):
            tma, mRows = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), mRows, tile, (spec.rows, ROW_WORDS)
            )
        self.Storage = storage_struct(spec)
        self.kernel(tma, mRows, mLast, steps, places).launch(
            grid=(mLast.shape[0], 1, 1), block=[spec.num_threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tma: cute.CopyAtom, mRows: cute.Tensor, mLast: cute.Tensor, steps: Int32, places: Int32):
        spec = self.spec
        cta, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        storage = SmemAllocator().allocate(self.Storage)
        words = spec.rows * ROW_WORDS
        shared = storage.stages.get_tensor(cute.make_layout(spec.stages * words))
        if const_expr(spec.path == "tma"):
            self.boxes(tma, mRows, shared, storage.barriers.data_ptr(), cta, steps, places)
        else:
            self.gather(mRows, shared, cta, thread, steps, places)
        for i in cutlass.range(thread, spec.stages * words, spec.num_threads, unroll=1):
            mLast[cta, i] = shared[i]

    @cute.jit
    def boxes(self, tma, mRows: cute.Tensor, shared: cute.Tensor, full, cta: Int32, steps: Int32, places: Int32):
        """One warp keeps ``stages`` boxes in flight."""
        spec = self.spec
        with cute.arch.elect_one():
            for s in cutlass.range_constexpr(spec.stages):
                cute.arch.mbarrier_init(full + s, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        tiles = cute.make_tensor(
            shared.iterator,
            cute.make_layout((spec.rows, ROW_WORDS, spec.stages), stride=(ROW_WORDS, 1, spec.rows * ROW_WORDS)),
        )
        boxes = cute.local_tile(mRows, (spec.rows, ROW_WORDS), (None, 0))
        target, source = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(tiles, 0, 2), cute.group_modes(boxes, 0, 2)
        )
        state = Uint32(cta) * Uint32(SEED_STEP)
        slot, phase = Int32(0), Int32(0)
        for i in cutlass.range(steps, unroll=1):
            if i >= spec.stages:
                mbarrier_wait((full + slot).toint(), phase ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, spec.step_bytes)
            state = following(state)
            cute.copy(tma, source[None, place(state, places)], target[None, slot], tma_bar_ptr=full + slot)
            slot += 1
            if slot == spec.stages:
                slot, phase = Int32(0), phase ^ 1
        for _ in cutlass.range(spec.stages, unroll=1):  # the oldest first, as they were issued
            mbarrier_wait((full + slot).toint(), phase ^ 1)
            slot += 1
            if slot == spec.stages:
                slot, phase = Int32(0), phase ^ 1

    @cute.jit
    def gather(self, mRows: cute.Tensor, shared: cute.Tensor, cta: Int32, thread: Int32, steps: Int32, places: Int32):
        """Groups of 16 threads copy a row each; a thread keeps ``stages`` groups of copies in flight."""
        spec = self.spec
        group, chunk = thread // CHUNKS_PER_ROW, thread % CHUNKS_PER_ROW
        source = mRows.iterator.toint() + Int64(chunk * 16)
        target = Int32(shared.iterator.toint()) + thread * 16
        state = Uint32(cta * LINE_ROWS + group) * Uint32(SEED_STEP)
        slot = Int32(0)
        for _ in cutlass.range(steps, unroll=1):
            cute.arch.cp_async_wait_group(spec.stages - 1)
            for m in cutlass.range_constexpr(spec.rows // LINE_ROWS):
                state = following(state)
                row = Int64(place(state, places)) * (4 * ROW_WORDS)
                cp_async_16(target + slot * spec.step_bytes + m * (4 * ROW_WORDS * LINE_ROWS), source + row, 256)
            cute.arch.cp_async_commit_group()
            slot += 1
            if slot == spec.stages:
                slot = Int32(0)
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()
