# SPDX-License-Identifier: Apache-2.0
"""Lowering of integer, floating-point, logic and comparison instructions (PTX ISA 9.7.1 to 9.7.8)."""

from __future__ import annotations

from .builder import Builder
from .ir import DOUBLE, KIND_OF_BITS, PREDICATE, WORD
from .parse import BITS, Unsupported, immediate
from .table import lowers

FTZ, SAT = 1, 2  # x of the f32 handlers
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
ROUNDINGS = {"rz": 1, "rm": 2, "rp": 3}
HALF_OPERATION = {"add": 0, "sub": 1, "mul": 2, "fma": 3, "min": 4, "max": 5, "fma.relu": 6, "max.NaN": 7, "min.NaN": 8}


def unary(b: Builder, op: str, operands: list[str], src: str = WORD, dst: str = WORD, x: int = 0, n: int = 0):
    b.emit(op, a=b.src(operands[1], src), d=b.dst(operands[0], dst), x=x, n=n)


def binary(
    b: Builder, op: str, operands: list[str], src: str = WORD, dst: str = WORD, second: str | None = None, x: int = 0
):
    b.emit(op, a=b.src(operands[1], src), b=b.src(operands[2], second or src), d=b.dst(operands[0], dst), x=x)


def ternary(
    b: Builder, op: str, operands: list[str], src: str = WORD, dst: str = WORD, third: str | None = None, x: int = 0
):
    sources = b.src(operands[1], src), b.src(operands[2], src), b.src(operands[3], third or src)
    b.emit(op, a=sources[0], b=sources[1], c=sources[2], d=b.dst(operands[0], dst), x=x)


def kind(type_name: str) -> str:
    return KIND_OF_BITS[BITS[type_name]]


def modifiers(qualifiers: list[str]) -> int:
    return (FTZ if "ftz" in qualifiers else 0) | (SAT if "sat" in qualifiers else 0)


def signed(type_name: str) -> str:
    """The S32 of MIN_S32: sign and width."""
    return f"{'S' if type_name[0] == 's' else 'U'}{BITS[type_name]}"


def _half(b: Builder, operation: str, q: list[str], operands: list[str]) -> None:
    """16-bit floats, scalar or in pairs."""
    if "f32" in q[:-1] or "rz" in q or "sat" in q:
        raise Unsupported("mixed, rz or saturating 16-bit arithmetic")
    sources = [b.src(o, WORD) for o in operands[1:]] + [b.constant(WORD, 0)] * (4 - len(operands))
    x = HALF_OPERATION[operation] | (16 if q[-1].startswith("bf16") else 0)
    b.emit(
        "HALF",
        a=sources[0],
        b=sources[1],
        c=sources[2],
        d=b.dst(operands[0], WORD),
        x=x,
        n=2 if q[-1].endswith("x2") else 1,
    )


def _directed(b: Builder, operation: int, q: list[str], operands: list[str]) -> None:
    """f32 with .rz, .rm or .rp."""
    mode = next(value for name, value in ROUNDINGS.items() if name in q)
    sources = [b.src(o, WORD) for o in operands[1:]] + [b.constant(WORD, 0)] * (4 - len(operands))
    x = modifiers(q) | mode << 4 | operation << 6
    b.emit("DIRECTED_F32", a=sources[0], b=sources[1], c=sources[2], d=b.dst(operands[0], WORD), x=x)


def _has_directed_rounding(q: list[str]) -> bool:
    return any(name in q for name in ROUNDINGS)


def _add_like(b: Builder, name: str, q: list[str], operands: list[str]) -> None:
    ty = q[-1]
    if ty in HALVES:
        return _half(b, name, q, operands)
    if ty == "f32":
        if _has_directed_rounding(q):
            return _directed(b, HALF_OPERATION[name], q, operands)
        return binary(b, f"{name.upper()}_F32", operands, x=modifiers(q))
    if ty == "f64":
        return binary(b, f"{name.upper()}_F64", operands, DOUBLE, DOUBLE)
    if "cc" in q or "sat" in q:
        raise Unsupported("carry or saturating integer arithmetic")
    return binary(b, f"{name.upper()}{BITS[ty]}", operands, kind(ty), kind(ty))


