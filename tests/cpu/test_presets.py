# SPDX-License-Identifier: Apache-2.0
"""The shipped YAML files, and what a mistake in one says."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgattn_cute import presets
from fgattn_cute.errors import PresetError
from fgattn_cute.kernels.spec import FwdSpec

STEMS = ("gh200", "h100_pcie", "h100_sxm", "h20", "h200", "sm90")
MINIMAL = """\
schema: 1
gpu:
  names: ["Test GPU"]
  cc: [9, 0]
  sms: {value: 100, source: s}
  l2_bytes: {value: 1024, source: s}
  memory_bytes: {value: 1, source: s}
  memory_gb_per_s: {value: 1, source: s}
  bf16_dense_tflops: {value: 1, source: s}
  boost_mhz: {value: 1, source: s}
  power_w: {value: 1, source: s}
forward:
  - id: only
    when: {}
    tile: {m: 128, n: 64}
    softmax: exact
    provenance: assumed
    measured: {}
"""


def changed(old, new):
    assert MINIMAL.count(old) == 1, old
    return MINIMAL.replace(old, new)


def refusal(text, name="my.yaml"):
    with pytest.raises(PresetError) as caught:
        presets.parse(text, name)
    return caught.value


def test_the_files_the_readme_names_are_there():
    assert presets.builtin_names() == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_each_file_covers_every_supported_problem(stem):
    file = presets.builtin(stem)
    assert file.gpu.cc == (9, 0)
    assert set(file.gpu.sources) == set(file.gpu.constants)
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 96, 128, 256):
            matching = [p for p in file.presets if p.takes(dtype, head_dim, 1)]
            assert len(matching) > 1 and matching[-1].is_fallback
            tiles = {p.fields["tile_m"] for p in matching if p.takes_slice_m(64)}
            assert 64 in tiles, "slice_m 64 has a preset of its own"


@pytest.mark.parametrize("stem", STEMS)
def test_every_preset_can_run_and_so_can_its_redo_pass(stem):
    for preset in presets.builtin(stem).presets:
        for spec in preset.specs():
            assert spec.reasons() == []
            if spec.softmax == "fixed_ref":
                assert spec.dtype == "bf16"
                assert spec.redo_spec().reasons() == []


def test_only_the_h200_claims_measurements():
    for stem in STEMS:
        provenance = {p.provenance for p in presets.builtin(stem).presets}
        assert provenance == ({"measured", "assumed"} if stem == "h200" else {"assumed"})


def test_the_flagship_is_the_measured_one():
    """M = 192, tile 80, 2 stages, ping-pong, fixed reference scaled per tile: the fastest on an H200."""
    flagship = presets.builtin("h200").get("m192-d128")
    assert flagship.spec(dtype="bf16", head_dim=128) == FwdSpec(
        head_dim=128,
        tile_m=192,
        tile_n=80,
        softmax="fixed_ref",
        ping_pong=True,
        scale_reference="per_tile",
        kv_loads="runs",
    )
    assert flagship.measured.tflops == 635.8


def test_schema_json_is_the_generated_one():
    path = presets.CONFIG_DIR / "schema.json"
    assert path.read_text() == presets.json_schema(), "renew it as configs/README.md says"
    models = json.loads(path.read_text())["$defs"]
    assert {"FileModel", "OverlayModel"} <= models.keys()
    assert all(model["additionalProperties"] is False for model in models.values())


def test_gpu_files_are_found_by_device_name():
    assert presets.for_gpu("NVIDIA H200").name == "configs/h200.yaml"
    assert presets.for_gpu("NVIDIA H100 80GB HBM3").name == "configs/h100_sxm.yaml"
    assert presets.for_gpu("NVIDIA H800").name == "configs/sm90.yaml"


def test_minimal_file_is_accepted():
    file = presets.parse(MINIMAL, "my.yaml")
    assert file.gpu.sms == 100
    assert file.get("only").spec(dtype="fp16", head_dim=256).tile_n == 64


@pytest.mark.parametrize(
    "old, new, line, key, words",
    [
        ("    softmax: exact", "    sofmax: exact", 16, "forward[0].sofmax", ["did you mean softmax?", "ping_pong"]),
        ("  cc: [9, 0]", "  cc: [9, 0]\n  sm: 1", 5, "gpu.sm", ["unknown key 'sm'", "l2_bytes"]),
        ("when: {}", "when: {dtype: [bf16, fp8]}", 14, "forward[0].when.dtype[1]", ["'fp8'", "bf16"]),
        ("when: {}", "when: {slice_m: {multiple: 2}}", 14, "forward[0].when.slice_m.multiple", ["multiple_of"]),
        ("when: {}", "when: {head_dim: [128]}", 14, "forward[0].when", ["fallback"]),
        ("{m: 128, n: 64}", "{m: 128}", 15, "forward[0].tile.n", ["missing"]),
        ("{m: 128, n: 64}", "{m: 128, n: sixty}", 15, "forward[0].tile.n", ["integer", "sixty"]),
        ("{m: 128, n: 64}", "{m: 192, n: 64}", 13, "forward[0].id", ["only cannot run with bf16, head_dim 256"]),
        ("schema: 1", "schema: 2", 1, "schema", ["reads 1"]),
        ("provenance: assumed", "provenance: measured", 17, "forward[0].provenance", ["tflops is None"]),
        ("  cc: [9, 0]", "  cc: [9, 0]\n  cc: [9, 0]", 5, "gpu.cc", ["given twice", "line 4"]),
        ("{value: 100, source: s}", "{value: 100}", 5, "gpu.sms.source", ["missing"]),
    ],
)
def test_a_mistake_names_file_line_key_and_what_is_legal(old, new, line, key, words):
    error = refusal(changed(old, new))
    assert (error.file, error.line, error.key) == ("my.yaml", line, key)
    assert str(error).startswith(f"my.yaml:{line}: {key}: ")
    for word in words:
        assert word in str(error)


def test_a_kernel_that_cannot_run_quotes_the_spec():
    error = refusal(changed("    softmax: exact", "    softmax: exact\n    ctas_per_sm: 2"))
    expected = FwdSpec(head_dim=64, tile_m=128, tile_n=64, softmax="exact", ctas_per_sm=2).reasons()
    assert expected and all(reason in str(error) for reason in expected)


def test_every_mistake_is_listed():
    text = changed("    softmax: exact", "    sofmax: exact").replace("schema: 1", "schema: one")
    error = refusal(text)
    assert error.key == "forward[0].sofmax", "the typo, not the key that it leaves missing"
    assert "also line 1: schema: input should be a valid integer" in str(error)
    assert "also line 13: forward[0].softmax: is missing" in str(error)


def test_second_entry_with_an_id_already_taken():
    entry = MINIMAL[MINIMAL.index("  - id") :]
    text = MINIMAL.replace("when: {}", "when: {head_dim: [64]}") + entry
    error = refusal(text)
    assert error.line == 19 and "already the id of forward[0]" in str(error)


@pytest.mark.parametrize("text, words", [("", "is empty"), ("a: [1", "not YAML"), ("just words", "valid dictionary")])
def test_what_is_no_preset_file_at_all(text, words):
    assert words in str(refusal(text))


def test_yaml_tags_do_not_run_code():
    with pytest.raises(PresetError, match="not YAML"):
        presets.parse("schema: !!python/object/apply:os.system ['true']\n", "my.yaml")


@pytest.mark.parametrize(
    "text", ["&a [*a]", "schema: &a {schema: *a}", "? [1, 2]\n: 3", "1: 2", "<<: 3", "schema: .inf"]
)
def test_odd_yaml_is_refused_like_any_other_mistake(text):
    with pytest.raises(PresetError):
        presets.parse(text, "my.yaml")


LINES = MINIMAL.splitlines()
SCALARS = st.sampled_from(["", "~", "[]", "{}", "-1", "1e400", ".nan", "true", "2026-11-23", "'", "*x", "- a"])


@given(st.integers(0, len(LINES) - 1), st.integers(0, 40), SCALARS | st.text(max_size=12))
def test_no_text_raises_anything_but_a_preset_error(row, column, inserted):
    changed_lines = [*LINES]
    changed_lines[row] = LINES[row][:column] + inserted + LINES[row][column + len(inserted) :]
    try:
        presets.parse("\n".join(changed_lines), "my.yaml")
    except PresetError as refused:
        assert str(refused).startswith("my.yaml")


def test_unreadable_and_unknown_files(tmp_path):
    with pytest.raises(PresetError, match="cannot be read"):
        presets.load(tmp_path / "none.yaml")
    with pytest.raises(PresetError, match=r"did you mean h100_pcie\?.*legal: gh200"):
        presets.builtin("h100_pci")


def test_file_names_in_messages_hold_for_own_files(tmp_path):
    path = Path(tmp_path) / "mine.yaml"
    path.write_text(changed("schema: 1", "schem: 1"))
    with pytest.raises(PresetError) as caught:
        presets.load(path)
    assert caught.value.file == os.fspath(path)
