# SPDX-License-Identifier: Apache-2.0
"""Views of WGMMA register fragments, and one WGMMA chain."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import warpgroup

from .ptx import cvt_pair


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), M, N) accumulator -> ((2, M), (2, N/8, N)): rows of the thread x its columns."""
    (s, m, n), (ds, dm, dn) = acc.layout.shape, acc.layout.stride
    layout = cute.make_layout(((s[1], m), (s[0], s[2], n)), stride=((ds[1], dm), (ds[0], ds[2], dn)))
    return cute.make_tensor(acc.iterator, layout)


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), M, N) accumulator -> ((2, 2, 2), M, (N/16, N)): the A fragment of the next product."""
    divided = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    (s, m, n), (ds, dm, dn) = divided.shape, divided.stride
    layout = cute.make_layout(
        ((s[0], s[1], s[2][0]), m, (s[2][1], n)), stride=((ds[0], ds[1], ds[2][0]), dm, (ds[2][1], dn))
    )
    return cute.make_tensor(acc.iterator, layout)


@cute.jit
def convert(source: cute.Tensor, target: cute.Tensor, dtype: cutlass.Constexpr):
    """fp32 fragment -> packed 16-bit fragment of the same element order."""
    pairs = cute.recast_tensor(target, Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cvt_pair(source[2 * i], source[2 * i + 1], dtype)


@cute.jit
def multiply(tiled_mma: cute.TiledMma, acc, a, b, zero_init: cutlass.Constexpr[bool]):
    """Issue acc (+)= a b as one committed WGMMA group; the caller waits for it."""
    warpgroup.fence()
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, not zero_init)
    for k in cutlass.range_constexpr(cute.size(a.shape[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
