# SPDX-License-Identifier: Apache-2.0
"""The micro-benchmarks' copy kernels on the emulator: the bytes that arrive are those of the places that were drawn."""

import pytest
import torch

from fgattn_cute import compile as compiler
from fgattn_cute import cubin, emulator
from fgattn_cute.kernels.copy_spec import CopySpec, measured_specs
from tests.copy_cases import SPECS, expected


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("steps", [4, 7])
def test_the_right_bytes_arrive(spec, steps):
    ctas, places = 2, 37
    rows = torch.arange(places * (spec.rows if spec.path == "tma" else 1) * 64, dtype=torch.int32).view(-1, 64)
    last = torch.full((ctas, spec.stages * spec.rows * 64), -1, dtype=torch.int32)
    kernel = compiler.get(spec, emulated=True).call
    with emulator.session(seed=steps, checks="all"):
        kernel(rows, last, steps, places)
    wanted = expected(spec, rows, ctas, steps, places)
    assert torch.equal(last.view_as(wanted), wanted)


def test_what_is_measured_can_run():
    found = measured_specs()
    assert {spec.rows for spec in found if spec.path == "tma"} == {1, 8, 16, 64, 80, 128}
    assert all(spec.reasons() == [] and spec.ctas_per_sm() >= 1 for spec in found)
    assert len({spec.name for spec in found}) == len(found)
    (gather,) = [spec for spec in found if spec.path == "cp_async"]
    assert gather.ctas_per_sm() >= 4


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"path": "ldg", "rows": 8, "stages": 2}, "path 'ldg' is not one of tma, cp_async"),
        ({"path": "tma", "rows": 257, "stages": 2}, "rows 257 is not from 1 to 256"),
        ({"path": "cp_async", "rows": 12, "stages": 2}, "rows 12 is not a multiple of the 8"),
        ({"path": "tma", "rows": 8, "stages": 0}, "stages 0 is less than 1"),
        ({"path": "tma", "rows": 256, "stages": 4}, "shared memory"),
    ],
)
def test_what_cannot_run_is_refused(fields, reason):
    (why,) = CopySpec(**fields).reasons()
    assert reason in why


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.name)
def test_compiled_code(spec):
    """Nothing but copies in the loop: no local memory, and shared memory as the spec says."""
    artifact = compiler.artifact(spec)
    assert artifact.facts["stack_bytes"] == 0 and artifact.facts["smem_bytes"] == spec.smem_bytes()
    if cubin.nvdisasm() is None:
        pytest.skip("needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    found = cubin.opcodes(cubin.from_object(artifact.object_file))
    copies = [op for op in found if op.startswith("UTMALDG" if spec.path == "tma" else "LDGSTS")]
    assert len(copies) == (1 if spec.path == "tma" else spec.rows // 8)


def test_rates_are_bytes_over_time(monkeypatch):
    """A timer that says 2 ms: 3 SMs, 2 CTAs on each, 32 MiB for every SM."""
    from types import SimpleNamespace

    from fgattn_cute.timing import Samples
    from perf import copies

    launched = []
    monkeypatch.setattr(copies.compiler, "get", lambda spec: SimpleNamespace(call=lambda *a: launched.append(a)))

    def timer(calls, rounds):
        calls[0]()
        return [Samples((2e-3,) * rounds)]

    spec = CopySpec(path="tma", rows=8, stages=4)
    record = copies.measure(spec, 2, 1, 3, timer, "cpu")
    ((rows, last, steps, places),) = launched
    assert (rows.shape, last.shape) == ((4096, 64), (6, 4 * 8 * 64)) and places == 4096 // 8
    assert steps * spec.step_bytes * 2 == 32 << 20
    assert record["tb_per_s"] == pytest.approx(3 * (32 << 20) / 2e-3 / 1e12, abs=1e-3)
    assert record["million_steps_per_s_and_sm"] == pytest.approx(2 * steps / 2e-3 / 1e6, rel=1e-3)
    asked = copies.cases()
    assert {(s.rows, n) for s, n, mib in asked if s.path == "tma" and mib == 32} >= {(1, 1), (128, 1)}
    assert {mib for s, n, mib in asked if s.path == "cp_async"} == {8, 16, 32, 48, 64, 96, 512}
