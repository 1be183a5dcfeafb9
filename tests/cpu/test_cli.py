# SPDX-License-Identifier: Apache-2.0
"""The command line as a person and as a script meet it: text, JSON, exit codes, messages."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def fgattn(*arguments, **environment) -> Done:
    """The console script's entry point, in this process: a new one would spend its time importing torch."""
    from fgattn_cute.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["fgattn", *map(str, arguments)]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def fgattn_process(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fgattn_cute.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_a_command_it_lists_them():
    done = fgattn()
    assert "Usage" in done.stdout + done.stderr
    for command in ("bench", "compile", "demo", "doctor", "explain", "presets", "cache", "mask", "tune"):
        assert command in done.stdout + done.stderr


def test_doctor_tells_versions_and_backends():
    import torch

    text, data = fgattn("doctor"), json.loads(fgattn("doctor", "--json").stdout)
    assert text.returncode == 0
    assert torch.__version__.split("+")[0] in text.stdout
    assert data["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(data["backends"]) == {"cuda", "emulator", "reference"}
    assert data["backends"]["reference"] is None
    assert (data["backends"]["cuda"] is None) == (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    )


def test_doctor_without_compiler_or_gpu_says_so_and_exits_with_1(tmp_path):
    done = fgattn_process("doctor", "--json", CC="no-such-compiler", CUDA_VISIBLE_DEVICES="")
    data = json.loads(done.stdout)
    assert done.returncode == 1
    assert "no-such-compiler" in data["backends"]["emulator"]
    assert "GPU" in data["backends"]["cuda"] or "CUDA" in data["backends"]["cuda"]


def test_presets_list_names_every_file():
    listed = json.loads(fgattn("presets", "list", "--json").stdout)
    assert sorted({preset["file"].removeprefix("configs/").removesuffix(".yaml") for preset in listed}) == STEMS
    text = fgattn("presets", "list", "--gpu", "h200").stdout
    shown = [preset for preset in listed if preset["file"] == "configs/h200.yaml"]
    assert all(preset["id"] in text for preset in shown)
    assert "configs/h20.yaml" not in text


def test_presets_show_gives_the_budgets_of_each_kernel():
    first = json.loads(fgattn("presets", "list", "--gpu", "h200", "--json").stdout)[0]
    shown = json.loads(fgattn("presets", "show", first["id"], "--gpu", "h200", "--json").stdout)
    assert shown["tile_m"] == first["tile_m"]
    assert shown["kernels"]
    for kernel in shown["kernels"]:
        assert 0 < kernel["smem_bytes"] <= 232_448
        assert kernel["register_estimate"] <= kernel["consumer_registers"]
        assert kernel["reasons"] == []
    assert first["id"] in fgattn("presets", "show", first["id"], "--gpu", "h200").stdout


def test_an_unknown_preset_is_refused_with_the_legal_ones():
    done = fgattn("presets", "show", "m999", "--gpu", "h200")
    assert done.returncode == 1
    assert "PresetError" in done.stderr and "m999" in done.stderr and "fallback" in done.stderr
    assert "Traceback" not in done.stderr


def test_presets_validate_finds_the_line_of_a_typo(tmp_path):
    assert fgattn("presets", "validate").returncode == 0
    text = (ROOT / "configs/sm90.yaml").read_text()
    line = next(i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith("stages:"))
    wrong = tmp_path / "mine.yaml"
    wrong.write_text(text.replace("    stages:", "    stagse:", 1))
    done = fgattn("presets", "validate", wrong, "--json")
    assert done.returncode == 1
    (verdict,) = json.loads(done.stdout)
    assert "stagse" in verdict["error"] and f"mine.yaml:{line}" in verdict["error"] and "stages" in verdict["error"]


def test_explain_follows_slice_m_and_the_gpu_file():
    flagship = json.loads(fgattn("explain", "--slice-m", 192, "--gpu", "h200", "--density", 0.25, "--json").stdout)
    choice = flagship["choice"]
    assert choice["preset"] == "m192-d128" and "configs/h200.yaml" in choice["why"]
    assert choice["preset"] not in {other["preset"] for other in flagship["runners_up"]}
    assert flagship["packed_flops"] == flagship["effective_flops"] / 4 == 12 * 128 * 32760**2
    fp16 = json.loads(fgattn("explain", "--slice-m", 128, "--dtype", "fp16", "--gpu", "sm90", "--json").stdout)
    assert fp16["choice"]["spec"]["softmax"] == "exact", "fp16 has no fixed_ref kernel"
    text = fgattn("explain", "--slice-m", 192, "--gpu", "h200").stdout
    assert choice["kernel"] in text and choice["why"] in text


def test_explain_refuses_what_cannot_run_with_reasons():
    done = fgattn("explain", "--head-dim", 80)
    assert done.returncode == 1
    assert "head_dim 80" in done.stderr and "64" in done.stderr and "Traceback" not in done.stderr
    assert fgattn("explain", "--dtype", "fp8").returncode == 2


def test_cache_info_prune_and_clear(tmp_path):
    """On a cache with two entries: one of these sources, one of others."""
    from fgattn_cute import cache
    from fgattn_cute.kernels.spec import FwdSpec

    folder = tmp_path / "kernels"
    folder.mkdir()
    for stem, fingerprint in (("current", cache.fingerprint()), ("old", "0" * 64)):
        record = {"name": FwdSpec(head_dim=64).name, "fingerprint": fingerprint, "created": "2026-01-01T00:00:00Z"}
        for suffix, data in ((".o", b"x" * 1000), (".ptx", b"y" * 500), (".json", json.dumps(record).encode())):
            (folder / f"{stem}{suffix}").write_bytes(data)
    place = {"FGATTN_CACHE_DIR": str(tmp_path)}
    info = json.loads(fgattn("cache", "info", "--json", **place).stdout)
    assert (info["entries"], info["stale"], info["folder"]) == (2, 1, str(folder))
    assert info["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert "old" in fgattn("cache", "info", **place).stdout
    assert json.loads(fgattn("cache", "prune", "--json", **place).stdout) == {"removed": 1}
    assert not (folder / "old.o").exists() and (folder / "current.o").exists()
    assert fgattn("cache", "clear", **place).stdout == "removed 1 kernels\n"
    assert not list(folder.iterdir())


# ---- masks ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def mask_file(tmp_path):
    import torch

    pytest.importorskip("safetensors")
    from fgattn_cute import Plan, SliceMask

    keep = torch.arange(30).view(1, 1, 3, 10) % 3 == 0
    mask = SliceMask.from_dense(keep, slice_m=16, slice_n=4, seqlen_q=48, seqlen_k=40)
    mask.save(tmp_path / "mask.safetensors")
    Plan.from_mask(mask).save(tmp_path / "plan.safetensors")
    return tmp_path / "mask.safetensors"


def test_mask_stats_of_a_mask_and_of_its_plan(mask_file):
    facts = json.loads(fgattn("mask", "stats", mask_file, "--json").stdout)
    assert facts["density"] == pytest.approx(1 / 3) and facts["slices"] == "16 x 4" and facts["bytes_as_bits"] == 12
    assert json.loads(fgattn("mask", "stats", mask_file.with_name("plan.safetensors"), "--json").stdout) == facts
    text = fgattn("mask", "stats", mask_file).stdout
    assert "density             0.3333" in text


def test_mask_plot_writes_a_picture(mask_file):
    pytest.importorskip("matplotlib")
    done = fgattn("mask", "plot", mask_file)
    assert done.returncode == 0 and mask_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert fgattn("mask", "plot", mask_file, "--head", "0", "--out", mask_file.with_name("a.svg")).returncode == 0
    assert b"<svg" in mask_file.with_name("a.svg").read_bytes()


def test_mask_commands_refuse_other_files(tmp_path):
    (tmp_path / "noise").write_text("no tensors here")
    done = fgattn("mask", "stats", tmp_path / "noise")
    assert done.returncode == 1 and "MaskError" in done.stderr and "is not a safetensors file" in done.stderr
    assert fgattn("mask", "stats", tmp_path / "absent").returncode == 2


# ---- kernels: tune, compile, bench ----------------------------------------------------------------------------------
def test_tune_without_a_hopper_ranks_by_the_model_and_says_so():
    arguments = ("tune", "--gpu", "h200", "--slice-m", 192, "--seqlen", 4096, "--heads", 2)
    data = json.loads(fgattn(*arguments, "--json").stdout)
    assert data["measured"] is False and data["path"] is None
    priced = [c["predicted_ms"] for c in data["candidates"] if c["rejected"] is None]
    assert len(priced) > 20 and priced == sorted(priced)
    assert all(c["timing"] is None for c in data["candidates"])
    text = fgattn(*arguments).stdout
    assert "NOT measured" in text and data["winner"]["kernel"] in text


def test_tune_does_not_write_what_was_not_measured(tmp_path):
    path = tmp_path / "h200.yaml"
    path.write_text((ROOT / "configs/h200.yaml").read_text())
    done = fgattn("tune", "--gpu", "h200", "--seqlen", 1024, "--write", path)
    assert done.returncode == 1 and "nothing was measured" in done.stderr
    assert path.read_text() == (ROOT / "configs/h200.yaml").read_text()


def test_bench_without_a_hopper_says_that_it_expects():
    data = json.loads(fgattn("bench", "--gpu", "h200", "--json").stdout)
    assert data["measured"] is False and 3 < data["speed_up"] < 3.6
    assert "False" in fgattn("bench", "--gpu", "h200").stdout
    assert fgattn("bench", "--gpu", "h2000").returncode == 1
    assert fgattn("bench", "--gpu", "h200", "--dtype", "fp8").returncode == 2


def test_compile_reports_each_kernel_and_checks_a_folder(tmp_path, monkeypatch):
    from fgattn_cute import cache, workers

    def pretend(specs, processes=None, on_done=None):
        for spec in specs[1:]:
            cache.publish(spec, cache.Artifact(b"code", "ptx", {}, b"linked"))
        return [workers.Outcome(s, "ptxas died" if i == 0 else None, 0.1, {}) for i, s in enumerate(specs)]

    monkeypatch.setattr(workers, "compile_all", pretend)
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "out"
    done = fgattn("compile", "--gpu", "h200", "--head-dim", 256, "--dtype", "bf16", "--out", out, "--json")
    data = json.loads(done.stdout)
    assert done.returncode == 1 and data["failed"] == 1 and data["compiled"] == len(data["kernels"]) - 1 > 1
    assert data["loaded_without_the_dsl"] == data["compiled"]
    assert len(list(out.glob("*.o"))) == data["compiled"]
    assert fgattn("compile", "--out", out, "--check").returncode == 0
    next(out.glob("*.o")).write_bytes(b"x")
    checked = fgattn("compile", "--out", out, "--check", "--json")
    assert checked.returncode == 1
    assert sum(v["refused"] is not None for v in json.loads(checked.stdout)) == 1
    assert fgattn("compile", "--check").returncode == 2
    assert fgattn("compile", "--gpu", "h200", "--head-dim", 80).returncode == 2
