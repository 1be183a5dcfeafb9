# SPDX-License-Identifier: Apache-2.0
"""Lowering of asynchronous copies: cp.async, bulk copies, TMA (PTX ISA 9.7.9.25)."""

from __future__ import annotations

import re

from ..abi import NONE
from .builder import Builder
from .ir import SHARED, WIDE, WORD
from .parse import PtxError, Unsupported, immediate
from .table import lowers

NOINC = 16
REDUCTIONS = {"add": 1, "min": 2, "max": 3, "and": 4, "or": 5, "xor": 6}
# Element types as tensor maps number them (core/tensor_map.h).
ELEMENT_TYPE = {"u32": 2, "b32": 2, "s32": 3, "u64": 4, "b64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}


def _word(value: int) -> int:
    return value & 0xFFFFFFFF


@lowers("cp")
def cp(b, q, operands):
    if q[0] == "reduce" or q[1] == "bulk":
        return _bulk(b, q, operands)
    if q[1] == "commit_group":
        return b.emit("CP_ASYNC_COMMIT")
    if q[1] == "wait_group":
        return b.emit("CP_ASYNC_WAIT", imm=immediate(operands[0], 32))
    if q[1] == "wait_all":
        return b.emit("CP_ASYNC_WAIT", x=1)
    address, wide, offset = b.address(operands[0])
    if q[1] == "mbarrier":
        return b.emit("CP_ASYNC_ARRIVE", a=address, imm=offset, x=SHARED | wide | (NOINC if "noinc" in q else 0))
    source, wide_source, source_offset = b.address(operands[1])
    if not wide_source:
        raise PtxError("the source of cp.async is not a 64-bit address")
    rest = operands[3:-1] if "cache_hint" in b.text else operands[3:]
    size = ignore = None
    if rest and b.kind_of(rest[0].lstrip("!")) == "p":
        ignore = b.src(rest[0], "p")
    elif rest:
        size = b.src(rest[0], WORD)
    return b.emit(
        "CP_ASYNC",
        a=address,
        imm=offset,
        x=SHARED | wide,
        b=source,
        c=size,
        e=ignore,
        uses=[ignore],
        aux=[_word(source_offset)],
        n=immediate(operands[2], 32),
    )


def _bulk(b: Builder, q: list[str], operands: list[str]) -> object:
    if "commit_group" in q:
        return b.emit("BULK_COMMIT")
    if "wait_group" in q:
        return b.emit("BULK_WAIT", imm=immediate(operands[0], 32))
    if "prefetch" in q:
        return b.emit("NOP")
    spaces = [word.split("::")[0] for word in q if word.split("::")[0] in ("shared", "global")]
    to_shared = spaces[0] == "shared"
    reduction = next(REDUCTIONS[word] for word in q if word in REDUCTIONS) if q[0] == "reduce" else 0
    if "tensor" in q:
        return _tensor_load(b, q, operands) if to_shared else _tensor_store(b, q, operands, reduction)
    if to_shared:
        if reduction:
            raise Unsupported("a bulk reduction into shared memory")
        return _linear_load(b, q, operands, spaces[1] == "shared")
    return _linear_store(b, q, operands, reduction)


def _tensor(b: Builder, q: list[str], text: str):
    """`[map, {c0, c1}]` -> (map address, its offset, coordinates)."""
    if any(word.startswith(("im2col", "tile::")) for word in q):
        raise Unsupported("im2col and gather modes")
    dims = int(next(word for word in q if re.fullmatch(r"[1-5]d", word))[0])
    tensor_map, coordinates = re.fullmatch(r"\s*\[\s*([^,]+?)\s*,\s*\{(.*)\}\s*\]\s*", text).groups()
    address, wide, offset = b.address_inside(tensor_map)
    if not wide:
        raise PtxError("the tensor map's address is not a 64-bit one")
    values = [b.src(c, WORD) for c in coordinates.split(",")]
    if len(values) != dims:
        raise PtxError(f"{len(values)} coordinates for {dims} dimensions")
    return address, _word(offset), values


def _multicast_mask(b: Builder, q: list[str], operands: list[str]):
    return b.src(operands[0], WORD) if any("multicast" in word for word in q) else None


def _tensor_load(b, q, operands):
    address, wide, offset = b.address(operands[0])
    tensor_map, map_offset, coordinates = _tensor(b, q, operands[1])
    barrier, wide_barrier, barrier_offset = b.address(operands[2])
    mask = _multicast_mask(b, q, operands[3:])
    aux = [
        *coordinates,
        mask if mask is not None else NONE,
        map_offset,
        _word(barrier_offset),
        int(wide_barrier == WIDE),
    ]
    uses = [*coordinates, mask]
    return b.emit(
        "TMA_LOAD",
        a=address,
        imm=offset,
        x=SHARED | wide,
        b=tensor_map,
        c=barrier,
        n=len(coordinates),
        aux=aux,
        uses=uses,
    )


def _tensor_store(b, q, operands, reduction):
    tensor_map, map_offset, coordinates = _tensor(b, q, operands[0])
    address, wide, offset = b.address(operands[1])
    aux = [*coordinates, map_offset]
    x = SHARED | wide | reduction << 8
    return b.emit("TMA_STORE", a=address, imm=offset, x=x, b=tensor_map, n=len(coordinates), aux=aux, uses=coordinates)


def _linear_load(b, q, operands, from_shared):
    address, wide, offset = b.address(operands[0])
    source, _, source_offset = b.address(operands[1])
    size = b.src(operands[2], WORD)
    barrier, wide_barrier, barrier_offset = b.address(operands[3])
    mask = _multicast_mask(b, q, operands[4:])
    aux = [
        barrier,
        _word(barrier_offset),
        int(wide_barrier == WIDE),
        mask if mask is not None else NONE,
        int(from_shared),
        _word(source_offset),
    ]
    return b.emit("BULK_LOAD", a=address, imm=offset, x=SHARED | wide, b=source, c=size, aux=aux, uses=[barrier, mask])


def _linear_store(b, q, operands, reduction):
    destination, _, destination_offset = b.address(operands[0])
    address, wide, offset = b.address(operands[1])
    size = b.src(operands[2], WORD)
    x = SHARED | wide
    if reduction:
        x |= (reduction | ELEMENT_TYPE[next(word for word in reversed(q) if word in ELEMENT_TYPE)] << 8) << 8
    return b.emit("BULK_STORE", a=address, imm=offset, x=x, b=destination, c=size, aux=[_word(destination_offset)])
