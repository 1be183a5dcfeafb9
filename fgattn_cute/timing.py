# SPDX-License-Identifier: Apache-2.0
"""Timing several GPU functions against each other: interleaved, with a cold L2, medians.

Every round launches each function once, starting from another one each time, so that drift of the clock falls on all
alike. Before each launch a buffer twice the size of the L2 is overwritten. Used by the autotuner and by perf/.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

WARM_UP_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds of one function, in the order in which they were measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """The sample below which ``share`` of all lie, nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]

    def as_dict(self) -> dict:
        """Milliseconds: median, p20, p80, and how many samples."""
        values = {"median_ms": self.median, "p20_ms": self.quantile(0.2), "p80_ms": self.quantile(0.8)}
        return {**{name: round(1e3 * value, 5) for name, value in values.items()}, "samples": len(self.seconds)}


class Timer(Protocol):
    """Measures functions against each other."""

    def __call__(self, calls: Sequence[Callable[[], object]], rounds: int) -> list[Samples]:
        """One Samples of ``rounds`` measurements per function, in their order."""


class CudaTimer:
    """CUDA events on the current stream of a device.

    device: index; None takes the current one.
    """

    def __init__(self, device: int | None = None):
        self.device = torch.cuda.current_device() if device is None else device
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=f"cuda:{self.device}")

    def __call__(self, calls: Sequence[Callable[[], object]], rounds: int) -> list[Samples]:
        with torch.cuda.device(self.device):
            for _ in range(WARM_UP_ROUNDS):
                for call in calls:
                    call()
            events: list[list] = [[] for _ in calls]
            for index in rotation(len(calls), rounds):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                calls[index]()
                end.record()
                events[index].append((start, end))
            torch.cuda.synchronize(self.device)
        return [Samples(tuple(1e-3 * start.elapsed_time(end) for start, end in pairs)) for pairs in events]


def rotation(number: int, rounds: int) -> list[int]:
    """The order of launches: each round all of them, each starting one further than the round before."""
    return [(first + i) % number for first in range(rounds) for i in range(number)]
