# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, logic, conversions and selection of single instructions against numpy and torch."""

import numpy as np
import pytest
import torch

from tests.cpu.emulator.ptx_lab import bits32, per_thread

F32, I32, I64 = torch.float32, torch.int32, torch.int64


def same(a, b):
    return torch.equal(torch.nan_to_num(a.float(), 12345.0), torch.nan_to_num(b.float(), 12345.0))


@pytest.fixture
def floats():
    f, h = torch.randn(32) * 10, torch.randn(32) * 10
    f[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    f[4:8] = torch.tensor([65504.7, 1e-7, 3.4e38, -0.0])
    return f, h


@pytest.fixture
def ints():
    i = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=I64).to(I32)
    j = torch.randint(-50, 50, (32,), dtype=I32)
    return i, torch.where(j == 0, 3, j)


def test_float_arithmetic(floats):
    f, h = floats
    assert same(per_thread("add.f32 $0, $1, $2", [f, h], F32), f + h)
    assert same(per_thread("sub.f32 $0, $1, $2", [f, h], F32), f - h)
    assert same(per_thread("mul.f32 $0, $1, $2", [f, h], F32), f * h)
    # PTX ISA 9.7.3.6: fma rounds once
    exact = torch.from_numpy((f.double() * h.double() + f.double()).float().numpy())
    assert same(per_thread("fma.rn.f32 $0, $1, $2, $1", [f, h], F32), exact)
    assert same(per_thread("neg.f32 $0, $1", [f], F32), -f)
    assert same(per_thread("abs.f32 $0, $1", [f], F32), f.abs())


def test_min_and_max_ignore_nan_unless_told(floats):
    # PTX ISA 9.7.3.10/11: "if one of the inputs is NaN the result is the other"; .NaN propagates
    f, h = floats
    assert same(per_thread("max.f32 $0, $1, $2", [f, h], F32), torch.fmax(f, h))
    assert same(per_thread("min.f32 $0, $1, $2", [f, h], F32), torch.fmin(f, h))
    assert same(per_thread("max.NaN.f32 $0, $1, $2", [f, h], F32), torch.maximum(f, h))
    assert same(per_thread("min.NaN.f32 $0, $1, $2", [f, h], F32), torch.minimum(f, h))


