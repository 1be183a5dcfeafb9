# SPDX-License-Identifier: Apache-2.0
"""A Hopper that runs anywhere: executes compiled CuTe DSL kernels on a CPU, from their PTX, with checks that no GPU
offers.

    from fgattn_cute import emulator

    emulator.prepare()                                    # before the first cute.compile
    compiled = cute.compile(kernel, ...)
    with emulator.session(seed=0, checks="all") as emu:   # CPU tensors, ordinary call
        compiled(q, k, v, out, lse)
    print(emu.report())

Importing this package needs neither the DSL nor a compiler; `prepare` and `session` do.
"""

from __future__ import annotations

import importlib

from .errors import (
    AccessError,
    DeadlockError,
    EmulatorError,
    LimitError,
    RaceError,
    SetupError,
    SynchronisationError,
    UninitialisedError,
    UnsupportedError,
)
from .schedule import Schedule, of_seed, schedules

_LAZY = {
    "Report": "report",
    "Launch": "report",
    "Session": "sessions",
    "session": "sessions",
    "run_all_schedules": "sessions",
    "register_ptx": "launch",
    "cubin_key": "launch",
    "ptx_of": "launch",
}

__all__ = [
    "AccessError",
    "DeadlockError",
    "EmulatorError",
    "Launch",
    "LimitError",
    "RaceError",
    "Report",
    "Schedule",
    "Session",
    "SetupError",
    "SynchronisationError",
    "UninitialisedError",
    "UnsupportedError",
    "cubin_key",
    "install",
    "of_seed",
    "prepare",
    "ptx_of",
    "register_ptx",
    "run_all_schedules",
    "schedules",
    "session",
]


def prepare() -> None:
    """Makes this process able to emulate: sets the DSL's environment and hooks its launch path. Cheap when repeated.

    Call it before the first `cute.compile` whose result is to run in a session (kernels compiled earlier have no PTX
    and are bound to the real runtime). Kernels compiled afterwards still run on a real GPU outside a session.

    Raises:
        SetupError: No C compiler, nvidia-cutlass-dsl is missing, or this process has a kernel for the GPU already.
    """
    from . import intercept

    intercept.install()


install = prepare


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
