# SPDX-License-Identifier: Apache-2.0
"""The device memory of a call: the bytes of its tensors, and which bytes of tracked tensors a kernel has written."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np

from .machine import Region

Span = tuple[int, int]  # host bytes [lo, hi)


def span(tensor) -> Span:
    """The bytes from the first to the last element of a strided tensor; empty tensors give lo == hi."""
    lo = tensor.data_ptr()
    if tensor.numel() == 0:
        return lo, lo
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return lo, lo + (last + 1) * tensor.element_size()


class SessionMemory:
    """Memory beyond single calls: tensors registered for the whole session, and the tracking of written bytes."""

    def __init__(self):
        self._registered: list[tuple[Span, weakref.ref]] = []
        self._written: dict[Span, np.ndarray] = {}  # one byte per byte, 1 = a kernel wrote it
        self._lent: list[tuple[Region, list[Span]]] = []

    def register(self, tensor) -> None:
        """Adds a tensor to the memory of every call, until it is freed."""
        self._registered.append((span(tensor), weakref.ref(tensor)))

    def track(self, tensor) -> None:
        """Counts the bytes of `tensor` as never written from here on."""
        lo, hi = span(tensor)
        self._written[lo, hi] = np.zeros(hi - lo, np.uint8)

    def unwritten(self, tensor) -> int:
        """How many elements of a tracked tensor have a byte that no kernel has written."""
        written = self._written[span(tensor)]
        size = tensor.element_size()
        strides = [s * size for s in tensor.stride()]
        elements = np.lib.stride_tricks.as_strided(written, (*tensor.shape, size), (*strides, 1))
        return int((elements == 0).any(-1).sum())

    def regions(self, tensors: Iterable) -> list[Region]:
        """The memory of one call, sorted and disjoint; spans that overlap are merged. Give it back with `collect`."""
        self._lent.clear()
        self._registered = [(s, ref) for s, ref in self._registered if ref() is not None]
        spans = sorted({span(t) for t in tensors} | {s for s, _ in self._registered})
        merged: list[list[int]] = []
        for lo, hi in spans:
            if merged and lo < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], hi)
            elif lo < hi:
                merged.append([lo, hi])
        return [self._region(lo, hi) for lo, hi in merged]

    def _region(self, lo: int, hi: int) -> Region:
        tracked = [s for s in self._written if s[0] < hi and lo < s[1]]
        if not tracked:
            return Region(lo, hi)
        written = np.ones(hi - lo, np.uint8)
        for a, b in tracked:
            first, last = max(a, lo), min(b, hi)
            written[first - lo : last - lo] = self._written[a, b][first - a : last - a]
        region = Region(lo, hi, written=np.packbits(written, bitorder="little"))
        self._lent.append((region, tracked))
        return region

    def collect(self) -> None:
        """Takes over what the launch has written."""
        for region, tracked in self._lent:
            written = np.unpackbits(region.written, bitorder="little", count=region.hi - region.lo)
            for a, b in tracked:
                first, last = max(a, region.lo), min(b, region.hi)
                self._written[a, b][first - a : last - a] |= written[first - region.lo : last - region.lo]
        self._lent.clear()
