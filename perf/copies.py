# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of what feeds the kernels: boxes by TMA, by size, and rows gathered by cp.async, 16 bytes each.

    python -m perf.copies [--out results.jsonl]

Rows of 256 bytes from random places of a footprint; nothing else happens (kernels/copy_sm90.py). The kernels are among
the prebuilt ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from fgattn_cute import compile as compiler
from fgattn_cute.kernels.copy_spec import ROW_WORDS, CopySpec, measured_specs
from fgattn_cute.timing import CudaTimer, Timer

RESIDENT_MIB = 32  # fits the L2 of every Hopper
FOOTPRINTS_MIB = (8, 16, 32, 48, 64, 96, 512)
MAX_CTAS_PER_SM = 4
BYTES_PER_SM = 32 << 20  # of a launch: the first touch of a resident footprint is less than 1 % of that
ROUNDS = 10


def cases() -> list[tuple[CopySpec, int, int]]:
    """(kernel, CTAs per SM, footprint in MiB): boxes and the gather in the L2, then the gather by footprint."""
    specs = measured_specs()
    numbers = lambda spec: range(1, min(MAX_CTAS_PER_SM, spec.ctas_per_sm()) + 1)
    resident = [(spec, ctas, RESIDENT_MIB) for spec in specs for ctas in numbers(spec)]
    gather = next(spec for spec in specs if spec.path == "cp_async")
    return resident + [(gather, ctas, mib) for mib in FOOTPRINTS_MIB for ctas in (1, 2) if mib != RESIDENT_MIB]


def measure(spec: CopySpec, ctas_per_sm: int, mib: int, sms: int, timer: Timer, device: str = "cuda") -> dict:
    """One record: what arrived in a launch over its median time."""
    number = (mib << 20) // (4 * ROW_WORDS)
    rows = torch.zeros(number, ROW_WORDS, dtype=torch.int32, device=device)
    last = torch.empty(sms * ctas_per_sm, spec.stages * spec.step_bytes // 4, dtype=torch.int32, device=device)
    steps = max(spec.stages, BYTES_PER_SM // (ctas_per_sm * spec.step_bytes))
    places = number // spec.rows if spec.path == "tma" else number
    kernel = compiler.get(spec).call
    (found,) = timer([lambda: kernel(rows, last, steps, places)], ROUNDS)
    steps_per_s = steps * last.shape[0] / found.median
    return {
        "kind": "tma boxes" if spec.path == "tma" else "cp.async gather",
        "rows": spec.rows,
        "stages": spec.stages,
        "ctas_per_sm": ctas_per_sm,
        "footprint_mib": mib,
        **found.as_dict(),
        "tb_per_s": round(steps_per_s * spec.step_bytes / 1e12, 3),
        "million_steps_per_s_and_sm": round(steps_per_s / sms / 1e6, 3),
    }


def records(sms: int, timer: Timer, device: str = "cuda") -> Iterator[dict]:
    """All cases, one record each."""
    for spec, ctas_per_sm, mib in cases():
        yield measure(spec, ctas_per_sm, mib, sms, timer, device)


def main() -> None:
    """Prints one JSON record per kernel, CTAs per SM and footprint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for record in records(torch.cuda.get_device_properties(0).multi_processor_count, CudaTimer()):
        line = json.dumps(record)
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
