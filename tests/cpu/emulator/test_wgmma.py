# SPDX-License-Identifier: Apache-2.0
"""`wgmma.mma_async`: every type, both majors of both operands, every swizzle, A from shared memory or registers."""

import numpy as np
import pytest
import torch

from fgattn_cute import emulator
from tests.cpu.emulator.layouts import ATOM_BYTES, accumulator_fragment, operand_fragment, place
from tests.cpu.emulator.ptx_lab import fault, fill_shared, run

TYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "tf32": torch.float32,
}
B_AT = 32768  # byte offset of the B tile


def offsets(major, rows, mode):
    """Leading and stride byte offsets of a dense tile with `rows` rows (K-major) or 16 columns of K (MN-major)."""
    if mode == 0:
        return rows // 8 * 128, 128
    return (0 if major == "k" else 2 * 8 * ATOM_BYTES[mode]), 8 * ATOM_BYTES[mode]


def descriptor(register, at, lbo, sbo, mode):
    """PTX ISA 9.7.15.5.1 (matrix descriptor): start, leading and stride offset over 16, swizzle in bits 62-63."""
    constant = (lbo >> 4) << 16 | (sbo >> 4) << 32 | mode << 62
    return (
        f"add.s32 %r520, smem, {at}; and.b32 %r520, %r520, 0x3ffff; shr.u32 %r520, %r520, 4;"
        f"cvt.u64.u32 {register}, %r520; or.b64 {register}, {register}, {constant};\n"
    )


def byte_view(t):
    return t.view(torch.uint8).reshape(*t.shape, t.element_size()).numpy()


def multiply(
    kind, n, a_major, b_major, mode, a_from_registers, negate=1, accumulate=True, seed=0, wait="", out_f16=False
):
    """One wgmma on random integers; returns the fragment the emulator left and the one it should have left."""
    dtype = TYPES[kind]
    es = dtype.itemsize
    k = 32 // es
    a, b = (torch.randint(-3, 4, (rows, k)).float().to(dtype) for rows in (64, n))
    c = torch.randint(-3, 4, (64, n)).float()
    (la, sa), (lb, sb) = offsets(a_major, 64, mode), offsets(b_major, n, mode)
    tiles = [place(byte_view(a), a_major, mode, la, sa), place(byte_view(b), b_major, mode, lb, sb)]
    regs = n // 4 if out_f16 else n // 2
    c_fragment = accumulator_fragment(c.numpy())
    if out_f16:
        c_in = torch.from_numpy(c_fragment).half().view(torch.int32).contiguous()
    else:
        c_in = torch.from_numpy(c_fragment.copy())
    out = torch.full_like(c_in, -1)
    image, a_regs = (
        torch.from_numpy(np.concatenate(tiles)),
        torch.from_numpy(operand_fragment(byte_view(a)).view(np.int32)),
    )
    d = ", ".join(f"%r{i}" for i in range(regs))
    majors = [int(m != "k") for m in ([b_major] if a_from_registers else [a_major, b_major])]
    transposes = "".join(f", {m}" for m in majors) if es == 2 else ""
    source = "{%r530, %r531, %r532, %r533}" if a_from_registers else "%d10"
    scale = f", {negate}, 1{transposes}"
    body = fill_shared(65536)
    body += f"mul.wide.u32 %d20, tid, {regs * 4}; add.s64 %d21, %d20, a2; add.s64 %d22, %d20, a1;"
    body += "mul.wide.u32 %d23, tid, 16; add.s64 %d23, %d23, a3;\n"
    body += "".join(f"ld.global.b32 %r{i}, [%d21+{4 * i}];" for i in range(regs))
    body += "".join(f"ld.global.b32 %r{530 + i}, [%d23+{4 * i}];" for i in range(4))
    body += descriptor("%d10", 0, la, sa, mode) + descriptor("%d11", B_AT, lb, sb, mode)
    shape = f"m64n{n}k{k}.{'f16' if out_f16 else 'f32'}.{kind}.{kind}"
    body += f"""wgmma.fence.sync.aligned; setp.eq.u32 %p1, 0, {int(not accumulate)};
wgmma.mma_async.sync.aligned.{shape} {{{d}}}, {source}, %d11, %p1{scale};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"""
    body += "".join(f"st.global.b32 [%d22+{4 * i}], %r{i};" for i in range(regs))
    run(body, [image, out, c_in, a_regs], seed=seed)
    want = negate * (a.float() @ b.float().T) + (c if accumulate else 0)
    got = out.view(torch.float16).float() if out_f16 else out
    return got.numpy(), accumulator_fragment(want.numpy())


