# SPDX-License-Identifier: Apache-2.0
"""What lowering produces before registers have places: values and instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..abi import CLASS

# Kinds of slots: predicate (32 bits, one per lane), and 32-, 64-, 128-bit lanes. 8- and 16-bit registers live in 32-bit
# lanes.
PREDICATE, WORD, DOUBLE, QUAD = "p", "w", "d", "q"
KIND_OF_BITS = {1: PREDICATE, 8: WORD, 16: WORD, 32: WORD, 64: DOUBLE, 128: QUAD}
SLOT_BYTES = {WORD: 128, DOUBLE: 256, QUAD: 512}

# Address spaces, as core/machine.h numbers them, and the flag for 64-bit address registers.
GENERIC, GLOBAL, SHARED, PARAM, LOCAL = range(5)
WIDE = 8

MOVES = frozenset(
    {"MOV16", "MOV32", "MOV64", "MOV128", "PACK32", "PACK64", "PACK128", "UNPACK32", "UNPACK64", "UNPACK128"}
)


@dataclass(eq=False)
class Value:
    """An operand: a virtual register, or a constant, special register or shared-memory address in a slot of its own."""

    kind: str
    origin: str  # "register", "constant", "special", "shared"
    value: int = 0  # constant: bits; special: index; shared: byte offset in the CTA's shared memory
    name: str = ""
    index: int = -1  # registers: dense number
    offset: int = -1  # place in the register file, once assigned

    @property
    def is_register(self) -> bool:
        return self.origin == "register"


@dataclass(eq=False)
class Instruction:
    """One lowered instruction. `uses` and `defs` are the virtual registers it reads and writes, the guard included."""

    op: str
    line: int  # 0-based line of the PTX text
    d: Value | None = None
    a: Value | None = None
    b: Value | None = None
    c: Value | None = None
    e: Value | None = None
    guard: Value | None = None
    guard_not: bool = False
    x: int = 0
    n: int = 0
    imm: int = 0
    aux: Sequence[Value | int | None] = ()
    targets: list[int] = field(default_factory=list)  # of branches: indices of instructions
    uses: list[Value] = field(default_factory=list)
    defs: list[Value] = field(default_factory=list)
    flags: int = 0

    @property
    def is_move(self) -> bool:
        return self.op in MOVES


_CLASS_OF_PREFIX = (
    (
        ("BRA", "EXIT", "TRAP", "UNSUPPORTED", "YIELD", "SETMAXNREG", "CLOCK", "MARK_", "COPY_WRITTEN", "CHECK_"),
        CLASS.CONTROL,
    ),
    (("EX2_", "LG2_", "RCP_F32", "SQRT_F32", "RSQRT_F32", "SIN_", "COS_", "TANH_"), CLASS.MUFU),
    (("SETP_", "SELP", "AND_PRED", "OR_PRED", "XOR_PRED", "MOV_PRED"), CLASS.PREDICATE),
    (("MBARRIER_",), CLASS.MBARRIER),
    (("BAR", "CLUSTER_"), CLASS.BARRIER),
    (("CP_ASYNC",), CLASS.CP_ASYNC),
    (("TMA_", "BULK_"), CLASS.TMA),
    (("WGMMA_FENCE", "FENCE_"), CLASS.FENCE),
    (("WGMMA",), CLASS.WGMMA),
    (("MMA", "LDMATRIX", "STMATRIX"), CLASS.MMA),
    (("ELECT", "SHFL", "VOTE", "MATCH", "ACTIVEMASK", "REDUX", "WARPSYNC"), CLASS.WARP),
    (("LD_PARAM",), CLASS.PARAM),
    (("ATOM",), CLASS.ATOMIC),
    (("CVT_", "CVT"), CLASS.CONVERT),
    (("MOV", "PACK", "UNPACK", "NOP"), CLASS.MOVE),
    (("HALF", "DIRECTED_F32", "FLUSH_"), CLASS.FLOAT),
)


def instruction_class(instruction: Instruction) -> int:
    """The class an instruction is counted under."""
    op = instruction.op
    if op in ("LD", "ST"):
        return {SHARED: CLASS.SHARED, PARAM: CLASS.PARAM}.get(instruction.x & 7, CLASS.GLOBAL)
    if op.startswith("CVTA"):
        return CLASS.INTEGER
    for prefixes, cls in _CLASS_OF_PREFIX:
        if op.startswith(prefixes):
            return cls
    return CLASS.FLOAT if op.endswith(("_F32", "_F64")) else CLASS.INTEGER
