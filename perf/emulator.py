# SPDX-License-Identifier: Apache-2.0
"""How fast the emulator is: the product's forward kernel on one and more threads, with and without checks.

One JSON object per line. Run from the repository: python -m perf.emulator [--threads 1 2] [--seqlen 2048]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

import fgattn_cute as fg
from fgattn_cute import emulator
from fgattn_cute.kernels.spec import FwdSpec

SCHEDULES = {"eager": 1, "late": 0}


def problem(seqlen: int, heads: int, density: float, spec: FwdSpec):
    """q, k, v (1, S, H, D) bf16 and a plan that keeps `density` of all (block, key) pairs at random."""
    q, k, v = (torch.randn(1, seqlen, heads, spec.head_dim).bfloat16() for _ in range(3))
    keep = torch.rand(1, heads, -(-seqlen // spec.tile_m), seqlen) < density
    mask = fg.SliceMask.from_dense(keep, slice_m=spec.tile_m, slice_n=1, seqlen_q=seqlen, seqlen_k=seqlen)
    return q, k, v, fg.Plan.from_mask(mask)


def measure(call, repeats: int, **session) -> dict:
    """Median over `repeats` launches of the emulation itself (without marshalling), after one to warm up.

    `cpu_seconds` is the CPU time of the whole call over all threads: what to read where the machine is shared.
    """
    seconds, walls, cpu = [], [], []
    for _ in range(repeats + 1):
        with emulator.session(on_violation="collect", **session) as emu:
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            walls.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        main = max(emu.report(), key=lambda launch: launch.result.seconds)
        seconds.append(sum(launch.result.seconds for launch in emu.report()))
    counters = main.result.counters
    median = statistics.median(seconds[1:])
    return {
        "seconds": round(median, 5),
        "seconds_min": round(min(seconds[1:]), 5),
        "wall_seconds": round(statistics.median(walls[1:]), 5),
        "cpu_seconds": round(statistics.median(cpu[1:]), 5),
        "warp_instructions": counters["instructions"],
        "million_instructions_per_s": round(counters["instructions"] / median / 1e6, 2),
        "wgmma_gflops": round(counters.get("wgmma_flops", 0) / median / 1e9, 2),
    }


def main() -> None:
    """Prints one record per number of threads, schedule and set of checks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checks", nargs="+", default=["none", "fast", "all"])
    options = parser.parse_args()
    torch.manual_seed(0)
    spec = FwdSpec(head_dim=options.head_dim, softmax="exact")
    q, k, v, plan = problem(options.seqlen, options.heads, options.density, spec)
    call = lambda: fg.attention(q, k, v, plan, backend="emulator", spec=spec, checks="off")
    for checks in options.checks:
        for name, seed in SCHEDULES.items():
            base = None
            for threads in options.threads:
                record = measure(call, options.repeats, seed=seed, checks=checks, threads=threads)
                base = base or record["seconds"]
                header = {
                    "what": "emulator",
                    "kernel": spec.name,
                    "machine": platform.machine(),
                    "density": options.density,
                }
                sizes = {"seqlen": options.seqlen, "heads": options.heads, "head_dim": options.head_dim}
                how = {"checks": checks, "schedule": name, "threads": threads}
                print(json.dumps({**header, **sizes, **how, **record, "speed_up": round(base / record["seconds"], 2)}))


if __name__ == "__main__":
    main()
