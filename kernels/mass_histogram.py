# SPDX-License-Identifier: Apache-2.0
"""Counts of scores by size, one histogram per query block of a CTA, in shared memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .mask_spec import BINS
from .spec import WARPGROUP_THREADS


class Histogram:
    """counts: (slices * BINS,) int32 in shared memory.

    A non-negative float grows with its bits read as an integer, so the bits of a score above an edge, shifted right,
    are a bin whose width is proportional to the score: 2^(23 - shift) bins per octave. What is added is
    ``score * unit + base`` rounded down: 1, or the score itself in fixed point. Sums of integers do not depend on their
    order, so the result is the same in every run.
    """

    def __init__(self, spec, route, counts, shift, unit, base):
        self.route = route
        self.counts, self.size = counts, spec.histogram_elements
        self.threads = WARPGROUP_THREADS * spec.consumer_warpgroups
        self.shift, self.unit, self.base = shift, unit, base

    @cute.jit
    def clear(self, thread: Int32):
        """All consumers; a barrier must follow."""
        counts = self.counts
        for i in cutlass.range(thread, self.size, self.threads, unroll=1):
            counts[i] = Int32(0)

    @cute.jit
    def add(self, index: Int32, score: Float32, edge: Int32):
        """Score of a slice of histogram ``index``; edge: bits of the float where its bins start."""
        above = score.bitcast(Int32) - edge
        place = above >> self.shift
        if above >= 0 and place < BINS:
            target = self.counts.iterator + (index * BINS + place)
            amount = Int32(score * self.unit + self.base)
            cute.arch.red(target.llvm_ptr, amount, op="add", dtype="s32", sem="relaxed", scope="cta")

    @cute.jit
    def write(self, mOut: cute.Tensor, thread: Int32):
        """All consumers, after a barrier. mOut: (B, H, blocks, BINS) int32; no other CTA has these blocks."""
        for i in cutlass.range(thread, self.route.slices * BINS, self.threads, unroll=1):
            block = self.route.first_block + i // BINS
            if block * self.route.slice_m < self.route.seqlen_q:
                mOut[self.route.batch, self.route.head, block, i % BINS] = self.counts[i]
