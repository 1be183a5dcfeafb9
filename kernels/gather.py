# SPDX-License-Identifier: Apache-2.0
"""The asynchronous gather: list ids -> key rows -> 16-byte cp.async into a packed, swizzled tile.

A producer warpgroup copies G = ``row_groups`` rows side by side (16 for 128-byte swizzle atoms, 32 for 64-byte ones),
each by ``lanes_per_row`` neighbouring threads; group g writes the shared rows m * G + g, m < R = ``rows_per_thread``.
That makes its swizzle one XOR for the whole kernel and every further shared offset an immediate. Which list position
goes to which shared row is free, because softmax does not care about the order of keys, so each slice_n takes the order
in which ids are cheapest to read (``Positions``).
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from .ptx import cp_async_16, cp_async_16_or_zero, unsigned_divmod
from .smem import swizzled_chunk
from .spec import BOX_ROWS


class Positions:
    """List positions of a tile's shared rows: where ids come from and how segments of slice_n keys expand to rows.

    Blocked: shared row m * G + g holds position g * R + m, so a thread's positions are neighbours.

    * ``ids``: R is a multiple of slice_n: R / slice_n neighbouring ids, loaded as vectors.
    * ``one``: slice_n is a multiple of R: a thread's rows lie inside one segment.
    * ``each``: anything else (3, 5, 100, ...): one id per row, found by division.
    * ``few``: the same where an id and a division for each of so many rows spilled: the ids of the segments that R
      positions can touch, and one division; a row is in one of two neighbouring segments, wherever the first one is.

    Interleaved: shared row m * G + g holds position m * G + g, so a row's group alone decides where in a segment it is.

    * ``box``: TMA places the segments' rows as they are (kv_loads boxes); nothing expands.
    * ``spread``: slice_n divides G, while R fits neither way (tile_n 80 with slice_n 2 or 8): one id per row at a
      constant stride. Found by division instead, they cost 4 % of the M = 192 kernel on an H200.

    By quarters, where keys have keep-bits: a consumer thread, which owns every fourth pair of columns, holds a quarter
    of the tile's positions in their order, so that its keep-bits lie side by side in a word of the plan.

    * ``each`` again: one id per row, for slice_n 1 at a constant stride.
    """

    def __init__(self, spec):
        self.groups, self.rows, seg = spec.row_groups, spec.rows_per_thread, spec.slice_n
        self.quarter = spec.tile_n // 4
        self.order = "blocked"
        if spec.keep_bits:
            self.expansion, self.ids_per_thread, self.order = "each", self.rows, "quarters"
        elif spec.kv_loads == "boxes":
            self.expansion, self.ids_per_thread, self.order = "box", 0, "interleaved"
        elif self.rows % seg == 0:
            self.expansion, self.ids_per_thread = "ids", self.rows // seg
        elif seg % self.rows == 0:
            self.expansion, self.ids_per_thread = "one", 1
        elif self.groups % seg == 0:
            self.expansion, self.ids_per_thread, self.order = "spread", self.rows, "interleaved"
        elif self.rows > (8 if spec.producer_registers > 32 else 4 if spec.redo else 6):
            self.expansion, self.ids_per_thread = "few", (self.rows - 2) // seg + 2
        else:
            self.expansion, self.ids_per_thread = "each", self.rows

    def of_line(self, m: int) -> int:
        """Positions from a group's first shared row, number g, to its row m * G + g."""
        return m * {"blocked": 1, "interleaved": self.groups, "quarters": self.groups // 4}[self.order]

    def of_group(self, group):
        """List position inside a tile of shared row ``group`` < G."""
        if self.order == "blocked":
            return group * self.rows
        if self.order == "interleaved":
            return group
        return group % 8 // 2 * self.quarter + group // 8 * 2 + group % 2

    def of_column(self, j: int) -> int:
        """List position of a consumer thread's j-th column, row 8 (j // 2) + 2 q + j % 2, less ``of_lane(q)``."""
        m, g = divmod(8 * (j // 2) + j % 2, self.groups)
        return self.of_line(m) + self.of_group(g)

    def of_lane(self, quad_lane):
        """A consumer thread's share of its columns' positions. quad_lane: its lane % 4."""
        return quad_lane * {"blocked": 2 * self.rows, "interleaved": 2, "quarters": self.quarter}[self.order]


class Gather:
    """One producer thread's share of every K and V tile."""

    def __init__(self, spec):
        self.spec = spec
        self.positions = Positions(spec)
        self.expansion = self.positions.expansion
        self.ids_per_thread = self.positions.ids_per_thread
        # An L2 prefetch hint wider than the row would drag in a neighbour that may not be listed.
        row_bytes = spec.atoms_per_row * spec.swizzle_bytes
        self.l2_prefetch_bytes = 256 if row_bytes % 256 == 0 else 128 if row_bytes % 128 == 0 else 64

    def group(self, thread):
        return thread // self.spec.lanes_per_row

    def chunk(self, thread):
        return thread % self.spec.lanes_per_row

    @cute.jit
    def smem_offset(self, thread: Int32) -> Int32:
        """Byte offset of this thread's first chunk inside a tile."""
        g = self.group(thread)
        line = g
        if const_expr(self.spec.atoms_first):
            line = g + g // BOX_ROWS * (BOX_ROWS * (self.spec.atoms_per_row - 1))
        return line * self.spec.swizzle_bytes + swizzled_chunk(self.spec, g, self.chunk(thread)) * 16

    @cute.jit
    def load_ids(self, ids: cute.Tensor, mList: cute.Tensor, tile: Int32, group: Int32):
        """Read the ids behind this thread's rows of ``tile``. mList: (n,) int32, from the list's start on."""
        count = self.ids_per_thread
        if const_expr(self.expansion == "ids"):
            # Lists start on 32 bytes and a thread's share is a whole number of vectors into them. The share comes first
            # in the sum: it does not change from tile to tile, and the producer has no register to spare.
            address = mList.iterator.toint() + Int64(group) * (4 * count)
            address = address + Int64(tile) * (4 * count * self.spec.row_groups)
            first = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4 * math.gcd(count, 4))
            cute.autovec_copy(cute.make_tensor(first, cute.make_layout(count)), ids)
        elif const_expr(self.expansion == "spread"):
            for m in cutlass.range_constexpr(count):
                segment, _ = self.spread(tile, m, group)
                ids[m] = mList[segment]
        elif const_expr(self.expansion == "few"):
            first, _ = self.split(tile, group)
            for j in cutlass.range_constexpr(count):
                ids[j] = mList[first + j]
        else:
            position = tile * self.spec.tile_n + self.positions.of_group(group)
            for m in cutlass.range_constexpr(count):
                ids[m] = mList[unsigned_divmod(position + self.positions.of_line(m), self.spec.slice_n)[0]]

    def spread(self, tile: Int32, m: int, group: Int32) -> tuple:
        """(segment in the list, key inside it) of a thread's m-th row of ``tile``."""
        spec = self.spec
        mine, within = unsigned_divmod(group, spec.slice_n)
        line = tile * spec.rows_per_thread + m  # of G positions, which hold G / slice_n segments
        return line * (spec.row_groups // spec.slice_n) + mine, within

    def split(self, tile: Int32, group: Int32) -> tuple:
        """(segment in the list, key inside it) of a thread's first row of ``tile``."""
        return unsigned_divmod(tile * self.spec.tile_n + self.positions.of_group(group), self.spec.slice_n)

    @cute.jit
    def expand(self, rows: cute.Tensor, ids: cute.Tensor, tile: Int32, group: Int32, last_key: Int32):
        """Ids -> key rows, clamped into the sequence: an id from outside reads a wrong row, never outside memory."""
        seg = self.spec.slice_n
        position = tile * self.spec.tile_n + self.positions.of_group(group)
        for m in cutlass.range_constexpr(self.spec.rows_per_thread):
            if const_expr(self.expansion == "ids"):
                row = ids[m // seg] * seg + m % seg
            elif const_expr(self.expansion == "one"):
                row = ids[0] * seg + unsigned_divmod(position, seg)[1] + m
            elif const_expr(self.expansion == "spread"):
                row = ids[m] * seg + self.spread(tile, m, group)[1]
            elif const_expr(self.expansion == "few"):
                place, step = divmod(m, seg)
                within = self.split(tile, group)[1] + step
                row = ids[place] * seg + within
                if const_expr(step > 0):
                    row = row if within < seg else ids[place + 1] * seg + (within - seg)
            else:
                row = ids[m] * seg + unsigned_divmod(position + self.positions.of_line(m), seg)[1]
            rows[m] = cutlass.min(cutlass.max(row, 0), last_key)

    @cute.jit
    def copy_tile(
        self,
        smem_addr: Int32,  # of this thread's first chunk in the stage
        global_addr: Int64,  # of this thread's first chunk of row 0
        row_bytes: Int32,
        rows: cute.Tensor,  # (R,) int32
        group: Int32,
        num_valid: Int32,  # list positions of this tile that hold a key
        whole: cutlass.Constexpr[bool],  # every position does
    ):
        """Issue the copies of one tile. Positions past the list's end are zero-filled and read nothing."""
        spec = self.spec
        num_mine = num_valid - self.positions.of_group(group)
        # Lines of a swizzle atom from row to row of this thread, and from atom to atom of a row.
        row_step, atom_step = spec.row_groups, spec.tile_n
        if const_expr(spec.atoms_first):
            row_step, atom_step = spec.row_groups * spec.atoms_per_row, BOX_ROWS
        for m in cutlass.range_constexpr(spec.rows_per_thread):
            source = global_addr + Int64(rows[m]) * Int64(row_bytes)
            for a in cutlass.range_constexpr(spec.atoms_per_row):
                target = smem_addr + (m * row_step + a * atom_step) * spec.swizzle_bytes
                chunk = source + a * spec.swizzle_bytes
                if const_expr(whole):
                    cp_async_16(target, chunk, self.l2_prefetch_bytes)
                else:
                    num_bytes = Int32(16) if self.positions.of_line(m) < num_mine else Int32(0)
                    cp_async_16_or_zero(target, chunk, num_bytes, self.l2_prefetch_bytes)
