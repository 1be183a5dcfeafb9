# SPDX-License-Identifier: Apache-2.0
"""PTX text to entries, statements and operands (PTX ISA chapter 4)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BITS = {
    **{
        "b8": 8,
        "u8": 8,
        "s8": 8,
        "b16": 16,
        "u16": 16,
        "s16": 16,
        "f16": 16,
        "bf16": 16,
        "b32": 32,
        "u32": 32,
        "s32": 32,
        "f32": 32,
    },
    **{"f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "b128": 128, "pred": 1},
    **{"e4m3x2": 16, "e5m2x2": 16},
}

_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)*\.entry\s+([\w$]+)\s*(\(|\{|\.)")
_VARIABLE = re.compile(
    r"^[ \t]*((?:\.(?:visible|extern|weak)\s+)*)\.(shared|global|const)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(=[^;]*)?;",
    flags=re.M,
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_IMMEDIATE = re.compile(
    r"[+-]?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?|\d+\.\d*(e[+-]?\d+)?)$"
)


class PtxError(Exception):
    """The text is not PTX as this reader understands it."""


class Unsupported(Exception):
    """An instruction that cannot be lowered; becomes an error when (and only when) it is executed."""


class Param(NamedTuple):
    """A kernel parameter: its place in the parameter space, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class SharedVariable:
    """A module-scope `.shared` variable; an external one is the dynamic shared memory."""

    align: int
    size: int
    external: bool


@dataclass
class Entry:
    """A kernel as text. `first_line` is the 0-based line of the module its body starts on."""

    name: str
    params: list[Param]
    param_bytes: int
    body: str
    first_line: int
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Text:
    """A PTX module, split."""

    lines: list[str]
    entries: dict[str, Entry]
    shared: dict[str, SharedVariable]
    constants: dict[str, tuple[int, bytes]]  # .global and .const variables: (alignment, initial bytes)


def is_immediate(text: str) -> bool:
    return _IMMEDIATE.match(text) is not None


def immediate(text: str, bits: int = 64) -> int:
    """The bit pattern of an immediate as an integer (negative integers stay negative). `bits` is the float width."""
    text = text.strip()
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        value = int(text[2:], 16)
        return _float_bits(struct.unpack("<d", struct.pack("<Q", value))[0], 32) if bits == 32 else value
    negative, digits = text.startswith("-"), text.lstrip("+-").rstrip("uU")
    if re.fullmatch(r"\d+\.\d*(e[+-]?\d+)?", digits):
        return _float_bits(-float(digits) if negative else float(digits), bits)
    base = {"0x": 16, "0X": 16, "0b": 2, "0B": 2}.get(digits[:2], 8 if len(digits) > 1 and digits[0] == "0" else 10)
    value = int(digits, base)
    return -value if negative else value


def _float_bits(value: float, bits: int) -> int:
    return (
        struct.unpack("<I", struct.pack("<f", value))[0]
        if bits == 32
        else struct.unpack("<Q", struct.pack("<d", value))[0]
    )


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def vector(text: str) -> list[str]:
    """`{a, b}` -> ["a", "b"]; a scalar is a vector of one."""
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]


def statements(body: str, first_line: int) -> Iterator[tuple[int, str, str]]:
    """Yields (0-based line, kind, text); kind is "{", "}", "label" or "statement"."""
    line, start, buffer = first_line, first_line, ""
    for i, char in enumerate(body):
        line += char == "\n"
        if not buffer.strip():
            if char in "{}":
                yield line, char, char
                buffer = ""
                continue
            if not char.isspace():
                start = line
        if char == ";":
            if buffer.strip():
                yield start, "statement", " ".join(buffer.split())
            buffer = ""
        elif char == ":" and re.fullmatch(r"\s*[$%A-Za-z_][\w$]*", buffer) and body[i + 1 : i + 2] != ":":
            yield start, "label", buffer.strip()
            buffer = ""
        elif char == "\n" and re.match(r"\s*\.(loc|file|section)\b", buffer):
            buffer = ""
        else:
            buffer += char


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a '{' is never closed")


def _params(text: str) -> tuple[list[Param], int]:
    params, offset = [], 0
    for declaration in split_operands(text):
        match = _PARAM.match(" ".join(declaration.split()))
        if not match:
            raise PtxError(f"parameter: {declaration}")
        align, base, name, count = match.groups()
        size = BITS[base] // 8 * int(count or 1)
        alignment = int(align or BITS[base] // 8)
        offset = (offset + alignment - 1) // alignment * alignment
        params.append(Param(name, offset, size))
        offset += size
    return params, offset


def _directives(head: str) -> dict[str, tuple[int, ...]]:
    """`.reqntid 384, 1, 1` -> {"reqntid": (384, 1, 1)}."""
    found = {}
    for name in ("reqntid", "maxntid", "reqnctapercluster", "minnctapersm", "maxnreg"):
        match = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        if match:
            found[name] = tuple(int(x or 1) for x in match.groups())
    return found


def _initial_bytes(text: str | None, element_bytes: int, count: int) -> bytes:
    data = bytearray(element_bytes * count)
    values = re.findall(r"0f[0-9a-fA-F]{8}|0d[0-9a-fA-F]{16}|-?0x[0-9a-fA-F]+|-?\d+", text or "")
    for i, value in enumerate(values):
        bits = immediate(value, element_bytes * 8) & ((1 << (8 * element_bytes)) - 1)
        data[i * element_bytes : (i + 1) * element_bytes] = bits.to_bytes(element_bytes, "little")
    return bytes(data)


def parse(text: str) -> Text:
    """Splits a PTX module into its entries and module-scope variables."""
    stripped = _strip_comments(text)
    module = Text(text.split("\n"), {}, {}, {})
    for match in _ENTRY.finditer(stripped):
        name, position, declared = match.group(1), match.end() - 1, ""
        if stripped[position] == "(":
            end = stripped.index(")", position)
            declared, position = stripped[position + 1 : end], end + 1
        opening = stripped.index("{", position)
        closing = _closing_brace(stripped, opening)
        params, size = _params(declared)
        body, line = stripped[opening + 1 : closing], stripped.count("\n", 0, opening + 1)
        module.entries[name] = Entry(name, params, size, body, line, _directives(stripped[position:opening]))
    for match in _VARIABLE.finditer(stripped):
        linkage, space, align, base, name, dims, init = match.groups()
        count = 1
        for dim in re.findall(r"\[(\d*)\]", dims):
            count *= int(dim or 0)
        element_bytes = max(BITS[base] // 8, 1)
        alignment = int(align or element_bytes)
        if space == "shared":
            module.shared[name] = SharedVariable(alignment, element_bytes * count, "extern" in linkage)
        else:
            module.constants[name] = (alignment, _initial_bytes(init, element_bytes, count))
    return module
