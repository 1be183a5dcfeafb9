# SPDX-License-Identifier: Apache-2.0
"""Kernels that were compiled elsewhere: found, loaded, and refused with the reason where they do not fit."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import cache, loading, prebuilt, presets
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
        (lambda r: r["versions"].update({"nvidia-cutlass-dsl-libs-cu99": "4"}), "libs-cu99 4, here is (none)"),
        (lambda r: r["versions"].update({"apache-tvm-ffi": "0.0"}), "made with apache-tvm-ffi 0.0, here is"),
        (lambda r: r["versions"].update(arch="sm_100a"), "made with arch sm_100a, here is sm_90a"),
        (lambda r: r["versions"].update(cpu="riscv64"), "made with cpu riscv64, here is"),
        (lambda r: r.update(sources="0"), "other kernel sources"),
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


def test_another_python_and_a_missing_compiler_do_not_matter(folder, monkeypatch):
    """Neither leaves a trace in the code: a bundle for Python 3.12 may be made by 3.11, and needs no compiler."""
    (path,) = folder.glob("*.json")
    loading_only = {k: v for k, v in cache.versions().items() if k not in prebuilt.COMPILER} | {"python": "2.7"}
    assert "apache-tvm-ffi" in loading_only and any("-libs-cu" in name for name in loading_only)
    monkeypatch.setattr(cache, "versions", lambda: loading_only)
    cache.fingerprint.cache_clear()
    try:
        assert cache.stem_of(SPEC) != path.stem  # its name is another's, and it serves
        assert cache.load(SPEC) == ARTIFACT
    finally:
        cache.fingerprint.cache_clear()


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
    specs = prebuilt.specs_of("h200", (1, 8, 64))
    assert len(specs) == len(set(specs))
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            assert spec in specs
            assert spec.softmax != "fixed_ref" or spec.redo_spec() in specs
            facts = {"dtype": spec.dtype, "head_dim": spec.head_dim}
            for grouped, even in ((True, False), (False, True), (True, True)):
                assert preset.spec(**facts, grouped=grouped, even=even) in specs or spec.slice_n > 1
    assert {spec.slice_n for spec in specs} == {1, 8, 64}
    assert {s.head_dim for s in prebuilt.specs_of("h200", head_dims=[64])} == {64}


def test_kernels_without_a_preset_are_built_too(tmp_path):
    """What turns masks into lists, and the micro-benchmarks, so that a bare machine lacks nothing."""
    wanted = prebuilt.helpers()
    assert {spec.name for spec in wanted} >= {"compact_count", "compact_write", "copy_tma_r64s4", "copy_cp_async_r64s3"}
    (outcome,) = prebuilt.build(tmp_path, wanted[:1], processes=1)
    assert outcome.error is None
    (path,) = tmp_path.glob("compact_count-*.json")
    assert prebuilt.refusal(path) is None


def test_a_built_folder_runs_without_a_compiler(tmp_path, monkeypatch):
    """Build one real kernel, then load it in a fresh process where the DSL cannot be imported."""
    spec = next(s for s in prebuilt.specs_of("h200", dtypes=["bf16"], head_dims=[64]) if s.softmax == "exact")
    compiler.artifact(spec)  # shared with other tests, so that the worker finds it
    where = tmp_path / "prebuilt"
    (outcome,) = prebuilt.build(where, [spec], processes=1)
    assert outcome.error is None and len(list(where.iterdir())) == 4
    monkeypatch.setenv("FGATTN_PREBUILT_DIR", str(where))
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "empty"))
    code = f"""
