# SPDX-License-Identifier: Apache-2.0
"""Which kernel a spec compiles to, and stand-ins for its arguments: every extent and stride symbolic but D.

Extents that must agree share a symbol, which TVM-FFI then checks at every call. The DSL is imported on use.
"""

from __future__ import annotations

from .kernels.copy_spec import ROW_WORDS, CopySpec
from .kernels.mask_spec import HALVES_SUMS, PARTS_SUMS, CompactSpec, HalfListSpec, MassSpec, MemberSpec, PartListSpec
from .kernels.spec import PARTS_BLOCKS, FwdSpec

STRIDE_ELEMS = 8  # rows of q, k, v, out start on 16 bytes
OPERAND_ALIGN_BYTES = 16
LIST_ALIGN_BYTES = 32


def kernel_of(spec) -> tuple:
    """(kernel object, stand-ins for the arguments of its ``__call__``)."""
    if isinstance(spec, FwdSpec):
        from .kernels.fwd_sm90 import FgAttnForwardSm90

        return FgAttnForwardSm90(spec), _forward(spec)
    if isinstance(spec, CompactSpec):
        from .kernels import compact_sm90

        if spec.step == "count":
            return compact_sm90.CountBits(), _count_bits()
        return compact_sm90.WriteIds(), _write_ids()
    if isinstance(spec, PartListSpec):
        from .kernels import part_lists_sm90

        kernel = part_lists_sm90.MeasureParts() if spec.step == "measure" else part_lists_sm90.WriteParts()
        return kernel, _part_lists(spec)
    if isinstance(spec, HalfListSpec):
        from .kernels import half_lists_sm90

        kernel = half_lists_sm90.MeasureHalves() if spec.step == "measure" else half_lists_sm90.WriteHalves()
        return kernel, _half_lists(spec)
    if isinstance(spec, MemberSpec):
        from .kernels.members_sm90 import PackMembers

        return PackMembers(spec), _members(spec)
    if isinstance(spec, MassSpec):
        from .kernels.mass_sm90 import MassSm90

        return MassSm90(spec), _mass(spec)
    if isinstance(spec, CopySpec):
        from .kernels.copy_sm90 import CopyRate

        return CopyRate(spec), _copies(spec)
    raise TypeError(f"no kernel is made from a {type(spec).__name__}")


def _element(dtype: str):
    import cutlass

    return cutlass.BFloat16 if dtype == "bf16" else cutlass.Float16


def _symbols(count: int) -> list:
    from cutlass import cute

    return [cute.sym_int() for _ in range(count)]


def _activation(dtype: str, *shape):
    """A 16-bit (B, S, H, D) tensor with D last and contiguous."""
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_tensor

    strides = tuple(cute.sym_int64(divisibility=STRIDE_ELEMS) for _ in range(3))
    return make_fake_tensor(_element(dtype), shape, (*strides, 1), assumed_align=OPERAND_ALIGN_BYTES)


def _packed(element, shape, align: int):
    """A contiguous tensor."""
    from cutlass.cute.runtime import make_fake_compact_tensor

    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=align)


def _stream():
    """torch's current stream, which TVM-FFI fills in."""
    from cutlass.cute.runtime import make_fake_stream

    return make_fake_stream(use_tvm_ffi_env_stream=True)


