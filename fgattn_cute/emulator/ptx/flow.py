# SPDX-License-Identifier: Apache-2.0
"""Data flow over a lowered kernel. Sets of registers are Python integers used as bit sets (bit = register index).

Four questions are answered once here, so that the machine need not ask them of every instruction it runs:

* which registers a wgmma may own at each instruction (`FLIGHT`: only these accesses can be hazards or moves to be
  deferred);
* which accesses may fall between a wgmma.fence and its wgmma (`TOUCH`: in a correct kernel usually none);
* which reads may see a register that no path has written (bookkeeping is inserted around these registers only);
* which registers are live where (for the sharing of slots, ptx/slots.py).

All answers are "may" answers: they decide where the machine looks, and the machine decides by what really happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..abi import FLAG
from .ir import Instruction, Value

SCALE, DESC_A, ACCUMULATORS = 9, 10, 16  # places in the aux words of WGMMA (WgmmaShape)
IN_REGISTERS = 8


@dataclass
class Block:
    """Instructions [start, end) without branches in or out of the middle."""

    start: int
    end: int
    successors: list[int]


def bits(values: Iterable[Value]) -> int:
    mask = 0
    for value in values:
        mask |= 1 << value.index
    return mask


def members(mask: int) -> list[int]:
    """The indices in a bit set, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def basic_blocks(code: list[Instruction]) -> list[Block]:
    """The control flow graph; a block falls through unless it ends with an unguarded branch or exit."""
    leaders = {0}
    for i, instruction in enumerate(code):
        leaders.update(instruction.targets)
        if instruction.op in ("BRA", "EXIT"):
            leaders.add(i + 1)
    starts = sorted(s for s in leaders if s < len(code))
    block_at = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(code)
        last = code[end - 1]
        successors = [block_at[t] for t in last.targets]
        if (last.op not in ("BRA", "EXIT") or last.guard is not None) and i + 1 < len(starts):
            successors.append(i + 1)
        blocks.append(Block(start, end, successors))
    return blocks


