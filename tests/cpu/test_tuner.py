# SPDX-License-Identifier: Apache-2.0
"""The autotuner with a simulated clock and kernels on the emulator; its records; preset files edited in place."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import compile as compiler
from fgattn_cute import emulator, gpu, preset_edit, presets, roofline, select, tuned, tuner, workers
from fgattn_cute.errors import PresetError, UnsupportedError
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.problem import Problem
from fgattn_cute.timing import Samples, rotation
from perf.roofline import problem as problem_of

H200 = gpu.from_config("h200")
D = 64


@pytest.fixture
def case():
    """q, k, v, plan and problem: small, D = 64, slice_m 64."""
    q, k, v = (torch.randn(1, 200, 1, D).bfloat16() for _ in range(3))
    keep = torch.rand(1, 1, 4, 200) < 0.6
    plan = fg.Plan.from_mask(fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=200, seqlen_k=200))
    return q, k, v, plan, Problem.of(q, k, v, plan)


@pytest.fixture
def own_records(tmp_path, monkeypatch):
    """A folder of records for this test; the compiled kernels stay shared."""
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def few(monkeypatch):
    """Only three candidates, so that three kernels are compiled: m64 at tile 128 (the preset's) and 96, and exact."""
    file = presets.builtin("h200")
    own = file.get("m64-d64").spec(dtype="bf16", head_dim=D)
    exact = file.get("m64-exact-d64").spec(dtype="bf16", head_dim=D)
    specs = [own, dataclasses.replace(own, tile_n=96), exact]
    monkeypatch.setattr(tuner, "candidates", lambda problem, gpu: [tuner.Candidate(spec, "m64-d64") for spec in specs])
    monkeypatch.setattr(select, "fallback", lambda problem, gpu: exact)
    monkeypatch.setattr(
        workers, "compile_all", lambda specs, processes=None: [workers.Outcome(s, None, 0.0, {}) for s in specs]
    )
    return specs


class Clock:
    """A timer that runs every function once and then says what it was told: seconds of tile 128, 96 and exact."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, calls, rounds):
        self.calls = len(calls)
        for call in calls:
            call()
        specs = [call.args[0] for call in calls]
        which = [2 if spec.softmax == "exact" else 1 if spec.tile_n == 96 else 0 for spec in specs]
        return [Samples((self.seconds[i],) * rounds) for i in which]


# ---- candidates and ranking -----------------------------------------------------------------------------------------
def test_candidates_are_the_presets_ranges_and_say_why_they_cannot_run(case):
    found = tuner.candidates(dataclasses.replace(case[-1], head_dim=128), H200)
    assert len({c.spec for c in found}) == len(found) > 100
    mine = [p for p in presets.builtin("h200").presets if p.takes("bf16", 128, 1)]
    presets_own = {p.spec(dtype="bf16", head_dim=128) for p in mine}
    assert presets_own <= {c.spec for c in found}
    for candidate in found:
        assert (candidate.rejected is None) == (tuner._cannot_run(candidate.spec, case[-1]) is None)
    # Tile 160 with Q in registers: S 80, P 40, O 64, Q 32 and the rest exceed a consumer's 224.
    spilling = [c for c in found if c.spec.tile_n == 160 and c.spec.q_source == "registers"]
    assert spilling and all("registers" in c.rejected for c in spilling)


def test_candidates_for_grouped_lists_bring_runs_of_8_by_tma(case):
    found = tuner.candidates(dataclasses.replace(case[-1], head_dim=128, grouped=True), H200)
    assert {c.spec.kv_loads for c in found} == {"octets"} and any(c.rejected is None for c in found)


def test_candidates_for_even_lists_try_waves_and_zigzag(case):
    found = tuner.candidates(dataclasses.replace(case[-1], head_dim=128, even=True), H200)
    own = [c.spec for c in found if c.preset_id == "m128-d128"]
    assert {spec.scheduler for spec in own} == {"grid", "persistent", "zigzag"}
    assert len({spec.tile_n for spec in own if spec.scheduler == "zigzag"}) > 1


def test_ranking_uses_the_plans_own_lists(case):
    """Lists of 100 keys waste less of a tile of 96 than of 160; lists of 16,000 keys do not care."""
    spec = presets.builtin("h200").get("m64-d64").spec(dtype="bf16", head_dim=D)
    pair = [dataclasses.replace(spec, tile_n=n) for n in (128, 160)]
    for keys, better in ((129, 160), (128, 128)):
        work = roofline.Workload.uniform(problem_of(16384, 4, D, 64), 0.0, keys=(keys,) * 1024)
        ranked = tuner.rank([tuner.Candidate(s, "x") for s in pair], H200, work)
        assert ranked[0].spec.tile_n == better
        assert ranked[0].predicted_ms < ranked[1].predicted_ms


# ---- end to end -----------------------------------------------------------------------------------------------------
def test_the_fastest_right_candidate_wins_and_is_found_again(case, few, own_records, monkeypatch):
    *tensors, problem = case
    before = select.select(problem, H200)
    result = fg.autotune(*tensors, gpu=H200, timer=Clock(2e-3, 1e-3, 3e-3), rounds=5)
    assert result.measured and result.winner.spec.tile_n == 96 and result.baseline.spec == before.spec
    assert result.winner.timing == {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "samples": 5}
    # The record is where it says, holds every timing, and the next choice comes from it.
    record = json.loads(Path(result.path).read_text())
    assert [c["timing"]["median_ms"] for c in record["candidates"]] == [1.0, 2.0, 3.0]
    assert record["key"]["gpu"] == "NVIDIA H200" and len(record["key"]["fingerprint"]) == 64
    after = select.select(problem, H200)
    assert (after.source, after.spec.tile_n) == ("tuned", 96)
    assert "fastest of 3 measured" in after.why and "against 2 ms" in after.why
    explained = fg.explain(*tensors, gpu=H200)
    assert explained.choice.source == "tuned" and any(r.preset_id == "m64-d64" for r in explained.runners_up)
    # An explicit spec still comes first, and other lengths are another key.
    assert select.select(problem, H200, "m64-d64").source == "explicit"
    assert select.select(dataclasses.replace(problem, seqlen_q=4000), H200).source == "preset"
    assert select.select(dataclasses.replace(problem, density_bucket=5), H200).source == "preset"


def test_a_users_file_comes_before_a_tuned_record(case, few, own_records, monkeypatch, tmp_path):
    *tensors, problem = case
    fg.autotune(*tensors, gpu=H200, timer=Clock(2e-3, 1e-3, 3e-3), rounds=1)
    shutil.copy(presets.CONFIG_DIR / "h200.yaml", tmp_path / "mine.yaml")
    monkeypatch.setenv("FGATTN_CONFIG", str(tmp_path / "mine.yaml"))
    assert select.select(problem, H200).source == "user"


def test_a_tie_keeps_the_preset(case, few, own_records):
    result = fg.autotune(*case[:-1], gpu=H200, timer=Clock(1e-3, 0.995e-3, 3e-3), rounds=1)
    assert result.winner is result.baseline


def test_a_wrong_candidate_is_rejected_however_fast_it_is(case, few, own_records):
    """Tile 96's kernel multiplies by the row sum instead of dividing: nothing faults, no row is poisoned."""

    def plant(name, ptx):
        return ptx.replace("rcp.approx.ftz.f32", "abs.f32") if "n96" in name and "ref" in name else ptx

    compiler.forget()
    with emulator.session(checks="none", edit_ptx=plant, ctas_per_sm=2):
        clock = Clock(2e-3, 1e-3, 3e-3)
        result = fg.autotune(*case[:-1], gpu=H200, timer=clock, rounds=1)
    wrong = next(c for c in result.candidates if c.spec.tile_n == 96)
    assert wrong.rejected.startswith("wrong: differs") and wrong.timing is None
    assert clock.calls == 2 and result.winner.spec.tile_n == 128
    assert any((c["rejected"] or "").startswith("wrong") for c in result.record["candidates"])


def test_a_candidate_that_does_not_compile_or_run_is_only_out(case, few, own_records, monkeypatch):
    broken = few[1]
    monkeypatch.setattr(
        workers,
        "compile_all",
        lambda specs, processes=None: [
            workers.Outcome(s, "ptxas died" if s == broken else None, 0.0, {}) for s in specs
        ],
    )
    result = fg.autotune(*case[:-1], gpu=H200, timer=Clock(2e-3, 1e-3, 3e-3), rounds=1)
    assert next(c for c in result.candidates if c.spec == broken).rejected == "does not compile: ptxas died"


def test_without_a_gpu_the_model_decides_and_nothing_is_recorded(case, own_records):
    result = fg.autotune(*case[:-1], gpu=H200)
    assert not result.measured and result.path is None and not own_records.exists()
    assert result.winner.timing is None and result.winner.predicted_ms > 0
    prices = [c.predicted_ms for c in result.candidates if c.rejected is None]
    assert prices == sorted(prices)
    json.dumps(result.as_dict())


def test_not_while_tracing(case, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedError, match="call it once before"):
        fg.autotune(*case[:-1])


def test_differences():
    out, lse = torch.randn(1, 4, 1, 8), torch.tensor([[[0.0, 1.0, -torch.inf, 2.0]]])
    assert tuner._difference((out, lse), (out, lse)) is None
    assert tuner._difference((out * 1.005, lse), (out, lse)) is None
    assert "wrong" in tuner._difference((out * 1.02, lse), (out, lse))
    assert "wrong" in tuner._difference((out, lse + 0.01), (out, lse))
    assert "empty" in tuner._difference((out, torch.zeros_like(lse)), (out, lse))
    assert "wrong" in tuner._difference((out * torch.nan, lse), (out, lse))


# ---- records --------------------------------------------------------------------------------------------------------
def stored(problem, spec):
    candidate = tuner.Candidate(spec, "m64-d64", timing={"median_ms": 1.0}).as_dict()
    record = {"format": tuned.FORMAT, "key": tuned.key_of(problem, H200), "created": "2026-01-01T00:00:00Z"}
    return {**record, "winner": candidate, "baseline": candidate, "candidates": [candidate]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "{",
        lambda r: "[]",
        lambda r: json.dumps({**r, "format": 99}),
        lambda r: json.dumps({**r, "key": {**r["key"], "sms": 7}}),
        lambda r: json.dumps({**r, "winner": {"spec": {"head_dim": D, "tile_m": 65}}}),
        lambda r: json.dumps({**r, "winner": {"spec": {"head_dim": D, "colour": "red"}}}),
        lambda r: json.dumps({**r, "winner": {"spec": {"head_dim": 128}}}),
    ],
)
def test_damaged_records_are_ignored_with_a_warning(case, own_records, damage, caplog):
    problem = case[-1]
    spec = presets.builtin("h200").get("m64-d64").spec(dtype="bf16", head_dim=D)
    path = tuned.store(stored(problem, spec))
    assert tuned.find(problem, H200)[0] == spec
    path.write_text(damage(json.loads(path.read_text())))
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert tuned.find(problem, H200) is None
    assert "damaged tuning record" in caplog.text
    assert select.select(problem, H200).source == "preset"


