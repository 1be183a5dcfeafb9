# SPDX-License-Identifier: Apache-2.0
"""Schedules: when asynchronous operations complete and in which order warps run.

A seed is a whole number and selects one schedule, always the same one. Hardware may legally behave like any of them,
so a correct kernel gives the same result under all; a kernel with a missing wait, fence or barrier usually does not.
"""

from __future__ import annotations

from dataclasses import dataclass

EAGER, LATE, RANDOM, NEWEST = 0, 1, 2, 3
QUANTA = (5, 20, 60, 200, 1000)


@dataclass(frozen=True)
class Schedule:
    """One way to interleave a kernel.

    Attributes:
        name: For reports.
        wgmma: Completion of `wgmma.mma_async`: EAGER at issue, LATE at the wait that covers it, RANDOM in between.
        tma: The same for TMA and bulk copies; LATE means when no warp can go on otherwise, NEWEST is LATE with the
            newest first.
        cp: The same for `cp.async`.
        random_warps: Pick the next warp at random, instead of lowest first.
        quantum: Warp instructions before another warp gets its turn; 0 lets a warp run until it blocks.
        cta_order: 0 ascending, 1 descending, 2 random.
    """

    name: str
    wgmma: int
    tma: int
    cp: int
    random_warps: bool = False
    quantum: int = 0
    cta_order: int = 0


_FIXED = (
    Schedule("late", LATE, LATE, LATE),
    Schedule("eager", EAGER, EAGER, EAGER),
    Schedule("newest-first", LATE, NEWEST, LATE, cta_order=1),
)


def of_seed(seed: int) -> Schedule:
    """The schedule of a seed.

    Seeds 0, 1 and 2 are fixed: 0 completes everything as late as allowed (the default, it finds missing waits), 1
        completes everything
    at issue (it finds what relies on an operation still being in flight, and is the fastest), 2 completes the newest
    TMA operation first and runs CTAs in descending order. From 3 on warps are pre-empted at random and operations
    complete at random, early or late.
    """
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if seed < len(_FIXED):
        return _FIXED[seed]
    n = seed - len(_FIXED)
    return Schedule(
        f"random-{seed}",
        (RANDOM, LATE, EAGER)[n % 3],
        (LATE, RANDOM, EAGER)[n % 3],
        RANDOM,
        random_warps=True,
        quantum=QUANTA[n % len(QUANTA)],
        cta_order=2,
    )


def schedules(n: int = 6) -> list[int]:
    """The first `n` seeds worth running: late, eager, newest first, then random ones.

    Args:
        n: How many; 3 covers the fixed schedules, 6 is what kernel tests use, more is for hunting.
    """
    return list(range(n))