class Flow:
    """The analyses of one kernel; flags are set on the instructions, the other results are attributes.

    Attributes:
        blocks: the control flow graph.
        live_in, live_out: bit sets per block.
        waits: per wgmma.wait_group (index), the registers that may be in flight there; they stay live up to it.
        questioned: registers whose order to wgmma.fence must be followed at run time.
        unwritten: per instruction (index), the registers it may read unwritten.
    """

    def __init__(self, code: list[Instruction], num_registers: int):
        self.code = code
        self.all_registers = (1 << num_registers) - 1
        self.blocks = basic_blocks(code)
        self.uses = [bits(i.uses) for i in code]
        self.defs = [bits(i.defs) for i in code]
        self._find_flight()
        self._find_touched()
        self._find_live()
        self._find_unwritten()

    def _forward(self, entry: int, transfer: Callable[[int, int], int]) -> list[int]:
        """Solves a forward union problem; returns the state at the start of each block."""
        state = [0] * len(self.blocks)
        state[0] = entry
        pending = set(range(len(self.blocks)))
        while pending:
            number = min(pending)
            pending.discard(number)
            current = state[number]
            for i in range(self.blocks[number].start, self.blocks[number].end):
                current = transfer(i, current)
            for successor in self.blocks[number].successors:
                if current & ~state[successor]:
                    state[successor] |= current
                    pending.add(successor)
        return state

    def _walk(self, state: list[int], transfer: Callable[[int, int], int], visit: Callable[[int, int], None]) -> None:
        for block, current in zip(self.blocks, state, strict=True):
            for i in range(block.start, block.end):
                visit(i, current)
                current = transfer(i, current)

    # ------------------------------------------------------------------------------------------- registers in flight
    def _find_flight(self) -> None:
        self.waits: dict[int, int] = {}

        def transfer(i: int, flight: int) -> int:
            instruction = self.code[i]
            if instruction.op == "WGMMA":
                return flight | self._owned(i)
            if instruction.op == "WGMMA_WAIT":
                return 0 if instruction.imm == 0 else flight
            if instruction.is_move and self.uses[i] & flight:
                return flight | self.defs[i]
            return flight

        def visit(i: int, flight: int) -> None:
            instruction = self.code[i]
            if instruction.op == "WGMMA_WAIT":
                self.waits[i] = flight
            elif instruction.op != "WGMMA" and (self.uses[i] | self.defs[i]) & flight:
                instruction.flags |= FLAG.FLIGHT | (FLAG.MOVE if instruction.is_move else 0)

        self._walk(self._forward(0, transfer), transfer, visit)

    def _owned(self, i: int) -> int:
        """Accumulators, and A registers, of a wgmma."""
        aux = self.code[i].aux
        a = [v for v in aux[12:16] if isinstance(v, Value)] if aux[IN_REGISTERS] else []
        return self.defs[i] | bits(v for v in a if v.is_register)

    # ------------------------------------------------------------------------------------------------- wgmma.fence
    def _find_touched(self) -> None:
        operands = 0
        for i, instruction in enumerate(self.code):
            if instruction.op == "WGMMA":
                operands |= self._owned(i)
        self.questioned = 0
        if not operands:
            return

        def transfer(i: int, touched: int) -> int:
            op = self.code[i].op
            if op == "WGMMA_FENCE":
                return 0
            return touched if op == "WGMMA" else touched | (self.uses[i] | self.defs[i]) & operands

        def visit(i: int, touched: int) -> None:
            if self.code[i].op == "WGMMA":
                self.questioned |= self._owned(i) & touched

        self._walk(self._forward(0, transfer), transfer, visit)
        for i, instruction in enumerate(self.code):
            if instruction.op != "WGMMA" and (self.uses[i] | self.defs[i]) & self.questioned:
                instruction.flags |= FLAG.TOUCH

    # ---------------------------------------------------------------------------------------------------- liveness
    def effects(self, i: int) -> tuple[int, int]:
        """(registers read, registers surely overwritten), for liveness."""
        instruction, used, killed = self.code[i], self.uses[i], self.defs[i]
        if instruction.op == "WGMMA":
            used |= self.defs[i]
            killed = 0
        elif i in self.waits:
            used |= self.waits[i]
        return used, 0 if instruction.guard is not None else killed

    def _find_live(self) -> None:
        number = len(self.blocks)
        gen, kill = [0] * number, [0] * number
        for k, block in enumerate(self.blocks):
            for i in reversed(range(block.start, block.end)):
                used, killed = self.effects(i)
                gen[k] = gen[k] & ~killed | used
                kill[k] = (kill[k] | killed) & ~used
        self.live_in, self.live_out = list(gen), [0] * number
        changed = True
        while changed:
            changed = False
            for k in reversed(range(number)):
                out = 0
                for successor in self.blocks[k].successors:
                    out |= self.live_in[successor]
                if out != self.live_out[k]:
                    self.live_out[k] = out
                    self.live_in[k] = gen[k] | out & ~kill[k]
                    changed = True

    # -------------------------------------------------------------------------------------------- unwritten registers
    def _find_unwritten(self) -> None:
        self.unwritten: dict[int, int] = {}
        self._definitions: dict[int, list[Instruction]] = {}
        for instruction in self.code:
            for register in instruction.defs:
                self._definitions.setdefault(register.index, []).append(instruction)

        def transfer(i: int, unwritten: int) -> int:
            instruction, defs = self.code[i], self.defs[i]
            if not defs:
                return unwritten
            if instruction.is_move and self.uses[i] & unwritten:
                return unwritten | defs
            return unwritten if instruction.guard is not None else unwritten & ~defs

        def visit(i: int, unwritten: int) -> None:
            instruction = self.code[i]
            read = self.uses[i]
            if instruction.op == "WGMMA" and not self._scale_is_false(i):
                read |= self.defs[i]
            if read & unwritten:
                self.unwritten[i] = read & unwritten

        self._walk(self._forward(self.all_registers, transfer), transfer, visit)

    def _scale_is_false(self, i: int) -> bool:
        """Is scale-d of a wgmma known to be false? The DSL writes it as `mov r, 0; setp.ne p, r, 0; wgmma ... p`."""
        scale = self.code[i].aux[SCALE]
        if not scale.is_register:
            return scale.value == 0
        compare = next((c for c in reversed(self.code[max(0, i - 4) : i]) if scale in c.defs), None)
        if compare is None or compare.op != "SETP_EQ32" or compare.x != 1 or compare.c is not None:
            return False
        left, right = self._constant(compare.a), self._constant(compare.b)
        return left is not None and left == right

    def _constant(self, value: Value) -> int | None:
        """The bits of a constant, or of a register whose only definition is a move of one."""
        if value.is_register:
            moves = self._definitions.get(value.index, [])
            if len(moves) != 1 or moves[0].op != "MOV32" or moves[0].guard is not None:
                return None
            value = moves[0].a
        return value.value if value.origin == "constant" else None