def test_a_record_serves_every_segment_of_its_key_only(case, own_records, monkeypatch):
    problem = case[-1]
    tuned.store(stored(problem, FwdSpec(head_dim=D, tile_m=64, tile_n=64)))
    assert tuned.find(dataclasses.replace(problem, slice_n=2), H200) is None
    assert tuned.find(problem, dataclasses.replace(H200, sms=100)) is None
    monkeypatch.setenv("FGATTN_CACHE", "off")
    assert tuned.find(problem, H200) is None


def test_two_processes_leave_one_whole_record(tmp_path):
    """Both write the same key many times; a third reads all the while and never sees half a record."""
    writer = (
        "import json, sys; from fgattn_cute import tuned; record = json.loads(sys.stdin.read());"
        "[tuned.store({**record, 'turn': i}) for i in range(50)]"
    )
    problem = Problem.of(
        *(torch.empty(1, 64, 1, D, dtype=torch.bfloat16),) * 3,
        fg.SliceMask.empty(slice_m=64, slice_n=1, seqlen_q=64, seqlen_k=64),
    )
    record = stored(problem, FwdSpec(head_dim=D, tile_m=64, tile_n=64))
    environment = {**os.environ, "FGATTN_CACHE_DIR": str(tmp_path), "FGATTN_CACHE": "on"}
    root = str(presets.CONFIG_DIR.parent.parent)
    writers = [
        subprocess.Popen([sys.executable, "-c", writer], stdin=subprocess.PIPE, env=environment, cwd=root, text=True)
        for _ in range(2)
    ]
    for process in writers:
        process.stdin.write(json.dumps(record))
        process.stdin.close()
    path = tmp_path / "tuned" / tuned.path_of(record["key"]).name
    while any(process.poll() is None for process in writers):
        if path.exists():
            assert json.loads(path.read_text())["winner"] == record["winner"]
    assert [process.returncode for process in writers] == [0, 0]
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


