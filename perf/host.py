# SPDX-License-Identifier: Apache-2.0
"""What can be measured without a GPU: host overhead of a call, import, compile cold and warm, masks and plans.

    python -m perf.host [--compile] [--out results.jsonl]
    python -m perf.host --gpu [--out results.jsonl]

Without a GPU the launch is a stub, so a call's time is what this package adds to it. With --gpu the launches are real,
eager, in a CUDA graph and in torch.compile, beside torch's own dense call. The machine's load is in every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import fgattn_cute as fg
from fgattn_cute import api, launch
from fgattn_cute import gpu as gpus
from fgattn_cute.kernels.spec import FwdSpec

ROOT = Path(__file__).parent.parent
CALLS = 4000
BURST = 50  # calls between two looks at the clock: short enough to fall between other processes' turns
GRAPH_CALLS = 20


def example(seqlen: int = 512, heads: int = 2, head_dim: int = 128):
    """q, k, v and a plan on the CPU."""
    q, k, v = (torch.randn(1, seqlen, heads, head_dim).bfloat16() for _ in range(3))
    keep = torch.rand(1, heads, seqlen // 128, seqlen) < 0.3
    mask = fg.SliceMask.from_dense(keep, slice_m=128, slice_n=1, seqlen_q=seqlen, seqlen_k=seqlen)
    return q, k, v, fg.Plan.from_mask(mask)


@contextlib.contextmanager
def stubbed_launch(plan, kernel: Callable = lambda *_: None):
    """attention() takes the GPU's way on CPU tensors, with three replacements: the backend is "cuda" whatever the
    tensors, the device's properties are constants, and `kernel` stands for the compiled one. Yields the specs chosen.
    """
    gpu = gpus.from_config("h200")
    chosen = []

    def prepare(problem, spec, emulated=False):
        chosen.append(spec)
        return launch.Launcher(spec, kernel, None, plan.slice_m, launch.ctas_per_block(spec, plan.slice_m), "bshd")

    def on_cuda(launcher, q, k, v, plan, scale, logit_bound):
        return launch._launch(launcher, q, k, v, plan, scale, logit_bound, gpu.sms)

    with (
        mock.patch.object(api, "pick_backend", lambda *_: "cuda"),
        mock.patch.object(launch, "prepare", prepare),
        mock.patch.object(gpus, "from_cuda", lambda device: gpu),
        mock.patch.object(launch, "on_cuda", on_cuda),
    ):
        api.forget_choices()
        try:
            yield chosen
        finally:
            api.forget_choices()


def call_overhead(calls: int = CALLS) -> dict:
    """Microseconds that attention() adds to the kernel's own launch call, plan and choice cached.

    Allocating out and lse is timed apart, as any caller must do it.
    """
    q, k, v, plan = example()
    with stubbed_launch(plan):
        whole = microseconds(lambda: fg.attention(q, k, v, plan), calls)
    allocation = microseconds(
        lambda: (torch.empty_like(q), torch.empty((1, q.shape[2], q.shape[1]), dtype=torch.float32)), calls
    )
    return {"what": "call overhead", "us": round(whole - allocation, 2), "allocation_us": round(allocation, 2)}


def microseconds(call: Callable, calls: int) -> float:
    """Best mean of many short bursts: what the code takes when nothing else runs."""
    call()
    means = []
    for _ in range(max(1, calls // BURST)):
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        means.append(1e6 * (time.perf_counter() - start) / BURST)
    return min(means)


def calls_on_gpu(device: str = "cuda", calls: int = 200) -> list[dict]:
    """Host microseconds of a call with a cached plan, kernels launched but not waited for, and what graphs make of it.

    The problem is small and ``calls`` launches fit the driver's queue, so the host never waits for the GPU. "us on the
    device" is the time of one call among many, the device saturated: where it exceeds the host's, the host is not
    what limits.
    """
    q, k, v, plan = (x.to(device) for x in example())
    mask, heads_first = plan.to_mask(), [x.transpose(1, 2) for x in (q, k, v)]
    compiled = torch.compile(lambda q, k, v: fg.attention(q, k, v, plan), fullgraph=True)
    ways = {
        "eager": lambda: fg.attention(q, k, v, plan),
        "eager, logits bounded": lambda: fg.attention(q, k, v, plan, logit_bound=20.0),
        "eager, checks off": lambda: fg.attention(q, k, v, plan, checks="off"),
        "torch.compile": lambda: compiled(q, k, v),
        "torch sdpa, dense": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first),
        "a plan and its order": lambda: fg.Plan.from_mask(mask).work(1, q.shape[2]),
        "the same, room known": lambda: fg.Plan.from_mask(mask, plan.capacity, plan.grouped).work(1, q.shape[2]),
    }
    records = [host_and_device(name, call, calls) for name, call in ways.items()]
    if device == "cuda":
        graph = captured(ways["eager"], GRAPH_CALLS)
        record = host_and_device("CUDA graph", graph.replay, calls // GRAPH_CALLS)
        for key in ("host_us", "device_us"):
            record[key] = round(record[key] / GRAPH_CALLS, 2)
        records.append({**record, "note": f"{GRAPH_CALLS} calls in one graph, per call"})
    return records


def captured(call, number: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            call()
    return graph


def host_and_device(name: str, call, calls: int) -> dict:
    """Best of five: microseconds until the last of the calls returns, and until the device is through, per call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    found = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        returned = time.perf_counter()
        wait()
        found.append((1e6 * (returned - start) / calls, 1e6 * (time.perf_counter() - start) / calls))
    host, device = (min(column) for column in zip(*found, strict=True))
    return {"what": "call", "way": name, "host_us": round(host, 2), "device_us": round(device, 2)}


