# SPDX-License-Identifier: Apache-2.0
"""Shared memory: swizzled operand layouts, the storage struct, and the swizzle as address arithmetic."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_utils
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum

from .spec import WGMMA_ROWS

OPERAND_ALIGN_BYTES = 1024  # a 128-byte swizzle atom spans 8 rows, and TMA swizzles by absolute address


def element_type(spec):
    return cutlass.BFloat16 if spec.dtype == "bf16" else cutlass.Float16


class OperandLayouts(NamedTuple):
    """Swizzled layouts (rows, D, stages): Q and O in one 64-row slab per consumer warpgroup, K and V in tiles."""

    q: cute.ComposedLayout
    kv: cute.ComposedLayout


def swizzle_atom(spec):
    kind = sm90_utils.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, element_type(spec), spec.head_dim)
    return warpgroup.make_smem_layout_atom(kind, element_type(spec))


def operand_tile(spec, rows: int) -> cute.ComposedLayout:
    """Swizzled layout (rows, D) of one operand tile, D contiguous."""
    return cute.tile_to_shape(swizzle_atom(spec), (rows, spec.head_dim), order=(0, 1))


def operand_layouts(spec, atoms_first: bool = False) -> OperandLayouts:
    """atoms_first: the atoms of a row lie side by side in K and V tiles, as boxes of 8 rows want it."""

    def staged(rows, stages, order=(0, 1, 2)):
        return cute.tile_to_shape(swizzle_atom(spec), (rows, spec.head_dim, stages), order=order)

    return OperandLayouts(
        q=staged(WGMMA_ROWS, spec.consumer_warpgroups),
        kv=staged(spec.tile_n, spec.kv_stages, (1, 0, 2) if atoms_first else (0, 1, 2)),
    )


def storage_struct(spec, layouts: OperandLayouts):
    """The CTA's shared memory. Its size is ``spec.smem_bytes()``."""
    dtype = element_type(spec)
    out_elements = cute.cosize(layouts.q) if spec.stages_output else 0
    operand = lambda n: cute.struct.Align[cute.struct.MemRange[dtype, n], OPERAND_ALIGN_BYTES]  # noqa: E731

    @cute.struct
    class Storage:
        barriers: cute.struct.MemRange[Int64, spec.num_barriers]
        flags: cute.struct.MemRange[Int32, spec.num_flags]
        sO: operand(out_elements)
        sQ: operand(cute.cosize(layouts.q))
        sK: operand(cute.cosize(layouts.kv))
        sV: operand(cute.cosize(layouts.kv))

    return Storage


@cute.jit
def swizzled_chunk(spec: cutlass.Constexpr, row: Int32, chunk: Int32) -> Int32:
    """Place of 16-byte ``chunk`` of a row in its swizzle atom: address bits 4.. xor bits 7.. (as TMA and WGMMA do)."""
    if const_expr(spec.swizzle_bytes == 128):
        place = chunk ^ (row % 8)
    else:
        place = chunk ^ ((row // 2) % 4)
    return place
