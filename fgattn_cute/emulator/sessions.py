# SPDX-License-Identifier: Apache-2.0
"""A session: the time in which launches go to the emulator, with what options, and what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import intercept, launch
from . import ptx as ptx_frontend
from .errors import SetupError, violation
from .machine import Check, Completion, LaunchConfig, LaunchResult, Machine
from .memory import SessionMemory
from .report import Launch, Report, describe, kind_of
from .schedule import of_seed, schedules


@dataclass(frozen=True)
class Options:
    """What a session runs with; see `session`."""

    seed: int
    checks: Check
    threads: int
    num_sms: int
    raise_on_violation: bool
    max_instructions: int
    ctas_per_sm: int
    edit_ptx: Callable[[str, str], str] | None


def parse_checks(checks: str | Iterable[str]) -> Check:
    """ "all", "fast", "none" or names of checks in lower case, as flags. Checks that guard the process itself stay on.

    Raises:
        SetupError: A name that no check has.
    """
    if isinstance(checks, Check):
        return checks | Check.ALWAYS
    if isinstance(checks, str):
        named = {"all": Check.ALL, "fast": Check.FAST, "none": Check.ALWAYS}
        if checks in named:
            return named[checks]
        checks = [checks]
    flags = Check.ALWAYS
    for name in checks:
        if name.upper() not in Check.__members__:
            raise SetupError(
                f"no check is called {name!r}; there are {', '.join(c.name.lower() for c in Check)}, all, fast, none"
            )
        flags |= Check[name.upper()]
    return flags


class Session:
    """Created by `session()`; use it as a context manager. Sessions nest, the innermost counts; they are not for
    several threads at once.
    """

    def __init__(self, options: Options, outputs: Iterable = ()):
        self.options = options
        self._report = Report()
        self._memory = SessionMemory()
        self._outputs: list = []
        self._machine = Machine()
        self.outputs(*outputs)

    def __enter__(self) -> Session:
        launch.push(self)
        return self

    def __exit__(self, kind, error, trace) -> None:
        launch.pop(self)
        if kind is None:
            self._check_outputs()

    def register(self, *tensors) -> None:
        """Adds CPU tensors to the memory of every call, for kernels that reach them through a raw pointer
        (`make_ptr`).
        """
        for t in tensors:
            self._memory.register(t)

    def outputs(self, *tensors) -> None:
        """Declares tensors that the kernels must write in full.

        Their bytes count as uninitialised from here on: reading one before a kernel wrote it is a fault
            ("uninit_global"), and an element
        that was not written by the end of the session is one too ("unwritten"). The contents are overwritten with 0xFF
        bytes (NaN in every floating type), so a result cannot be right by accident.
        """
        for t in tensors:
            self.uninitialised(t)
            integer_view(t).fill_(-1)
            self._outputs.append(t)

    def uninitialised(self, tensor) -> None:
        """Marks the bytes of `tensor` as never written, so that a kernel that reads them first is reported; contents
        stay as they are.
        """
        self._memory.track(tensor)

    def unwritten(self, tensor) -> int:
        """How many elements of a tensor given to `outputs` or `uninitialised` have a byte that no kernel has written
        so far.
        """
        return self._memory.unwritten(tensor)

    def report(self) -> Report:
        """Every launch so far: findings, counters per warp role, time."""
        return self._report

    def launch(self, name: str, ptx: str, grid, block, cluster, smem: int, args) -> None:
        """Runs one launch on the machine, records it, and raises what it found (unless the session only collects).

        Args:
            name: The PTX entry.
            ptx: Text of the module.
            grid, block, cluster: Three numbers each.
            smem: Dynamic shared memory in bytes.
            args: `args[i]` is the address of the i-th parameter.
        """
        if self.options.edit_ptx is not None:
            ptx = self.options.edit_ptx(name, ptx)
        kernels = ptx_frontend.load(ptx).kernels
        if name not in kernels:
            raise SetupError(f"the PTX has no kernel {name}; it has {', '.join(kernels)}")
        kernel = kernels[name]
        self.run(kernel, grid, block, cluster, smem, launch.parameter_bytes(kernel, args), launch.call.tensors)

    def run(self, kernel, grid, block, cluster, smem: int, params: bytes, tensors: Iterable) -> LaunchResult:
        """The same for a lowered kernel and parameter bytes; `tensors` are the memory of the call."""
        o, s = self.options, of_seed(self.options.seed)
        config = LaunchConfig(
            grid=grid,
            block=block,
            cluster=cluster,
            dynamic_smem=smem,
            params=params,
            memory=self._memory.regions(tensors),
            checks=o.checks,
            seed=o.seed,
            threads=o.threads,
            async_wgmma=Completion(s.wgmma),
            async_tma=Completion(s.tma),
            async_cp=Completion(s.cp),
            random_schedule=s.random_warps,
            quantum=s.quantum,
            cta_order=s.cta_order,
            max_instructions=o.max_instructions,
            num_sms=o.num_sms,
            ctas_per_sm=o.ctas_per_sm,
        )
        result = self._machine.run(kernel, config)
        self._memory.collect()
        self._report.launches.append(Launch(len(self._report), o.seed, s.name, result))
        findings = self._report[-1].findings
        if findings and (o.raise_on_violation or kind_of(findings[0]) == "unsupported"):
            raise violation(
                kind_of(findings[0]), "\n".join([f"kernel {result.kernel}", *map(describe, findings)]), tuple(findings)
            )
        return result

    def _check_outputs(self) -> None:
        for t in self._outputs:
            missing = self.unwritten(t)
            if missing:
                text = f"{missing} of {t.numel()} elements of an output of shape {tuple(t.shape)} were never written"
                self._report.unwritten.append(text)
                if self.options.raise_on_violation:
                    raise violation("unwritten", text)


def integer_view(tensor):
    """The tensor's bits as integers of the element's size."""
    import torch

    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def session(
    seed: int = 0,
    checks: str | Iterable[str] = "all",
    threads: int | None = None,
    *,
    num_sms: int = 132,
    outputs: Iterable = (),
    on_violation: str = "raise",
    max_instructions: int = 2_000_000_000,
    ctas_per_sm: int = 1,
    edit_ptx: Callable[[str, str], str] | None = None,
) -> Session:
    """Sends every launch of the block to the emulator: `with emulator.session() as emu: compiled(q, k, v, out)`.

    Args:
        seed: Selects the schedule, see `schedule.of_seed`: 0 everything as late as allowed, 1 everything at issue, 2
            newest first, 3 and up random. The same seed gives the same results and the same report, on any number of
            threads.
        checks: "all", "fast" (without races and uninitialised memory), "none" (only what protects this process), or
            names of checks.
        threads: Host threads, each runs whole clusters; None: one per CPU this process may use.
        num_sms: Streaming multiprocessors of the emulated chip, as the DSL's hardware queries report them.
        outputs: Tensors that the kernels must write in full, see `Session.outputs`.
        on_violation: "raise" an `EmulatorError` from the call, or "collect" it in the report only. An unknown
            instruction always raises.
        max_instructions: Warp instructions per cluster before the launch counts as an endless loop.
        ctas_per_sm: CTAs that are meant to share a multiprocessor, for the register pool that `setmaxnreg` draws from.
        edit_ptx: Called with the kernel's name and its PTX before each launch; what it returns is run instead. For
            planting faults, and for trying a change without compiling.

    Raises:
        SetupError: No C compiler, no nvidia-cutlass-dsl, or an unknown option.
    """
    if on_violation not in ("raise", "collect"):
        raise SetupError(f"on_violation is 'raise' or 'collect', not {on_violation!r}")
    of_seed(seed)
    intercept.install()
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = Options(
        seed,
        parse_checks(checks),
        threads,
        num_sms,
        on_violation == "raise",
        max_instructions,
        ctas_per_sm,
        edit_ptx,
    )
    return Session(options, outputs)


def run_all_schedules(body: Callable[[Session], object], n: int = 6, **options) -> list[Report]:
    """Calls `body(emu)` in one session per schedule, and returns their reports.

    Args:
        body: Launches kernels and asserts on their results.
        n: How many schedules, see `schedule.schedules`.
        options: Arguments of `session` other than `seed`.
    """
    reports = []
    for seed in schedules(n):
        with session(seed=seed, **options) as emu:
            body(emu)
        reports.append(emu.report())
    return reports
