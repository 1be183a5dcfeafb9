# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness without a GPU: cases, providers, records, gate, pictures, and what the host costs."""

import json

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute.timing import Samples
from perf import compare, plot, providers, run
from perf.providers import Absent, Prepared
from perf.workloads import Case, cases

CASE = Case("small", seqlen=260, heads=2, head_dim=64, density=0.4, slice_m=128, slice_n=1)


def fixed(*milliseconds):
    """A timer that runs everything once and gives the functions these times, in their order."""

    def timer(calls, rounds):
        for call in calls:
            call()
        return [Samples((1e-3 * ms,) * rounds) for ms, _ in zip(milliseconds, calls, strict=True)]

    return timer


def test_workloads_are_those_of_the_models():
    found = {case.name: case for case in cases(densities=[0.3], slices=[(192, 1)])}
    assert (found["wan-14b-720p"].seqlen, found["wan-14b-720p"].heads) == (75600, 40)
    assert (found["wan-1.3b-480p"].seqlen, found["wan-1.3b-480p"].heads) == (32760, 12)
    assert (found["hunyuan-115k"].seqlen, found["hunyuan-115k"].heads) == (115200, 24)
    # 117.1 TFLOP a layer and call, as the literature counts (4 S^2 H D)
    assert found["wan-14b-720p"].effective_flops == pytest.approx(117.1e12, rel=1e-3)
    everything = cases()
    assert len(everything) == len(set(everything))
    assert {0.05, 1.0} <= {c.density for c in everything} and {(16, 1), (192, 1), (128, 128)} <= {
        (c.slice_m, c.slice_n) for c in everything
    }
    with pytest.raises(ValueError, match="wan-14b-720p"):
        cases(["wan"])


def test_inputs_are_the_same_for_everyone_and_keep_the_density():
    one, two = CASE.inputs("cpu"), CASE.inputs("cpu")
    assert torch.equal(one.q, two.q) and torch.equal(one.mask.bits, two.mask.bits)
    assert one.plan.density == pytest.approx(0.4, abs=0.03)
    assert one.mask.heads == 2 and not torch.equal(one.mask.bits[:, 0], one.mask.bits[:, 1])


def test_every_provider_is_judged_before_it_is_timed():
    x = CASE.inputs("cpu")
    ours = lambda: fg.attention(x.q, x.k, x.v, x.plan)
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (x.q, x.k, x.v))
    ).transpose(1, 2)

    def refuses(case, x):
        raise Absent("not for this")

    def missing(case, x):
        import a_package_that_nobody_has  # noqa: F401

    chosen = {
        "ours": lambda case, x: Prepared(ours, plan_ms=2.0, note="n"),
        "dense": lambda case, x: Prepared(dense, dense=True),
        "cheat": lambda case, x: Prepared(lambda: 0.9 * ours()),
        "dense that claims the mask": lambda case, x: Prepared(dense),
        "refuses": refuses,
        "missing": missing,
    }
    records = {r["provider"]: r for r in run.run_case(CASE, x, fixed(1.0, 4.0), 5, chosen)}
    assert "differs from the reference" in records["cheat"]["absent"]
    assert "differs from the reference" in records["dense that claims the mask"]["absent"]
    assert records["refuses"]["absent"] == "Absent: not for this"
    assert records["missing"]["absent"].startswith("ModuleNotFoundError")
    ours, dense = records["ours"], records["dense"]
    assert (ours["median_ms"], ours["samples"], ours["with_plan_ms"]) == (1.0, 5, 3.0)
    flops = 4 * 64 * 2 * 260 * 260
    assert ours["effective_tflops"] == round(flops / 1e-3 / 1e12, 1)
    assert ours["packed_tflops"] == round(flops * x.plan.density / 1e-3 / 1e12, 1)
    assert dense["packed_tflops"] == dense["effective_tflops"] and dense["plan_ms"] is None
    json.dumps(list(records.values()))


def test_our_provider_and_torchs_run_here():
    x = CASE.inputs("cpu")
    expected = run.oracle(x, dense=False)
    assert expected.shape == x.q.shape
    assert run.relative_error(providers.ours(CASE, x).call(), expected) < 1e-2
    assert run.relative_error(providers.PROVIDERS["sdpa-flash"](CASE, x).call(), run.oracle(x, dense=True)) < 1e-2


@pytest.mark.parametrize(
    "name, changed",
    [
        ("flex", {"slice_n": 1}),
        ("fa4-block-sparse", {"slice_n": 64}),
        ("cudnn-bsa", {"slice_m": 128}),
        ("chipmunk", {"slice_m": 128}),
        ("flashinfer-fa3", {}),
    ],
)
def test_providers_say_why_they_are_absent(name, changed):
    """Whether the library is missing or the case is not for it: a reason, never a crash."""
    import dataclasses

    case = dataclasses.replace(CASE, **changed)
    (record,) = run.run_case(case, case.inputs("cpu"), fixed(), 1, {name: providers.PROVIDERS[name]})
    assert record["absent"] and "median_ms" not in record


def test_records_are_written_one_by_one(tmp_path):
    """What exists when the machine goes away is on disk."""
    out = tmp_path / "a" / "results.jsonl"

    def records():
        yield {"provider": "one"}
        assert json.loads(out.read_text()) == {"provider": "one"}
        yield {"provider": "two"}

    assert run.write(out, records(), lambda said: None) == 2


# ---- the gate and the pictures --------------------------------------------------------------------------------------
def record(provider, ms, **changed):
    base = {"kind": "attention", "name": "w", "density": 0.3, "slice_m": 192, "slice_n": 1, "provider": provider}
    return {**base, **({"median_ms": ms} if ms else {"absent": "gone"}), **changed}


def results(tmp_path, name, *records):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return compare.load(path)


def test_the_gate_sees_a_regression_and_not_a_slow_chip(tmp_path):
    before = results(tmp_path, "b", record("ours", 1.0), record("fa4-dense", 3.0), {"kind": "environment"})
    slow_chip = results(tmp_path, "s", record("ours", 1.2), record("fa4-dense", 3.6))
    worse = results(tmp_path, "w", record("ours", 1.2), record("fa4-dense", 3.0))
    gone = results(tmp_path, "g", record("ours", None), record("fa4-dense", 3.0))
    alone = results(tmp_path, "a", record("ours", 1.2))
    judged = lambda after: compare.compare(before, after, "ours", 0.05)[0]
    assert judged(slow_chip)["ratio"] == pytest.approx(1.0) and not judged(slow_chip)["worse"]
    assert judged(worse)["ratio"] == pytest.approx(1.2) and judged(worse)["worse"]
    assert judged(gone)["worse"] and judged(gone)["why"] == "gone"
    assert judged(alone)["against"] is None and judged(alone)["worse"]
    assert compare.compare(before, {}, "ours", 0.05) == []
    with pytest.raises(ValueError, match="x:1"):
        (tmp_path / "x").write_text("{\n")
        compare.load(tmp_path / "x")


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    found = results(
        tmp_path, "r", record("ours", 1.0), record("ours", 0.4, density=0.1), record("flex", 2.0), record("x", None)
    )
    (key,) = plot.series(found)
    lines = plot.series(found)[key]
    assert lines == {"ours": [(0.1, 0.4), (0.3, 1.0)], "flex": [(0.3, 2.0)]}
    path = plot.draw(key, lines, tmp_path)
    assert path.name == "w-m192n1.svg" and "<svg" in path.read_text()
