# SPDX-License-Identifier: Apache-2.0
"""The demo from photograph to picture, at a size of seconds; and the command line around it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage", reason="the demo's photograph comes with scikit-image")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")

from fgattn_cute import demo
from fgattn_cute.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]
SMALL = demo.Size(frames=3, rows=8, columns=12, heads=2)  # 288 tokens: three query blocks, the last one ragged


def test_without_a_hopper_the_gpu_is_refused_and_the_emulator_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.pick_backend("auto") == ("emulator", "this CPU, because torch sees no CUDA device")
    with pytest.raises(DeviceError, match=r"(?s)no CUDA device.*emulator"):
        demo.pick_backend("cuda")


def test_a_missing_package_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(demo, "make_scene", lambda **_: pytest.fail("computed before it refused"))
    with pytest.raises(DeviceError, match=r"needs matplotlib: pip install 'fgattn-cute\[demo\]'"):
        demo.run(tmp_path)


def test_the_whole_demo_on_the_emulator(tmp_path):
    result = demo.run(tmp_path, backend="emulator", size=SMALL)
    assert result.backend == "emulator"
    assert (result.tokens, result.heads, result.head_dim) == (288, 2, 128)
    assert 0.05 < result.density < 0.95
    assert demo.KEPT_MASS - 1e-3 <= result.kept_mass <= 1
    assert 0 < result.error <= result.error_limit
    assert result.lse_error < 1e-3
    assert result.emulated_instructions > 10_000 and result.dense_seconds is None
    assert 1e-4 < result.dense_change < 0.25, "skipping 5 % of the mass must show, and must not ruin the output"
    assert result.preset == "m128-d128" and "slice_m 128" in result.why
    assert result.kernel.startswith("fwd_bf16_d128_m128")
    assert Path(result.picture) == tmp_path / "attention.png"

    from matplotlib.image import imread

    picture = imread(result.picture)
    assert picture.shape[1] == 1200
    assert picture.std() > 0.1, "an empty canvas"


def test_a_wrong_backend_is_a_usage_error(tmp_path):
    command = [sys.executable, "-m", "fgattn_cute.cli", "demo", "--backend", "tpu", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tpu" in done.stderr and "emulator" in done.stderr


def test_demo_as_json(tmp_path, monkeypatch, capsys):
    """The command prints the result's fields; the computation is the test above."""
    fields = dict.fromkeys(demo.Result.__dataclass_fields__, 0.5)
    monkeypatch.setattr(demo, "run", lambda out, **_: demo.Result(**fields))
    from fgattn_cute.cli import app

    app(["demo", "--json", "--out", str(tmp_path)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == fields