# ---- preset files ---------------------------------------------------------------------------------------------------
def measured_record(problem, spec):
    record = stored(problem, spec)
    record["winner"]["packed_tflops"] = 512.34
    return {**record, "measured": True, "problem": "S=200", "density": 0.6, "gpu": {"name": "NVIDIA H200"}}


def test_write_changes_one_entry_and_keeps_the_comments(case, tmp_path):
    path = tmp_path / "h200.yaml"
    shutil.copy(presets.CONFIG_DIR / "h200.yaml", path)
    before = path.read_text()
    winner = dataclasses.replace(
        presets.load(path).get("m192-d64").spec(dtype="bf16", head_dim=D), tile_n=112, ping_pong=False
    )
    assert preset_edit.write(path, "m192-d64", measured_record(case[-1], winner))
    after = presets.load(path)
    changed = after.get("m192-d64")
    assert changed.spec(dtype="bf16", head_dim=D) == winner
    assert changed.measured.tflops == 512.3 and changed.provenance == "measured"
    # Every comment is still there, and every other entry is what it was.
    comments = [line for line in before.splitlines() if "#" in line]
    assert [line for line in path.read_text().splitlines() if "#" in line] == comments
    for preset in presets.load(presets.CONFIG_DIR / "h200.yaml").presets:
        if preset.id != "m192-d64":
            assert after.get(preset.id).fields == preset.fields
            assert after.get(preset.id).measured == preset.measured
    assert not preset_edit.write(path, "m192-d64", measured_record(case[-1], winner)), "nothing more to change"


