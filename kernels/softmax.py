# SPDX-License-Identifier: Apache-2.0
"""Softmax over the tiles of a list, in two exact modes.

Both compute P = 2^(s * scale_log2 - reference) in fp32 and keep per-thread row sums; a row's four lanes meet once, at
the end. They differ in the reference:

* ``exact``: the running row maximum (Milakov and Gimelshein's online softmax), O rescaled whenever it moves.
* ``fixed_ref``: the maximum of the first tile, for good. Softmax does not change under a shift, and bf16 has the
  exponent range of fp32, so P may be any power of two away from 1. The loop then has no maximum, no shuffles and no
  rescaling of O. A guard before each tile moves the reference of rows whose sum passed 2^60. A row whose sum passes
  2^100 inside one tile could overflow in P V before the sum does: it is poisoned (LSE = +inf) and a redo launch
  recomputes it with ``exact``. So is a row whose first tile has no finite score, and (LSE = NaN) one whose O is not
  finite.

Where blocks share a union list, P of a key that the row's block does not keep is 0. Under fixed_ref a row's reference
may then come from a key that it does not keep; a row whose sum stays below 2^-60 could have lost bits to underflow and
is poisoned too.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from .fragments import rows_and_columns
from .ptx import mul_bf16x2

LN2 = math.log(2.0)
GUARD_LOG2 = 60
OVERFLOW = 2.0**100
UNDERFLOW = 2.0**-60
BF16_PAIR_ONE = 0x3F803F80
BF16_PAIR_SHIFT = 0x21802180  # 2^-60 twice
assert (0x2180 >> 7) - 127 == -GUARD_LOG2  # a bf16 is sign, 8 exponent bits, 7 mantissa bits

ROWS = 2  # rows of a thread in a 64-row accumulator


class Softmax:
    """State of one consumer thread: the reference of each of its rows and their partial sums.

    ``FwdSpec.scale_reference``: fixed_ref keeps the reference in log2 units ("once") or in raw score units, which costs
    two FMULs per tile and makes ptxas issue all FFMAs of a row before its first EX2. Measured on an H200: per_tile wins
    2 to 3 % at M = 64 and M = 192 and loses 3 % at M = 128 with Q in registers. exact keeps raw score units.
    """

    def __init__(self, spec, scale_log2: Float32, keep):
        self.fixed = spec.softmax == "fixed_ref"
        self.scale_log2 = scale_log2
        self.scaled = self.fixed and spec.scale_reference == "once"
        self.reference = cute.make_rmem_tensor((ROWS,), Float32)
        self.total = cute.make_rmem_tensor((ROWS,), Float32)
        self.rescale = cute.make_rmem_tensor((ROWS,), Float32)
        self.keep = keep

    @cute.jit
    def reset(self):
        self.reference.fill(0.0)
        self.total.fill(0.0)
        if const_expr(self.keep is not None):
            self.keep.reset()

    @cute.jit
    def first_tile(self, acc_S: cute.Tensor):
        """Scores -> P of the first tile; sets the reference."""
        S = rows_and_columns(acc_S)
        if const_expr(self.keep is not None):
            tops = [self.row_max(S, r) for r in range(ROWS)]
            self.keep.mask(S)
        for r in cutlass.range_constexpr(ROWS):
            top = self.row_max(S, r)
            if const_expr(self.keep is not None and self.fixed):
                # A row that keeps none of these keys takes its reference from all of them: better than nothing.
                top = tops[r] if top == -Float32.inf else top
            finite_top = Float32(0.0) if top == -Float32.inf else top
            shift = finite_top * self.scale_log2
            p = cute.math.exp2(S[r, None].load() * self.scale_log2 - shift, fastmath=True)
            S[r, None].store(p)
            self.total[r] = p.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
            if const_expr(self.fixed):
                self.reference[r] = shift if const_expr(self.scaled) else finite_top
                self.total[r] = Float32.inf if top == -Float32.inf else self.total[r]
            else:
                self.reference[r] = top

    @cute.jit
    def next_tile(self, acc_S: cute.Tensor):
        """Scores -> P of a later tile."""
        S = rows_and_columns(acc_S)
        if const_expr(self.keep is not None):
            self.keep.mask(S)
        for r in cutlass.range_constexpr(ROWS):
            if const_expr(self.fixed):
                shift, carried = self.shift(r), self.total[r]
            else:
                before = self.reference[r]
                top = cute.arch.fmax(self.row_max(S, r), before)
                self.reference[r] = top
                finite_top = Float32(0.0) if top == -Float32.inf else top
                shift = finite_top * self.scale_log2
                self.rescale[r] = cute.math.exp2((before - finite_top) * self.scale_log2, fastmath=True)
                carried = self.total[r] * self.rescale[r]
            p = cute.math.exp2(S[r, None].load() * self.scale_log2 - shift, fastmath=True)
            self.total[r] = p.reduce(cute.ReductionOp.ADD, carried, 0)
            S[r, None].store(p)

    @cute.jit
    def row_max(self, S: cute.Tensor, r: cutlass.Constexpr[int]) -> Float32:
        """Maximum of a row over its four lanes. Four chains, because FMNMX has a latency of several cycles."""
        chains = [S[r, 0], S[r, 1], S[r, 2], S[r, 3]]
        for j in cutlass.range_constexpr(4, cute.size(S, mode=[1]), 4):
            for u in cutlass.range_constexpr(4):
                chains[u] = cute.arch.fmax(chains[u], S[r, j + u])
        top = cute.arch.fmax(cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3]))
        top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 1))
        return cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 2))

    @cute.jit
    def guard(self, acc_O: cute.Tensor, tOrP: cute.Tensor):
        """fixed_ref, between two tiles: move the reference of rows whose sum passed 2^60. Taken almost never.

        A row's four lanes share the reference, so they decide together: their sum decides, not their parts.
        """
        high = Float32(2.0**GUARD_LOG2)
        reference, totals = self.reference, self.total
        step = Float32(GUARD_LOG2) if const_expr(self.scaled) else Float32(GUARD_LOG2) / self.scale_log2
        if cute.arch.vote_any_sync(totals[0] > high or totals[1] > high):
            P = cute.recast_tensor(tOrP, Int32)
            O_rows = rows_and_columns(acc_O)
            for r in cutlass.range_constexpr(ROWS):
                row_total = self.row_total(r)
                hit = row_total > high
                factor = Float32(2.0**-GUARD_LOG2) if hit else Float32(1.0)
                pair = Int32(BF16_PAIR_SHIFT) if hit else Int32(BF16_PAIR_ONE)
                reference[r] = reference[r] + (step if hit else Float32(0.0))
                totals[r] = Float32.inf if row_total > OVERFLOW else totals[r] * factor
                O_rows[r, None].store(O_rows[r, None].load() * factor)
                for i in cutlass.range_constexpr(r, cute.size(P), ROWS):
                    P[i] = mul_bf16x2(P[i], pair)

    @cute.jit
    def rescale_output(self, acc_O: cute.Tensor):
        """exact, after P V of the tile before: bring O to the new reference."""
        O_rows = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(ROWS):
            O_rows[r, None].store(O_rows[r, None].load() * self.rescale[r])

    @cute.jit
    def row_total(self, r: cutlass.Constexpr[int]) -> Float32:
        """Sum of a row over its four lanes. A lane that has been poisoned (+inf) poisons the row."""
        total = self.total[r] + cute.arch.shuffle_sync_bfly(self.total[r], 1)
        return total + cute.arch.shuffle_sync_bfly(total, 2)

    @cute.jit
    def finalize(self, acc_O: cute.Tensor, lse: cute.Tensor):
        """Normalise O and write the rows' natural-log LSE into ``lse`` (ROWS,). No kept key: O = 0, LSE = -inf."""
        O_rows = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(ROWS):
            if const_expr(self.fixed):
                # P up to 2^100 times a large V may overflow where the result does not: 0 * inf makes such a row NaN.
                self.total[r] += (O_rows[r, None].load() * 0.0).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
            total = self.row_total(r)
            if const_expr(self.fixed):
                total = Float32.inf if total > OVERFLOW else total
                if const_expr(self.keep is not None):
                    total = Float32.inf if self.keep.any_seen() and total < UNDERFLOW else total
            empty = total == 0.0
            inverse = cute.arch.rcp_approx(Float32(1.0) if empty else total)
            O_rows[r, None].store(O_rows[r, None].load() * inverse)
            lse[r] = -Float32.inf if empty else self.lse(r, total)

    def shift(self, r: int) -> Float32:
        """Reference of row r in log2 units."""
        return self.reference[r] if self.scaled else self.reference[r] * self.scale_log2

    def lse(self, r: int, total: Float32) -> Float32:
        return (self.shift(r) + cute.math.log2(total, fastmath=True)) * Float32(LN2)