def import_time() -> dict:
    """Seconds after torch, in a fresh interpreter, until the package is imported and until ``attention`` is there."""
    code = (
        "import time, torch; start = time.perf_counter(); import fgattn_cute; there = time.perf_counter();"
        "fgattn_cute.attention; print(there - start, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    module, attention = map(float, done.stdout.split())
    return {"what": "import", "s": round(module, 4), "attention_s": round(attention, 4)}


def compile_time(spec: FwdSpec) -> dict:
    """Seconds to the first use of a kernel, each in a fresh interpreter: into an empty cache, the DSL being imported
    already, then from the cache, where nothing needs the DSL."""
    code = (
        "import sys, time, torch; from fgattn_cute import compile as c; from fgattn_cute.kernels.spec import FwdSpec;"
        "{before}; t = time.perf_counter(); k = c.get({spec!r});"
        "print(time.perf_counter() - t, k.source, 'cutlass' in sys.modules)"
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FGATTN_CACHE_DIR": folder, "FGATTN_CACHE": "on", "FGATTN_PREBUILT_DIR": ""}
        for state, before, said in (("cold", "c._import_dsl()", "compiled True"), ("warm", "pass", "disk False")):
            command = [sys.executable, "-c", code.format(before=before, spec=spec)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            seconds, got = done.stdout.strip().split(" ", 1)
            assert got == said, f"expected {said}, got {got}"
            found[f"{state}_s"] = round(float(seconds), 4)
    return {"what": "compile", "kernel": spec.name, **found}


def plans(seqlen: int = 8192, heads: int = 2) -> dict:
    """Milliseconds on the CPU from a dense mask to bits, and from bits to lists."""
    keep = torch.rand(1, heads, seqlen // 128, seqlen) < 0.3
    geometry = {"slice_m": 128, "slice_n": 1, "seqlen_q": seqlen, "seqlen_k": seqlen}
    mask = fg.SliceMask.from_dense(keep, **geometry)
    cells = keep.numel()
    mask_ms = statistics.median(_ms(lambda: fg.SliceMask.from_dense(keep, **geometry)) for _ in range(5))
    plan_ms = statistics.median(_ms(lambda: fg.Plan.from_mask(mask)) for _ in range(5))
    return {"what": "mask and plan", "cells": cells, "mask_ms": round(mask_ms, 3), "plan_ms": round(plan_ms, 3)}


def _ms(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Prints one JSON record per figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="also the compile times (half a minute)")
    parser.add_argument("--gpu", action="store_true", help="real calls on this machine's GPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.gpu:
        from perf.run import environment

        records = [environment(), *calls_on_gpu()]
    else:
        records = [call_overhead(), import_time(), plans()]
    if options.compile:
        records.append(compile_time(FwdSpec(head_dim=128, tile_m=192, tile_n=80, ping_pong=True)))
    lines = [json.dumps({**record, "machine": platform.machine()}) for record in records]
    print("\n".join(lines))
    if options.out:
        with options.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