def track_unwritten(flow: Flow, code: list[Instruction], registers: list[Value]) -> tuple[list[Instruction], int]:
    """Inserts the bookkeeping of registers that may be read unwritten.

    Returns:
        The new code (branch targets adjusted) and the number of registers that are tracked.
    """
    tracked = 0
    for i, mask in flow.unwritten.items():
        if not code[i].is_move:
            tracked |= mask
    grown = tracked
    while grown:  # moves hand the doubt on: follow it back to the sources
        grown = 0
        for i, mask in flow.unwritten.items():
            if code[i].is_move and flow.defs[i] & tracked:
                grown |= mask & ~tracked
        tracked |= grown
    if not tracked:
        return code, 0
    number = {index: n for n, index in enumerate(members(tracked))}
    out: list[Instruction] = []
    place: list[int] = []
    for i, instruction in enumerate(code):
        place.append(len(out))
        doubtful = flow.unwritten.get(i, 0) & tracked
        if doubtful and not instruction.is_move:
            out.extend(_checks(instruction, doubtful, flow, i, number))
        out.append(instruction)
        out.extend(
            _marks(instruction, doubtful, [number[r.index] for r in instruction.defs if r.index in number], number)
        )
    place.append(len(out))
    for instruction in out:
        instruction.targets = [place[t] for t in instruction.targets]
    return out, len(number)


def _pseudo(like: Instruction, op: str, indices: list[int], c: Value | None = None) -> Instruction:
    return Instruction(
        op, like.line, c=c, guard=like.guard, guard_not=like.guard_not, aux=indices, n=len(indices), flags=FLAG.PSEUDO
    )


def _checks(instruction: Instruction, doubtful: int, flow: Flow, i: int, number: dict[int, int]) -> list[Instruction]:
    """Accumulators of a wgmma are read only if scale-d is true. The guard itself is read by every lane."""
    accumulators = doubtful & flow.defs[i] & ~flow.uses[i] if instruction.op == "WGMMA" else 0
    checks = []
    if accumulators:
        scale = instruction.aux[SCALE]
        checks.append(_pseudo(instruction, "CHECK_WRITTEN", [number[m] for m in members(accumulators)], c=scale))
    plain = [number[m] for m in members(doubtful & ~accumulators)]
    if plain:
        check = _pseudo(instruction, "CHECK_WRITTEN", plain)
        if instruction.guard is not None and doubtful >> instruction.guard.index & 1:
            check.guard = None
        checks.append(check)
    for distance, check in enumerate(reversed(checks), 1):
        check.imm = distance  # to the instruction that is checked
    return checks


def _marks(instruction: Instruction, doubtful: int, defs: list[int], number: dict[int, int]) -> list[Instruction]:
    if not defs:
        return []
    if instruction.is_move and doubtful:
        sources = [number[m] for m in members(doubtful)]
        return [_pseudo(instruction, "COPY_WRITTEN", [d, *sources]) for d in defs]
    return [_pseudo(instruction, "MARK_WRITTEN", defs)]
