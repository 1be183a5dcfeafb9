# SPDX-License-Identifier: Apache-2.0
"""PTX: text to what the machine executes."""

from __future__ import annotations

from functools import lru_cache

from . import prototype


class Kernel:
    """One lowered kernel.

    Attributes:
        name: the PTX entry.
        params: (name, offset, bytes) of each parameter in the PTX parameter space.
        param_bytes: size of the parameter space.
        static_smem: bytes of static shared memory.
        reqntid: `.reqntid`, or None.
        reqcluster: `.reqnctapercluster`, or None.
    """

    def __init__(self, entry):
        self.entry = entry
        for n in ("name", "params", "param_bytes", "static_smem", "reqntid", "reqcluster"):
            setattr(self, n, getattr(entry, n))

    def where(self, pc):
        ln = self.entry.code[pc]["line"]
        return ln + 1, self.entry.mod.lines[ln].strip()[:200]


class Module:
    """A loaded PTX module: `kernels` by entry name."""

    def __init__(self, text):
        from ..machine import _ops

        mod = prototype.Module(text)
        self.kernels = {n: Kernel(prototype.Entry(mod, n, _ops())) for n in mod.entries}


@lru_cache(maxsize=64)
def load(text: str) -> Module:
    """Parses and lowers a PTX module (cached by its text)."""
    return Module(text)
