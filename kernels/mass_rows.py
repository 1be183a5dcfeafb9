# SPDX-License-Identifier: Apache-2.0
"""Consumers that need no reduction over queries: bits of single (query, key) pairs, and log-sum-exp."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from .fragments import rows_and_columns
from .mask_spec import WORD_BITS
from .mass_consumer import ROWS, MassConsumer
from .softmax import Softmax


class RowScores(MassConsumer):
    """Slices of one query by one key, as pooled attention has them: a score is one probability."""

    def bind(self, histogram, mEdge, mOut):
        self.histogram, self.mEdge, self.mOut = histogram, mEdge, mOut

    @cute.jit
    def tile(self, acc: cute.Tensor, first: Int32, group: Int32, tile: Int32, part: Int32):
        mEdge, mOut = self.mEdge, self.mOut
        S = rows_and_columns(acc)
        _, limit = self.route.keys(first + group, tile)
        word = (first + group) * (self.spec.tile_n // WORD_BITS) + self.quad_lane
        for r in cutlass.range_constexpr(ROWS):
            index = self.first_row + 8 * r
            row = self.route.row(part) + index
            is_mine = row < self.route.row_end()
            edge = mEdge.element_type(0)
            if is_mine:
                edge = mEdge[self.route.batch, self.route.head, row]
            p = cute.math.exp2(S[r, None].load() * self.scale_log2 - self.lse[r], fastmath=True)
            S[r, None].store(p)
            if const_expr(self.spec.output == "bits"):
                bits = self.row_bits(S, r, edge, limit)
                if is_mine and self.quad_lane < self.spec.tile_n // WORD_BITS and word < self.route.end_word:
                    mOut[self.route.batch, self.route.head, row, word] = bits
            elif is_mine:
                self.count_row(S, r, edge, index, limit)

    @cute.jit
    def row_bits(self, S: cute.Tensor, r: cutlass.Constexpr[int], tau: Float32, limit: Int32) -> Int32:
        """Word ``quad_lane`` of a row's bits of one tile. The row's four lanes hold 8 of every 32 columns each."""
        mine = Int32(0)
        for w in cutlass.range_constexpr(self.spec.tile_n // WORD_BITS):
            bits = Int32(0)
            for i in cutlass.range_constexpr(8):
                keep = S[r, 8 * w + i] >= tau
                bits = bits | (Int32(1 << (8 * (i // 2) + i % 2)) if keep else Int32(0))
            bits = bits << (2 * self.quad_lane)
            bits = bits | cute.arch.shuffle_sync_bfly(bits, 1)
            bits = bits | cute.arch.shuffle_sync_bfly(bits, 2)
            legal = limit - w * WORD_BITS
            bits = bits if legal >= WORD_BITS else bits & ((1 << cutlass.max(legal, 0)) - 1)
            mine = bits if self.quad_lane == w else mine
        return mine

    @cute.jit
    def count_row(self, S: cute.Tensor, r: cutlass.Constexpr[int], edge: Int32, index: Int32, limit: Int32):
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            if 8 * (j // 2) + j % 2 + 2 * self.quad_lane < limit:
                self.histogram.add(index, S[r, j], edge)

    @cute.jit
    def start(self):
        if const_expr(self.spec.output == "histogram"):
            self.histogram.clear(self.thread)
            self.sync()

    @cute.jit
    def finish(self):
        if const_expr(self.spec.output == "histogram"):
            self.sync()
            self.histogram.write(self.mOut, self.thread)


class RowLse(MassConsumer):
    """Natural logarithm of each query's sum of exponentials, into the tensor that other kernels read it from."""

    def bind(self):
        self.softmax = Softmax(self.spec, self.scale_log2, keep=None)

    @cute.jit
    def start(self):
        self.softmax.reset()
        self.softmax.reference.fill(-Float32.inf)

    def read_lse(self, part: Int32):
        """It is what is wanted here."""

    @cute.jit
    def tile(self, acc: cute.Tensor, first: Int32, group: Int32, tile: Int32, part: Int32):
        S = rows_and_columns(acc)
        _, limit = self.route.keys(first + group, tile)
        limit = limit - 2 * self.quad_lane
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            for r in cutlass.range_constexpr(ROWS):
                S[r, j] = S[r, j] if 8 * (j // 2) + j % 2 < limit else -Float32.inf
        self.softmax.next_tile(acc)

    @cute.jit
    def finish(self):
        mLSE = self.mLSE
        for r in cutlass.range_constexpr(ROWS):
            total = self.softmax.row_total(r)
            row = self.route.row(0) + self.first_row + 8 * r
            if self.quad_lane == 0 and row < self.route.row_end():
                mLSE[self.route.batch, self.route.head, row] = self.softmax.lse(r, total)
