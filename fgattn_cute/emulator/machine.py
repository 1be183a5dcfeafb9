# SPDX-License-Identifier: Apache-2.0
"""The machine: runs one lowered kernel over a grid and says what happened.

    kernel = ptx.load(text).kernels["name"]
    result = Machine().run(kernel, LaunchConfig(grid=(8, 1, 1), block=(128, 1, 1), params=raw, memory=[Region(lo, hi)]))

Addresses are host addresses: the "device memory" of a launch is the list of :class:`Region` it may touch.
"""

from __future__ import annotations

import ctypes as C
import enum
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import abi, build

if TYPE_CHECKING:
    from .ptx import Kernel


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
    WGMMA_ORDER = (
        enum.auto()
    )  # with RACE: do not grant that the issue of a wgmma orders the four warps of its warpgroup

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

    ``written`` turns on tracking of initialised bytes: a uint8 bitmap of ``ceil((hi - lo) / 8)`` bytes, bit ``i % 8``
    of byte ``i // 8`` says that byte ``lo + i`` holds a value. The launch sets bits as it writes and reports reads of
    bytes whose bit is clear; the caller keeps the array between launches and looks for elements never written
    afterwards.
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
    """One fault. Faults of one kind at one instruction are one finding: where it was first seen, and how often."""

    kind: str  # one of errors.KINDS
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


_SWITCHES = {name: f"CHECK_{name}" for name in Check.__members__ if f"CHECK_{name}" in abi.ENUMS["Check"]}
NUM_COUNTERS = len(abi.CLASSES) + len(abi.COUNTERS)
SECTOR_BYTES = 32
MAX_WARPS = 32
SMEM_LIMIT = 227 * 1024
_SOURCE_MARK = re.compile(r"@pc(\d+)@")


@lru_cache(maxsize=1)
def _library() -> C.CDLL:
    library = C.CDLL(str(build.core_library()))
    library.fge_run.argtypes = [C.POINTER(abi.Kernel), C.POINTER(abi.Launch), C.POINTER(abi.Result)]
    abi.verify(library)
    return library


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


class Machine:
    """Runs lowered kernels. It has no state of its own: what a launch knows is in its `LaunchConfig`."""

    def run(self, kernel: Kernel, launch: LaunchConfig) -> LaunchResult:
        """Runs one launch to its end or to its first fatal fault.

        Args:
            kernel: A kernel of `ptx.load`.
            launch: Grid, memory, parameters, schedule and checks.

        Returns:
            The result; a fault is in `error` and is not raised.
        """
        result = LaunchResult(
            kernel.name, tuple(launch.grid), tuple(launch.block), tuple(launch.cluster), launch.dynamic_smem, 0.0
        )
        refused = _refusal(kernel, launch)
        if refused is not None:
            result.error = refused
            result.findings.append(refused)
            return result
        regions, sectors = _regions(kernel, launch)
        counters = np.zeros((MAX_WARPS, NUM_COUNTERS), np.uint64)
        registers = np.zeros(MAX_WARPS, np.uint32)
        params = np.zeros(kernel.param_bytes + 128, np.uint8)
        start = -_address(params) % 128
        params[start : start + len(launch.params)] = np.frombuffer(launch.params, np.uint8)

        raw = abi.Result()
        arguments = _c_launch(kernel, launch)
        arguments.num_regions, arguments.regions = len(regions), _address(regions)
        arguments.params = _address(params) + start
        arguments.counters, arguments.warp_registers = _address(counters), _address(registers)
        began = time.perf_counter()
        _library().fge_run(C.byref(_c_kernel(kernel)), C.byref(arguments), C.byref(raw))
        result.seconds = time.perf_counter() - began

        result.findings = [_finding(kernel, raw, raw.findings[i]) for i in range(raw.num_findings)]
        result.findings.sort(key=lambda f: (f.fatal, f.cta[::-1], f.pc if f.pc is not None else -1))
        result.error = next((f for f in result.findings if f.fatal), None)
        _count(result, counters, registers, sectors)
        return result


