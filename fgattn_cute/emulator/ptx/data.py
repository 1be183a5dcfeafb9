# SPDX-License-Identifier: Apache-2.0
"""Lowering of moves, conversions, loads, stores, atomics and address arithmetic (PTX ISA 9.7.9, 9.7.13.12)."""

from __future__ import annotations

from .arithmetic import kind, unary
from .builder import Builder
from .ir import DOUBLE, GENERIC, GLOBAL, LOCAL, PARAM, PREDICATE, QUAD, SHARED, WIDE, WORD
from .parse import BITS, Unsupported, vector
from .table import lowers

TYPE_CODE = {
    **{
        "u8": 0,
        "b8": 0,
        "s8": 1,
        "u16": 2,
        "b16": 2,
        "s16": 3,
        "u32": 4,
        "b32": 4,
        "s32": 5,
        "u64": 6,
        "b64": 6,
        "s64": 7,
    },
    **{"f16": 8, "bf16": 9, "f32": 10, "f64": 11, "f16x2": 12, "bf16x2": 13},
}
_SPACES = {"global": GLOBAL, "shared": SHARED, "param": PARAM, "const": GLOBAL, "local": LOCAL}


# ---------------------------------------------------------------------------------------------------------------- moves
def _unpack(b: Builder, parts: list[str], source: str, bits: int) -> None:
    each = bits // len(parts)
    if len(parts) == 2 and each in (16, 32, 64):
        whole, part = {16: (WORD, WORD), 32: (DOUBLE, WORD), 64: (QUAD, DOUBLE)}[each]
        high = b.dst(parts[1], part)
        b.emit(f"UNPACK{bits}", a=b.src(source, whole), d=b.dst(parts[0], part), e=high, defs=[high])
    else:
        registers = [b.dst(p, WORD) for p in parts]
        b.emit("UNPACK_PARTS", a=b.src(source, kind(f"b{bits}")), aux=registers, defs=registers, n=len(parts), x=each)


def _pack(b: Builder, destination: str, parts: list[str], bits: int) -> None:
    each = bits // len(parts)
    if len(parts) == 2 and each in (16, 32, 64):
        whole, part = {16: (WORD, WORD), 32: (DOUBLE, WORD), 64: (QUAD, DOUBLE)}[each]
        b.emit(f"PACK{bits}", a=b.src(parts[0], part), b=b.src(parts[1], part), d=b.dst(destination, whole))
    else:
        registers = [b.src(p, WORD) for p in parts]
        b.emit(
            "PACK_PARTS", aux=registers, uses=registers, d=b.dst(destination, kind(f"b{bits}")), n=len(parts), x=each
        )


@lowers("mov")
def mov(b, q, operands):
    bits, (destination, source) = BITS[q[-1]], operands
    if source in ("%clock", "%clock_hi"):
        return b.emit("CLOCK", d=b.dst(destination, WORD))
    if source in ("%clock64", "%globaltimer"):
        return b.emit("CLOCK", d=b.dst(destination, DOUBLE), x=1)
    if destination.startswith("{"):
        return _unpack(b, vector(destination), source, bits)
    if source.startswith("{"):
        return _pack(b, destination, vector(source), bits)
    k = kind(q[-1])
    if k == PREDICATE:
        return b.emit("MOV_PRED", a=b.predicate(source)[0], d=b.dst(destination, PREDICATE))
    op = {8: "MOV32", 16: "MOV16", 32: "MOV32", 64: "MOV64", 128: "MOV128"}[bits]
    return b.emit(op, a=b.src(source, k), d=b.dst(destination, k))


# ---------------------------------------------------------------------------------------------------------- conversions
_DIRECT = {
    **{
        ("u64", "u32"): "CVT_U64_U32",
        ("s64", "u32"): "CVT_U64_U32",
        ("s64", "s32"): "CVT_S64_S32",
        ("u64", "s32"): "CVT_S64_S32",
    },
    **{(d, s): "CVT_U32_U64" for d in ("u32", "s32") for s in ("u64", "s64")},
    **{
        ("f32", "s32"): "CVT_F32_S32",
        ("f32", "u32"): "CVT_F32_U32",
        ("f32", "bf16"): "CVT_F32_BF16",
        ("u32", "u16"): "CVT_U32_U16",
    },
}
_ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rni": 4, "rzi": 5, "rmi": 6, "rpi": 7}
RELU, RZ, E5M2 = 1, 2, 4


def _convert_packed(b: Builder, to: str, source: str, mods: list[str], operands: list[str]) -> None:
    x = (RELU if "relu" in mods else 0) | (RZ if "rz" in mods else 0) | (E5M2 if "e5m2x2" in (to, source) else 0)
    if to in ("bf16x2", "f16x2") and source == "f32":
        op = "CVT_BF16X2" if to == "bf16x2" else "CVT_F16X2"
    elif source == "f32":
        op = "CVT_FP8X2_F32"
    elif to in ("e4m3x2", "e5m2x2") and source == "f16x2":
        return unary(b, "CVT_FP8X2_F16X2", operands, x=x)
    elif to == "f16x2":
        return unary(b, "CVT_F16X2_FP8X2", operands, x=x)
    else:
        raise Unsupported(f"cvt from {source} to {to}")
    b.emit(op, a=b.src(operands[1], WORD), b=b.src(operands[2], WORD), d=b.dst(operands[0], WORD), x=x)