def test_write_adds_what_the_entry_did_not_name(case, tmp_path):
    path = tmp_path / "h200.yaml"
    shutil.copy(presets.CONFIG_DIR / "h200.yaml", path)
    spec = presets.load(path).get("m128-d64").spec(dtype="bf16", head_dim=D)
    winner = dataclasses.replace(spec, scale_reference="per_tile", proxy_fence="consumer")
    preset_edit.write(path, "m128-d64", measured_record(case[-1], winner))
    assert presets.load(path).get("m128-d64").spec(dtype="bf16", head_dim=D) == winner


def test_write_refuses_and_leaves_the_file(case, tmp_path):
    path = tmp_path / "h200.yaml"
    shutil.copy(presets.CONFIG_DIR / "h200.yaml", path)
    before = path.read_text()
    spec = presets.load(path).get("m64-d64").spec(dtype="bf16", head_dim=D)
    with pytest.raises(PresetError, match="nothing was measured"):
        preset_edit.write(path, "m64-d64", {**measured_record(case[-1], spec), "measured": False})
    with pytest.raises(PresetError, match="no preset 'm65'"):
        preset_edit.write(path, "m65", measured_record(case[-1], spec))
    with pytest.raises(PresetError):  # a tile that the registers cannot hold
        preset_edit.write(path, "m64-d64", measured_record(case[-1], dataclasses.replace(spec, tile_n=250)))
    assert path.read_text() == before


# ---- timing ---------------------------------------------------------------------------------------------------------
def test_samples():
    samples = Samples(tuple(x * 1e-3 for x in (5, 1, 2, 3, 4, 100)))
    assert samples.median == 3.5e-3
    assert samples.as_dict() == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "samples": 6}


def test_rotation_gives_everyone_every_place():
    assert rotation(3, 4) == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
