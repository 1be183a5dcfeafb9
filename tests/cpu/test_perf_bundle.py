# SPDX-License-Identifier: Apache-2.0
"""The bundle for a machine without a network, with pip and the compiler replaced: what it holds, and who finds it."""

import json
import os
import subprocess
import sys

import pytest

from fgattn_cute import cache, prebuilt, workers
from perf import bundle, gpu


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """pip's command lines, and a compiler that fills the cache with made-up kernels but for one."""
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "cache"))
    commands = []
    real = subprocess.run

    def run(command, **options):
        if "pip" not in command:
            return real(command, **options)
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bundle.subprocess, "run", run)

    def pretend(specs, processes=None, on_done=None):
        found = []
        for i, spec in enumerate(dict.fromkeys(specs)):
            cache.publish(spec, cache.Artifact(b"code", "ptx", {}))
            found.append(workers.Outcome(spec, "too hard" if i == 0 else None, 0.1, {}))
        return found

    monkeypatch.setattr(workers, "compile_all", pretend)
    return commands


def test_a_bundle_holds_wheels_kernels_sources_and_three_lines(stubs, tmp_path):
    out = tmp_path / "bundle"
    record = bundle.make(out, "3.12", "h200", lambda said: None)
    (command,) = stubs
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--python-version=3.12" in command and "--only-binary=:all:" in command
    asked = (out / "requirements.txt").read_text().split("\n")[:-1]
    assert command[-len(asked) :] == asked
    for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        assert f"{name}=={cache.versions()[name]}" in asked
    names = {line.split("=")[0].split(">")[0] for line in asked}
    assert names >= {"pydantic", "pyyaml", "typer", "rich", "matplotlib", "pytest"} and "torch" not in names
    lines = (out / "README.txt").read_text().splitlines()
    assert len(lines) == 3 and "--no-index" in lines[0] and "make gpu" in lines[2]
    assert record["kernels"] == len(list((out / "kernels").glob("*.json"))) > 80
    assert list(record["failed"].values()) == ["too hard"]
    assert {"copy_tma_r64s4", "compact_write"} <= {p.name.rpartition("-")[0] for p in (out / "kernels").glob("*.o")}
    assert all(prebuilt.refusal(path) is None for path in (out / "kernels").glob("*.json"))
    with pytest.raises(FileExistsError, match="not empty"):
        bundle.make(out, "3.12", "h200", lambda said: None)


def test_the_copied_sources_find_their_kernels(stubs, tmp_path):
    out = tmp_path / "bundle"
    bundle.copy_sources(out / "source")
    assert (out / "source/fgattn_cute/kernels").is_symlink() and not list(out.rglob("__pycache__"))
    (out / bundle.MARK).write_text("{}")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FGATTN_PREBUILT_DIR")}
    done = subprocess.run(
        [sys.executable, "-m", "perf.gpu", "--dry-run"],
        cwd=out / "source",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert f"compile --check --json --out {out}/kernels" in done.stdout.splitlines()[0], done.stderr
    assert bundle.around(gpu.ROOT) is None


def test_what_pyproject_says_is_read(tmp_path):
    needed = 'dependencies = [\n  "torch>=2.6", # ours\n  "apache-tvm-ffi>=0.1",\n]\n'
    text = needed + 'cli = ["a>=1"]\nperf = ["b", "a>=1"] # x\n'
    pinned = f"apache-tvm-ffi=={cache.versions()['apache-tvm-ffi']}"
    assert bundle.requirements(text) == [pinned, "a>=1", "b", "pytest", "pytest-timeout"]
    assert json.dumps(bundle.requirements((gpu.ROOT / "pyproject.toml").read_text()))