def _refusal(kernel: Kernel, launch: LaunchConfig) -> Finding | None:
    """A launch that the driver would refuse."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    smem = kernel.static_smem + launch.dynamic_smem
    registers = launch.registers or kernel.default_registers(threads, launch.ctas_per_sm)
    kind, message = "limit", None
    if not 0 < threads <= 1024:
        message = f"a block of {threads} threads; there may be 1 to 1024"
    elif kernel.reqntid and tuple(launch.block) != kernel.reqntid:
        kind, message = "launch", f"block {tuple(launch.block)} differs from .reqntid {kernel.reqntid}"
    elif kernel.reqcluster and tuple(launch.cluster) != kernel.reqcluster:
        kind, message = "launch", f"cluster {tuple(launch.cluster)} differs from .reqnctapercluster {kernel.reqcluster}"
    elif any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
        kind, message = "launch", f"grid {tuple(launch.grid)} is not a multiple of the cluster {tuple(launch.cluster)}"
    elif not 0 < launch.cluster[0] * launch.cluster[1] * launch.cluster[2] <= 16:
        message = f"a cluster of {tuple(launch.cluster)}; it may have 1 to 16 CTAs"
    elif smem > SMEM_LIMIT:
        message = f"{smem} bytes of shared memory exceed the {SMEM_LIMIT} (227 KiB) of sm_90"
    elif launch.ctas_per_sm > 1 and (smem + 1024) * launch.ctas_per_sm > SMEM_LIMIT + 1024:
        message = (
            f"{launch.ctas_per_sm} CTAs of {smem} bytes of shared memory (and 1 KiB each for the system) exceed the "
            "228 KiB of an SM"
        )
    elif launch.checks & Check.SETMAXNREG and registers * threads * launch.ctas_per_sm > 65536:
        kind = "registers"
        message = f"{launch.ctas_per_sm} CTAs of {threads} threads with {registers} registers exceed the 65536 of an SM"
    elif len(launch.params) > kernel.param_bytes:
        kind, message = "launch", f"{len(launch.params)} bytes of parameters; the kernel has {kernel.param_bytes}"
    if message is None:
        return None
    return Finding(kind, message, None, None, "", (0, 0, 0), None, None, None, True)


def _regions(kernel: Kernel, launch: LaunchConfig) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The launch's memory as sorted, disjoint records, and the bitmaps of sectors read and written in each."""
    wanted = [r for r in launch.memory if r.hi > r.lo]
    wanted += [Region(address, address + size) for _, address, size in kernel.module.constants if size]
    merged: list[Region] = []
    for region in sorted(wanted, key=lambda r: (r.lo, -r.hi)):
        if merged and region.lo < merged[-1].hi:
            last = merged[-1]
            if last.written is not None or region.written is not None:
                if (last.lo, last.hi) == (region.lo, region.hi):
                    merged[-1] = last if last.written is not None else region
                    continue
                raise ValueError(
                    f"regions {last.name or hex(last.lo)} and {region.name or hex(region.lo)} overlap, "
                    "and one is tracked"
                )
            merged[-1] = Region(last.lo, max(last.hi, region.hi), last.name)
        else:
            merged.append(region)
    records = np.zeros(max(len(merged), 1), abi.REGION)
    sectors = []
    for record, region in zip(records, merged, strict=False):
        if region.written is not None and region.written.nbytes * 8 < region.hi - region.lo:
            raise ValueError(
                f"the bitmap of {region.name or hex(region.lo)} is too small for {region.hi - region.lo} bytes"
            )
        size = (region.hi - region.lo + SECTOR_BYTES - 1) // SECTOR_BYTES // 8 + 1
        sectors.append((np.zeros(size, np.uint8), np.zeros(size, np.uint8)))
        record["lo"], record["hi"] = region.lo, region.hi
        record["written"] = _address(region.written) if region.written is not None else 0
        record["read_sectors"], record["write_sectors"] = map(_address, sectors[-1])
    return records[: len(merged)], sectors


