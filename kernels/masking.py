# SPDX-License-Identifier: Apache-2.0
"""The only masking left after gathering: columns of a packed tile past the list's end."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .fragments import rows_and_columns


class TailMask:
    """Column c of a packed tile holds list position (c % row_groups) * R + c // row_groups (see gather.py).

    A thread of a WGMMA accumulator owns the columns 8 a + 2 q + b with q = lane % 4 and b in {0, 1}, so its share of
    the comparison moves to the right-hand side and what is left on the left is known at compile time.
    """

    def __init__(self, spec):
        self.groups, self.rows = spec.row_groups, spec.rows_per_thread

    def position(self, j: int) -> int:
        """List position of a thread's j-th column, less 2 q R."""
        column = 8 * (j // 2) + j % 2
        return column % self.groups * self.rows + column // self.groups

    @cute.jit
    def apply(self, acc_S: cute.Tensor, num_valid: Int32, thread: Int32):
        S = rows_and_columns(acc_S)
        limit = num_valid - thread % 4 * (2 * self.rows)
        for j in cutlass.range_constexpr(cute.size(S, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                S[r, j] = S[r, j] if self.position(j) < limit else -Float32.inf