CASES = [
    (kind, a_major, b_major, a_regs)
    for kind in TYPES
    for a_major in ("k", "mn")
    for b_major in ("k", "mn")
    for a_regs in (False, True)
    # PTX ISA 9.7.15.5.2: only 16-bit types may be MN-major; A in registers has no major
    if (a_major == b_major == "k" or TYPES[kind].itemsize == 2) and not (a_regs and a_major == "mn")
]


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize(("kind", "a_major", "b_major", "a_regs"), CASES)
def test_product_is_exact_on_integers(kind, a_major, b_major, a_regs, mode):
    for i, n in enumerate((8, 64, 136, 256)):
        got, want = multiply(
            kind, n, a_major, b_major, mode, a_regs, negate=-1 if i == 1 and kind != "tf32" else 1, seed=i
        )
        np.testing.assert_array_equal(got, want, err_msg=f"n {n}")


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_width(n):
    got, want = multiply("bf16", n, "k", "k", 1, False)
    np.testing.assert_array_equal(got, want)


def test_scale_d_false_ignores_the_accumulator():
    got, want = multiply("bf16", 64, "k", "k", 1, False, accumulate=False)
    np.testing.assert_array_equal(got, want)


def test_half_accumulators_hold_two_columns_per_register():
    got, want = multiply("f16", 64, "k", "k", 1, False, out_f16=True)
    np.testing.assert_array_equal(got, want)


MMA = """mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0; setp.eq.u32 %p1, 0, 0;
{fence} wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r0,%r1,%r2,%r3}}, %d10, %d11, %p1, 1, 1, 0, 0;
{commit} {between} {wait} add.s32 %r4, %r0, 1;"""


def one_mma(
    fence="wgmma.fence.sync.aligned;",
    commit="wgmma.commit_group.sync.aligned;",
    between="",
    wait="wgmma.wait_group.sync.aligned 0;",
    start=0,
    mode=0,
    lbo=128,
    sbo=128,
    extra=0,
):
    body = fill_shared(65536) + descriptor("%d10", start, lbo, sbo, mode) + descriptor("%d11", B_AT, lbo, sbo, mode)
    body += f"or.b64 %d10, %d10, {extra};\n"
    return body + MMA.format(fence=fence, commit=commit, between=between, wait=wait)


IMAGE = torch.zeros(65536, dtype=torch.uint8)


def test_the_reference_case_of_the_fault_tests_is_clean():
    for seed in emulator.schedules(4):
        assert run(one_mma(), [IMAGE], seed=seed).findings == []


@pytest.mark.parametrize(
    "broken",
    [
        {"fence": ""},
        {"wait": ""},
        {"commit": ""},
        {"between": "add.s32 %r5, %r1, 1;"},
        {"between": "mov.b32 %r2, 7;"},
        {"wait": "wgmma.wait_group.sync.aligned 1;"},
    ],
    ids=["no fence", "no wait", "no commit", "read in flight", "write in flight", "wait for too few"],
)
def test_misuse_of_the_asynchronous_group_is_found(broken):
    fault("wgmma", one_mma(**broken), [IMAGE])


@pytest.mark.parametrize(
    ("broken", "kinds"),
    [
        ({"extra": 1 << 49}, ("descriptor", "unsupported")),  # base offset: legal on the chip, not emulated
        ({"extra": 1 << 52}, ("descriptor",)),  # reserved bits
        ({"start": 65536 * 3}, ("bounds",)),  # past the CTA's shared memory
    ],
    ids=["base offset", "reserved bits", "outside shared memory"],
)
def test_illegal_descriptors_are_refused(broken, kinds):
    with pytest.raises(emulator.EmulatorError) as caught:
        run(one_mma(**broken), [IMAGE])
    assert caught.value.kind in kinds, str(caught.value)


def test_divergent_warps_of_a_group_are_refused():
    body = one_mma().replace("wgmma.fence", "setp.eq.u32 %p9, warp, 2; @%p9 bra END; wgmma.fence", 1) + "END:"
    with pytest.raises(emulator.EmulatorError) as caught:
        run(body, [IMAGE])
    assert caught.value.kind in ("deadlock", "wgmma")
