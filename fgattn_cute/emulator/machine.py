# SPDX-License-Identifier: Apache-2.0
"""The machine: runs one lowered kernel over a grid and says what happened.

    kernel = ptx.load(text).kernels["name"]
    result = Machine().run(kernel, LaunchConfig(grid=(8, 1, 1), block=(128, 1, 1), params=raw, memory=[Region(lo, hi)]))

Addresses are host addresses: the "device memory" of a launch is the list of :class:`Region` it may touch.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


class Check(enum.IntFlag):
    """What a launch looks for. Members of ``ALWAYS`` guard the host process itself and cannot be switched off."""

    BOUNDS = enum.auto()  # global access outside the regions of the launch, to the byte
    SHARED = enum.auto()  # shared memory access outside the CTA's (or cluster's) shared memory
    ALIGNMENT = enum.auto()  # misaligned global, shared, vector, cp.async, TMA access
    DESCRIPTOR = enum.auto()  # illegal wgmma descriptors and tensor maps
    MBARRIER = enum.auto()  # over-arrival, under-arrival at exit, transaction overflow, leftover transactions
    DEADLOCK = enum.auto()  # every warp is blocked
    UNINIT_REGISTER = enum.auto()  # read of a register no path has written
    UNINIT_SHARED = enum.auto()  # read of shared memory nobody has written
    UNINIT_GLOBAL = enum.auto()  # read of bytes of a tracked region nobody has written
    WGMMA = enum.auto()  # registers of a wgmma touched in flight, missing wgmma.fence, missing commit or wait
    PROXY = enum.auto()  # generic-proxy write read by the async proxy without fence.proxy.async
    RACE = enum.auto()  # shared memory races between warps and asynchronous agents (vector clocks)
    SETMAXNREG = enum.auto()  # register pool demands that can never be satisfied
    EXIT = enum.auto()  # asynchronous work still in flight when its warp or CTA exits

    ALWAYS = BOUNDS | SHARED | ALIGNMENT | DESCRIPTOR | MBARRIER | DEADLOCK
    FAST = ALWAYS | UNINIT_REGISTER | WGMMA | PROXY | SETMAXNREG | EXIT
    ALL = FAST | UNINIT_SHARED | UNINIT_GLOBAL | RACE


class Completion(enum.IntEnum):
    """When an asynchronous operation takes effect."""

    EAGER = 0  # at issue
    LATE = 1  # as late as the program allows
    RANDOM = 2  # by the seed
    NEWEST_FIRST = 3  # late, and the newest first (TMA loads only; the others treat it as LATE)


@dataclass(frozen=True)
class Region:
    """A piece of device memory a launch may touch: host bytes ``[lo, hi)``.

    ``written`` turns on tracking of initialised bytes: a uint8 bitmap of ``ceil((hi - lo) / 8)`` bytes, bit ``i % 8`` of
    byte ``i // 8`` says that byte ``lo + i`` holds a value. The launch sets bits as it writes and reports reads of bytes
    whose bit is clear; the caller keeps the array between launches and looks for elements never written afterwards.
    """

    lo: int
    hi: int
    name: str = ""
    written: np.ndarray | None = None


@dataclass
class LaunchConfig:
    """One launch. ``params`` are the kernel's parameters laid out as the PTX parameter space (``Kernel.params`` gives
    name, offset and size of each)."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_smem: int = 0  # bytes
    params: bytes = b""
    memory: Sequence[Region] = ()
    checks: Check = Check.FAST
    seed: int = 0
    threads: int = 1  # host threads, each runs whole clusters
    async_wgmma: Completion = Completion.LATE
    async_tma: Completion = Completion.LATE
    async_cp: Completion = Completion.LATE
    random_schedule: bool = False  # shuffle the warps, preempt at random
    quantum: int = 0  # most instructions of a warp per turn; 0: until it blocks
    cta_order: int = 0  # 0 natural, 1 reversed, 2 shuffled by the seed
    max_instructions: int = 2_000_000_000  # warp instructions per cluster; guards against endless loops
    num_sms: int = 132
    registers: int = 0  # per thread, as the cubin says; 0: derived from .reqntid / .minnctapersm
    ctas_per_sm: int = 1  # requested residency, for the register pool


@dataclass(frozen=True)
class Finding:
    """One fault. The same fault of the same instruction in the same CTA counts once, with ``count`` occurrences."""

    kind: Check
    message: str
    pc: int | None  # index of the lowered instruction
    line: int | None  # 1-based line of the PTX text
    text: str  # the PTX instruction
    cta: tuple[int, int, int]
    warp: int | None
    lane: int | None  # lowest lane at fault, where one can be named
    address: int | None  # shared address or host address at fault, where one can be named
    fatal: bool  # execution stopped here
    count: int = 1


@dataclass
class RoleCounters:
    """Counters of the warps that play one role: a run of warpgroups that asked for the same number of registers."""

    name: str
    warps: tuple[int, ...]
    registers: int | None  # target of the last setmaxnreg
    counters: dict[str, int]


@dataclass
class LaunchResult:
    """What a launch did. ``error`` is the fault that stopped it (None: it ran to the end)."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    error: Finding | None = None
    counters: dict[str, int] = field(default_factory=dict)  # whole launch
    warps: list[dict[str, int]] = field(default_factory=list)  # per warp index, summed over the CTAs
    registers: list[int | None] = field(default_factory=list)  # per warp index: target of its last setmaxnreg
    roles: list[RoleCounters] = field(default_factory=list)