def _c_kernel(kernel: Kernel) -> C.Structure:
    return abi.Kernel(
        code=_address(kernel.code),
        num_code=len(kernel.code),
        aux=_address(kernel.aux),
        image=_address(kernel.image),
        image_bytes=kernel.image_bytes,
        special=_address(kernel.special),
        num_special=len(kernel.special),
        du_ptr=_address(kernel.du_ptr),
        du=_address(kernel.du),
        symbols=_address(kernel.symbols),
        num_symbols=kernel.num_symbols,
        static_smem=kernel.static_smem,
        local_bytes=kernel.local_bytes,
        num_tracked=kernel.num_tracked,
        param_bytes=kernel.param_bytes,
    )


def _c_launch(kernel: Kernel, launch: LaunchConfig) -> C.Structure:
    c = abi.Launch()
    c.grid[:], c.block[:], c.cluster[:] = launch.grid, launch.block, launch.cluster
    switches = abi.ENUMS["Check"]
    wanted = Check(launch.checks) | Check.ALWAYS
    c.checks = sum(switches[name] for member, name in _SWITCHES.items() if wanted & Check[member])
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    for name in (
        "dynamic_smem",
        "threads",
        "seed",
        "async_wgmma",
        "async_tma",
        "async_cp",
        "quantum",
        "cta_order",
        "num_sms",
    ):
        setattr(c, name, int(getattr(launch, name)))
    c.random_schedule = int(launch.random_schedule)
    c.max_instructions = launch.max_instructions
    c.registers = launch.registers or kernel.default_registers(threads, launch.ctas_per_sm)
    return c


def _finding(kernel: Kernel, raw: C.Structure, record: C.Structure) -> Finding:
    def known(value: int) -> int | None:
        return None if value == abi.NONE else value

    def source(match: re.Match) -> str:
        line, text = kernel.where(int(match.group(1)))
        return f"PTX line {line}: {text}"

    pc = known(record.pc)
    message = (raw.report if record.fatal else record.message).decode(errors="replace")
    message = _SOURCE_MARK.sub(source, message)
    if pc in kernel.unsupported:
        message += f" ({kernel.unsupported[pc]})"
    line, text = kernel.where(pc) if pc is not None else (None, "")
    kind = abi.KINDS[record.kind]
    cta, lane = tuple(record.cta), known(record.lane)
    return Finding(
        kind,
        message,
        pc,
        line,
        text,
        cta,
        known(record.warp),
        lane,
        record.address or None,
        bool(record.fatal),
        record.count,
    )


def _named(counts: np.ndarray) -> dict[str, int]:
    """Instruction counts by class (`instructions.<class>`), their sum, and the other counters."""
    classes = {f"instructions.{name}": int(n) for name, n in zip(abi.CLASSES, counts, strict=False) if n}
    others = {name: int(n) for name, n in zip(abi.COUNTERS, counts[len(abi.CLASSES) :], strict=True)}
    return {"instructions": sum(classes.values()), **classes, **others}


def _count(
    result: LaunchResult, counters: np.ndarray, registers: np.ndarray, sectors: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Fills in the counters per warp, per role and of the launch."""
    threads = result.block[0] * result.block[1] * result.block[2]
    warps = (threads + 31) // 32
    result.warps = [_named(row) for row in counters[:warps]]
    result.registers = [int(n) or None for n in registers[:warps]]
    result.counters = _named(counters[:warps].sum(axis=0))
    for name, which in (("distinct_global_read_bytes", 0), ("distinct_global_write_bytes", 1)):
        result.counters[name] = SECTOR_BYTES * sum(int(np.unpackbits(pair[which]).sum()) for pair in sectors)
    groups: list[list[int]] = []
    for first in range(0, warps, 4):
        members = list(range(first, min(first + 4, warps)))
        wanted = result.registers[first]
        if groups and wanted is not None and result.registers[groups[-1][0]] == wanted:
            groups[-1] += members
        else:
            groups.append(members)
    for members in groups:
        wanted = result.registers[members[0]]
        name = f"warps {members[0]}-{members[-1]}" + (f", {wanted} registers" if wanted else "")
        result.roles.append(RoleCounters(name, tuple(members), wanted, _named(counters[members].sum(axis=0))))