@lowers("add")
def add(b, q, operands):
    _add_like(b, "add", q, operands)


@lowers("sub")
def sub(b, q, operands):
    _add_like(b, "sub", q, operands)


@lowers("mul")
def mul(b, q, operands):
    ty = q[-1]
    if ty in HALVES or ty in ("f32", "f64"):
        return _add_like(b, "mul", q, operands)
    if "wide" in q:
        return binary(b, f"MULWIDE_{signed(ty)}", operands, kind(ty), {16: WORD, 32: DOUBLE}[BITS[ty]])
    if "hi" in q:
        return binary(b, f"MULHI_{signed(ty)}", operands, kind(ty), kind(ty))
    return binary(b, f"MUL{BITS[ty]}", operands, kind(ty), kind(ty))


@lowers("mad")
def mad(b, q, operands):
    ty = q[-1]
    if ty in ("f32", "f64"):
        return fma(b, q, operands)
    if "cc" in q or "sat" in q:
        raise Unsupported("carry or saturating integer arithmetic")
    if "wide" in q:
        wide = {16: WORD, 32: DOUBLE}[BITS[ty]]
        return ternary(b, f"MADWIDE_{signed(ty)}", operands, kind(ty), wide, wide)
    if "hi" in q:
        return ternary(b, f"MADHI_{signed(ty)}", operands, kind(ty), kind(ty))
    return ternary(b, f"MAD{BITS[ty]}", operands, kind(ty), kind(ty))


@lowers("fma")
def fma(b, q, operands):
    ty = q[-1]
    if ty == "f64":
        return ternary(b, "FMA_F64", operands, DOUBLE, DOUBLE)
    if ty in HALVES:
        return _half(b, "fma.relu" if "relu" in q else "fma", q, operands)
    if _has_directed_rounding(q):
        return _directed(b, 3, q, operands)
    return ternary(b, "FMA_F32", operands, x=modifiers(q))


@lowers("div")
def div(b, q, operands):
    ty = q[-1]
    if ty == "f32":
        return binary(b, "DIV_F32", operands, x=modifiers(q))
    if ty == "f64":
        return binary(b, "DIV_F64", operands, DOUBLE, DOUBLE)
    return binary(b, f"DIV_{signed(ty)}", operands, kind(ty), kind(ty))


@lowers("rem")
def rem(b, q, operands):
    binary(b, f"REM_{signed(q[-1])}", operands, kind(q[-1]), kind(q[-1]))


def _min_max(b: Builder, name: str, q: list[str], operands: list[str]) -> None:
    ty, nan = q[-1], "NaN" in q
    if ty == "f32":
        if "xorsign" in q or "abs" in q:
            raise Unsupported("min and max with .xorsign.abs")
        op = f"{name.upper()}_NAN_F32" if nan else f"{name.upper()}_F32"
        if len(operands) == 4:  # three inputs
            first = b.new_register(WORD)
            b.emit(op, a=b.src(operands[1], WORD), b=b.src(operands[2], WORD), d=first, x=modifiers(q))
            return b.emit(op, a=first, b=b.src(operands[3], WORD), d=b.dst(operands[0], WORD), x=modifiers(q))
        return binary(b, op, operands, x=modifiers(q))
    if ty == "f64":
        return binary(b, f"{name.upper()}_F64", operands, DOUBLE, DOUBLE)
    if ty in HALVES:
        return _half(b, f"{name}.NaN" if nan else name, q, operands)
    if "relu" in q:
        if ty != "s32":
            raise Unsupported(f"{name}.relu.{ty}")
        result = b.new_register(WORD)
        b.emit(f"{name.upper()}_S32", a=b.src(operands[1], WORD), b=b.src(operands[2], WORD), d=result)
        return b.emit("MAX_S32", a=result, b=b.constant(WORD, 0), d=b.dst(operands[0], WORD))
    return binary(b, f"{name.upper()}_{signed(ty)}", operands, kind(ty), kind(ty))


