# SPDX-License-Identifier: Apache-2.0
"""What masks cost on a GPU, as a share of the attention that they serve: bits, lists, unions and predictors.

    python -m perf.mask_share --out results.jsonl [--workload wan-14b-720p] [--density 0.3 0.1]

Everything of a case is timed against each other as in ``perf.run``: interleaved, cold L2, medians by CUDA events.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fgattn_cute as fg
from fgattn_cute import predict
from fgattn_cute.kernels.spec import WGMMA_ROWS
from fgattn_cute.timing import CudaTimer, Timer
from perf.run import clocks, describe, environment, write
from perf.workloads import Case, Inputs, cases

WORKLOADS = ("wan-1.3b-480p", "wan-14b-480p", "wan-14b-720p", "hunyuan-119k")
SLICES = ((192, 1), (128, 1), (64, 1), (32, 1), (16, 1))
UNION_SLICES = (16, 32)


def parts(case: Case, x: Inputs) -> dict[str, Callable[[], object]]:
    """What is timed, by name; "attention" is the call that the others are held against.

    "bits": a dense bool mask to bits. "lists": bits to lists of known room, and their order of work. "unions": the same
    for a UnionPlan, which takes the place of the lists at slices of 16 and 32 queries, and "unions in halves" for a
    HalvesPlan. "lists in parts": the same for a PartsPlan, at 64. "mass": the predictor with a budget, all by itself;
    "mass, lse known": the same with the row sums of an attention before. "pooled": its cheaper stand-in.
    """
    geometry = {"slice_m": case.slice_m, "slice_n": case.slice_n, "seqlen_q": case.seqlen, "seqlen_k": case.seqlen}
    if case.slice_m in UNION_SLICES:
        unions = fg.UnionPlan.from_mask(x.mask)
        return {
            "attention": lambda: fg.attention(x.q, x.k, x.v, unions),
            "unions": lambda: fg.UnionPlan.from_mask(x.mask).work(1, case.heads),
            "unions in halves": lambda: fg.HalvesPlan.from_mask(x.mask).work(1, case.heads),
        }
    if case.slice_m == WGMMA_ROWS:
        shared = fg.PartsPlan.from_mask(x.mask)
        return {
            "attention": lambda: fg.attention(x.q, x.k, x.v, shared),
            "lists in parts": lambda: fg.PartsPlan.from_mask(x.mask).work(1, case.heads),
        }
    keep, select = x.mask.to_dense(), predict.Budget(case.density)
    _, lse = fg.attention(x.q, x.k, x.v, x.plan, return_lse=True)
    options = {"slice_m": case.slice_m, "slice_n": case.slice_n, "select": select}
    return {
        "attention": lambda: fg.attention(x.q, x.k, x.v, x.plan),
        "bits": lambda: fg.SliceMask.from_dense(keep, **geometry),
        "lists": lambda: fg.Plan.from_mask(x.mask, x.plan.capacity, x.plan.grouped).work(1, case.heads),
        "mass": lambda: predict.mass(x.q, x.k, **options),
        "mass, lse known": lambda: predict.mass(x.q, x.k, lse, **options),
        "pooled": lambda: predict.pooled(x.q, x.k, **options),
    }


def shares(case: Case, x: Inputs, timer: Timer, rounds: int) -> Iterator[dict]:
    """One record per part: its time, and its time over the attention's."""
    calls = parts(case, x)
    samples = dict(zip(calls, timer(list(calls.values()), rounds), strict=True))
    about = {**describe(case), "kind": "mask cost", "kept_density": round(x.plan.density, 5), "clocks": clocks()}
    for name, found in samples.items():
        share = found.median / samples["attention"].median
        yield {**about, "what": name, **found.as_dict(), "share_of_attention": round(share, 4)}


def main() -> None:
    """Appends JSON records to a file; exit code 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workload", nargs="*", default=WORKLOADS)
    parser.add_argument("--density", nargs="*", type=float, default=[0.3, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing is measured. What runs without one is python -m perf.masks")
    write(options.out, iter([environment()]), lambda said: None)
    timer = CudaTimer()
    for case in cases(options.workload, options.density, SLICES):
        x = case.inputs("cuda")
        write(options.out, shares(case, x, timer, options.rounds), lambda said: None)
        print(case, file=sys.stderr)
        del x
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
