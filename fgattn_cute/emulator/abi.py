# SPDX-License-Identifier: Apache-2.0
"""The structures and enums that Python and the C core share, read from `core/abi.h` and `core/ops.h`.

The headers are the one source of truth: a small reader turns their typedefs into `ctypes.Structure` classes and their
enums into dictionaries. Every structure lists its fields in simple declarations, which is all the reader understands.
"""

from __future__ import annotations

import ctypes as C
import re
from types import SimpleNamespace

import numpy as np

from .build import CORE_DIR

NONE = 0xFFFFFFFF  # no operand

_TYPES = {
    "u8": C.c_uint8,
    "s8": C.c_int8,
    "u16": C.c_uint16,
    "s16": C.c_int16,
    "u32": C.c_uint32,
    "s32": C.c_int32,
    "u64": C.c_uint64,
    "s64": C.c_int64,
    "char": C.c_char,
}


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def _constant(text: str, enums: dict[str, dict[str, int]]) -> int:
    return int(text, 0) if text[0].isdigit() else next(e[text] for e in enums.values() if text in e)


def _read_enums(text: str) -> dict[str, dict[str, int]]:
    """`enum Name { A, B = 4, ... };` -> {"Name": {"A": 0, "B": 4, ...}}."""
    enums: dict[str, dict[str, int]] = {}
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", text, flags=re.S):
        value, members = 0, {}
        for item in filter(None, (part.strip() for part in body.split(","))):
            label, _, given = (part.strip() for part in item.partition("="))
            value = int(given, 0) if given else value
            members[label] = value
            value += 1
        enums[name] = members
    return enums


def _read_structures(text: str, enums: dict[str, dict[str, int]]) -> dict[str, type[C.Structure]]:
    """`typedef struct { u32 a, b[3]; ... } Name;` -> {"Name": ctypes structure}."""
    types = dict(_TYPES)
    structures: dict[str, type[C.Structure]] = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, flags=re.S):
        fields = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            base, names = declaration.split(None, 1)
            for label, size in re.findall(r"(\w+)(?:\[(\w+)\])?", names):
                fields.append((label, types[base] * _constant(size, enums) if size else types[base]))
        types[name] = structures[name] = type(name, (C.Structure,), {"_fields_": fields})
    return structures


_HEADER = _without_comments((CORE_DIR / "abi.h").read_text())
ENUMS = _read_enums(_HEADER)
STRUCTURES = _read_structures(_HEADER, ENUMS)

Kernel, MemoryRegion, Launch = STRUCTURES["Kernel"], STRUCTURES["MemoryRegion"], STRUCTURES["Launch"]
FindingRecord, Result = STRUCTURES["FindingRecord"], STRUCTURES["Result"]

OPS = {
    name: i for i, name in enumerate(re.findall(r"\bX\((\w+)\)", _without_comments((CORE_DIR / "ops.h").read_text())))
}


def _numpy_dtype(structure: type[C.Structure]) -> np.dtype:
    return np.dtype(structure)


INSTRUCTION = _numpy_dtype(STRUCTURES["Ins"])
SYMBOL = _numpy_dtype(STRUCTURES["SharedSymbol"])
REGION = _numpy_dtype(MemoryRegion)


def _names(enum: str, prefix: str) -> list[str]:
    """The members of an enum in order, without prefix, lower case; the closing ..._COUNT is left out."""
    members = sorted(ENUMS[enum].items(), key=lambda item: item[1])
    return [
        name.removeprefix(prefix).lower() for name, _ in members if not name.endswith(("_COUNTERS", f"{prefix}COUNT"))
    ]


CLASSES = _names("Class", "CLASS_")
COUNTERS = _names("Counter", "COUNT_")
KINDS = _names("Kind", "KIND_")
SPECIALS = {name: i for i, name in enumerate(_names("Special", "SPECIAL_"))}
CLASS = SimpleNamespace(**{name.upper(): i for i, name in enumerate(CLASSES)})
FLAG = SimpleNamespace(**{name.removeprefix("INS_"): value for name, value in ENUMS["InsFlag"].items()})


def verify(library: C.CDLL) -> None:
    """Compares the structures read from the header with what the compiler made of them."""
    sizes = (C.c_uint32 * 6)()
    library.fge_abi_sizes(sizes)
    ours = [
        C.sizeof(STRUCTURES[name]) for name in ("Ins", "Kernel", "MemoryRegion", "Launch", "FindingRecord", "Result")
    ]
    if list(sizes) != ours:
        raise RuntimeError(f"core/abi.h is read differently by Python and C: sizes {ours} and {list(sizes)}")
