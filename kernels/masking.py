# SPDX-License-Identifier: Apache-2.0
"""The masking left after gathering: columns past the list's end, and keys of a union that a block does not keep."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from .fragments import rows_and_columns
from .gather import Positions
from .spec import HALVES_TILE_WORDS, UNION_TILES_N, WARP_ROWS, WGMMA_ROWS


class TailMask:
    """Columns of S are the shared rows of a K tile, in the order of gather.Positions.

    A thread of a WGMMA accumulator owns the columns 8 a + 2 q + b with q = lane % 4 and b in {0, 1}. Position is linear
    in q, so the thread's share of the comparison moves to the right-hand side and the left one is known at compile
    time.
    """

    def __init__(self, spec):
        self.positions = Positions(spec)

    @cute.jit
    def apply(self, acc_S: cute.Tensor, num_valid: Int32, thread: Int32):
        """-inf for the columns past the first ``num_valid`` positions of the tile."""
        S = rows_and_columns(acc_S)
        limit = num_valid - self.positions.of_lane(thread % 4)
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                S[r, j] = S[r, j] if self.positions.of_column(j) < limit else -Float32.inf


class KeepBits:
    """Which keys of a union list the query block of this warp keeps: one word for a thread's columns of a tile.

    The plan holds a bit per (list position, block): word w of a list covers positions 32 w to 32 w + 31, the words of
    the union's blocks lie side by side. A warp owns 16 rows, so its block is one for all its threads. A thread's
    columns are a quarter of a tile's positions in their order (gather.Positions): a whole word, or half of one.
    """

    def __init__(self, spec, mMembers, thread, warpgroup_index, halves):
        self.spec = spec
        self.halves = halves
        self.mMembers = mMembers
        pieces = spec.tile_m // spec.union_blocks // WARP_ROWS
        self.member = (warpgroup_index * (WGMMA_ROWS // WARP_ROWS) + thread // 32) // pieces
        self.first_bit = thread % 4 * (spec.tile_n // 4)
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
        if const_expr(self.halves is None):
            self.first[0] = list_start * self.spec.slice_n // 32 + Int64(union)
        else:
            self.first[0] = self.halves.first[0] + 2  # the keys of the halves, and where the first tile is
        self.read_ahead(Int32(0))

    @cute.jit
    def read_ahead(self, tile: Int32):
        tile_words = HALVES_TILE_WORDS if const_expr(self.spec.halves) else self.spec.tile_n // 32
        index = self.first[0] + Int64(tile * tile_words + self.first_bit // 32)
        word = self.mMembers[index, self.member]
        if const_expr(self.spec.tile_n < UNION_TILES_N[0]):
            word = (word >> self.first_bit % 32) & ((1 << self.spec.tile_n // 4) - 1)
        self.ahead[0] = word

    @cute.jit
    def advance(self, following: Int32):
        """Take the word read ahead and read that of tile ``following``."""
        self.word[0] = self.ahead[0]
        self.seen[0] = self.seen[0] | self.ahead[0]
        self.read_ahead(following)

    @cute.jit
    def mask(self, S: cute.Tensor):
        """-inf for the keys that the block does not keep. S: (rows, columns) of this thread."""
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            keep = self.word[0] & Int32((1 << j) - (1 << 32 if j == 31 else 0))
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                S[r, j] = S[r, j] if keep != 0 else -Float32.inf

    def any_seen(self):
        """Whether the block keeps any key of the list so far."""
        return cute.arch.vote_any_sync(self.seen[0] != 0)
