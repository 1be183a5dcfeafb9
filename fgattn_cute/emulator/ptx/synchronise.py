# SPDX-License-Identifier: Apache-2.0
"""Lowering of control flow, warp-wide instructions and barriers (PTX ISA 9.7.12, 9.7.13)."""

from __future__ import annotations

from .arithmetic import kind, unary
from .ir import DOUBLE, PREDICATE, SHARED, WORD
from .parse import Unsupported, immediate
from .table import lowers


@lowers("bra")
def bra(b, q, operands):
    b.emit("BRA", labels=[operands[0]])


@lowers("ret", "exit")
def leave(b, q, operands):
    b.emit("EXIT")


@lowers("trap")
def trap(b, q, operands):
    b.emit("TRAP")


@lowers("nanosleep")
def nanosleep(b, q, operands):
    b.emit("YIELD")


@lowers("griddepcontrol", "membar", "pmevent", "brkpt")
def nothing(b, q, operands):
    """Launches are complete before the next starts, and memory is sequentially consistent: nothing is left to do."""
    b.emit("NOP")


@lowers("fence")
def fence(b, q, operands):
    b.emit("FENCE_PROXY" if "proxy" in q and any(word.startswith("async") for word in q) else "NOP")


@lowers("setmaxnreg")
def setmaxnreg(b, q, operands):
    b.emit("SETMAXNREG", imm=immediate(operands[0]))


# ----------------------------------------------------------------------------------------------------------------- warp
def _split_pair(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


@lowers("elect")
def elect(b, q, operands):
    lane, predicate = _split_pair(operands[0])
    elected = b.dst(predicate, PREDICATE)
    b.emit("ELECT", a=b.src(operands[1], WORD), d=b.dst(lane, WORD), e=elected, defs=[elected])


@lowers("shfl")
def shfl(b, q, operands):
    names = _split_pair(operands[0])
    mode = ("idx", "up", "down", "bfly").index(q[1])
    a, lane, clamp, members = (b.src(o, WORD) for o in operands[1:5])
    valid = b.dst(names[1], PREDICATE) if len(names) > 1 else None
    b.emit(
        "SHFL",
        a=a,
        b=lane,
        c=clamp,
        d=b.dst(names[0], WORD),
        e=valid,
        defs=[valid],
        aux=[members],
        uses=[members],
        x=mode,
    )


@lowers("vote")
def vote(b, q, operands):
    mode = ("all", "any", "uni", "ballot").index(q[1])
    predicate, negated = b.predicate(operands[1])
    destination = b.dst(operands[0], WORD if mode == 3 else PREDICATE)
    b.emit("VOTE", a=predicate, b=b.src(operands[2], WORD), d=destination, x=mode | negated << 4)


@lowers("match")
def match(b, q, operands):
    names, k = _split_pair(operands[0]), kind(q[-1])
    same = b.dst(names[1], PREDICATE) if len(names) > 1 else None
    x = (k == DOUBLE) | ("all" in q) << 1
    b.emit(
        "MATCH", a=b.src(operands[1], k), b=b.src(operands[2], WORD), d=b.dst(names[0], WORD), e=same, defs=[same], x=x
    )


_REDUX = {
    **{
        ("add", "u32"): 0,
        ("add", "s32"): 0,
        ("min", "s32"): 1,
        ("max", "s32"): 2,
        ("min", "u32"): 3,
        ("max", "u32"): 4,
    },
    **{("and", "b32"): 5, ("or", "b32"): 6, ("xor", "b32"): 7},
}


@lowers("redux")
def redux(b, q, operands):
    b.emit(
        "REDUX",
        a=b.src(operands[1], WORD),
        b=b.src(operands[2], WORD),
        d=b.dst(operands[0], WORD),
        x=_REDUX[q[1], q[-1]],
    )


# ------------------------------------------------------------------------------------------------------------- barriers
@lowers("bar")
def bar(b, q, operands):
    if q[0] == "warp":
        return b.emit("WARPSYNC", a=b.src(operands[0], WORD))
    words = [word for word in q if word not in ("cta", "aligned")]
    if words[0] == "red":
        return _barrier_reduction(b, words[1], operands)
    count = b.src(operands[1], WORD) if len(operands) > 1 else None
    return b.emit("BAR", a=b.src(operands[0], WORD), b=count, x=("sync", "arrive").index(words[0]))


def _barrier_reduction(b, operation, operands):
    """bar.red d, barrier {, count}, {!}predicate."""
    mode = ("popc", "and", "or").index(operation)
    predicate, negated = b.predicate(operands[-1])
    count = b.src(operands[2], WORD) if len(operands) > 3 else None
    destination = b.dst(operands[0], WORD if mode == 0 else PREDICATE)
    b.emit("BAR_RED", a=b.src(operands[1], WORD), b=count, c=predicate, d=destination, x=mode | negated << 4)


@lowers("barrier")
def barrier(b, q, operands):
    if q[0] == "cluster":
        return b.emit("CLUSTER_ARRIVE" if q[1] == "arrive" else "CLUSTER_WAIT")
    return bar(b, q, operands)


ARRIVE_DROP, COMPLETE_TX, STATE, TEST_WAIT = 16, 16, 16, 32  # x of the mbarrier handlers


def _arrive(b, q, operands):
    state = None
    if not operands[0].startswith("["):
        state = b.dst(operands[0], DOUBLE)
        operands = operands[1:]
    if "noComplete" in q:
        raise Unsupported("mbarrier.arrive.noComplete")
    address, wide, offset = b.address(operands[0])
    value = b.src(operands[1], WORD) if len(operands) > 1 else None
    count, tx = (None, value) if "expect_tx" in q else (value, None)
    x = SHARED | wide | (ARRIVE_DROP if q[0] == "arrive_drop" else 0)
    b.emit("MBARRIER_ARRIVE", a=address, imm=offset, x=x, b=count, c=tx, d=state)


@lowers("mbarrier")
def mbarrier(b, q, operands):
    name = q[0]
    if name in ("arrive", "arrive_drop"):
        return _arrive(b, q, operands)
    if name == "pending_count":
        return unary(b, "MBARRIER_PENDING", operands, DOUBLE, WORD)
    if name in ("try_wait", "test_wait"):
        address, wide, offset = b.address(operands[1])
        parity = "parity" in q
        x = SHARED | wide | (0 if parity else STATE) | (TEST_WAIT if name == "test_wait" else 0)
        phase = b.src(operands[2], WORD if parity else DOUBLE)
        return b.emit("MBARRIER_WAIT", a=address, imm=offset, b=phase, d=b.dst(operands[0], PREDICATE), x=x)
    address, wide, offset = b.address(operands[0])
    x = SHARED | wide
    if name == "init":
        return b.emit("MBARRIER_INIT", a=address, imm=offset, x=x, b=b.src(operands[1], WORD))
    if name == "inval":
        return b.emit("MBARRIER_INVAL", a=address, imm=offset, x=x)
    if name in ("expect_tx", "complete_tx"):
        x |= COMPLETE_TX if name == "complete_tx" else 0
        return b.emit("MBARRIER_TX", a=address, imm=offset, x=x, b=b.src(operands[1], WORD))
    raise Unsupported(f"mbarrier.{name}")
