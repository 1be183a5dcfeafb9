# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: its steps are commands that exist, and its runner keeps to the time whatever they do."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from perf import gpu
from perf.gpu import ROOT, Step


def test_steps_run_what_is_there(tmp_path):
    """Every module can be asked for its help, and the flags that a step gives it are known ones."""
    todo = gpu.steps(tmp_path)
    assert sum(step.minutes for step in todo[:3]) <= 10, "the most valuable results come first"
    needs_triton = {"perf.micro"} if importlib.util.find_spec("triton") is None else set()
    for module in sorted({step.arguments[1] for step in todo} - {"pytest", "fgattn_cute.cli"} - needs_triton):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        flags = {a for step in todo if step.arguments[1] == module for a in step.arguments if a.startswith("--")}
        assert all(flag in done.stdout for flag in flags), (module, flags)


def test_without_a_hopper_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "-m", "perf.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a Hopper GPU" in done.stderr


def test_a_failure_or_a_hang_does_not_stop_the_next_step(tmp_path):
    todo = [
        Step("fails", ("-c", "print('why'); raise SystemExit(3)"), 1),
        Step("hangs", ("-c", "import time; print('half', flush=True); time.sleep(60)"), 0.03),
        Step("works", ("-c", "print('done')"), 1),
    ]
    outcomes = gpu.run_all(todo, tmp_path, minutes=1)
    assert [outcome.status for outcome in outcomes] == ["failed", "out of time", "ok"]
    assert [o["status"] for o in json.loads((tmp_path / "summary.json").read_text())] == ["failed", "out of time", "ok"]
    logs = [(tmp_path / outcome.log).read_text() for outcome in outcomes]
    assert logs == ["why\n", "half\n", "done\n"]


def test_the_total_time_holds(tmp_path):
    """A clock that jumps: the second step finds no time left."""
    times = iter([0.0, 0.0, 0.0, 90.0, 90.0])
    todo = [Step("long", ("-c", "pass"), 5), Step("late", ("-c", "raise SystemExit(1)"), 5)]
    outcomes = gpu.run_all(todo, tmp_path, minutes=1, clock=lambda: next(times))
    assert [outcome.status for outcome in outcomes] == ["ok", "skipped"]


def test_the_gather_reads_the_rows_that_its_ids_name():
    """Triton's interpreter runs the micro-benchmark's kernel on the CPU."""
    pytest.importorskip("triton")
    code = (
        "import torch; from perf import micro; rows, ids, out = micro.inputs(1 << 16, 3, 4, 16, 'cpu');"
        "micro.launch(rows, ids, out); assert torch.equal(out, rows[ids.long()].sum((1, 2)).int())"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