@lowers("cvt")
def cvt(b, q, operands):
    if "pack" in q:
        raise Unsupported("cvt.pack")
    to, source, mods = q[-2], q[-1], q[:-2]
    if "x2" in to + source:
        return _convert_packed(b, to, source, mods, operands)
    if to == "tf32":
        if "rna" not in mods:
            raise Unsupported("cvt to tf32 other than rna")
        return unary(b, "CVT_TF32_RNA", operands)
    # cvt operands may be wider than their type (PTX ISA, operand size exceeding instruction-type size)
    to_kind, source_kind = b.kind_of(operands[0]) or kind(to), b.kind_of(operands[1]) or kind(source)
    direct = _DIRECT.get((to, source))
    if direct and mods in ([], ["rn"]) and to_kind == kind(to) and source_kind == kind(source):
        return unary(b, direct, operands, source_kind, to_kind)
    rounding = next((code for name, code in _ROUNDING.items() if name in mods), 0)
    if "rna" in mods:
        raise Unsupported("cvt.rna")
    flags = ("sat" in mods) << 11 | ("ftz" in mods) << 12 | ("relu" in mods) << 13
    x = TYPE_CODE[to] | TYPE_CODE[source] << 4 | rounding << 8 | flags
    return unary(b, "CVT", operands, source_kind, to_kind, x=x, n=(to_kind == DOUBLE) | (source_kind == DOUBLE) << 1)


@lowers("cvta")
def cvta(b, q, operands):
    space = next((word.split("::")[0] for word in q if word.split("::")[0] in _SPACES), None)
    if space in ("param", "global", "const"):
        return unary(b, "MOV64", operands, DOUBLE, DOUBLE)
    if space in ("shared", "local"):
        op = "CVTA_TO_WINDOW" if "to" in q else f"CVTA_{space.upper()}"
        return unary(b, op, operands, DOUBLE, DOUBLE)
    raise Unsupported("cvta without a space")


@lowers("isspacep")
def isspacep(b, q, operands):
    b.emit("ISSPACEP", a=b.src(operands[1], DOUBLE), d=b.dst(operands[0], PREDICATE), x=_SPACES[q[0].split("::")[0]])


@lowers("mapa")
def mapa(b, q, operands):
    k = kind(q[-1])
    wide = WIDE if k == DOUBLE else 0
    b.emit("MAPA", a=b.src(operands[1], k), b=b.src(operands[2], WORD), d=b.dst(operands[0], k), x=wide)


@lowers("getctarank")
def getctarank(b, q, operands):
    k = kind(q[-1])
    b.emit("GETCTARANK", a=b.src(operands[1], k), d=b.dst(operands[0], WORD), x=WIDE if k == DOUBLE else 0)


# ----------------------------------------------------------------------------------------------------- loads and stores
def space_of(q: list[str]) -> int:
    return next((_SPACES[word.split("::")[0]] for word in q if word.split("::")[0] in _SPACES), GENERIC)


@lowers("ld", "ldu")
def load(b, q, operands):
    ty, space, names = q[-1], space_of(q), vector(operands[0])
    element_bytes = BITS[ty] // 8
    registers = [b.dst(name) for name in names]
    wide = next(r.kind for r in registers if r is not None) == DOUBLE
    sign_extend = ty in ("s8", "s16") or (ty == "s32" and wide)
    x = element_bytes << 4 | sign_extend << 9 | wide << 10
    at = b.param_address(operands[1]) if space == PARAM else None
    if at is not None and element_bytes <= 8:
        return b.emit("LD_PARAM", aux=registers, defs=registers, n=len(names), x=x, imm=at)
    address, wide_address, offset = b.address(operands[1])
    x |= (GENERIC if space == PARAM else space) | wide_address
    return b.emit("LD", a=address, aux=registers, defs=registers, n=len(names), imm=offset, x=x)


@lowers("st")
def store(b, q, operands):
    if "async" in q:
        raise Unsupported("st.async")
    names = vector(operands[1])
    k = next((b.kind_of(name) for name in names if b.kind_of(name)), kind(q[-1]))
    registers = [b.src(name, k) for name in names]
    address, wide_address, offset = b.address(operands[0])
    x = space_of(q) | wide_address | BITS[q[-1]] // 8 << 4 | (k == DOUBLE) << 10
    b.emit("ST", a=address, aux=registers, uses=registers, n=len(names), imm=offset, x=x)


_ATOMIC = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _atomic(b: Builder, q: list[str], results: list[str], operands: list[str]) -> None:
    if "async" in q:
        raise Unsupported("red.async")
    operation, ty = next(word for word in q if word in _ATOMIC), q[-1]
    k = kind(ty)
    values = [b.src(name, k) for name in vector(operands[1])]
    swap = b.src(operands[2], k) if operation == "cas" else None
    destinations = [b.dst(name, k) for name in results] or [None] * len(values)
    address, wide_address, offset = b.address(operands[0])
    x = space_of(q) | wide_address | _ATOMIC.index(operation) << 4 | TYPE_CODE[ty] << 8
    b.emit(
        "ATOM",
        a=address,
        c=swap,
        aux=values + destinations,
        uses=values,
        defs=destinations,
        n=len(values),
        imm=offset,
        x=x,
    )


@lowers("atom")
def atom(b, q, operands):
    _atomic(b, q, vector(operands[0]), operands[1:])


@lowers("red")
def red(b, q, operands):
    _atomic(b, q, [], operands)


@lowers("createpolicy")
def createpolicy(b, q, operands):
    b.emit("MOV64", a=b.constant(DOUBLE, 0), d=b.dst(operands[0], DOUBLE))  # cache policies change nothing here


@lowers("prefetch", "prefetchu", "discard", "applypriority")
def cache_hint(b, q, operands):
    b.emit("NOP")


@lowers("activemask")
def activemask(b, q, operands):
    b.emit("ACTIVEMASK", d=b.dst(operands[0], WORD))
