# SPDX-License-Identifier: Apache-2.0
"""Instructions that the CuTe DSL has no exact form for, each with its section of the PTX ISA."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr


@cute.jit
def cp_async_16(smem_addr: Int32, global_addr: Int64, l2_prefetch_bytes: cutlass.Constexpr[int]):
    """Copy 16 bytes global -> shared, asynchronously, around the L1 (PTX ISA: cp.async, ``.cg``).

    A generic-proxy write: WGMMA may read it only after a proxy fence.
    """
    cute.arch.inline_ptx(
        f"cp.async.cg.shared.global.L2::{l2_prefetch_bytes}B [{{$r0}}], [{{$r1}}], 16;",
        read_only_args=[smem_addr, global_addr],
    )


@cute.jit
def cp_async_16_or_zero(
    smem_addr: Int32, global_addr: Int64, num_bytes: Int32, l2_prefetch_bytes: cutlass.Constexpr[int]
):
    """As ``cp_async_16``, but reads only ``num_bytes`` (0 or 16) and fills the rest with zeros (cp.async, src-size)."""
    cute.arch.inline_ptx(
        f"cp.async.cg.shared.global.L2::{l2_prefetch_bytes}B [{{$r0}}], [{{$r1}}], 16, {{$r2}};",
        read_only_args=[smem_addr, global_addr, num_bytes],
    )


@cute.jit
def cvt_pair(lo: Float32, hi: Float32, dtype: cutlass.Constexpr) -> Int32:
    """Two fp32 -> one packed pair of 16-bit floats, round to nearest even (PTX ISA: cvt).

    ``Tensor.to`` is scalarised by the DSL for some fragment shapes; this form is one F2FP per pair.
    """
    pair = "bf16x2" if const_expr(dtype is cutlass.BFloat16) else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{pair}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Int32], read_only_args=[lo, hi]
    )


@cute.jit
def mul_bf16x2(a: Int32, b: Int32) -> Int32:
    """Product of two packed bf16 pairs (PTX ISA: mul, half precision instructions)."""
    return cute.arch.inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b])


@cute.jit
def mbarrier_wait(barrier_addr: Int32, phase: Int32):
    """Spin on ``mbarrier.try_wait.parity`` (PTX ISA: mbarrier.test_wait, mbarrier.try_wait), as CUTLASS C++ does.

    ``cute.arch.mbarrier_wait`` is the form with a time limit; ptxas turns it into a predicated TRYWAIT / NANOSLEEP /
    PHASECHK chain of two scoreboard round trips even when the phase has long completed. Measured on an H200: 1.6 % of
    the M = 128 kernel.
    """
    cute.arch.inline_ptx(
        "{ .reg .pred done; FG_WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [{$r0}], {$r1}; "
        "@done bra FG_DONE; bra FG_WAIT; FG_DONE: }",
        read_only_args=[barrier_addr, phase],
    )


def unsigned_divmod(dividend: Int32, divisor: Int32) -> tuple:
    """(quotient, remainder) of two non-negative numbers, without the sign handling of Python's floor division."""
    a, b = Uint32(dividend), Uint32(divisor)
    quotient = a // b
    return Int32(quotient), Int32(a - quotient * b)


@cute.jit
def exit_if_zero(flag: Int32):
    """End the thread where ``flag`` is zero (PTX ISA: exit)."""
    cute.arch.inline_ptx("{ .reg .pred none; setp.eq.s32 none, {$r0}, 0; @none exit; }", read_only_args=[flag])
