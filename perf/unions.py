# SPDX-License-Identifier: Apache-2.0
"""What sharing a list costs and saves: unions and lists in parts against blocks of their own, over the union factor.

    python -m perf.unions --out perf/results/h200/unions.jsonl       # on a Hopper: one JSON record per kernel
    python -m perf.unions --table                                    # Markdown: which slices pay, by the cost model

Masks have a union factor that is set: the blocks of 384 queries (the unions of three CTAs of 128 rows, or of two of
192) draw their keys from a pool of their own. Kernels of a mask are judged against each other, then timed: interleaved,
a cold L2, medians. Useful TFLOPS count kept pairs, executed ones all pairs of the unions' lists.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fgattn_cute as fg
from fgattn_cute import gpu as gpus
from fgattn_cute import roofline, select, workers
from fgattn_cute.errors import FgAttnError
from fgattn_cute.kernels.spec import HALVES_ROWS, WGMMA_ROWS
from fgattn_cute.plan_choice import IN_HALVES, OWN, PARTS, expected, price, ways
from fgattn_cute.timing import CudaTimer, Timer
from fgattn_cute.unions import UnionPlan, rows_for
from perf.roofline import problem
from perf.run import MAX_RELATIVE_ERROR, clocks, environment, write
from perf.workloads import pool_mask

SLICES = (16, 32, 48, 64, 96)
FACTORS = (1.05, 1.5, 2.0, 3.0)
TABLE_FACTORS = (1.05, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE_DENSITIES = (0.1, 0.2, 0.3, 0.5)
# Useful TFLOPS of a prototype on one H200 (2026-11-23), S = 16,128 to 16,384, 30 % density, head_dim 128, bf16, unions
# of 128 rows, fixed_ref: (slice_m, union factor) -> rate.
PROTOTYPE = {
    (16, 1.05): 570,
    (16, 1.5): 420,
    (16, 2.0): 325,
    (16, 3.0): 229,
    (32, 1.11): 548,
    (32, 1.42): 441,
    (32, 1.88): 334,
}


# ---- measuring ------------------------------------------------------------------------------------------------------
def providers(slice_m: int) -> dict:
    """Name -> mask -> plan: every exact way to run a mask."""
    ways = {"own lists": fg.Plan.from_mask}
    for rows in rows_for(slice_m):
        ways[f"unions of {rows} rows"] = functools.partial(UnionPlan.from_mask, rows=rows)
    if slice_m == WGMMA_ROWS:
        ways[PARTS] = fg.PartsPlan.from_mask
    elif HALVES_ROWS % slice_m == 0:
        ways[IN_HALVES] = fg.HalvesPlan.from_mask
    return ways


def compile_ahead(slices, seqlen: int, heads: int, head_dim: int, gpu: gpus.Gpu) -> None:
    """Compile every kernel side by side before the clock runs."""
    specs = set()
    for slice_m in slices:
        asked = problem(seqlen, heads, head_dim, slice_m)
        for blocks in (1, *(rows // slice_m for rows in rows_for(slice_m))):
            specs.add(select.select(dataclasses.replace(asked, union_blocks=blocks), gpu).spec)
        specs |= {select.select(way.asked(asked), gpu).spec for way in ways(slice_m, 1, False) if way.lists != "bits"}
    specs |= {spec.redo_spec() for spec in specs if spec.softmax == "fixed_ref"}
    for outcome in workers.compile_all(list(specs)):
        if outcome.error:
            print(f"{outcome.spec.name}: {outcome.error}", file=sys.stderr)


def run_case(
    mask: fg.SliceMask, factor: float, timer: Timer, rounds: int, head_dim: int, logit_bound
) -> Iterator[dict]:
    """One record per way to run the mask."""
    device, heads, seqlen = mask.device, mask.heads, mask.seqlen_q
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, seqlen, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(3))
    density = mask.density
    described = {"kind": "unions", "seqlen": seqlen, "heads": heads, "head_dim": head_dim, "slice_m": mask.slice_m}
    described |= {"slice_n": 1, "density": round(density, 4), "asked_factor": factor, "logit_bound": logit_bound}
    calls, facts, expected = {}, {}, None
    for name, make in providers(mask.slice_m).items():
        try:
            make(mask)
            _wait(device)
            started = time.perf_counter()
            plan = make(mask)
            plan.work(1, heads)
            _wait(device)
            facts[name] = {"plan_ms": round(1e3 * (time.perf_counter() - started), 3)}
            call = functools.partial(fg.attention, q, k, v, plan, logit_bound=logit_bound)
            out = call().float()
            expected = out if expected is None else expected
            error = float((out - expected).norm() / expected.norm())
            if not error <= MAX_RELATIVE_ERROR:
                raise ArithmeticError(f"differs from own lists by {error:.2e}")
            explained = fg.explain(q, k, v, plan)
            facts[name] |= {"union_factor": round(explained.union_factor, 4), "kernel": explained.choice.spec.name}
            if explained.loads_per_key is not None:
                facts[name]["loads_per_key"] = round(explained.loads_per_key, 4)
            calls[name] = call
        except (FgAttnError, ArithmeticError, RuntimeError) as why:
            yield {**described, "provider": name, "absent": f"{type(why).__name__}: {str(why).splitlines()[0]}"}
    before = clocks()
    samples = timer(list(calls.values()), rounds)
    after = clocks()
    for name, found in zip(calls, samples, strict=True):
        useful = 4 * head_dim * heads * seqlen**2 * density / found.median / 1e12
        yield {
            **described,
            "provider": name,
            **facts[name],
            **found.as_dict(),
            "useful_tflops": round(useful, 1),
            "executed_tflops": round(useful * facts[name]["union_factor"], 1),
            "prototype_tflops": PROTOTYPE.get((mask.slice_m, factor)),
            "clocks": [before, after],
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- what the model expects -----------------------------------------------------------------------------------------
def table(seqlen: int = 16384, heads: int = 24, head_dim: int = 128) -> str:
    """Markdown: the plan that ``fg.best_plan`` would take, by density and union factor, on an H200."""
    gpu = gpus.from_config("h200")
    dense_ms = 4 * head_dim * heads * seqlen**2 / (select.facts_for(gpu).constants["dense_attention_tflops"] * 1e9)
    head = ["density", "slice_m", *(f"factor {factor}" for factor in TABLE_FACTORS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for density in TABLE_DENSITIES:
        for slice_m in SLICES:
            cells = []
            for factor in TABLE_FACTORS:
                if factor * density > 1 or factor >= rows_for(slice_m)[0] / slice_m:
                    cells.append("-")  # no such mask
                    continue
                kinds = ways(slice_m, 1, coarser=False)
                asked = problem(seqlen, heads, head_dim, slice_m)
                option = price(asked, gpu, density, *expected(kinds, factor, density * seqlen)).option
                ms = 1e3 * option.seconds
                kind = {OWN: "own", PARTS: "parts", IN_HALVES: "halves"}.get(option.name, f"u{option.rows}")
                cells.append(f"{kind} {ms:.2f} ({dense_ms / ms:.1f} x)")
            lines.append(f"| {density:.0%} | {slice_m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_prototype() -> str:
    """Markdown: useful TFLOPS of the prototype on an H200, and what the model expects of unions of 128 rows."""
    gpu = gpus.from_config("h200")
    lines = ["| slice_m | factor | prototype | model |", "|---|---|---|---|"]
    for (slice_m, factor), rate in PROTOTYPE.items():
        asked = dataclasses.replace(problem(16384, 24, 128, slice_m), union_blocks=128 // slice_m)
        work = roofline.Workload.uniform(asked, 0.3, union_factor=factor)
        spec = select.select(asked, gpu).spec
        found = roofline.predict(spec, select.facts_for(gpu), work, roofline.known_instructions(spec))
        lines.append(f"| {slice_m} | {factor} | {rate} | {found.packed_tflops:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures on the GPU; exit code 1 without one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--slice-m", nargs="*", type=int, default=list(SLICES), choices=SLICES)
    parser.add_argument("--factor", nargs="*", type=float, default=[], help="default: 1.05 1.5 2 3 and the prototype's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--logit-bound", type=float, help="known bound of the logits: a small one saves the redo launch"
    )
    parser.add_argument("--table", action="store_true", help="what the cost model expects, as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(), against_prototype(), sep="\n\n")
        return
    if options.out is None or not torch.cuda.is_available():
        sys.exit("needs --out and a GPU: nothing is measured")
    sizes = {"seqlen": options.seqlen, "heads": options.heads}
    compile_ahead(options.slice_m, *sizes.values(), options.head_dim, gpus.current())
    write(options.out, iter([environment()]), lambda said: None)
    timer = CudaTimer()
    for slice_m in options.slice_m:
        own = [factor for m, factor in PROTOTYPE if m == slice_m]
        for factor in options.factor or sorted({*FACTORS, *own}):
            try:
                mask = pool_mask(slice_m, factor, density=options.density, device="cuda", **sizes)
            except ValueError as why:
                print(f"slice_m {slice_m}, factor {factor}: {why}", file=sys.stderr)
                continue
            print(f"slice_m {slice_m}, factor {factor}", file=sys.stderr)
            records = run_case(mask, factor, timer, options.rounds, options.head_dim, options.logit_bound)
            write(options.out, records, lambda said: print("  " + said, file=sys.stderr))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
