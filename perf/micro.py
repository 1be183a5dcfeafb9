# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmark of what bounds small slices: how fast rows scattered over the L2 reach the SMs, by footprint.

    python -m perf.micro [--out results.jsonl]

Written in Triton, so that a machine with torch and triton alone can run it. Loads go to registers, not through
cp.async, so the figure is a lower bound of what the forward kernel's gather can reach. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from fgattn_cute.timing import CudaTimer

FOOTPRINTS_MIB = (8, 16, 32, 48, 64, 96, 512)
ROW_WORDS = 64  # a row of 256 bytes, K or V at head dim 128, as 32-bit words
ROWS_PER_STEP = 64
STEPS = 256


@triton.jit
def gather_rows(rows, ids, out, STEPS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Each program reads STEPS x ROWS rows of WORDS words that its ids name and leaves their sum, so that no read is
    dead."""
    program = tl.program_id(0)
    words = tl.arange(0, WORDS)
    total = tl.zeros((ROWS, WORDS), dtype=tl.int32)
    for step in range(STEPS):
        picked = tl.load(ids + (program * STEPS + step) * ROWS + tl.arange(0, ROWS))
        total += tl.load(rows + picked[:, None].to(tl.int64) * WORDS + words[None, :])
    tl.store(out + program * WORDS + words, tl.sum(total, axis=0))


def launch(rows: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """rows: int32 (n, words). ids: int32 (programs, steps, rows per step). out: int32 (programs, words)."""
    programs, steps, per_step = ids.shape
    gather_rows[(programs,)](rows, ids, out, steps, per_step, rows.shape[1], num_warps=4)


def inputs(footprint_bytes: int, programs: int, steps: int, per_step: int, device: str):
    """Rows that fill the footprint, and random ids into them."""
    number = footprint_bytes // (4 * ROW_WORDS)
    rows = torch.randint(-(2**20), 2**20, (number, ROW_WORDS), dtype=torch.int32, device=device)
    ids = torch.randint(0, number, (programs, steps, per_step), dtype=torch.int32, device=device)
    return rows, ids, torch.empty(programs, ROW_WORDS, dtype=torch.int32, device=device)


def main() -> None:
    """One JSON record per footprint and CTAs per SM."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    timer = CudaTimer()
    for mib in FOOTPRINTS_MIB:
        for per_sm in (1, 2, 4, 8):
            rows, ids, out = inputs(mib << 20, sms * per_sm, STEPS, ROWS_PER_STEP, "cuda")
            (found,) = timer([lambda r=rows, i=ids, o=out: launch(r, i, o)], 20)
            read = ids.numel() * 4 * ROW_WORDS
            record = {"kind": "l2 gather", "footprint_mib": mib, "ctas_per_sm": per_sm, **found.as_dict()}
            line = json.dumps({**record, "tb_per_s": round(read / found.median / 1e12, 2)})
            print(line, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
