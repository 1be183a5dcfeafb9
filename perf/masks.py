# SPDX-License-Identifier: Apache-2.0
"""What masks cost: memory as bits and as lists, and the time to compact and to find them next to attention itself.

One JSON object per line. Run from the repository: python -m perf.masks [--device cuda] [--seqlen 32760]
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from fgattn_cute import predict
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan

DENSITIES = (0.1, 0.3, 0.5)
SLICES = ((128, 1), (64, 1), (128, 8), (128, 64))


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of one call, in ms, after one call to warm up; waits for the device."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(repeats))


def memory_and_compaction(seqlen: int, heads: int, device: torch.device, repeats: int):
    """One record per slice size and density: bytes in both forms, time of compaction and of the work order."""
    for slice_m, slice_n in SLICES:
        for density in DENSITIES:
            shape = (1, heads, -(-seqlen // slice_m), -(-seqlen // slice_n))
            geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen, "seqlen_k": seqlen}
            mask = SliceMask.from_dense(torch.rand(shape, device=device) < density, **geometry)
            plan = Plan.from_mask(mask)
            build = functools.partial(Plan.from_mask, mask, plan.capacity, plan.grouped)
            yield {
                "what": "compaction",
                **geometry,
                "heads": heads,
                "density": density,
                "bytes_as_bits": mask.nbytes,
                "bytes_as_lists": plan.nbytes,
                "lists_over_bits": round(plan.nbytes / mask.nbytes, 2),
                "compact_ms": milliseconds(build, device, repeats),
                "compact_and_order_ms": milliseconds(lambda build=build: build().work(1, heads), device, repeats),
            }


def prediction(seqlen: int, heads: int, head_dim: int, device: torch.device, repeats: int):
    """One record per predictor: its time and its FLOPs as a share of dense attention's 4 * D * Sq * Sk per head."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, seqlen, heads, head_dim, dtype=dtype, device=device)
    k, v = torch.randn_like(q), torch.randn_like(q)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    dense_ms = milliseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first), device, max(1, repeats // 2)
    )
    select = predict.Threshold(1.0 / seqlen)
    for slice_m, slice_n in SLICES:
        sizes = {"slice_m": slice_m, "slice_n": slice_n}
        for name, find, share in (
            ("mass", lambda sizes=sizes: predict.mass(q, k, **sizes, select=select), 0.5),
            ("pooled", lambda sizes=sizes: predict.pooled(q, k, **sizes, select=select), 0.5 / (slice_m * slice_n)),
        ):
            taken = milliseconds(find, device, repeats)
            yield {
                "what": name,
                **sizes,
                "seqlen": seqlen,
                "heads": heads,
                "head_dim": head_dim,
                "ms": taken,
                "flops_of_dense_attention": share,
                "time_of_dense_sdpa": taken / dense_ms,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"device": name, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d")}
    print(json.dumps(about))
    for record in memory_and_compaction(options.seqlen, options.heads, device, options.repeats):
        print(json.dumps(record))
    for record in prediction(options.seqlen, options.heads, options.head_dim, device, options.repeats):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
