# SPDX-License-Identifier: Apache-2.0
"""Runs a few lines of hand-written PTX on the emulator.

The body finds these registers: `tid`, `lane`, `warp` and `smem` (b32; the last is the shared address of the dynamic
shared memory), `%r0..` (b32), `%d0..` (b64), `%h0..` (b16), `%p0..` (pred), and one `a0`, `a1`, ... per argument: the
address of a tensor or tensor map (b64), or the value of a number (b32).
"""

import numpy as np
import pytest
import torch

from fgattn_cute import emulator
from fgattn_cute.emulator import ptx

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic_smem[];
"""
TMAP_TYPE = {1: 0, 2: 10, 4: 7}  # element bytes -> type code of a tensor map: U8, BF16, F32


def module(body, args, directives=""):
    """The PTX module around `body`, and the bytes of its parameter space."""
    params, loads, data = [], [], b""
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            data += b"\0" * (-len(data) % 8) + a.data_ptr().to_bytes(8, "little")
            params.append(f".param .u64 p{i}")
            loads.append(f".reg .b64 a{i}; ld.param.u64 a{i}, [p{i}];")
        elif isinstance(a, bytes):
            data += b"\0" * (-len(data) % 64) + a
            params.append(f".param .align 64 .b8 p{i}[{len(a)}]")
            loads.append(f".reg .b64 a{i}; mov.b64 a{i}, p{i}; cvta.param.u64 a{i}, a{i};")
        else:
            data += b"\0" * (-len(data) % 4) + (a & 0xFFFFFFFF).to_bytes(4, "little")
            params.append(f".param .u32 p{i}")
            loads.append(f".reg .b32 a{i}; ld.param.u32 a{i}, [p{i}];")
    prologue = (
        ".reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<600>; .reg .b64 %d<64>; .reg .b32 tid, lane, warp, smem;\n"
        + "\n".join(loads)
        + "\nmov.u32 tid, %tid.x; mov.u32 lane, %laneid; shr.u32 warp, tid, 5; mov.b32 smem, dynamic_smem;\n"
    )
    return f"{HEAD}.visible .entry k({', '.join(params)})\n{directives}\n{{\n{prologue}{body}\nret;\n}}\n", data


def run(
    body, args=(), *, block=128, smem=65536, grid=1, cluster=(1, 1, 1), seed=0, memory=(), directives="", **options
):
    """Runs `body` and returns the launch's entry of the report. `memory`: tensors reached through a tensor map."""
    text, data = module(body, args, directives)
    emu = emulator.session(seed=seed, threads=1, **options)
    tensors = [a for a in args if isinstance(a, torch.Tensor)] + list(memory)
    emu.run(ptx.load(text).kernels["k"], (grid, 1, 1), (block, 1, 1), cluster, smem, data, tensors)
    return emu.report()[0]


def fault(kind, body, args=(), **how):
    """Asserts that the emulator refuses `body` for `kind`, and returns the error."""
    with pytest.raises(emulator.EmulatorError) as caught:
        run(body, args, **how)
    assert caught.value.kind == kind, f"expected {kind}, got {caught.value.kind}: {caught.value}"
    return caught.value


def per_thread(op, inputs, out_dtype, *, setup="", block=32, **how):
    """Runs `op` in every thread: `$0` is the result's register, `$1`, `$2`, ... hold element `tid` of each input."""
    out = torch.zeros(block, dtype=out_dtype)
    body, names = setup, []
    for i, x in enumerate(inputs):
        bits = x.element_size() * 8
        names.append({8: "%r", 16: "%h", 32: "%r", 64: "%d"}[bits] + str(i + 1))
        load = f"ld.global.{'u8' if bits == 8 else f'b{bits}'}"
        body += f"mul.wide.u32 %d30, tid, {bits // 8}; add.s64 %d30, %d30, a{i}; {load} {names[-1]}, [%d30];\n"
    bits = out.element_size() * 8
    result = {16: "%h20", 32: "%r20", 64: "%d20"}[bits]
    for i, name in enumerate([result, *names]):
        op = op.replace(f"${i}", name)
    body += f"{op};\nmul.wide.u32 %d30, tid, {bits // 8}; add.s64 %d30, %d30, a{len(inputs)};\n"
    body += f"st.global.b{bits} [%d30], {result};"
    run(body, [*inputs, out], block=block, **how)
    return out


def fill_shared(nbytes, source="a0", at=0, threads=128):
    """PTX: all threads copy `nbytes` bytes of global to shared memory, then fence for the async proxy and sync."""
    return f"""
mov.u32 %r590, tid;
FILL{at}: setp.ge.u32 %p60, %r590, {nbytes // 4}; @%p60 bra FILLED{at};
mul.wide.u32 %d60, %r590, 4; add.s64 %d60, %d60, {source}; ld.global.b32 %r591, [%d60];
shl.b32 %r592, %r590, 2; add.s32 %r592, %r592, smem; st.shared.b32 [%r592+{at}], %r591;
add.s32 %r590, %r590, {threads}; bra FILL{at};
FILLED{at}: fence.proxy.async.shared::cta; bar.sync 0;
"""


def drain_shared(nbytes, target, at=0, threads=128):
    """PTX: all threads copy `nbytes` bytes of shared memory to global memory."""
    return f"""
mov.u32 %r590, tid;
DRAIN{at}: setp.ge.u32 %p60, %r590, {nbytes // 4}; @%p60 bra DRAINED{at};
shl.b32 %r592, %r590, 2; add.s32 %r592, %r592, smem; ld.shared.b32 %r591, [%r592+{at}];
mul.wide.u32 %d60, %r590, 4; add.s64 %d60, %d60, {target}; st.global.b32 [%d60], %r591;
add.s32 %r590, %r590, {threads}; bra DRAIN{at};
DRAINED{at}:
"""


def tensor_map(tensor, box, swizzle=0):
    """The 128-byte tensor map of a contiguous tensor. `box` is innermost first; swizzle 0 none, 1 32 B, 2 64 B, 3 128
    B.

    The layout is the one that the DSL's host code writes (there is no public description): see `docs/emulator.md`.
    """
    dims, rank, es = list(tensor.shape)[::-1], tensor.dim(), tensor.element_size()
    strides = [s * es for s in list(tensor.stride())[::-1]]
    w = np.zeros(32, np.uint32)
    address = tensor.data_ptr()
    w[0], w[1] = address & 0xFFFFFFFF, address >> 32
    w[2] = 2 | (rank - 1) << 4 | TMAP_TYPE[es] << 7 | swizzle << 13
    for i in range(1, rank):
        w[2 + i] = strides[i] >> 4
        w[14] |= (box[i] - 1) << (8 * (i - 1))
    for i in range(rank):
        w[8 + i] = dims[i] - 1
    w[13] = (box[0] - 1) << 24
    return w.tobytes()


def bits32(tensor):
    """A 32-bit tensor as numpy uint32."""
    return tensor.contiguous().view(torch.int32).numpy().view(np.uint32)
