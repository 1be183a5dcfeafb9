# SPDX-License-Identifier: Apache-2.0
"""Scores of slices: probabilities added up (or their maximum taken) over a slice's queries and keys.

A warp owns 16 query rows, a slab; slices are whole slabs. Per tile it reduces its slab to one value per atom of
neighbouring keys and keeps these in its slots of shared memory. When the scores of a batch are complete, the slots of a
slice's slabs and atoms are added up in a fixed order, a lane per slice, and 32 comparisons become one word of bits.
No atomics on floating-point numbers: the same input always gives the same bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from .fragments import rows_and_columns
from .mask_spec import SLAB_ROWS, WORD_BITS
from .mass_consumer import MassConsumer
from .ptx import unsigned_divmod

ROW_LANES = (16, 8, 4)  # lanes of a warp that differ in these bits hold other rows of the same columns
COLUMN_LANES = (2, 1)  # ... other columns of the same rows


class SliceScores(MassConsumer):
    """slots: (slots, warps) fp32, this warp's partial scores in column ``warp``."""

    def bind(self, slots, histogram, mEdge, mOut):
        self.slots, self.histogram = slots, histogram
        self.mEdge, self.mOut = mEdge, mOut
        self.is_max = self.spec.statistic == "max"

    # ---- a tile -> slots -------------------------------------------------------------------------------------------
    @cute.jit
    def tile(self, acc: cute.Tensor, first: Int32, group: Int32, tile: Int32, part: Int32):
        spec, S = self.spec, rows_and_columns(acc)
        values = cute.make_rmem_tensor((spec.tile_n // 4,), Float32)
        _, limit = self.route.keys(first + group, tile)
        limit = limit - 2 * self.quad_lane
        for j in cutlass.range_constexpr(cute.size(values)):
            value = self.merge(self.contribution(S, 0, j), self.contribution(S, 1, j))
            values[j] = value if 8 * (j // 2) + j % 2 < limit else Float32(self.nothing())
        self.add_neighbours(values)
        kept, index = self.reduce_lanes(values)
        self.store(values, kept, index, group, (tile > 0) | (part > 0))

    @cute.jit
    def contribution(self, S: cute.Tensor, r: cutlass.Constexpr[int], j: cutlass.Constexpr[int]) -> Float32:
        """Probability of one (query, key) pair, or its log2 where maxima are taken: those need no exponential."""
        log_p = S[r, j] * self.scale_log2 - self.lse[r]
        return log_p if const_expr(self.is_max) else cute.math.exp2(log_p, fastmath=True)

    def merge(self, a: Float32, b: Float32) -> Float32:
        return cute.arch.fmax(a, b) if self.is_max else a + b

    def nothing(self) -> float:
        return -float("inf") if self.is_max else 0.0

    @property
    def in_thread(self) -> int:
        """Columns of a thread that belong to one atom."""
        return 1 if self.spec.atom == 1 else max(2, self.spec.atom // 4)

    @cute.jit
    def add_neighbours(self, values: cute.Tensor):
        """Columns of one atom that lie in the same thread, into the first places of ``values``."""
        width = self.in_thread
        if const_expr(width > 1):
            for i in cutlass.range_constexpr(cute.size(values) // width):
                total = values[i * width]
                for u in cutlass.range_constexpr(1, width):
                    total = self.merge(total, values[i * width + u])
                values[i] = total

    @cute.jit
    def reduce_lanes(self, values: cute.Tensor):
        """Reduce over the lanes that share columns; returns (values left in each lane, index of the first of them).

        While several values are left, the lanes of a pair split them: each gives the other's half away, so a step
        costs half the shuffles of the step before. Reducing every value on its own would take three times as many.
        """
        masks = ROW_LANES if const_expr(self.spec.atom < 8) else ROW_LANES + COLUMN_LANES
        count = cute.size(values) // self.in_thread
        index = Int32(0)
        for mask in masks:
            if const_expr(count > 1):
                count = count // 2
                upper = (self.lane & mask) != 0
                for i in cutlass.range_constexpr(count):
                    low, high = values[i], values[i + count]
                    given = cute.arch.shuffle_sync_bfly(low if upper else high, mask)
                    values[i] = self.merge(high if upper else low, given)
                index += count if upper else 0
            else:
                values[0] = self.merge(values[0], cute.arch.shuffle_sync_bfly(values[0], mask))
        return count, index

    @cute.jit
    def store(self, values: cute.Tensor, kept: cutlass.Constexpr[int], index: Int32, group: Int32, accumulate: Boolean):
        """Into this warp's slots, or on top of them where an earlier tile or part has left its share."""
        spec, slots, warp = self.spec, self.slots, self.warp
        base = group * (spec.tile_n // spec.atom)
        if self.is_writer():
            for i in cutlass.range_constexpr(kept):
                # Place of value v = index + i inside its group: columns lie as WGMMA has spread them over the lanes.
                if const_expr(spec.atom == 1):
                    place = base + 4 * index + (8 * (i // 2) + i % 2) + 2 * self.quad_lane
                elif const_expr(spec.atom == 2):
                    place = base + 4 * (index + i) + self.quad_lane
                else:
                    place = base + index + i
                earlier = Float32(self.nothing())
                if accumulate:
                    earlier = slots[place, warp]
                slots[place, warp] = self.merge(values[i], earlier)

    @cute.jit
    def is_writer(self) -> Boolean:
        """One lane of those that hold the same value after ``reduce_lanes``."""
        masks = ROW_LANES if const_expr(self.spec.atom < 8) else ROW_LANES + COLUMN_LANES
        count = self.spec.tile_n // 4 // self.in_thread
        shared = sum(mask for step, mask in enumerate(masks) if count >> step <= 1)
        return (self.lane & shared) == 0

    # ---- slots -> scores -------------------------------------------------------------------------------------------
    @cute.jit
    def batch(self, word: Int32):
        """Scores of a batch: each warp takes pairs of (slice, word) in turn, a lane per slice column."""
        spec = self.spec
        self.sync()
        words = cutlass.min(self.route.words, self.route.end_word - word)
        for pair in cutlass.range(self.warp, self.route.slices * words, spec.consumer_warps, unroll=1):
            index, w = unsigned_divmod(pair, words)
            block = self.route.first_block + index
            if block * self.route.slice_m < self.route.seqlen_q:
                column = (word + w) * WORD_BITS + self.lane
                score = Float32(0.0)
                if column < self.route.columns:
                    score = self.score(index, block, w * WORD_BITS + self.lane)
                if const_expr(spec.output == "bits"):
                    self.store_word(score, block, word + w, column)
                else:
                    self.count(score, index, block, column)
        self.sync()

    @cute.jit
    def score(self, index: Int32, block: Int32, place: Int32) -> Float32:
        """Of slice ``index`` of this CTA, column ``place`` of the batch: mass per query, or largest probability."""
        spec, slots = self.spec, self.slots
        slabs = cutlass.min(self.route.slice_m // SLAB_ROWS, spec.consumer_warps)
        group, member = unsigned_divmod(place, self.route.group_slices)
        atoms = Int32(1)
        if self.route.group_slices > 1:
            atoms = self.route.slice_n // spec.atom
        first = group * (spec.tile_n // spec.atom) + member * atoms
        total = Float32(self.nothing())
        for slab in cutlass.range(index * slabs, (index + 1) * slabs, unroll=1):
            for atom in cutlass.range(first, first + atoms, unroll=1):
                total = self.merge(total, slots[atom, slab])
        if const_expr(self.is_max):
            total = cute.math.exp2(total, fastmath=True)
        else:
            rows = cutlass.min(self.route.slice_m, self.route.seqlen_q - block * self.route.slice_m)
            total = total / Float32(rows)
        return total

    @cute.jit
    def store_word(self, score: Float32, block: Int32, word: Int32, column: Int32):
        mEdge, mOut = self.mEdge, self.mOut
        keep = score >= mEdge[self.route.batch, self.route.head, block] and column < self.route.columns
        kept = cute.arch.vote_ballot_sync(keep)
        if self.lane == 0:
            mOut[self.route.batch, self.route.head, block, word] = kept

    @cute.jit
    def count(self, score: Float32, index: Int32, block: Int32, column: Int32):
        mEdge = self.mEdge
        if column < self.route.columns:
            self.histogram.add(index, score, mEdge[self.route.batch, self.route.head, block])

    # ---- around the batches ----------------------------------------------------------------------------------------
    @cute.jit
    def start(self):
        if const_expr(self.spec.output == "histogram"):
            self.histogram.clear(self.thread)

    @cute.jit
    def finish(self):
        if const_expr(self.spec.output == "histogram"):
            self.histogram.write(self.mOut, self.thread)