@lowers("min")
def minimum(b, q, operands):
    _min_max(b, "min", q, operands)


@lowers("max")
def maximum(b, q, operands):
    _min_max(b, "max", q, operands)


def _sign(b: Builder, name: str, q: list[str], operands: list[str]) -> None:
    ty = q[-1]
    if ty == "f32" and "ftz" in q:
        flushed = b.new_register(WORD)
        b.emit(f"{name}_F32", a=b.src(operands[1], WORD), d=flushed)
        return b.emit("FLUSH_F32", a=flushed, d=b.dst(operands[0], WORD))
    if ty == "f32":
        return unary(b, f"{name}_F32", operands)
    if ty == "f64":
        return unary(b, f"{name}_F64", operands, DOUBLE, DOUBLE)
    if ty in HALVES:
        return unary(b, "HALF_UNARY", operands, x={"NEG": 0, "ABS": 1}[name], n=2 if ty.endswith("x2") else 1)
    return unary(b, f"{name}_S{BITS[ty]}", operands, kind(ty), kind(ty))


@lowers("neg")
def neg(b, q, operands):
    _sign(b, "NEG", q, operands)


@lowers("abs")
def absolute(b, q, operands):
    _sign(b, "ABS", q, operands)


def _transcendental(b: Builder, name: str, q: list[str], operands: list[str]) -> None:
    ty = q[-1]
    if ty == "f64":
        return unary(b, f"{name}_F64", operands, DOUBLE, DOUBLE)
    if ty in HALVES:
        x = {"EX2": 2, "TANH": 3}[name] | (16 if ty.startswith("bf16") else 0)
        return unary(b, "HALF_UNARY", operands, x=x, n=2 if ty.endswith("x2") else 1)
    return unary(b, f"{name}_F32", operands, x=modifiers(q))


for _name in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"):
    lowers(_name)(lambda b, q, operands, name=_name.upper(): _transcendental(b, name, q, operands))


@lowers("copysign")
def copysign(b, q, operands):
    binary(b, "COPYSIGN_F32", operands)


# ---------------------------------------------------------------------------------------------------------------- logic
def _logic(b: Builder, name: str, q: list[str], operands: list[str]) -> None:
    if q[-1] == "pred":
        (first, not_first), (second, not_second) = b.predicate(operands[1]), b.predicate(operands[2])
        b.emit(f"{name}_PRED", a=first, b=second, d=b.dst(operands[0], PREDICATE), x=not_first | not_second << 1)
    else:
        binary(b, f"{name}{BITS[q[-1]]}", operands, kind(q[-1]), kind(q[-1]))


for _name in ("and", "or", "xor"):
    lowers(_name)(lambda b, q, operands, name=_name.upper(): _logic(b, name, q, operands))


@lowers("not")
def logical_not(b, q, operands):
    if q[-1] == "pred":
        return b.emit("MOV_PRED", a=b.src(operands[1], PREDICATE), d=b.dst(operands[0], PREDICATE), x=1)
    return unary(b, f"NOT{BITS[q[-1]]}", operands, kind(q[-1]), kind(q[-1]))


@lowers("cnot")
def cnot(b, q, operands):
    unary(b, f"CNOT{BITS[q[-1]]}", operands)


@lowers("shl")
def shl(b, q, operands):
    binary(b, f"SHL{BITS[q[-1]]}", operands, kind(q[-1]), kind(q[-1]), WORD)


@lowers("shr")
def shr(b, q, operands):
    binary(b, f"SHR_{signed(q[-1])}", operands, kind(q[-1]), kind(q[-1]), WORD)


