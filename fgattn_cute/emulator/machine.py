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


# ---- first version: runs the prototype's core, to be replaced room by room
import ctypes as C  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from functools import lru_cache  # noqa: E402

from . import build  # noqa: E402

u32, u64, i32, P = C.c_uint32, C.c_uint64, C.c_int32, C.c_void_p


class CKernel(C.Structure):
    _fields_ = [("code", P), ("ncode", u32), ("aux", P), ("rf_init", P), ("rf_bytes", u32), ("sp", P), ("du_ptr", P), ("du", P),
                ("static_smem", u32), ("local_bytes", u32), ("nshsym", u32), ("shsym", P), ("reg_lo", u32), ("reg_hi", u32)]


class CLaunch(C.Structure):
    _fields_ = [("grid", u32 * 3), ("block", u32 * 3), ("cluster", u32 * 3), ("dyn_smem", u32), ("nalloc", u32), ("alloc", P),
                ("async_wgmma", u32), ("async_tma", u32), ("async_cp", u32), ("sched", u32), ("quantum", u32), ("checks", u32),
                ("nthreads", u32), ("seed", u32), ("cta_order", u32), ("max_ins", u64), ("num_sms", u32), ("pad", u32)]


class CResult(C.Structure):
    _fields_ = [("code", i32), ("pc", u32), ("warp", u32), ("lane", u32), ("cta", u32 * 3), ("nwarn", u32), ("msg", C.c_char * 8192),
                ("warn", C.c_char * 16384), ("ins", u64), ("lane_ins", u64), ("wgmma", u64), ("tma_bytes", u64), ("switches", u64),
                ("stalls", u64), ("hist", u64 * 4096)]


@lru_cache(maxsize=1)
def _core():
    lib = C.CDLL(str(build.core_library()))
    lib.hsim_run.argtypes = [C.POINTER(CKernel), C.POINTER(CLaunch), C.POINTER(CResult)]
    return lib


@lru_cache(maxsize=1)
def _ops():
    return {n: int(i) for n, i in re.findall(r"#define (\w+) (\d+)", (build.CORE_DIR / "ops.h").read_text())}


WORDS = [("DEADLOCK", "deadlock"), ("instruction limit", "limit"), ("RACE", "race"), ("proxy", "proxy"), ("misaligned", "misaligned"), ("not 8-byte aligned", "misaligned"),
         ("outside", "bounds"), ("not supported", "unsupported"), ("mbarrier", "barrier"), ("barrier", "barrier"), ("wgmma", "wgmma"), ("tensor map", "descriptor")]


def _kind(message):
    return next((k for w, k in WORDS if w in message), "launch")


class Machine:
    """Runs lowered kernels."""

    def run(self, kernel, launch: LaunchConfig) -> LaunchResult:
        """Runs one launch to its end or to its first fatal fault."""
        e = kernel.entry
        k = CKernel()
        k.code, k.ncode, k.aux = e.code_np.ctypes.data, len(e.code_np), e.aux_np.ctypes.data
        rf = np.zeros(e.rf_bytes + 128, np.uint8)
        o = -rf.ctypes.data % 64
        rf[o:o + e.rf_bytes] = e.rf_init.view(np.uint8)[:e.rf_bytes]
        k.rf_init, k.rf_bytes = rf.ctypes.data + o, e.rf_bytes
        k.sp, k.du_ptr, k.du = e.sp_np.ctypes.data, e.du_ptr.ctypes.data, e.du_np.ctypes.data
        k.static_smem, k.local_bytes = e.static_smem, e.local_bytes
        k.nshsym, k.shsym = len(e.shsym), e.shsym_np.ctypes.data
        C.memmove(e.param_addr, launch.params, len(launch.params))
        al = sorted([(r.lo, r.hi) for r in launch.memory] + [(e.param_addr, e.param_addr + e.param_bytes)] + [(a, a + n) for a, n, _ in e.gsyms.values()])
        merged = []
        for lo, hi in al:
            if merged and lo < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], hi)
            else:
                merged.append([lo, hi])
        arr = np.array(merged, np.uint64)
        L = CLaunch()
        L.grid[:], L.block[:], L.cluster[:] = launch.grid, launch.block, launch.cluster
        L.dyn_smem, L.nalloc, L.alloc = launch.dynamic_smem, len(arr), arr.ctypes.data
        L.async_wgmma, L.async_tma, L.async_cp = launch.async_wgmma, launch.async_tma, launch.async_cp
        L.sched, L.quantum, L.cta_order = int(launch.random_schedule), launch.quantum, launch.cta_order
        L.checks = (1 if launch.checks & Check.WGMMA or launch.async_wgmma else 0) | (2 if launch.checks & Check.PROXY else 0) | (16 if launch.checks & Check.RACE else 0)
        L.nthreads, L.seed, L.max_ins, L.num_sms = launch.threads, launch.seed, launch.max_instructions, launch.num_sms
        R = CResult()
        t = time.perf_counter()
        _core().hsim_run(C.byref(k), C.byref(L), C.byref(R))
        res = LaunchResult(e.name, tuple(launch.grid), tuple(launch.block), tuple(launch.cluster), launch.dynamic_smem, time.perf_counter() - t)
        res.counters = dict(instructions=R.ins, wgmma=R.wgmma, tma_bytes=R.tma_bytes)
        for m in re.finditer(r"^pc (\d+): (.*) \(cta (\d+),(\d+),(\d+) warp (-?\d+)\)$", R.warn.decode(), flags=re.M):
            pc = int(m[1]) if int(m[1]) < len(e.code) else None
            line, text = kernel.where(pc) if pc is not None else (None, "")
            res.findings.append(Finding(_kind(m[2]), m[2], pc, line, text, (int(m[3]), int(m[4]), int(m[5])), int(m[6]), None, None, False))
        if R.code:
            msg = re.sub(r"@pc(\d+)@", lambda m: "[PTX line %d: %s]" % kernel.where(int(m.group(1))), R.msg.decode())
            pc = None if R.pc == 0xFFFFFFFF else R.pc
            line, text = kernel.where(pc) if pc is not None else (None, "")
            res.error = Finding(_kind(msg), msg, pc, line, text, tuple(R.cta), R.warp if pc is not None else None, None, None, True)
            res.findings.append(res.error)
        return res
