# SPDX-License-Identifier: Apache-2.0
"""What decides which micro-benchmark of global -> shared copies is compiled. Pure Python and free of cutlass."""

import dataclasses

from .spec import SMEM_LIMIT_BYTES, SMEM_PER_SM_BYTES, SMEM_RESERVED_PER_CTA_BYTES

PATHS = ("tma", "cp_async")
ROW_WORDS = 64  # 256 bytes: a key or a value at head dim 128 in 16 bits
LINE_ROWS = 8  # rows that the 128 threads of a cp.async CTA copy side by side, 16 bytes each


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopySpec:
    """A kernel that does nothing but bring rows of 256 bytes from random places into shared memory.

    path: "tma" brings neighbouring rows in one box per step; "cp_async" rows from all over, 16 bytes per thread.
    rows: of a step.
    stages: steps in flight.
    """

    path: str
    rows: int
    stages: int

    @property
    def name(self) -> str:
        return f"copy_{self.path}_r{self.rows}s{self.stages}"

    @property
    def num_threads(self) -> int:
        """One warp issues boxes; a producer warpgroup gathers, as in the forward kernel."""
        return 32 if self.path == "tma" else 128

    @property
    def streams(self) -> int:
        """Independent sequences of places in a CTA."""
        return 1 if self.path == "tma" else LINE_ROWS

    @property
    def step_bytes(self) -> int:
        return 4 * ROW_WORDS * self.rows

    def smem_bytes(self) -> int:
        """Shared memory of a CTA in bytes: the stages, aligned to 128 bytes, and for TMA an mbarrier for each."""
        barriers = -(-8 * self.stages // 128) * 128 if self.path == "tma" else 0
        return barriers + self.stages * self.step_bytes

    def ctas_per_sm(self) -> int:
        """CTAs that fit an SM's shared memory."""
        return SMEM_PER_SM_BYTES // (self.smem_bytes() + SMEM_RESERVED_PER_CTA_BYTES)

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        why = [] if self.path in PATHS else [f"path {self.path!r} is not one of {', '.join(PATHS)}"]
        if not 1 <= self.rows <= 256:
            why.append(f"rows {self.rows} is not from 1 to 256, the extent of a box")
        elif self.path == "cp_async" and self.rows % LINE_ROWS:
            why.append(f"rows {self.rows} is not a multiple of the {LINE_ROWS} that a CTA copies side by side")
        if self.stages < 1:
            why.append(f"stages {self.stages} is less than 1")
        if not why and self.smem_bytes() > SMEM_LIMIT_BYTES:
            why.append(f"shared memory {self.smem_bytes()} bytes exceeds {SMEM_LIMIT_BYTES}")
        return why


def measured_specs() -> list:
    """The kernels of ``python -m perf.copies``, with some 64 KB in flight for each CTA."""
    boxes = [CopySpec(path="tma", rows=rows, stages=min(64, 256 // rows)) for rows in (1, 8, 16, 64, 80, 128)]
    return [*boxes, CopySpec(path="cp_async", rows=64, stages=3)]
