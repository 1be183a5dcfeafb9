# SPDX-License-Identifier: Apache-2.0
"""What the micro-benchmarks' copy kernels must leave behind, written out: for tests/cpu and tests/gpu alike."""

import torch

from fgattn_cute.kernels.copy_spec import CopySpec

SPECS = [
    CopySpec(path="tma", rows=1, stages=4),
    CopySpec(path="tma", rows=16, stages=3),
    CopySpec(path="cp_async", rows=16, stages=3),
]


def drawn(stream: int, steps: int, places: int) -> list[int]:
    """Numerical Recipes' generator from stream * 2654435761, the upper bits scaled to the places."""
    state, found = stream * 2654435761 % 2**32, []
    for _ in range(steps):
        state = (state * 1664525 + 1013904223) % 2**32
        found.append(state * places // 2**32)
    return found


def expected(spec: CopySpec, rows: torch.Tensor, ctas: int, steps: int, places: int) -> torch.Tensor:
    """int32 (ctas, stages, rows, 64): what each stage holds after the last step. rows: (n, 64) on the CPU."""
    found = torch.empty(ctas, spec.stages, spec.rows, 64, dtype=torch.int32)
    for cta in range(ctas):
        if spec.path == "tma":
            for step, box in enumerate(drawn(cta, steps, places)):
                found[cta, step % spec.stages] = rows[box * spec.rows : (box + 1) * spec.rows]
        else:
            for group in range(8):
                for i, row in enumerate(drawn(cta * 8 + group, steps * spec.rows // 8, places)):
                    step, line = divmod(i, spec.rows // 8)
                    found[cta, step % spec.stages, 8 * line + group] = rows[row]
    return found
