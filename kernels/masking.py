# SPDX-License-Identifier: Apache-2.0
"""The only masking left after gathering: columns of a packed tile past the list's end."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .fragments import rows_and_columns
from .gather import Positions


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
