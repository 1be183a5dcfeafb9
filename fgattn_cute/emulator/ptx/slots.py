# SPDX-License-Identifier: Apache-2.0
"""Places for values in the register file: registers that are never live together share slots.

A slot holds all 32 lanes of a register. Lanes are threads of their own, so sharing is safe wherever it would be safe
for one thread. Sharing matters for speed only: it keeps the register file of a warp in the cache.
"""

from __future__ import annotations

import heapq

from .flow import Flow, members
from .ir import PREDICATE, SLOT_BYTES, Value

LINE = 128  # alignment of slots; also the size of a block of predicates


def _intervals(flow: Flow, number: int) -> list[tuple[int, int] | None]:
    """Per register the first and last instruction at which it may be live (None: it never occurs)."""
    first, last = [None] * number, [None] * number

    def touch(mask: int, position: int) -> None:
        for r in members(mask):
            if first[r] is None or position < first[r]:
                first[r] = position
            if last[r] is None or position > last[r]:
                last[r] = position

    for k, block in enumerate(flow.blocks):
        touch(flow.live_in[k], block.start)
        touch(flow.live_out[k], block.end)
        for i in range(block.start, block.end):
            touch(flow.effects(i)[0] | flow.defs[i], i)
    return [None if f is None else (f, last[r]) for r, f in enumerate(first)]


def assign(flow: Flow, registers: list[Value], others: list[Value]) -> int:
    """Sets `offset` of every value; returns the size of the register file in bytes."""
    end = 0
    predicate_end = 0

    def fresh(kind: str) -> int:
        nonlocal end, predicate_end
        if kind != PREDICATE:
            end += SLOT_BYTES[kind]
            return end - SLOT_BYTES[kind]
        if predicate_end % LINE == 0:
            predicate_end = end
            end += LINE
        predicate_end += 4
        return predicate_end - 4

    intervals = _intervals(flow, len(registers))
    pinned = flow.questioned  # the machine keeps a history per slot for these
    free: dict[str, list[int]] = {kind: [] for kind in SLOT_BYTES}
    busy: list[tuple[int, int, str]] = []  # (last position, slot, kind)
    order = sorted((span[0], r) for r, span in enumerate(intervals) if span is not None)
    for start, r in order:
        register = registers[r]
        while busy and busy[0][0] < start:
            _, slot, kind = heapq.heappop(busy)
            free[kind].append(slot)
        if register.kind == PREDICATE or pinned >> r & 1:
            register.offset = fresh(register.kind)
            continue
        register.offset = free[register.kind].pop() if free[register.kind] else fresh(register.kind)
        heapq.heappush(busy, (intervals[r][1], register.offset, register.kind))
    for value in others:
        value.offset = fresh(value.kind)
    return (end + LINE - 1) // LINE * LINE