@lowers("shf")
def shf(b, q, operands):
    ternary(b, f"SHF_{q[0].upper()}_{q[1].upper()}", operands)


@lowers("lop3")
def lop3(b, q, operands):
    if "BOOL" in b.text:
        raise Unsupported("lop3 with a predicate")
    a, second, c = (b.src(o, WORD) for o in operands[1:4])
    b.emit("LOP3", a=a, b=second, c=c, d=b.dst(operands[0], WORD), imm=immediate(operands[4], 32))


@lowers("prmt")
def prmt(b, q, operands):
    ternary(b, "PRMT", operands, x=("b32", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16").index(q[-1]))


@lowers("bfe")
def bfe(b, q, operands):
    ternary(b, f"BFE_{signed(q[-1])}", operands)


@lowers("bfi")
def bfi(b, q, operands):
    a, second, c, e = (b.src(o, WORD) for o in operands[1:5])
    b.emit(f"BFI{BITS[q[-1]]}", a=a, b=second, c=c, e=e, uses=[e], d=b.dst(operands[0], WORD))


for _name in ("popc", "clz"):
    lowers(_name)(lambda b, q, operands, name=_name.upper(): unary(b, f"{name}{BITS[q[-1]]}", operands, kind(q[-1])))


@lowers("brev")
def brev(b, q, operands):
    unary(b, f"BREV{BITS[q[-1]]}", operands)


@lowers("bfind")
def bfind(b, q, operands):
    unary(b, f"BFIND_SHIFT_{signed(q[-1])}" if "shiftamt" in q else f"BFIND_{signed(q[-1])}", operands)


@lowers("sad")
def sad(b, q, operands):
    ternary(b, f"SAD_{signed(q[-1])}", operands)


# ----------------------------------------------------------------------------------------------------------- comparison
@lowers("selp")
def selp(b, q, operands):
    k = kind(q[-1])
    a, second = b.src(operands[1], k), b.src(operands[2], k)
    chooser, negated = b.predicate(operands[3])
    op = {WORD: "SELP32", DOUBLE: "SELP64", PREDICATE: "SELP_PRED"}[k]
    b.emit(op, a=a, b=second, c=chooser, d=b.dst(operands[0], k), x=negated)


_COMPLEMENT = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "num": "nan"}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_MIRROR = {"gt": "lt", "ge": "le"}


@lowers("setp")
def setp(b, q, operands):
    """The machine compares with eq, ne (floats), lt, le and nan; the rest are mirrored or complemented."""
    ty, comparison = q[-1], q[0]
    combine = next((("and", "or", "xor").index(word) + 1 for word in q[1:-1] if word in ("and", "or", "xor")), 0)
    destinations = [part.strip() for part in operands[0].split("|")]
    a, second = b.src(operands[1], kind(ty)), b.src(operands[2], kind(ty))
    is_float, inverted = ty in ("f32", "f64", "f16", "bf16"), 0
    if is_float and comparison in _COMPLEMENT:
        comparison, inverted = _COMPLEMENT[comparison], 1
    elif not is_float:
        comparison = _UNSIGNED_NAMES.get(comparison, comparison)
        if comparison == "ne":
            comparison, inverted = "eq", 1
    if comparison in _MIRROR:
        a, second, comparison = second, a, _MIRROR[comparison]
    if is_float:
        op = f"SETP_{comparison.upper()}_{ty.upper()}"
    else:
        op = f"SETP_EQ{BITS[ty]}" if comparison == "eq" else f"SETP_{comparison.upper()}_{signed(ty)}"
    x, other = inverted, None
    if combine:
        other, negated = b.predicate(operands[3])
        x |= combine << 1 | negated << 3
    inverse = b.dst(destinations[1], PREDICATE) if len(destinations) > 1 else None
    b.emit(op, a=a, b=second, c=other, d=b.dst(destinations[0], PREDICATE), e=inverse, defs=[inverse], x=x)
