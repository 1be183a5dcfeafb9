# SPDX-License-Identifier: Apache-2.0
"""Kernels that were compiled elsewhere: found, loaded, and refused with the reason where they do not fit."""

import json
import logging
import subprocess
import sys
import time

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import cache, prebuilt, presets
from fgattn_cute import compile as compiler
from fgattn_cute.errors import InputError
from fgattn_cute.kernels.spec import FwdSpec

SPEC = FwdSpec(head_dim=128)
ARTIFACT = cache.Artifact(b"object code", ".version 8.8", {"registers": 168})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and a folder with one made-up prebuilt kernel."""
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "cache"))
    where = tmp_path / "prebuilt"
    where.mkdir(mode=0o755)
    monkeypatch.setenv("FGATTN_PREBUILT_DIR", str(where))
    cache.write_entry(where, SPEC, ARTIFACT)
    return where


def record_of(folder):
    (path,) = folder.glob("*.json")
    return path, json.loads(path.read_text())


def test_it_serves_where_the_cache_has_none(folder):
    assert cache.load(SPEC) == ARTIFACT
    cache.publish(SPEC, cache.Artifact(b"newer", "", {}))
    assert cache.load(SPEC).object_file == b"newer"
    assert cache.load(FwdSpec(head_dim=64)) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r["versions"].update({"nvidia-cutlass-dsl": "3.0"}), "made with nvidia-cutlass-dsl 3.0, here is"),
        (lambda r: r["versions"].update(python="2.7"), "made with python 2.7"),
        (lambda r: r["versions"].update(arch="sm_100a"), "made with arch sm_100a, here is sm_90a"),
        (lambda r: r.update(fingerprint="0"), "other kernel sources"),
    ],
)
def test_stale_and_foreign_entries_are_refused_with_the_reason(folder, change, reason, caplog):
    path, record = record_of(folder)
    change(record)
    # Another installation's entry has another key, and so another name.
    for suffix in (".o", ".ptx", ".json"):
        old = path.with_suffix(suffix)
        old.rename(old.with_name(f"{SPEC.name}-000000000000{suffix}"))
    renamed = folder / f"{SPEC.name}-000000000000.json"
    renamed.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert cache.load(SPEC) is None
    assert "is refused" in caplog.text and reason in caplog.text
    assert reason in prebuilt.refusal(renamed)


def test_damage_is_refused(folder, caplog):
    path, _ = record_of(folder)
    path.with_suffix(".o").write_bytes(b"something else")
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert cache.load(SPEC) is None
    assert "object file is not the recorded one" in caplog.text
    assert "damaged" in prebuilt.refusal(path)
    path.write_text("[]")
    assert "damaged" in prebuilt.refusal(path)


def test_a_folder_that_others_can_write_is_not_trusted(folder, caplog):
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert cache.load(SPEC) is None
    assert "others can write" in caplog.text


def test_a_folder_that_is_missing(monkeypatch):
    monkeypatch.setenv("FGATTN_PREBUILT_DIR", "/nowhere/at/all")
    with pytest.raises(InputError, match="FGATTN_PREBUILT_DIR"):
        prebuilt.load(SPEC)


def test_specs_are_every_kernel_that_a_call_launches():
    specs = prebuilt.specs_of("h200", (1, 8))
    assert len(specs) == len(set(specs))
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            assert spec in specs
            assert spec.softmax != "fixed_ref" or spec.redo_spec() in specs
    assert {spec.slice_n for spec in specs} == {1, 8}
    assert {s.head_dim for s in prebuilt.specs_of("h200", head_dims=[64])} == {64}


def test_a_built_folder_runs_in_a_process_without_a_cache(tmp_path, monkeypatch):
    """Build one real kernel, then load it with an empty cache and a compiler that must not be called."""
    spec = next(s for s in prebuilt.specs_of("h200", dtypes=["bf16"], head_dims=[64]) if s.softmax == "exact")
    compiler.artifact(spec)  # shared with other tests, so that the worker finds it
    where = tmp_path / "prebuilt"
    (outcome,) = prebuilt.build(where, [spec], processes=1)
    assert outcome.error is None and len(list(where.iterdir())) == 3
    monkeypatch.setenv("FGATTN_PREBUILT_DIR", str(where))
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(compiler, "build", lambda spec: pytest.fail("compiled"))
    compiler.forget()
    compiler._import_dsl()
    started = time.perf_counter()
    loaded = compiler.get(spec)
    assert time.perf_counter() - started < 1.0  # milliseconds on an idle machine
    assert loaded.source == "disk" and callable(loaded.call)
    compiler.forget()


def test_the_worker_sees_the_folder_too(folder):
    """FGATTN_PREBUILT_DIR is an ordinary variable: another process obeys it as well."""
    probe = (
        "from fgattn_cute import cache; from fgattn_cute.kernels.spec import FwdSpec;"
        "print(cache.load(FwdSpec(head_dim=128)).object_file.decode())"
    )
    root = presets.CONFIG_DIR.parent.parent
    done = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "object code"


# ---- fgattn bench's two halves --------------------------------------------------------------------------------------
def test_bench_checks_before_it_times(monkeypatch):
    from fgattn_cute import bench, gpu
    from fgattn_cute.timing import Samples

    q, k, v = (torch.randn(1, 150, 1, 64).bfloat16() for _ in range(3))
    keep = torch.rand(1, 1, 3, 150) < 0.5
    plan = fg.Plan.from_mask(fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=150, seqlen_k=150))
    timer = lambda calls, rounds: [Samples((2e-3,) * rounds), Samples((6e-3,) * rounds)]
    result = bench.measure(q, k, v, plan, rounds=4, timer=timer, gpu=gpu.from_config("h200"))
    assert result.measured and result.speed_up == pytest.approx(3)
    assert result.packed_tflops == pytest.approx(4 * 64 * 150 * 150 * plan.density / 2e-3 / 1e12)
    monkeypatch.setattr(bench.api, "attention", lambda q, k, v, plan: 2 * q)
    with pytest.raises(AssertionError, match="differs from dense"):
        bench.measure(q, k, v, plan, rounds=4, timer=timer, gpu=gpu.from_config("h200"))
