# SPDX-License-Identifier: Apache-2.0
"""What the emulator raises. Every error is an `EmulatorError` with a `kind`, so that a caller can test for a class of
faults.

Kinds of faults in a kernel are the keys of `KINDS`, and "trap" for a kernel that stops itself. Kinds outside a kernel
are "setup" and "launch".
"""

from __future__ import annotations

from ..errors import FgAttnError


class EmulatorError(FgAttnError, RuntimeError):
    """A kernel, a launch or the set-up of the emulator is at fault.

    Attributes:
        kind: What is at fault, see the module's text.
        findings: The `Finding`s behind the error, the fatal one first; empty for set-up errors.
    """

    def __init__(self, message: str, kind: str = "launch", findings: tuple = ()):
        super().__init__(message)
        self.kind = kind
        self.findings = findings


class SetupError(EmulatorError):
    """The emulator cannot run here: no compiler, no PTX for a kernel, no session, an unknown option."""

    def __init__(self, message: str):
        super().__init__(message, "setup")


class UnsupportedError(EmulatorError):
    """The kernel uses an instruction or a mode that the emulator does not know. Nothing is ever skipped."""


class LimitError(EmulatorError):
    """Shared memory over 227 KiB, a block over 1024 threads, or more instructions than the session allows."""


class AccessError(EmulatorError):
    """An access outside the tensors of the call or outside shared memory, or a misaligned one."""


class UninitialisedError(EmulatorError):
    """A register, shared or global byte was read before it was written, or an output byte was never written."""


class DeadlockError(EmulatorError):
    """No warp can go on; the message says who waits on what, for which phase, since when."""


class RaceError(EmulatorError):
    """Two accesses to shared memory, at least one of them a write, that nothing orders."""


class SynchronisationError(EmulatorError):
    """A barrier, a fence or an asynchronous operation used against its rules, or a register pool that cannot satisfy
    `setmaxnreg`.
    """


KINDS: dict[str, type[EmulatorError]] = {
    "unsupported": UnsupportedError,
    "limit": LimitError,
    "bounds": AccessError,
    "misaligned": AccessError,
    "uninitialised": UninitialisedError,
    "unwritten": UninitialisedError,  # an output, at the end of the session
    "deadlock": DeadlockError,
    "race": RaceError,
    "barrier": SynchronisationError,
    "proxy": SynchronisationError,
    "wgmma": SynchronisationError,
    "descriptor": SynchronisationError,
    "registers": SynchronisationError,  # setmaxnreg
    "exit": SynchronisationError,  # asynchronous work in flight when its warp or CTA ends
}


def violation(kind: str, message: str, findings: tuple = ()) -> EmulatorError:
    """The error for a fault of `kind` in a kernel, as the most specific class."""
    return KINDS.get(kind, EmulatorError)(message, kind, findings)