def _forward(spec: FwdSpec) -> list:
    from cutlass import Float32, Int32

    batch, seqlen_q, seqlen_k, heads, kv_heads, num_ids, num_work, num_words, num_unions = _symbols(9)
    unions = (None, None)
    if spec.union_blocks > 1:
        blocks = _packed(Int32, (num_unions, spec.union_blocks), 4)
        if spec.parts:
            unions = [_packed(Int32, (num_unions, spec.union_blocks, num_words), 4), blocks]
        else:
            unions = [_packed(Int32, (num_words, spec.union_blocks), 4), blocks]
    return [
        _activation(spec.dtype, batch, seqlen_q, heads, spec.head_dim),  # q
        _activation(spec.dtype, batch, seqlen_k, kv_heads, spec.head_dim),  # k
        _activation(spec.dtype, batch, seqlen_k, kv_heads, spec.head_dim),  # v
        _activation(spec.dtype, batch, seqlen_q, heads, spec.head_dim),  # out
        _packed(Float32, (batch, heads, seqlen_q), 4),  # lse
        _packed(Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
        _packed(Int32, (num_work, 4), OPERAND_ALIGN_BYTES),  # work descriptors
        1.0,  # softmax_scale
        *(1, 1, 1, 1),  # slice_m, ctas_per_block, num_ctas, ctas_per_wave: types only, the values stay dynamic
        *unions,  # members, blocks
        _stream(),
    ]


def _count_bits() -> list:
    from cutlass import Int32, Int64

    rows, words = _symbols(2)
    return [
        _packed(Int32, (rows, words), 4),  # bits
        _packed(Int64, (rows,), 8),  # counts
        _packed(Int32, (rows,), 4),  # keys
        *(1, 1, 1),  # last_column, slice_n, shortfall
        _stream(),
    ]


def _write_ids() -> list:
    from cutlass import Int32, Int64

    rows, words, num_ids = _symbols(3)
    return [
        _packed(Int32, (rows, words), 4),  # bits
        _packed(Int64, (rows,), 8),  # offset
        _packed(Int64, (rows,), 8),  # counts
        _packed(Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
        _stream(),
    ]


def _part_lists(spec: PartListSpec) -> list:
    from cutlass import Int32, Int64

    rows, words, lists, num_ids, width = _symbols(5)
    found = [
        _packed(Int32, (rows, words), 4),  # bits
        _packed(Int32, (lists, PARTS_BLOCKS), 4),  # blocks
        _packed(Int32, (lists, PARTS_SUMS), 4),  # what is measured
    ]
    if spec.step == "write":
        found += [
            _packed(Int64, (lists,), 8),  # offset
            _packed(Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
            _packed(Int32, (lists, PARTS_BLOCKS, width), 4),  # members
        ]
    return [*found, 1, _stream()]  # blocks_q


def _half_lists(spec: HalfListSpec) -> list:
    from cutlass import Int32, Int64

    rows, words, lists, num_ids, num_words = _symbols(5)
    found = [
        _packed(Int32, (rows, words), 4),  # bits
        _packed(Int32, (lists, spec.union_blocks), 4),  # blocks
        _packed(Int32, (lists, HALVES_SUMS), 4),  # what is measured
    ]
    if spec.step == "write":
        found += [
            _packed(Int64, (lists,), 8),  # offset
            _packed(Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
            _packed(Int32, (num_words, spec.union_blocks), 4),  # members
        ]
    return [*found, 1, _stream()]  # blocks_q


def _members(spec: MemberSpec) -> list:
    from cutlass import Int32, Int64

    unions, words, num_ids, num_words = _symbols(4)
    return [
        _packed(Int32, (unions, spec.union_blocks, words), 4),  # mask rows
        _packed(Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
        _packed(Int64, (unions,), 8),  # offset
        _packed(Int32, (unions,), 4),  # keys
        _packed(Int64, (unions,), 8),  # starts
        _packed(Int32, (num_words, spec.union_blocks), 4),  # members
        1,  # slice_n
        _stream(),
    ]


def _mass(spec: MassSpec) -> list:
    from cutlass import Float32, Int32

    batch, seqlen_q, seqlen_k, heads, kv_heads, blocks, width = _symbols(7)
    edge = out = None
    if spec.output != "lse":
        edge = _packed(Float32 if spec.output == "bits" else Int32, (batch, heads, blocks), 4)
        out = _packed(Int32, (batch, heads, blocks, width), 4)
    return [
        _activation(spec.dtype, batch, seqlen_q, heads, spec.head_dim),  # q
        _activation(spec.dtype, batch, seqlen_k, kv_heads, spec.head_dim),  # k
        _packed(Float32, (batch, heads, seqlen_q), 4),  # lse
        edge,
        out,
        *(1.0, 1, 1.0, 1.0),  # softmax_scale, bin_shift, weight_unit, weight_base
        *(1,) * 9,  # words_per_cta and the fields of Cut
        _stream(),
    ]


def _copies(spec: CopySpec) -> list:
    from cutlass import Int32

    rows, ctas = _symbols(2)
    return [
        _packed(Int32, (rows, ROW_WORDS), OPERAND_ALIGN_BYTES),  # rows
        _packed(Int32, (ctas, spec.stages * spec.rows * ROW_WORDS), 4),  # what arrived last
        *(1, 1),  # steps, places
        _stream(),
    ]
