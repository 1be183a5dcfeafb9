# SPDX-License-Identifier: Apache-2.0
"""Kernels from a folder on a real GPU, in processes that have no compiler; and the micro-benchmarks' bytes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fgattn_cute import compile as compiler
from fgattn_cute import prebuilt
from fgattn_cute.kernels.copy_spec import measured_specs
from fgattn_cute.presets import CONFIG_DIR
from tests.copy_cases import SPECS, expected

PROGRAM = """
import sys; sys.modules["cutlass"] = None  # importing it is an error from here on
import json, time, torch, tvm_ffi
import fgattn_cute as fg
from fgattn_cute import compile as compiler

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1000, 2, 128, device="cuda").bfloat16() for _ in range(3))
keep = torch.rand(1, 2, -(-1000 // 192), 1000, device="cuda") < 0.3
mask = fg.SliceMask.from_dense(keep, slice_m=192, slice_n=1, seqlen_q=1000, seqlen_k=1000)
plan = fg.Plan.from_mask(mask)
torch.cuda.synchronize()
started = time.perf_counter()
out = fg.attention(q, k, v, plan)
torch.cuda.synchronize()
first = time.perf_counter() - started
wanted = fg.reference.attention(q, k, v, plan).float()
error = float((out.float() - wanted).norm() / wanted.norm())
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    again = fg.attention(q, k, v, plan)
graph.replay()
torch.cuda.synchronize()
sources = sorted({found.source for found in compiler._memory.values()})
print(json.dumps({"error": error, "same": torch.equal(again, out), "first_ms": 1e3 * first, "sources": sources}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The H200's kernels for slices of 192 at head dim 128, and those that make lists."""
    where = tmp_path_factory.mktemp("prebuilt")
    wanted = [s for s in prebuilt.specs_of("h200", dtypes=["bf16"], head_dims=[128]) if s.tile_m == 192]
    outcomes = prebuilt.build(where, [*wanted, *prebuilt.helpers()[:2]], processes=4)
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return where


def test_a_process_without_the_compiler_computes_and_ends_well(folder, tmp_path):
    """The library's own end of life included: the exit code says whether unloading it was clean."""
    environment = {**os.environ, "FGATTN_PREBUILT_DIR": str(folder), "FGATTN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=CONFIG_DIR.parent.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["error"] < 5e-3 and found["same"] and found["sources"] == ["disk"]
    assert found["first_ms"] < 1000, "no compiler was started"


@pytest.mark.parametrize("spec", [*SPECS, *measured_specs()], ids=lambda spec: spec.name)
def test_copies_bring_the_right_bytes(spec):
    ctas, places, steps = 5, 1000, spec.stages + 3
    number = places * (spec.rows if spec.path == "tma" else 1)
    rows = torch.randint(-(2**31), 2**31 - 1, (number, 64), dtype=torch.int32)
    last = torch.empty(ctas, spec.stages * spec.rows * 64, dtype=torch.int32, device="cuda")
    compiler.get(spec).call(rows.cuda(), last, steps, places)
    wanted = expected(spec, rows, ctas, steps, places)
    assert torch.equal(last.cpu().view_as(wanted), wanted)
