# SPDX-License-Identifier: Apache-2.0
"""Mask bits -> sorted id lists on the device, in two launches with the lists' places decided between them.

One warp owns one row of bits, that is one list. ``CountBits`` measures every list, the host side adds the lengths up
without reading them, and ``WriteIds`` fills the lists. Ids come out ascending because columns are visited in order, and
the same bits always give the same lists: nothing is shared between warps.

An aligned run is eight neighbouring columns that one byte of bits holds, all set. Lists can have those first.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

WARP = 32
WORD_BITS = 32
WARPS_PER_CTA = 8
LIST_ALIGN = 8  # ids: a list starts on 32 bytes


@cute.jit
def own_row() -> Int32:
    """Row of this warp."""
    cta, _, _ = cute.arch.block_idx()
    return cta * WARPS_PER_CTA + cute.arch.make_warp_uniform(cute.arch.warp_idx())


@cute.jit
def word_of(mBits: cute.Tensor, row: Int32, column: Int32) -> Int32:
    """Word ``column`` of a row; zero past its end. A mask may hold more than 2^31 bytes, so the address is 64-bit."""
    words = mBits.shape[1]
    word = Int32(0)
    if column < words:
        word = (mBits.iterator + Int64(row) * words + column).load()
    return word


@cute.jit
def inclusive_sum(value: Int32, lane: Int32) -> Int32:
    """Sum over this lane and those before it."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        value += below if lane >= (1 << step) else Int32(0)
    return value


@cute.jit
def full_bytes(word: Int32) -> Int32:
    """The bits of a word whose whole byte is set."""
    halves = word & (word >> 4)
    quarters = halves & (halves >> 2)
    return (quarters & (quarters >> 1) & 0x01010101) * 0xFF


