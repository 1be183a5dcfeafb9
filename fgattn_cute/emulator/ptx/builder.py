# SPDX-License-Identifier: Apache-2.0
"""The state of lowering one kernel: scopes, names, operands, and the instructions emitted so far."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..abi import OPS, SPECIALS
from .ir import DOUBLE, KIND_OF_BITS, PREDICATE, WIDE, WORD, Instruction, Value
from .parse import BITS, Entry, PtxError, Text, Unsupported, immediate, is_immediate, split_operands, statements

WINDOW_PARAM = 0x72 << 56
ALL_LANES = 0xFFFFFFFF

_REGISTER_RANGE = re.compile(r"(%?[A-Za-z_$]+)<(\d+)>")
_NUMBERED = re.compile(r"(%?[A-Za-z_$]+)(\d+)")
_ADDRESS = re.compile(r"([%$\w.]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?")
_STATEMENT = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$")


class Scope:
    """One `{ }` block: registers and labels are block-scoped (inline assembly repeats names such as DONE)."""

    def __init__(self, number: int):
        self.number = number
        self.registers: dict[str, Value] = {}
        self.ranges: dict[str, tuple[str, int]] = {}  # "%r" -> (kind, count)


class Builder:
    """Lowers operands and collects instructions."""

    def __init__(self, module: Text, entry: Entry):
        self.module, self.entry = module, entry
        self.code: list[Instruction] = []
        self.registers: list[Value] = []
        self.values: list[Value] = []  # constants, specials, shared symbols
        self.unsupported: dict[int, str] = {}  # index of instruction -> why
        self.local_bytes = 0
        self.constant_addresses: dict[str, int] = {}
        self.text = ""
        self.line = 0
        self.guard: Value | None = None
        self.guard_not = False
        self._scopes = [Scope(0)]
        self._scope_count = 0
        self._labels: dict[tuple[tuple[int, ...], str], int] = {}
        self._fixups: list[tuple[int, list[str], tuple[int, ...]]] = []
        self._constants: dict[tuple[str, int], Value] = {}
        self._specials: dict[str, Value] = {}
        self._local: dict[str, int] = {}
        self._param_offsets = {p.name: p.offset for p in entry.params}
        self.shared_offsets, self.static_smem = self._place_shared()

    def _place_shared(self) -> tuple[dict[str, int], int]:
        """Static variables the kernel names first, then the dynamic block: offsets, and the bytes before the block."""
        used = set(re.findall(r"[\w$]+", self.entry.body))
        offsets, end = {}, 0
        for name, variable in self.module.shared.items():
            if not variable.external and name in used:
                offsets[name] = (end + variable.align - 1) // variable.align * variable.align
                end = offsets[name] + variable.size
        external = {name: v for name, v in self.module.shared.items() if v.external}
        align = max([v.align for v in external.values()], default=16)
        dynamic = (end + align - 1) // align * align
        offsets.update(dict.fromkeys(external, dynamic))
        return offsets, dynamic if external and end else end

    # ------------------------------------------------------------------------------------------------------- values
    def new_register(self, kind: str, name: str = "") -> Value:
        register = Value(kind, "register", name=name, index=len(self.registers))
        self.registers.append(register)
        return register

    def constant(self, kind: str, value: int) -> Value:
        value &= (1 << 64) - 1 if kind == DOUBLE else ALL_LANES
        key = (kind, value)
        if key not in self._constants:
            self._constants[key] = Value(kind, "constant", value)
            self.values.append(self._constants[key])
        return self._constants[key]

    def predicate_constant(self, truth: int) -> Value:
        return self.constant(PREDICATE, ALL_LANES if truth else 0)

    def _special(self, name: str) -> Value:
        if name not in self._specials:
            self._specials[name] = Value(WORD, "special", SPECIALS[name], name)
            self.values.append(self._specials[name])
        return self._specials[name]

    def register(self, name: str) -> Value | None:
        """The register a name means here, or None."""
        for scope in reversed(self._scopes):
            if name in scope.registers:
                return scope.registers[name]
            match = _NUMBERED.fullmatch(name)
            if match and match.group(1) in scope.ranges:
                kind, count = scope.ranges[match.group(1)]
                if int(match.group(2)) < count:
                    scope.registers[name] = self.new_register(kind, name)
                    return scope.registers[name]
        return None

    def _symbol(self, name: str, kind: str, offset: int = 0) -> Value:
        match = re.fullmatch(r"([\w$]+)\s*\+\s*(-?\w+)", name)
        if match:
            return self._symbol(match.group(1), kind, offset + immediate(match.group(2)))
        if name in self.shared_offsets:
            value = Value(kind, "shared", self.shared_offsets[name] + offset, name)
            self.values.append(value)
            return value
        if name in self._param_offsets:
            return self.constant(DOUBLE, WINDOW_PARAM + self._param_offsets[name] + offset)
        if name in self._local:
            return self.constant(kind, self._local[name] + offset)
        if name in self.constant_addresses:
            return self.constant(DOUBLE, self.constant_addresses[name] + offset)
        raise PtxError(f"unknown symbol {name}")

    # ----------------------------------------------------------------------------------------------------- operands
    def kind_of(self, name: str) -> str | None:
        register = self.register(name)
        return register.kind if register else None

    def dst(self, name: str, kind: str | None = None) -> Value | None:
        """A destination register; None for the sink "_"."""
        if name == "_":
            return None
        register = self.register(name)
        if register is None:
            raise PtxError(f"unknown destination register {name}")
        if kind and register.kind != kind:
            raise PtxError(f"register {name} is of kind {register.kind}, the instruction needs {kind}")
        return register

    def src(self, name: str, kind: str) -> Value:
        """A source operand of the given kind: register, special register, immediate or symbol."""
        name = name.strip()
        special = name[1:].replace(".", "_") if name.startswith("%") else ""
        if special in SPECIALS:
            if kind != WORD:
                raise Unsupported(f"{name} as an operand of kind {kind}")
            return self._special(special)
        register = self.register(name)
        if register is not None:
            if register.kind != kind:
                raise PtxError(f"register {name} is of kind {register.kind}, the instruction needs {kind}")
            return register
        if is_immediate(name):
            return self.constant(kind, immediate(name, 64 if kind == DOUBLE else 32))
        if name == "WARP_SZ":
            return self.constant(kind, 32)
        if name.startswith("%"):
            raise Unsupported(f"special register {name}")
        return self._symbol(name, kind)

    def predicate(self, name: str) -> tuple[Value, int]:
        """A predicate source with optional "!"; returns (value, 1 if negated)."""
        name = name.strip()
        if is_immediate(name):
            return self.predicate_constant(immediate(name, 32)), 0
        return self.src(name.lstrip("! "), PREDICATE), int(name.startswith("!"))

    def address(self, text: str) -> tuple[Value, int, int]:
        """`[register + offset]` -> (register or constant, WIDE if it has 64 bits else 0, offset)."""
        text = text.strip()
        if not (text.startswith("[") and text.endswith("]")):
            raise PtxError(f"address expected: {text}")
        return self.address_inside(text[1:-1])

    def address_inside(self, text: str) -> tuple[Value, int, int]:
        match = _ADDRESS.fullmatch(text.strip())
        if not match:
            raise PtxError(f"address {text}")
        base, plus, minus = match.groups()
        offset = immediate((plus or minus or "0").replace(" ", ""))
        register = self.register(base)
        if register is not None:
            return register, WIDE if register.kind == DOUBLE else 0, offset
        if is_immediate(base):
            return self.constant(WORD, immediate(base)), 0, offset
        if base in self.shared_offsets or base in self._local:
            return self._symbol(base, WORD), 0, offset
        return self._symbol(base, DOUBLE), WIDE, offset

    def param_address(self, text: str) -> int | None:
        """Byte in the parameter space of `[param + offset]`, or None if the address is something else."""
        match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match or match.group(1) not in self._param_offsets:
            return None
        return self._param_offsets[match.group(1)] + immediate(match.group(2) or "0")

    # ----------------------------------------------------------------------------------------------------- emission
    def emit(
        self,
        op: str,
        *,
        uses: Iterable[Value | None] = (),
        defs: Iterable[Value | None] = (),
        labels: Sequence[str] = (),
        **fields,
    ) -> Instruction:
        """Appends an instruction. d is a definition and a, b, c are uses; `uses` and `defs` name others (e, aux)."""
        if op not in OPS:
            raise Unsupported(f"the machine has no {op}")
        instruction = Instruction(op, self.line, guard=self.guard, guard_not=self.guard_not, **fields)
        read = [instruction.a, instruction.b, instruction.c, instruction.guard, *uses]
        instruction.uses = [v for v in read if v is not None and v.is_register]
        instruction.defs = [v for v in [instruction.d, *defs] if v is not None and v.is_register]
        if labels:
            self._fixups.append((len(self.code), list(labels), tuple(scope.number for scope in self._scopes)))
        self.code.append(instruction)
        return instruction

    # --------------------------------------------------------------------------------------------------- statements
    def lower(self, lowerings) -> None:
        """Lowers the whole body with the table of instruction families."""
        for line, kind, text in statements(self.entry.body, self.entry.first_line):
            self.line = line
            if kind == "{":
                self._scope_count += 1
                self._scopes.append(Scope(self._scope_count))
            elif kind == "}":
                self._scopes.pop()
            elif kind == "label":
                key = (tuple(scope.number for scope in self._scopes), text)
                if key in self._labels:
                    raise PtxError(f"line {line + 1}: label {text} is defined twice in one block")
                self._labels[key] = len(self.code)
            elif text.startswith("."):
                self._declaration(text)
            else:
                self._instruction(text, lowerings)
        self.guard, self.guard_not = None, False
        self.emit("EXIT")
        for index, labels, scope in self._fixups:
            self.code[index].targets = [self._find_label(label, scope) for label in labels]

    def _find_label(self, label: str, scope: tuple[int, ...]) -> int:
        while (scope, label) not in self._labels:
            if not scope:
                raise PtxError(f"label {label} is not defined")
            scope = scope[:-1]
        return self._labels[scope, label]

    def _declaration(self, text: str) -> None:
        if text.startswith(".reg"):
            base, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            kind = KIND_OF_BITS[BITS[base]]
            for name in (part.strip() for part in names.split(",")):
                match = _REGISTER_RANGE.fullmatch(name)
                if match:
                    self._scopes[-1].ranges[match.group(1)] = (kind, int(match.group(2)))
                else:
                    self._scopes[-1].registers[name] = self.new_register(kind, name)
        elif text.startswith(".local"):
            match = re.match(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d+\])*)", text)
            align, size = int(match.group(1) or 8), BITS[match.group(2)] // 8
            for dim in re.findall(r"\[(\d+)\]", match.group(4)):
                size *= int(dim)
            self._local[match.group(3)] = (self.local_bytes + align - 1) // align * align
            self.local_bytes = self._local[match.group(3)] + size
        elif text.startswith(".shared"):
            name = re.match(r"\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)", text).group(1)
            if name not in self.shared_offsets:
                raise PtxError(f"shared variable {name} has no place")

    def _instruction(self, text: str, lowerings) -> None:
        match = _STATEMENT.match(text)
        if not match:
            raise PtxError(f"line {self.line + 1}: cannot read: {text}")
        negated, guard, opcode, rest = match.groups()
        self.text = text
        self.guard, self.guard_not = None, bool(negated)
        if guard:
            self.guard = self.register(guard)
            if self.guard is None:
                raise PtxError(f"line {self.line + 1}: unknown guard {guard}")
        root, *qualifiers = opcode.split(".")
        start, fixups = len(self.code), len(self._fixups)
        try:
            if root not in lowerings:
                raise Unsupported(f"no such instruction: {opcode}")
            lowerings[root](self, [q for q in qualifiers if q], split_operands(rest))
        except (Unsupported, KeyError, ValueError, IndexError, StopIteration) as error:
            del self.code[start:], self._fixups[fixups:]
            self.unsupported[start] = (
                f"{text}: {error}" if isinstance(error, Unsupported) else f"{text}: not understood"
            )
            self.emit("UNSUPPORTED")
        except PtxError as error:
            raise PtxError(f"line {self.line + 1}: {text}: {error}") from None