import sys; sys.modules["cutlass"] = None
import time, torch, tvm_ffi  # any call of a kernel needs these two
from fgattn_cute import compile as compiler
from fgattn_cute.kernels.spec import FwdSpec
started = time.perf_counter()
found = compiler.get({spec!r})
print(time.perf_counter() - started, found.source, sys.modules["cutlass"])
found.call(1)
"""
    root = presets.CONFIG_DIR.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    seconds, *rest = done.stdout.split()
    assert rest == ["disk", "None"], done.stderr
    assert float(seconds) < 0.5  # 7 ms on an idle machine
    assert "mQ: Tensor([n0, n1, n2, 64], bfloat16)" in done.stderr  # TVM-FFI's own check of the arguments


def test_what_cannot_be_linked_or_loaded_goes_through_the_dsl(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fgattn_cute")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert loading.link(b"") is None and "no C compiler" in caplog.text
    monkeypatch.setenv("CC", "cc")
    assert loading.link(b"not an object file") is None and "is not linked" in caplog.text
    monkeypatch.setattr(loading, "RUNTIME", "libno_such_runtime.so")
    loading.runtime_library.cache_clear()
    assert loading.link(b"") is None and "libno_such_runtime.so cannot be found" in caplog.text
    loading.runtime_library.cache_clear()
    monkeypatch.setattr(loading, "RUNTIME", "librt.so")
    monkeypatch.setenv("CUTE_DSL_LIBS", os.pathsep.join(["/a/libshim.so", "/b/librt.so"]))
    assert str(loading.runtime_library()) == "/b/librt.so"
    loading.runtime_library.cache_clear()
    monkeypatch.undo()
    spec = next(s for s in prebuilt.specs_of("h200", dtypes=["bf16"], head_dims=[64]) if s.softmax == "exact")
    damaged = dataclasses.replace(compiler.artifact(spec), library=b"not a library")
    # What the DSL hands out does not matter, and a process that has loaded a real kernel cannot emulate one any more.
    loaded = types.SimpleNamespace(**{spec.name: "by the DSL"})
    monkeypatch.setattr(compiler._import_dsl().runtime, "load_module", lambda path, enable_tvm_ffi: loaded)
    assert compiler._load(spec, damaged, emulated=False) == "by the DSL"
    assert "its library cannot be loaded" in caplog.text


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


def test_unions_of_a_presets_kernels():
    """Blocks of 16 and 32 fill 128 rows 8 and 4 at a time, 64 does 2; 64 rows are not shared, and each has a packer.
    What select takes for unions in halves is among them."""
    from fgattn_cute.gpu import from_config
    from fgattn_cute.select import select
    from perf.roofline import problem

    specs = [s for s in prebuilt.specs_of("h200", dtypes=["bf16"], head_dims=[128]) if s.tile_m < 192]
    found = prebuilt.unions_of(specs)
    kernels = [s for s in found if isinstance(s, FwdSpec)]
    assert {(s.tile_m, s.union_blocks) for s in kernels} == {(128, 8), (128, 4), (128, 2)}
    assert {s.union_blocks for s in found if not isinstance(s, FwdSpec)} == {8, 4, 2}
    assert {s.redo_spec() for s in kernels if s.softmax == "fixed_ref"} <= set(kernels)
    assert all(not s.reasons() for s in found)
    asked = dataclasses.replace(problem(4096, 8, 128, 16), union_blocks=8, union_lists="halves")
    assert select(asked, from_config("h200")).spec in kernels
    assert {f"half_lists_{step}_u{n}" for step in ("measure", "write") for n in (2, 4, 8)} <= {s.name for s in found}


def test_lists_in_parts_of_a_presets_kernels():
    """Three blocks of 64 fill 192 rows, for single keys only; what select takes for such a plan is among them."""
    from fgattn_cute.gpu import from_config
    from fgattn_cute.select import select
    from perf.roofline import problem

    specs = prebuilt.specs_of("h200", (1, 64), dtypes=["bf16"], head_dims=[128])
    found = prebuilt.unions_of(specs)
    assert {"part_lists_measure", "part_lists_write"} <= {s.name for s in found}, "what makes such plans"
    found = [s for s in found if isinstance(s, FwdSpec) and s.parts]
    asked = dataclasses.replace(problem(4096, 8, 128, 64), union_blocks=3, union_lists="parts")
    taken = select(asked, from_config("h200")).spec
    assert {taken, taken.redo_spec()} <= set(found)
    assert {(s.tile_m, s.slice_n, s.softmax) for s in found} == {(192, 1, "fixed_ref"), (192, 1, "exact")}
    assert all(not s.reasons() for s in found)
