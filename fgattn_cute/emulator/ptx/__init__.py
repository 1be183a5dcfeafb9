# SPDX-License-Identifier: Apache-2.0
"""PTX for the machine: parse a module, lower its kernels.

parse.py        text -> entries, statements, operands
builder.py      scopes, names, operands, emission;  table.py: opcode -> family
arithmetic.py, data.py, synchronise.py, copies.py, matrix.py    the instruction families
flow.py         data flow: registers in flight, liveness, registers read before they are written
slots.py        places in the register file
kernel.py       the arrays the machine runs
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from .kernel import Kernel
from .parse import PtxError, parse

__all__ = ["Kernel", "Module", "PtxError", "load"]

_CACHE_MODULES = 64


class Module:
    """A loaded PTX module.

    Attributes:
        kernels: by entry name.
        constants: host memory of the module's `.global` and `.const` variables: (name, address, bytes).
    """

    def __init__(self, text: str):
        parsed = parse(text)
        self._memory = []
        self.constants: list[tuple[str, int, int]] = []
        for name, (align, initial) in parsed.constants.items():
            raw = np.zeros(len(initial) + align, np.uint8)
            start = -raw.ctypes.data % align
            raw[start : start + len(initial)] = np.frombuffer(initial, np.uint8)
            self._memory.append(raw)
            self.constants.append((name, raw.ctypes.data + start, len(initial)))
        addresses = {name: address for name, address, _ in self.constants}
        self.kernels = {name: Kernel(parsed, entry, addresses) for name, entry in parsed.entries.items()}
        for kernel in self.kernels.values():
            kernel.module = self


_cache: OrderedDict[str, Module] = OrderedDict()
_lock = threading.Lock()


def load(text: str) -> Module:
    """Parses and lowers a PTX module; the last modules are cached by their text.

    Raises:
        PtxError: the text cannot be read. An instruction that is merely unknown fails when it is executed.
    """
    with _lock:
        if text not in _cache:
            _cache[text] = Module(text)
            while len(_cache) > _CACHE_MODULES:
                _cache.popitem(last=False)
        _cache.move_to_end(text)
        return _cache[text]