class CountBits:
    """Length of every list, in segments and in keys."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32
        mCounts: cute.Tensor,  # (rows,) int64 out: set bits, and in the high half those in aligned runs
        mKeys: cute.Tensor,  # (rows,) int32 out: keys behind them, a segment that crosses the sequence's end cut
        last_column: Int32,  # the segment that may cross it
        slice_n: Int32,
        shortfall: Int32,  # keys that it lacks
        stream: cuda.CUstream,
    ):
        self.kernel(mBits, mCounts, mKeys, last_column, slice_n, shortfall).launch(
            grid=(cute.ceil_div(mBits.shape[0], WARPS_PER_CTA), 1, 1),
            block=[WARPS_PER_CTA * WARP, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mBits: cute.Tensor,
        mCounts: cute.Tensor,
        mKeys: cute.Tensor,
        last_column: Int32,
        slice_n: Int32,
        shortfall: Int32,
    ):
        row, lane = own_row(), cute.arch.lane_idx()
        if row < mBits.shape[0]:
            count, runs = Int32(0), Int32(0)
            for base in cutlass.range(0, mBits.shape[1], WARP, unroll=4):
                word = word_of(mBits, row, base + lane)
                count += cute.arch.popc(word)
                runs += cute.arch.popc(full_bytes(word))
            for distance in cutlass.range_constexpr(5):
                count += cute.arch.shuffle_sync_bfly(count, 1 << distance)
                runs += cute.arch.shuffle_sync_bfly(runs, 1 << distance)
            is_cut = (word_of(mBits, row, last_column >> 5) >> (last_column & 31)) & 1
            if lane == 0:
                mCounts[row] = Int64(runs) << 32 | Int64(count)
                mKeys[row] = count * slice_n - is_cut * shortfall


class WriteIds:
    """The lists themselves. Every id of the buffer is written: what belongs to no list becomes 0."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32
        mOffset: cute.Tensor,  # (rows,) int64, start of each list, multiples of 8, ascending
        mCounts: cute.Tensor,  # (rows,) int64, ids to write: the row's first set bits. The high half, unless it is 0:
        # how many of the row's bits are in aligned runs, which are to come before the others.
        mIds: cute.Tensor,  # (n,) int32 out, 32-byte aligned, n a multiple of 8 and past the end of every list
        stream: cuda.CUstream,
    ):
        self.kernel(mBits, mOffset, mCounts, mIds).launch(
            grid=(cute.ceil_div(mBits.shape[0], WARPS_PER_CTA), 1, 1),
            block=[WARPS_PER_CTA * WARP, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mBits: cute.Tensor, mOffset: cute.Tensor, mCounts: cute.Tensor, mIds: cute.Tensor):
        row, lane = own_row(), cute.arch.lane_idx()
        rows = mBits.shape[0]
        if row < rows:
            packed = mCounts[row]
            count, runs = Int32(packed), Int32(packed >> 32)
            mList = cute.make_tensor(mIds.iterator + mOffset[row], cute.make_layout(1 << 30))
            if runs == 0:
                self.write_list(mBits, mList, row, count, lane)
            else:
                self.write_grouped(mBits, mList, row, count, runs, lane)
            # The list's own padding; a list that was cut has none.
            if lane < LIST_ALIGN - 1 and (count + lane) // LIST_ALIGN == (count - 1) // LIST_ALIGN and count > 0:
                mList[count + lane] = Int32(0)
        end = (mOffset[rows - 1] + Int64(Int32(mCounts[rows - 1])) + (LIST_ALIGN - 1)) // LIST_ALIGN * LIST_ALIGN
        self.clear(mIds, end, row, lane)

    @cute.jit
    def write_list(self, mBits: cute.Tensor, mList: cute.Tensor, row: Int32, count: Int32, lane: Int32):
        """The first ``count`` set columns of a row, 32 words at a time.

        The 32 lanes take one word together, a lane per bit, so that neighbouring ids are stored together: a lane that
        stored the ids of a word of its own would touch a sector of memory for every id.
        """
        done = Int32(0)
        for base in cutlass.range(0, mBits.shape[1], WARP, unroll=1):
            word = word_of(mBits, row, base + lane)
            rank = inclusive_sum(cute.arch.popc(word), lane)
            total = cute.arch.shuffle_sync(rank, WARP - 1)
            rank += done - cute.arch.popc(word)
            if total > 0 and done < count:
                below = Int32(cute.arch.lanemask_lt())
                for j in cutlass.range_constexpr(WARP):
                    together = cute.arch.shuffle_sync(word, j)
                    place = cute.arch.shuffle_sync(rank, j) + cute.arch.popc(together & below)
                    if (together >> lane) & 1 != 0 and place < count:
                        mList[place] = (base + j) * WORD_BITS + lane
            done += total

    @cute.jit
    def write_grouped(self, mBits: cute.Tensor, mList: cute.Tensor, row: Int32, count: Int32, runs: Int32, lane: Int32):
        """The set columns of a row, those of aligned runs in front of the others, up to place ``count``.

        As ``write_list``, with two counts in one number: the low half for columns of no run, the high one for others.
        """
        run_place, place = Int32(0), runs
        for base in cutlass.range(0, mBits.shape[1], WARP, unroll=1):
            word = word_of(mBits, row, base + lane)
            in_runs = cute.arch.popc(full_bytes(word))
            own = (in_runs << 16) + (cute.arch.popc(word) - in_runs)
            rank = inclusive_sum(own, lane)
            total = cute.arch.shuffle_sync(rank, WARP - 1)
            rank -= own
            if total > 0:
                below = Int32(cute.arch.lanemask_lt())
                for j in cutlass.range_constexpr(WARP):
                    together = cute.arch.shuffle_sync(word, j)
                    before = cute.arch.shuffle_sync(rank, j)
                    full = full_bytes(together)
                    target = place + (before & 0xFFFF) + cute.arch.popc(together & ~full & below)
                    if (full >> lane) & 1 != 0:
                        target = run_place + (before >> 16) + cute.arch.popc(full & below)
                    if (together >> lane) & 1 != 0 and target < count:
                        mList[target] = (base + j) * WORD_BITS + lane
            run_place += total >> 16
            place += total & 0xFFFF

    @cute.jit
    def clear(self, mIds: cute.Tensor, end: Int64, row: Int32, lane: Int32):
        """Zero the ids from ``end`` on, a multiple of 8: the warps of the whole grid take 128 each in turn."""
        zeros = cute.make_rmem_tensor((4,), Int32)
        zeros.fill(0)
        ctas, _, _ = cute.arch.grid_dim()
        step = Int64(ctas * WARPS_PER_CTA * WARP * 4)
        first = end + Int64(row * WARP + lane) * 4
        while first < mIds.shape[0]:
            target = (mIds.iterator + first).align(16)
            cute.autovec_copy(zeros, cute.make_tensor(target, cute.make_layout(4)))
            first += step
