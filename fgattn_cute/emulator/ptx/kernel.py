# SPDX-License-Identifier: Apache-2.0
"""A lowered kernel as the arrays the machine runs."""

from __future__ import annotations

import numpy as np

from ..abi import FLAG, INSTRUCTION, NONE, OPS, SPECIALS, SYMBOL
from . import arithmetic, copies, data, matrix, synchronise  # noqa: F401  (they fill the table of instruction families)
from .builder import Builder
from .flow import Flow, track_unwritten
from .ir import DOUBLE, PREDICATE, Instruction, Value, instruction_class
from .parse import Entry, Param, Text
from .slots import assign
from .table import LOWERINGS

POISON = 0x7FFF7FFF  # registers start as NaN in f32, f16 and bf16; as an address it is out of bounds
PREDICATE_POISON = 0xAAAAAAAA
MAX_REGISTERS, REGISTER_FILE = 255, 65536  # per thread; per SM


def _aligned(size: int, alignment: int = 64) -> np.ndarray:
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]


class Kernel:
    """One kernel, ready to run.

    Attributes:
        name: the PTX entry.
        params: the parameters, with their places in the parameter space (bytes).
        param_bytes: size of the parameter space.
        static_smem: bytes of static shared memory; dynamic shared memory follows.
        reqntid: `.reqntid`, or None.
        reqcluster: `.reqnctapercluster`, or None.
        max_threads: most threads per CTA that `.reqntid` or `.maxntid` allow, or None.
        min_ctas_per_sm: `.minnctapersm`, or 1.
        unsupported: text of the instructions that the machine does not know, by index; they fail when executed.
        lines: the lines of the module.
    """

    def __init__(self, module: Text, entry: Entry, constant_addresses: dict[str, int]):
        builder = Builder(module, entry)
        builder.constant_addresses = constant_addresses
        builder.lower(LOWERINGS)
        self.name = entry.name
        self.params: list[Param] = entry.params
        self.param_bytes = entry.param_bytes
        self.static_smem = builder.static_smem
        self.local_bytes = builder.local_bytes
        self.lines = module.lines
        self.reqntid = entry.directives.get("reqntid")
        self.reqcluster = entry.directives.get("reqnctapercluster")
        threads = self.reqntid or entry.directives.get("maxntid")
        self.max_threads = threads[0] * threads[1] * threads[2] if threads else None
        self.min_ctas_per_sm = entry.directives.get("minnctapersm", (1,))[0]
        self._max_registers = entry.directives.get("maxnreg", (MAX_REGISTERS,))[0]

        unsupported = {id(builder.code[i]): why for i, why in builder.unsupported.items()}
        flow = Flow(builder.code, len(builder.registers))
        self.image_bytes = assign(flow, builder.registers, builder.values)
        code, self.num_tracked = track_unwritten(flow, builder.code, builder.registers)
        self.unsupported = {i: unsupported[id(ins)] for i, ins in enumerate(code) if id(ins) in unsupported}
        self._line_of = [ins.line for ins in code]
        self.uses_setmaxnreg = any(ins.op == "SETMAXNREG" for ins in code)
        self._encode(code)
        self._make_image(builder.registers, builder.values)

    def where(self, pc: int) -> tuple[int, str]:
        """1-based line of the PTX text and the instruction on it, for the index of a lowered instruction."""
        line = self._line_of[min(pc, len(self._line_of) - 1)]
        return line + 1, self.lines[line].strip()[:240]

    def default_registers(self, threads: int, ctas_per_sm: int = 1) -> int:
        """Registers per thread that ptxas gives a kernel that uses setmaxnreg: all that the launch bounds allow."""
        ctas = max(self.min_ctas_per_sm, ctas_per_sm)
        per_thread = REGISTER_FILE // ((self.max_threads or threads) * ctas) // 8 * 8
        return min(per_thread, self._max_registers, MAX_REGISTERS)

    def _encode(self, code: list[Instruction]) -> None:
        self.code = _aligned(len(code) * INSTRUCTION.itemsize).view(INSTRUCTION)
        aux: list[int] = []
        accesses: list[int] = []
        starts = [0]
        offset = _offset
        rows = []
        for ins in code:
            imm = ins.targets[0] if ins.op == "BRA" else ins.imm
            flags = ins.flags | (FLAG.GUARD_NOT if ins.guard_not else 0)
            operands = [offset(v) for v in (ins.guard, ins.d, ins.a, ins.b, ins.c, ins.e)]
            rows.append(
                (OPS[ins.op], instruction_class(ins), flags, *operands, ins.x, ins.n, len(aux), ins.line, 0, imm, 0)
            )
            aux.extend(offset(v) if v is None or isinstance(v, Value) else v for v in ins.aux)
            if ins.flags & (FLAG.FLIGHT | FLAG.TOUCH):
                accesses.extend(_slots(ins.uses, 0))
                accesses.extend(_slots(ins.defs, 1 << 31))
            starts.append(len(accesses))
        self.code[:] = rows
        self.aux = np.array([*aux, 0], np.uint32)
        self.du_ptr, self.du = np.array(starts, np.uint32), np.array([*accesses, 0], np.uint32)

    def _make_image(self, registers: list[Value], values: list[Value]) -> None:
        """The register file a warp starts with: poison, and the constants."""
        self.image = _aligned(self.image_bytes + 128)
        words = self.image[: self.image_bytes].view(np.uint32)
        words[:] = POISON
        self.special = np.full(len(SPECIALS), NONE, np.uint32)
        symbols = []
        for register in registers:
            if register.kind == PREDICATE and register.offset >= 0:
                words[register.offset // 4] = PREDICATE_POISON
        for value in values:
            at = value.offset // 4
            if value.origin == "special":
                self.special[value.value] = value.offset
            elif value.origin == "shared":
                symbols.append((value.offset, value.kind == DOUBLE, value.value, 0))
            elif value.kind == PREDICATE:
                words[at] = value.value
            elif value.kind == DOUBLE:
                self.image[value.offset : value.offset + 256].view(np.uint64)[:] = value.value
            else:
                words[at : at + 32] = value.value
        self.symbols = np.array(symbols, dtype=SYMBOL) if symbols else np.zeros(1, SYMBOL)
        self.num_symbols = len(symbols)


def _offset(value: Value | None) -> int:
    return NONE if value is None else value.offset


def _slots(values: list[Value], flag: int) -> list[int]:
    """Indices of the 128-byte slots of registers (predicates have none)."""
    found = []
    for value in values:
        if value.kind != PREDICATE:
            width = {"w": 1, "d": 2, "q": 4}[value.kind]
            found.extend((value.offset // 128 + i) | flag for i in range(width))
    return found
