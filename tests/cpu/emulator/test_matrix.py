# SPDX-License-Identifier: Apache-2.0
"""`ldmatrix`, `stmatrix` and `mma.sync` against the fragment layouts of the PTX ISA."""

import numpy as np
import pytest
import torch

from tests.cpu.emulator.ptx_lab import fill_shared, run

ROW = 48  # bytes between the rows of the 8x8 matrices: 24 elements, so that a wrong stride shows
SOURCE = torch.arange(1024, dtype=torch.int16)


def ldmatrix(x, trans):
    registers = ", ".join(f"%r{10 + i}" for i in range(x))
    return (
        fill_shared(2048, threads=32)
        + f"mul.lo.s32 %r1, lane, {ROW}; add.s32 %r1, %r1, smem;\n"
        + f"ldmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16 {{{registers}}}, [%r1];\n"
    )


def matrix(i):
    """The i-th 8x8 matrix: lane 8 i + r gives the address of its row r (PTX ISA 9.7.14.5.15)."""
    s = SOURCE.numpy()
    return np.stack([s[(i * 8 + r) * ROW // 2 :][:8] for r in range(8)])


@pytest.mark.parametrize("x", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(x, trans):
    out = torch.zeros(32, x, dtype=torch.int32)
    store = f"mul.wide.u32 %d1, lane, {4 * x}; add.s64 %d1, %d1, a1;"
    store += "".join(f"st.global.b32 [%d1+{4 * i}], %r{10 + i};" for i in range(x))
    run(ldmatrix(x, trans) + store, [SOURCE, out], block=32)
    got = out.numpy().view(np.uint16).reshape(32, x, 2)
    for i in range(x):
        m = matrix(i).T if trans else matrix(i)
        want = np.array([m[lane // 4, 2 * (lane % 4) :][:2] for lane in range(32)])
        np.testing.assert_array_equal(got[:, i], want)


@pytest.mark.parametrize("x", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(x, trans):
    # PTX ISA 9.7.14.5.16
    out = torch.zeros(1024, dtype=torch.int16)
    registers = ", ".join(f"%r{10 + i}" for i in range(x))
    body = (
        ldmatrix(x, trans)
        + f"""add.s32 %r1, %r1, 4096; stmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16 [%r1], {{{registers}}};
bar.warp.sync -1; setp.ge.u32 %p1, lane, {8 * x}; @%p1 bra END;
mul.wide.u32 %d2, lane, {ROW}; add.s64 %d2, %d2, a1;
ld.shared.v4.b32 {{%r20,%r21,%r22,%r23}}, [%r1]; st.global.v4.b32 [%d2], {{%r20,%r21,%r22,%r23}}; END:"""
    )
    run(body, [SOURCE, out], block=32)
    for r in range(8 * x):
        at = r * ROW // 2
        np.testing.assert_array_equal(out.numpy()[at : at + 8], SOURCE.numpy()[at : at + 8])


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("e4m3", torch.float8_e4m3fn)]
)
def test_mma_sync(kind, dtype):
    # PTX ISA 9.7.14.5.8 (m16n8k16) and 9.7.14.5.10 (m16n8k32): fragments of A, B and C
    es = dtype.itemsize
    k, per = 32 // es, 4 // es
    a, b = torch.randint(-3, 4, (16, k)).float().to(dtype), torch.randint(-3, 4, (k, 8)).float().to(dtype)
    c = torch.randint(-3, 4, (16, 8)).float()
    a_bytes, b_bytes = (x.view(torch.uint8).reshape(*x.shape, es).numpy() for x in (a, b))
    product = (a.float() @ b.float() + c).numpy()
    fa, fb = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    fc, want = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, t = lane // 4, lane % 4
        for r in range(4):
            cols = slice(t * per + r // 2 * 4 * per, t * per + r // 2 * 4 * per + per)
            fa[lane, r] = int.from_bytes(a_bytes[group + 8 * (r % 2), cols].tobytes(), "little")
            at = group + 8 * (r // 2), 2 * t + r % 2
            fc[lane, r], want[lane, r] = c[at], product[at]
        for r in range(2):
            rows = slice(t * per + r * 4 * per, t * per + r * 4 * per + per)
            fb[lane, r] = int.from_bytes(b_bytes[rows, group].tobytes(), "little")
    tensors = [torch.from_numpy(x) for x in (fa.view(np.int32), fb.view(np.int32), fc)] + [torch.zeros(32, 4)]
    body = f"""mul.wide.u32 %d1, tid, 16; mul.wide.u32 %d2, tid, 8;
add.s64 %d3, %d1, a0; add.s64 %d4, %d2, a1; add.s64 %d5, %d1, a2; add.s64 %d6, %d1, a3;
ld.global.v4.b32 {{%r1,%r2,%r3,%r4}}, [%d3]; ld.global.v2.b32 {{%r5,%r6}}, [%d4];
ld.global.v4.b32 {{%r7,%r8,%r9,%r10}}, [%d5];
mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32
  {{%r11,%r12,%r13,%r14}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{%r7,%r8,%r9,%r10}};
st.global.v4.b32 [%d6], {{%r11,%r12,%r13,%r14}};"""
    run(body, tensors, block=32)
    np.testing.assert_array_equal(tensors[3].numpy(), want)
