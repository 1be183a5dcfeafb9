# SPDX-License-Identifier: Apache-2.0
"""The error family and the layout of a refusal."""

import pytest

from fgattn_cute import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InputError", ValueError),
        ("PlanError", ValueError),
        ("MaskError", ValueError),
        ("PresetError", ValueError),
        ("UnsupportedError", NotImplementedError),
        ("DeviceError", RuntimeError),
        ("CompileError", RuntimeError),
    ],
)
def test_every_error_is_also_the_builtin(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.FgAttnError) and issubclass(kind, builtin)


def test_preset_error_says_where():
    error = errors.PresetError("unknown key", file="h200.yaml", line=12, key="presets[0].tile_o")
    assert str(error) == "h200.yaml:12: presets[0].tile_o: unknown key"
    assert (error.file, error.line, error.key) == ("h200.yaml", 12, "presets[0].tile_o")
    assert str(errors.PresetError("empty", file="a.yaml")) == "a.yaml: empty"
    assert str(errors.PresetError("empty")) == "empty"


def test_refusal_layout():
    text = errors.refusal("cannot run", ["q (1, 2)", "k (3,)"], ["too small", "too old"], "something else")
    assert text.splitlines() == [
        "cannot run",
        "  q (1, 2) | k (3,)",
        "  - too small",
        "  - too old",
        "  nearest thing that works: something else",
    ]
    assert errors.refusal("no", [], ["why"]).splitlines() == ["no", "  - why"]


def test_describe_tensor():
    torch = pytest.importorskip("torch")
    assert errors.describe_tensor("q", torch.zeros(2, 3, dtype=torch.bfloat16)) == "q (2, 3) bfloat16 cpu"
    assert errors.describe_tensor("q", None) == "q NoneType"
