# SPDX-License-Identifier: Apache-2.0
"""The harness: every provider on every case, judged before it is timed; one JSON record per provider and case.

    python -m perf.run --out perf/results/h200/today.jsonl [--workload wan-1.3b-480p] [--density 0.3] [--slice 192x1]

All providers of a case are timed against each other: interleaved, the L2 overwritten before every launch, median with
p20 and p80, clocks beside them. Packed TFLOPS count kept pairs, effective ones all. A dense provider's packed rate is
its effective one, since it computes every pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from fgattn_cute import cache, reference
from fgattn_cute.timing import CudaTimer, Timer
from perf.providers import PROVIDERS, Absent, Prepared
from perf.workloads import Case, Inputs, cases

CHECKED_ROWS = 2048  # queries that a result is judged on; the whole would take longer than all measurements
MAX_RELATIVE_ERROR = 1e-2
PACKAGES = ("flash-attn-4", "flashinfer-python", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13", "triton", "diffusers")


def run_case(case: Case, x: Inputs, timer: Timer, rounds: int, providers=PROVIDERS) -> Iterator[dict]:
    """One record per provider: a timing, or the reason why there is none."""
    ready: dict[str, Prepared] = {}
    expected: dict[bool, torch.Tensor] = {}
    for name, provider in providers.items():
        try:
            prepared = provider(case, x)
            if prepared.dense not in expected:
                expected[prepared.dense] = oracle(x, dense=prepared.dense)
            error = relative_error(prepared.call(), expected[prepared.dense])
            if not error <= MAX_RELATIVE_ERROR:
                raise Absent(f"wrong: differs from the reference by {error:.2e}")
            ready[name] = prepared
        except Exception as why:  # other people's libraries fail in every way; each is a result
            reason = str(why).strip().splitlines()[0][:300] if str(why).strip() else ""
            yield {**describe(case), "provider": name, "absent": f"{type(why).__name__}: {reason}"}
    if not ready:
        return
    before = clocks()
    samples = timer([p.call for p in ready.values()], rounds)
    after = clocks()
    density = x.plan.density
    for (name, prepared), found in zip(ready.items(), samples, strict=True):
        effective = case.effective_flops / found.median / 1e12
        yield {
            **describe(case),
            "provider": name,
            **found.as_dict(),
            "kept_density": round(density, 5),
            "effective_tflops": round(effective, 1),
            "packed_tflops": round(effective if prepared.dense else effective * density, 1),
            "plan_ms": None if prepared.plan_ms is None else round(prepared.plan_ms, 3),
            "with_plan_ms": round(1e3 * found.median + (prepared.plan_ms or 0.0), 4),
            "note": prepared.note,
            "clocks": [before, after],
        }


def oracle(x: Inputs, dense: bool) -> torch.Tensor:
    """The fp32 result of the first query rows (1, rows, H, D), by the package's reference or by plain torch."""
    from fgattn_cute import Plan, SliceMask

    blocks = -(-min(CHECKED_ROWS, x.q.shape[1]) // x.mask.slice_m)
    rows = min(blocks * x.mask.slice_m, x.q.shape[1])
    q = x.q[:, :rows].float()
    if dense:
        heads = [
            torch.nn.functional.scaled_dot_product_attention(*(t[:, :, h].float()[:, None] for t in (q, x.k, x.v)))[
                :, 0
            ]
            for h in range(q.shape[2])
        ]
        return torch.stack(heads, dim=2)
    geometry = {"slice_m": x.mask.slice_m, "slice_n": x.mask.slice_n, "seqlen_q": rows, "seqlen_k": x.k.shape[1]}
    mask = SliceMask(x.mask.bits[:, :, :blocks].contiguous(), **geometry)
    return reference.attention(q, x.k, x.v, Plan.from_mask(mask)).float()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm, on the rows that the oracle has."""
    got = out[:, : expected.shape[1]].float()
    return float((got - expected).norm() / expected.norm())


def describe(case: Case) -> dict:
    """The case and the machine, as every record carries them."""
    fields = ("name", "seqlen", "heads", "head_dim", "density", "slice_m", "slice_n", "factor")
    return {"kind": "attention", **{name: getattr(case, name) for name in fields}}


def environment() -> dict:
    """What the numbers depend on besides the code: once per file, as its first record."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "kind": "environment",
        "gpu": name,
        "torch": torch.__version__,
        **cache.versions(),
        "fingerprint": cache.fingerprint()[:12],
        "driver": driver(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "clocks": clocks(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(name: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the GPU's driver."""
    return _nvidia_smi("driver_version")


def clocks() -> str | None:
    """SM clock, power and throttle reasons as nvidia-smi says them; None without it."""
    return _nvidia_smi("clocks.sm,power.draw,clocks_event_reasons.active")


def _nvidia_smi(asked: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def write(out: Path, records: Iterator[dict], progress: Callable[[str], None]) -> int:
    """Append records as they come, each on disk before the next is made. Returns how many."""
    number = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            file.flush()
            number += 1
            progress(f"{record.get('provider', '')}: {record.get('median_ms', record.get('absent', ''))}")
    return number


def main() -> None:
    """Runs the selected cases on the GPU; exit code 1 without one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workload", nargs="*", default=[])
    parser.add_argument("--density", nargs="*", type=float, default=[])
    parser.add_argument("--slice", nargs="*", default=[], help="192x1 ...")
    parser.add_argument("--factor", nargs="*", type=float, default=[None], help="union factors; default: random masks")
    parser.add_argument("--provider", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing is measured. What runs without one is python -m perf.host")
    slices = [tuple(map(int, text.split("x"))) for text in options.slice]
    chosen = {name: PROVIDERS[name] for name in options.provider}
    write(options.out, iter([environment()]), lambda said: None)
    timer, started = CudaTimer(), time.monotonic()
    for case in cases(options.workload, options.density, slices, options.factor):
        if time.monotonic() - started > 60 * options.minutes:
            print("time is up; what is missing is missing", file=sys.stderr)
            break
        print(case, file=sys.stderr)
        x = case.inputs("cuda")
        records = run_case(case, x, timer, options.rounds, chosen)
        write(options.out, records, lambda said: print("  " + said, file=sys.stderr))
        del x
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
