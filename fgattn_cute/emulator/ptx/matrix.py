# SPDX-License-Identifier: Apache-2.0
"""Lowering of ldmatrix, stmatrix, mma.sync and wgmma (PTX ISA 9.7.14, 9.7.15)."""

from __future__ import annotations

import re

from .ir import DOUBLE, PREDICATE, SHARED, WORD
from .parse import PtxError, Unsupported, immediate, is_immediate, vector
from .table import lowers

OPERAND_TYPE = {"bf16": 0, "f16": 1, "e4m3": 2, "e5m2": 3, "tf32": 4}
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4}
TRANS = 16


def _matrices(q: list[str]) -> int:
    if "m8n8" not in q or "b16" not in q:
        raise Unsupported("matrix shapes other than m8n8.b16")
    return int(next(word for word in q if re.fullmatch(r"x[124]", word))[1])


@lowers("ldmatrix")
def ldmatrix(b, q, operands):
    address, wide, offset = b.address(operands[1])
    registers = [b.dst(name, WORD) for name in vector(operands[0])]
    x = SHARED | wide | (TRANS if "trans" in q else 0)
    b.emit("LDMATRIX", a=address, imm=offset, n=_matrices(q), aux=registers, defs=registers, x=x)


@lowers("stmatrix")
def stmatrix(b, q, operands):
    address, wide, offset = b.address(operands[0])
    registers = [b.src(name, WORD) for name in vector(operands[1])]
    x = SHARED | wide | (TRANS if "trans" in q else 0)
    b.emit("STMATRIX", a=address, imm=offset, n=_matrices(q), aux=registers, uses=registers, x=x)


@lowers("mma")
def mma(b, q, operands):
    shape = re.fullmatch(r"m16n8k(\d+)", q[2])
    if "sp" in q or not shape or q[3:5] != ["row", "col"] or q[6] not in OPERAND_TYPE or q[7] not in OPERAND_TYPE:
        raise Unsupported("mma." + ".".join(q))
    depth, element_bytes, half = int(shape.group(1)), ELEMENT_BYTES[q[6]], q[5] == "f16"
    d = [b.dst(name, WORD) for name in vector(operands[0])]
    a_regs, b_regs, c_regs = ([b.src(name, WORD) for name in vector(o)] for o in operands[1:4])
    if len(a_regs) != depth * element_bytes // 8 or len(b_regs) != depth * element_bytes // 16:
        raise Unsupported("mma with this number of operand registers")

    def padded(registers, n):
        return [*registers, *[0] * (n - len(registers))]

    aux = padded(d, 4) + padded(a_regs, 4) + padded(b_regs, 2) + padded(c_regs, 4)
    x = OPERAND_TYPE[q[6]] | OPERAND_TYPE[q[7]] << 4 | depth << 8 | half << 16
    b.emit("MMA", aux=aux, uses=[*a_regs, *b_regs, *c_regs], defs=d, x=x)


@lowers("wgmma")
def wgmma(b, q, operands):
    if q[0] == "fence":
        return b.emit("WGMMA_FENCE")
    if q[0] == "commit_group":
        return b.emit("WGMMA_COMMIT")
    if q[0] == "wait_group":
        return b.emit("WGMMA_WAIT", imm=immediate(operands[0], 32))
    return _wgmma_mma(b, q, operands)


def _wgmma_mma(b, q, operands):
    """aux follows the WgmmaShape structure of core/wgmma.h."""
    if "sp" in q:
        raise Unsupported("sparse wgmma")
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", q[3]).groups())
    type_d, type_a, type_b = q[4:7]
    if type_a not in OPERAND_TYPE or type_b not in OPERAND_TYPE or type_d not in ("f32", "f16"):
        raise Unsupported("wgmma types " + ".".join(q[4:7]))
    if k * ELEMENT_BYTES[type_a] != 32 or ELEMENT_BYTES[type_a] != ELEMENT_BYTES[type_b] or n % 8 or not 8 <= n <= 256:
        raise PtxError(f"there is no wgmma of shape {q[3]} for {type_a} and {type_b}")
    d = [b.dst(name, WORD) for name in vector(operands[0])]
    if len(d) != (n // 2 if type_d == "f32" else n // 4):
        raise PtxError(f"{len(d)} accumulator registers for n = {n}")
    in_registers = operands[1].startswith("{")
    a = [b.src(name, WORD) for name in vector(operands[1])] if in_registers else [0] * 4
    desc_a = 0 if in_registers else b.src(operands[1], DOUBLE)
    desc_b = b.src(operands[2], DOUBLE)
    scale_text = operands[3]
    scale = (
        b.predicate_constant(immediate(scale_text, 32)) if is_immediate(scale_text) else b.src(scale_text, PREDICATE)
    )
    numbers = [immediate(o, 32) for o in operands[4:]]
    negate, majors = int((numbers[0] == -1) != (numbers[1] == -1)), numbers[2:]
    major_a = major_b = 0
    if type_a in ("bf16", "f16"):
        major_a, major_b = (0, majors[0]) if in_registers else majors
    types = [OPERAND_TYPE[type_a], OPERAND_TYPE[type_b], int(type_d == "f16")]
    aux = [len(d), n, *types, negate, major_a, major_b, int(in_registers), scale, desc_a, desc_b, *a, *d]
    sources = [*a] if in_registers else [desc_a]
    # Accumulators count as definitions only: whether they are read depends on scale-d (ptx/flow.py looks at it).
    return b.emit("WGMMA", aux=aux, uses=[*sources, desc_b, scale], defs=d)