def test_integer_arithmetic(ints):
    i, j = ints
    n, m = i.numpy().astype(np.int64), j.numpy().astype(np.int64)
    u, v = bits32(i).astype(np.uint64), bits32(j).astype(np.uint64)
    low = lambda x: torch.from_numpy(x.astype(np.uint64).astype(np.uint32).view(np.int32).copy())
    assert torch.equal(per_thread("add.s32 $0, $1, $2", [i, j], I32), i + j)
    assert torch.equal(per_thread("mul.lo.s32 $0, $1, $2", [i, j], I32), i * j)
    assert torch.equal(per_thread("mul.wide.s32 $0, $1, $2", [i, j], I64), i.long() * j.long())
    assert torch.equal(per_thread("mul.hi.u32 $0, $1, $2", [i, j], I32), low(u * v >> 32))
    assert torch.equal(per_thread("mad.lo.s32 $0, $1, $2, $1", [i, j], I32), i * j + i)
    assert np.array_equal(per_thread("div.s32 $0, $1, $2", [i, j], I32).numpy(), np.trunc(n / m))
    assert np.array_equal(per_thread("rem.s32 $0, $1, $2", [i, j], I32).numpy(), np.fmod(n, m))
    assert torch.equal(per_thread("div.u32 $0, $1, $2", [i, j], I32), low(u // v))
    assert torch.equal(per_thread("min.s32 $0, $1, $2", [i, j], I32), torch.minimum(i, j))
    assert torch.equal(per_thread("min.u32 $0, $1, $2", [i, j], I32), low(np.minimum(u, v)))
    # PTX ISA 9.7.1.13: .relu clamps the result at zero
    assert torch.equal(per_thread("min.relu.s32 $0, $1, $2", [i, j], I32), torch.minimum(i, j).clamp(min=0))
    assert torch.equal(per_thread("max.relu.s32 $0, $1, $2", [i, j], I32), torch.maximum(i, j).clamp(min=0))


def test_logic_and_shifts(ints):
    i, j = ints
    u, v = bits32(i), bits32(j)
    eq = lambda op, want, *ins: np.testing.assert_array_equal(bits32(per_thread(op, ins, I32)), want)
    eq("and.b32 $0, $1, $2", u & v, i, j)
    eq("or.b32 $0, $1, $2", u | v, i, j)
    eq("xor.b32 $0, $1, $2", u ^ v, i, j)
    eq("not.b32 $0, $1", ~u, i)
    eq("shl.b32 $0, $1, 5", u << 5, i)
    eq("shr.u32 $0, $1, 5", u >> 5, i)
    # PTX ISA 9.7.8.8: shift amounts above the register width are clamped to it
    eq("shr.s32 $0, $1, 40", (i.numpy() >> 31).view(np.uint32), i)
    eq("shl.b32 $0, $1, 40", u * 0, i)
    eq("lop3.b32 $0, $1, $2, $1, 0x96", u ^ v ^ u, i, j)
    eq("lop3.b32 $0, $1, $2, $1, 0xe8", (u & v) | (u & u) | (v & u), i, j)
    eq("shf.l.wrap.b32 $0, $1, $2, 7", (v << 7) | (u >> 25), i, j)
    eq("bfe.u32 $0, $1, 5, 9", (u >> 5) & 511, i)
    eq("popc.b32 $0, $1", np.array([bin(x).count("1") for x in u]), i)
    eq("clz.b32 $0, $1", np.array([32 - int(x).bit_length() for x in u]), i)
    eq("brev.b32 $0, $1", np.array([int(f"{x:032b}"[::-1], 2) for x in u]), i)
    # PTX ISA 9.7.9.7: prmt picks four of the eight bytes of {b, a}
    eq("prmt.b32 $0, $1, $2, 0x5410", (u & 0xFFFF) | (v & 0xFFFF) << 16, i, j)
    eq("prmt.b32 $0, $1, $2, 0x7632", (u >> 16) | (v & 0xFFFF0000), i, j)


def test_comparison_and_selection(floats, ints):
    f, h = floats
    i, j = ints
    flag = lambda op, *ins: per_thread(f"{op}; selp.b32 $0, 1, 0, %p1", ins, I32)
    assert torch.equal(flag("setp.lt.f32 %p1, $1, $2", f, h), (f < h).int())
    # PTX ISA 9.7.6.2: the unordered forms are true with a NaN, the ordered ones false
    assert torch.equal(flag("setp.geu.f32 %p1, $1, $2", f, h), (~(f < h)).int())
    assert int(flag("setp.ne.f32 %p1, $1, $1", f).sum()) == 0
    assert int(flag("setp.neu.f32 %p1, $1, $1", f).sum()) == 1
    assert int(flag("setp.nan.f32 %p1, $1, $2", f, h).sum()) == 1
    below = torch.from_numpy((bits32(i) < bits32(j)).astype(np.int32))
    assert torch.equal(flag("setp.lt.u32 %p1, $1, $2", i, j), below)
    both = flag("setp.lt.s32 %p2, $1, $2; setp.gt.and.s32 %p1, $1, 0, %p2", i, j)
    assert torch.equal(both, ((i > 0) & (i < j)).int())


def test_conversions_to_narrow_floats(floats):
    # PTX ISA 9.7.9.21 (cvt): in d = cvt.f16x2(a, b) the upper half comes from a; NaN becomes 0x7fff (0x7f for e4m3)
    f, h = floats
    for ptx_type, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        got = bits32(per_thread(f"cvt.rn.{ptx_type}.f32 $0, $1, $2", [f, h], I32))
        upper = f.to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
        upper[2] = 0x7FFF
        np.testing.assert_array_equal(got >> 16, upper)
        np.testing.assert_array_equal(got & 0xFFFF, h.to(dtype).view(torch.int16).numpy().view(np.uint16))
    for name, dtype, top, nan in (
        ("e4m3x2", torch.float8_e4m3fn, 448, 0x7F),
        ("e5m2x2", torch.float8_e5m2, 57344, 0x7F),
    ):
        op = f"{{.reg .b16 q; cvt.rn.satfinite.{name}.f32 q, $1, $2; cvt.u32.u16 $0, q;}}"
        got = bits32(per_thread(op, [f, h], I32))
        upper = f.clamp(-top, top).to(dtype).view(torch.uint8).numpy().copy()
        upper[2] = nan
        np.testing.assert_array_equal(got >> 8, upper)
        np.testing.assert_array_equal(got & 255, h.clamp(-top, top).to(dtype).view(torch.uint8).numpy())


def test_conversions_between_numbers(floats, ints):
    f, _ = floats
    i, _ = ints
    # PTX ISA 9.7.9.21: float to integer saturates, NaN gives 0
    x = per_thread("cvt.rzi.s32.f32 $0, $1", [f], I32)
    assert x[:3].tolist() == [2**31 - 1, -(2**31), 0]
    assert torch.equal(x[8:], f[8:].trunc().to(I32))
    assert torch.equal(per_thread("cvt.rn.f32.s32 $0, $1", [i], F32), i.float())
    assert torch.equal(per_thread("cvt.s64.s32 $0, $1", [i], I64), i.long())
    assert torch.equal(per_thread("cvt.u64.u32 $0, $1", [i], I64), i.long() & 0xFFFFFFFF)
    assert torch.equal(per_thread("cvt.s32.s8 $0, $1", [i], I32), i.to(torch.int8).to(I32))
    halves = torch.randn(32).to(torch.bfloat16)
    back = per_thread("cvt.f32.bf16 $0, $1", [halves.view(torch.int16)], F32)
    assert torch.equal(back, halves.float())


def test_approximate_functions_are_as_close_as_the_manual_says(floats):
    f, _ = floats
    e = torch.linspace(-130, 20, 32)
    x = per_thread("ex2.approx.ftz.f32 $0, $1", [e], F32)
    want = torch.exp2(e.double())
    want[want < 2.0**-126] = 0  # .ftz
    assert ((x.double() - want).abs() <= want * 2.0**-22).all()  # PTX ISA 9.7.3.21: 2 ulp
    x = per_thread("ex2.approx.ftz.f32 $0, $1", [f], F32)
    assert x[0] == float("inf") and x[1] == 0 and x[2].isnan() and x[3] == 1
    positive = torch.rand(32) * 100 + 1e-3
    x = per_thread("lg2.approx.ftz.f32 $0, $1", [positive], F32)
    assert ((x.double() - torch.log2(positive.double())).abs() <= 2.0**-21).all()  # PTX ISA 9.7.3.20
    assert per_thread("lg2.approx.ftz.f32 $0, $1", [torch.zeros(32)], F32)[0] == float("-inf")
    x = per_thread("rcp.approx.ftz.f32 $0, $1", [positive], F32)
    assert ((x.double() * positive.double() - 1).abs() <= 2.0**-22).all()
    x = per_thread("tanh.approx.f32 $0, $1", [e / 20], F32)
    assert ((x.double() - torch.tanh(e.double() / 20)).abs() <= 2.0**-10.9).all()


def test_data_dependent_loop_reconverges_before_a_shuffle(ints):
    i, _ = ints
    loop = """mov.b32 %r10, 0; and.b32 %r11, $1, 15;
LOOP: setp.ge.s32 %p1, %r10, %r11; @%p1 bra DONE; add.s32 %r10, %r10, 1; bra LOOP;
DONE: shfl.sync.bfly.b32 $0, %r10, 1, 31, -1"""
    assert torch.equal(per_thread(loop, [i], I32), (i & 15)[torch.arange(32) ^ 1])
