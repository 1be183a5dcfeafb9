# SPDX-License-Identifier: Apache-2.0
"""The masking left after gathering: columns past the list's end, and keys of a union that a block does not keep."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from .fragments import rows_and_columns
from .gather import Positions
from .spec import WARP_ROWS, WGMMA_ROWS


class TailMask:
    """Columns of S are the shared rows of a K tile, in the order of gather.Positions.

    A thread of a WGMMA accumulator owns the columns 8 a + 2 q + b with q = lane % 4 and b in {0, 1}. Position is linear
    in q, so the thread's share of the comparison moves to the right-hand side and the left one is known at compile
    time.
    """

    def __init__(self, spec):
        self.positions = Positions(spec)

    def position(self, j: int) -> int:
        """List position of a thread's j-th column, less its share 2 q stride."""
        return self.positions.of_row(8 * (j // 2) + j % 2)

    @cute.jit
    def apply(self, acc_S: cute.Tensor, num_valid: Int32, thread: Int32):
        """-inf for the columns past the first ``num_valid`` positions of the tile."""
        S = rows_and_columns(acc_S)
        limit = num_valid - thread % 4 * (2 * self.positions.stride())
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                S[r, j] = S[r, j] if self.position(j) < limit else -Float32.inf


class KeepBits:
    """Which keys of a union list the query block of this warp keeps: one word for a thread's columns of a tile.

    The plan holds a bit per (list position, block): word w of a list covers positions 32 w to 32 w + 31, the words of
    the union's blocks lie side by side. A warp owns 16 rows, so its block is one for all its threads. Of a tile, a
    thread needs the positions (8 d + 2 q + b) R + c with d < G / 8, b < 2, c < R: one field of 2 R bits per d.
    """

    def __init__(self, spec, mMembers, thread, warpgroup_index):
        self.spec = spec
        self.mMembers = mMembers
        self.quad_lane = thread % 4
        pieces = spec.tile_m // spec.union_blocks // WARP_ROWS
        self.member = (warpgroup_index * (WGMMA_ROWS // WARP_ROWS) + thread // 32) // pieces
        self.fields = spec.row_groups // 8
        self.field_bits = 2 * spec.rows_per_thread
        self.word = cute.make_rmem_tensor((1,), Int32)
        self.ahead = cute.make_rmem_tensor((1,), Int32)
        self.seen = cute.make_rmem_tensor((1,), Int32)
        self.first = cute.make_rmem_tensor((1,), Int64)

    @cute.jit
    def reset(self):
        self.seen.fill(0)

    @cute.jit
    def start(self, union: Int32, list_start: Int64):
        """Begin the list of a union, which owns one word more than its list needs; reads the first tile ahead."""
        self.first[0] = list_start * self.spec.slice_n // 32 + Int64(union)
        self.read_ahead(Int32(0))

    @cute.jit
    def read_ahead(self, tile: Int32):
        spec = self.spec
        word = Int32(0)
        bit = self.quad_lane * self.field_bits
        for d in cutlass.range_constexpr(self.fields):
            index = tile * (spec.tile_n // 32) + d * (8 * spec.rows_per_thread) // 32 + bit // 32
            raw = self.mMembers[self.first[0] + Int64(index), self.member]
            field = (raw >> bit % 32) & ((1 << self.field_bits) - 1)
            word = word | field << (d * self.field_bits)
        self.ahead[0] = word

    @cute.jit
    def advance(self, following: Int32):
        """Take the word read ahead and read that of tile ``following``."""
        self.word[0] = self.ahead[0]
        self.seen[0] = self.seen[0] | self.ahead[0]
        self.read_ahead(following)

    def bit(self, j: int) -> Int32:
        """Non-zero where this thread's j-th column is kept."""
        a, b = j // 2, j % 2
        place = a % self.fields * self.field_bits + b * self.spec.rows_per_thread + a // self.fields
        return self.word[0] & Int32((1 << place) - (1 << 32 if place == 31 else 0))

    @cute.jit
    def mask_row(self, S: cute.Tensor, r: cutlass.Constexpr[int]):
        """-inf for the keys that the block does not keep."""
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, j] = S[r, j] if self.bit(j) != 0 else -Float32.inf

    def any_seen(self):
        """Whether the block keeps any key of the list so far."""
        return cute.arch.vote_any_sync(self.seen[0] != 0)
