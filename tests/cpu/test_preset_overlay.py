# SPDX-License-Identifier: Apache-2.0
"""A user's preset file that extends a shipped one: what it changes, what it leaves, and what it says of mistakes."""

import json

import pytest

from fgattn_cute import presets
from fgattn_cute.errors import PresetError
from fgattn_cute.gpu import from_config
from fgattn_cute.preset_edit import write
from fgattn_cute.select import facts_for, files_for, runners_up, select
from perf.roofline import problem

H200 = from_config("h200")
ENTRY = """\
  - id: m128-d128
    when: {dtype: [bf16], head_dim: [128], slice_m: {multiple_of: 128}}
    tile: {m: 128, n: 96}
    softmax: exact
    provenance: assumed
    measured: {}
"""
OVERLAY = (
    """\
schema: 1
extends: h200
gpu:
  l2_gather_tb_per_s: {value: 4.5, source: "python -m perf.copies on our machine"}
forward:
"""
    + ENTRY
)


@pytest.fixture
def overlay(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(OVERLAY)
    monkeypatch.setenv("FGATTN_CONFIG", str(path))
    return path


def refusal(text):
    with pytest.raises(PresetError) as caught:
        presets.parse(text, "mine.yaml")
    return caught.value


def test_its_entries_come_first_and_replace_those_of_the_same_id(overlay):
    file = presets.load(overlay)
    base = presets.builtin("h200")
    assert [p.id for p in file.presets] == ["m128-d128"] and file.base.name == "configs/h200.yaml"
    assert [p.id for p in file.base.presets] == [p.id for p in base.presets if p.id != "m128-d128"]
    taken = select(problem(16384, 24, 128, 128), H200)
    assert (taken.source, taken.spec.tile_n, taken.spec.softmax) == ("user", 96, "exact")
    untouched = select(problem(16384, 24, 128, 192), H200)
    assert (untouched.source, untouched.preset_id) == ("preset", "m192-d128")
    assert untouched.spec == base.get("m192-d128").spec(dtype="bf16", head_dim=128)
    others = [other.preset_id for other in runners_up(problem(16384, 24, 128, 192), H200, untouched.spec)]
    assert len(others) == len(set(others)), "no preset is offered twice"


def test_constants_that_it_gives_replace_the_others(overlay):
    facts, base = facts_for(H200), presets.builtin("h200").gpu
    assert facts.constants == {**base.constants, "l2_gather_tb_per_s": 4.5}
    assert facts.sources["l2_gather_tb_per_s"].endswith("our machine") and facts.names == base.names


def test_another_gpus_names_and_an_overlay_without_entries(tmp_path, monkeypatch):
    (tmp_path / "nvl.yaml").write_text('schema: 1\nextends: h200\ngpu: {names: ["NVIDIA H200 NVL"]}\n')
    (tmp_path / "h20.yaml").write_text("schema: 1\nextends: h20\n")
    monkeypatch.setenv("FGATTN_CONFIG", str(tmp_path))
    assert presets.for_gpu("NVIDIA H200 NVL", tmp_path).base.name == "configs/h200.yaml"
    assert presets.for_gpu("NVIDIA H20", tmp_path).base.name == "configs/h20.yaml", "the base's names count"
    found = files_for(from_config("h20"))
    assert [source for source, _ in found] == ["user", "preset"]
    assert select(problem(16384, 24, 128, 192), from_config("h20")).source == "preset"


@pytest.mark.parametrize(
    "old, new, line, key, words",
    [
        ("extends: h200", "extends: h100", 2, "extends", ["unknown GPU of configs/ 'h100'", "legal: gh200"]),
        ("extends: h200", "extend: h200", 2, "extend", ["did you mean extends?", "forward"]),
        ("l2_gather_tb_per_s:", "l2_gather:", 4, "gpu.l2_gather", ["unknown key", "l2_gather_tb_per_s"]),
        ("{value: 4.5, source: ", "{value: 4.5, src: ", 4, "gpu.l2_gather_tb_per_s.src", ["source"]),
        ("    softmax: exact", "    sofmax: exact", 9, "forward[0].sofmax", ["did you mean softmax?"]),
        ("    softmax: exact\n", "", 6, "forward[0].softmax", ["is missing"]),
        ("{m: 128, n: 96}", "{m: 128, n: 90}", 6, "forward[0].id", ["m128-d128 cannot run with bf16"]),
        ("provenance: assumed", "provenance: measured", 10, "forward[0].provenance", ["tflops is None"]),
        ("id: m128-d128", "id: fallback", 7, "forward[0].when", ["replaces the fallback of configs/h200.yaml"]),
        ("schema: 1", "schema: 2", 1, "schema", ["reads 1"]),
    ],
)
def test_a_mistake_names_file_line_key_and_what_is_legal(old, new, line, key, words):
    assert OVERLAY.count(old) == 1, old
    error = refusal(OVERLAY.replace(old, new))
    assert (error.file, error.line, error.key) == ("mine.yaml", line, key)
    assert all(word in str(error) for word in words), error


def test_the_fallback_may_be_replaced_by_another_one():
    text = (
        OVERLAY.replace("id: m128-d128", "id: fallback")
        .replace("when: {dtype: [bf16], head_dim: [128], slice_m: {multiple_of: 128}}", "when: {}")
        .replace("n: 96", "n: 32")
    )
    file = presets.parse(text, "mine.yaml")
    assert file.presets[-1].is_fallback and not any(p.is_fallback for p in file.base.presets)


def test_a_tuned_winner_is_written_into_it(overlay):
    """Its own entry is changed; an entry of the base is taken over first. The rest stays as it was."""
    winner = {"head_dim": 128, "tile_m": 192, "tile_n": 64, "ping_pong": True}
    record = {
        "measured": True,
        "gpu": {"name": "NVIDIA H200"},
        "winner": {"spec": winner, "packed_tflops": 650.0},
        "problem": "p",
        "density": 0.3,
        "created": "2026-11-23T00:00:00Z",
    }
    assert write(overlay, "m192-d128", record)
    file = presets.load(overlay)
    assert [p.id for p in file.presets] == ["m192-d128", "m128-d128"]
    assert file.get("m192-d128").fields["tile_n"] == 64 and file.get("m192-d128").provenance == "measured"
    assert overlay.read_text().endswith(ENTRY)
    with pytest.raises(PresetError, match="no preset 'm0'"):
        write(overlay, "m0", record)
    overlay.write_text("schema: 1\nextends: h200\n")
    assert write(overlay, "m192-d128", record) and presets.load(overlay).get("m192-d128").fields["tile_n"] == 64


def test_validate_on_the_command_line(overlay, tmp_path):
    from typer.testing import CliRunner

    from fgattn_cute.cli import app

    done = CliRunner().invoke(app, ["presets", "validate", str(overlay), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == [
        {"file": "mine.yaml", "presets": 1, "extends": "configs/h200.yaml", "error": None}
    ]
    assert (
        "1 presets, all can run, over configs/h200.yaml"
        in CliRunner().invoke(app, ["presets", "validate", str(overlay)]).stdout
    )
    overlay.write_text(OVERLAY.replace("h200", "h300"))
    done = CliRunner().invoke(app, ["presets", "validate", str(overlay)])
    assert done.exit_code == 1 and "2: extends: unknown GPU of configs/ 'h300'" in done.stdout
