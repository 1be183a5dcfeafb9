# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: everything that a rented Hopper is good for, in one folder, the most valuable first, under 20 minutes.

    python -m perf.gpu [--out folder] [--minutes 20] [--dry-run]

Each step is a process of its own with a limit of its own, writes its results as they come, and does not keep the next
one from running when it fails. ``summary.json`` is renewed after every step. Nothing is downloaded: kernels come from
FGATTN_PREBUILT_DIR, or from the bundle that these sources lie in (``python -m perf.bundle``), and are compiled
otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from perf import bundle

ROOT = Path(__file__).parent.parent
TOTAL_MINUTES = 20.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One process. minutes: after so long it is ended; what it has written stays."""

    name: str
    arguments: tuple[str, ...]
    minutes: float


@dataclasses.dataclass
class Outcome:
    """What became of a step. status: "ok", "failed", "out of time" or "skipped"."""

    name: str
    status: str
    seconds: float
    log: str | None


def steps(out: Path, prebuilt: str | None = None) -> list[Step]:
    """What is run, in order of value; first of all, which of the prebuilt kernels serve and why not the others."""
    run, cli = ("-m", "perf.run", "--out"), ("-m", "fgattn_cute.cli")
    first, rest = str(out / "first.jsonl"), str(out / "all.jsonl")
    # 260 tests and their kernels took 79 s with 12 processes on 16 cores beside an H200; one process takes minutes.
    side_by_side = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    tune = (*cli, "tune", "--json", "--slice-m")
    check = [Step("prebuilt kernels", (*cli, "compile", "--check", "--json", "--out", prebuilt), 1)] if prebuilt else []
    return [
        *check,
        Step("doctor", (*cli, "doctor", "--json"), 1),
        Step(
            "first benchmarks",
            (*run, first, "--workload", "square-16k", "wan-1.3b-480p", "--density", "0.3", "--slice", "192x1", "128x1")
            + ("--minutes", "3"),
            4,
        ),
        Step("tests", ("-m", "pytest", "-q", "tests/gpu", "-m", "gpu and not slow", *side_by_side), 5),
        Step("tune 192", (*tune, "192", "--seqlen", "75600", "--heads", "12"), 2),
        Step("tune 128", (*tune, "128", "--seqlen", "32760", "--heads", "12"), 2),
        Step("tune 64", (*tune, "64", "--seqlen", "32760", "--heads", "12"), 2),
        Step("copies", ("-m", "perf.copies", "--out", str(out / "copies.jsonl")), 1),
        Step("L2 gather", ("-m", "perf.micro", "--out", str(out / "micro.jsonl")), 1),
        Step("host time", ("-m", "perf.host", "--gpu", "--out", str(out / "host.jsonl")), 1),
        Step("masks", ("-m", "perf.mask_share", "--out", str(out / "masks.jsonl"), "--density", "0.1"), 1),
        Step("pictures of the first", ("-m", "perf.plot", first, "--out", str(out / "plots")), 1),
        Step("all benchmarks", (*run, rest, "--minutes", "5"), 6),
        Step("pictures of all", ("-m", "perf.plot", rest, "--out", str(out / "plots")), 1),
    ]


def run_all(todo: list[Step], out: Path, minutes: float, clock: Callable[[], float] = time.monotonic) -> list[Outcome]:
    """Run the steps within a total time. A step never gets more than what is left; none starts with nothing left."""
    out.mkdir(parents=True, exist_ok=True)
    started, outcomes = clock(), []
    for number, step in enumerate(todo):
        left = 60 * minutes - (clock() - started)
        if left <= 0:
            outcomes.append(Outcome(step.name, "skipped", 0.0, None))
        else:
            log = out / f"{number:02d}-{step.name.replace(' ', '-')}.log"
            outcomes.append(_run(step, log, min(left, 60 * step.minutes), clock))
        summary = [dataclasses.asdict(outcome) for outcome in outcomes]
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(step: Step, log: Path, seconds: float, clock: Callable[[], float]) -> Outcome:
    began = clock()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *step.arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            )
            status = "failed" if done.returncode else "ok"
        except subprocess.TimeoutExpired:
            status = "out of time"
    return Outcome(step.name, status, clock() - began, log.name)


def main() -> None:
    """Exit code 1 if a step failed or no Hopper is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-results" / time.strftime("%Y-%m-%d-%H%M"))
    parser.add_argument("--minutes", type=float, default=TOTAL_MINUTES)
    parser.add_argument("--dry-run", action="store_true", help="print the steps")
    options = parser.parse_args()
    found = bundle.around(ROOT)
    if found is not None:
        os.environ.setdefault("FGATTN_PREBUILT_DIR", str(found / "kernels"))
    todo = steps(options.out, os.environ.get("FGATTN_PREBUILT_DIR"))
    if options.dry_run:
        print("\n".join(f"{step.name} ({step.minutes:g} min): python {' '.join(step.arguments)}" for step in todo))
        return
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("make gpu needs a Hopper GPU (compute capability 9.0); torch sees none")
    outcomes = run_all(todo, options.out, options.minutes)
    print(f"results: {options.out}")
    sys.exit(int(any(outcome.status == "failed" for outcome in outcomes)))


if __name__ == "__main__":
    main()
