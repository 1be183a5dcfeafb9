# SPDX-License-Identifier: Apache-2.0
"""Policies: what they refuse, how they travel as files; and the guards: nothing runs dense in silence."""

import ast
import dataclasses
import importlib
import re
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")

from fgattn_cute import SliceMask
from fgattn_cute.errors import FgAttnError, InputError, MaskError, UnsupportedError
from fgattn_cute.integrations.diffusers import SparsePolicy, enable
from tests import video_models


# ---- policies ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of tau, density, top_p, top_k"),
        ({"tau": 0.1, "top_k": 3}, "tau, top_k are given"),
        ({"tau": 2.0}, "tau=2.0"),
        ({"rule": "magic", "tau": 0.1}, "rule='magic' is not one of mass, pooled, window"),
        ({"rule": "radial", "tau": 0.1}, "tau goes with the rules mass and pooled"),
        ({"tau": 0.1, "dense_steps": 1.5}, "lies above 1"),
        ({"tau": 0.1, "dense_steps": -1}, "dense_steps=-1"),
        ({"tau": 0.1, "dense_steps": True}, "dense_steps=True"),
        ({"tau": 0.1, "slice_m": 0}, "slice_m=0"),
        ({"tau": 0.1, "refresh_every": 0}, "refresh_every=0"),
        ({"tau": 0.1, "tile": (2, 2)}, "tile=(2, 2)"),
        ({"tau": 0.1, "backend": "mps"}, "backend='mps'"),
        ({"tau": 0.1, "steps": 0}, "steps=0"),
        ({"tau": 0.1, "plan_memory_gb": -1}, "plan_memory_gb=-1"),
        ({"tau": 0.1, "dense_layers": [-1]}, "dense_layers holds -1"),
        ({"tau": 0.1, "layers": {"3": {"tau": 0.2}}}, "layers has the key '3'"),
        ({"tau": 0.1, "layers": {0: {"tua": 0.2}}}, "layer 0: unknown tua"),
        ({"tau": 0.1, "layers": {0: {"tau": 0.2, "top_k": 1}}}, "exclude each other"),
        ({"tau": 0.1, "layers": {0: {"density": -0.5}}}, "layer 0: density=-0.5"),
        ({"rule": "radial", "layers": {0: {"tau": 0.5}}}, "takes no tau"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError) as error:
        SparsePolicy(**options)
    assert message in str(error.value)


def test_every_reason_is_given_at_once():
    with pytest.raises(InputError) as error:
        SparsePolicy(slice_m=0, dense_steps=-1, tile=(0, 1, 1))
    assert all(part in str(error.value) for part in ("slice_m", "dense_steps", "tile", "exactly one of"))


@pytest.mark.parametrize(
    ("dense_steps", "steps", "expected"),
    [(0.2, 50, 10), (0.2, 6, 2), (0.25, 4, 1), (0.0, None, 0), (3, None, 3), (9, 6, 6), (1.0, 7, 7)],
)
def test_dense_steps_are_a_share_or_a_number(dense_steps, steps, expected):
    assert SparsePolicy(tau=0.1, dense_steps=dense_steps).dense_steps_of(steps) == expected


def test_exceptions_hold_for_one_layer_one_transformer_and_some_heads():
    policy = SparsePolicy(
        tau=0.1,
        dense_layers=[5],
        layers={1: {"top_k": 7}, "transformer_2.1": {"tau": [0.1, 0.2, 0.3, 0.4]}, 2: {"dense": True}},
    )
    assert policy.selector("transformer", 0, range(4))[1].values == (0.1,)
    assert policy.selector("transformer", 1, range(4))[0] == "top_k"
    assert policy.selector("transformer_2", 1, range(2, 4))[1].values == (0.3, 0.4)
    places = [(name, layer) for name in ("transformer", "transformer_2") for layer in range(6)]
    dense = [place for place in places if policy.is_dense(*place)]
    assert dense == [("transformer", 2), ("transformer", 5), ("transformer_2", 2), ("transformer_2", 5)]


def test_a_policy_comes_back_from_its_file(tmp_path):
    policy = SparsePolicy(
        slice_m=192,
        density=[0.1, 0.2],
        dense_steps=3,
        dense_layers=[0, 1],
        tile=(2, 4, 4),
        layers={"transformer.3": {"density": [0.3, 0.4]}, 4: {"dense": True}},
    )
    path = tmp_path / "policy.yaml"
    policy.to_yaml(path, "line one\nline two")
    text = path.read_text()
    assert text.startswith("# line one\n# line two\n") and "slice_n" not in text, "defaults need no line"
    again = SparsePolicy.from_yaml(path)
    assert dataclasses.replace(again, density=(0.1, 0.2)) == dataclasses.replace(policy, density=(0.1, 0.2))
    assert list(again.density) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tau: 0.1\nslicem: 4\n", "unknown slicem; a policy has slice_m"),
        ("- 1\n", "a policy file is a mapping"),
        ("tau: [\n", "policy.yaml"),
        ("tau: 3\n", "tau=3"),
        ("tau: !!python/object/apply:os.getcwd []\n", "policy.yaml"),
    ],
)
def test_a_policy_file_with_a_mistake_names_itself_and_it(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        SparsePolicy.from_yaml(path)
    assert message in str(error.value) and "policy.yaml" in str(error.value)


def test_a_function_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="is a function"):
        SparsePolicy(rule=lambda site: None).to_yaml(tmp_path / "policy.yaml")


# ---- rules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "mass", "density": 0.4},
        {"rule": "mass", "top_p": 0.8},
        {"rule": "mass", "top_k": 20},
        {"rule": "mass", "tau": 0.01, "rule_options": {"statistic": "max"}},
        {"rule": "pooled", "tau": 0.008},
        {"rule": "window", "rule_options": {"tile": (1, 3, 4), "window": (3, 1, 1)}},
        {"rule": "radial", "rule_options": {"decay": 0.3}},
        {"rule": "spatial"},
        {"rule": "temporal", "rule_options": {"radius": 1}},
        {"rule": "spatial_or_temporal", "rule_options": {"temporal": {"radius": 1}}},
    ],
    ids=lambda options: "-".join(map(str, [options["rule"], *(k for k in options if k != "rule")])),
)
@pytest.mark.parametrize("tile", [None, (2, 4, 4)], ids=["raster", "tiles"])
def test_every_rule_runs_and_leaves_something_out(options, tile):
    model = video_models.wan(layers=1)
    with enable(model, SparsePolicy(slice_m=16, dense_steps=0, tile=tile, **options)) as handle, torch.no_grad():
        out = model(**video_models.wan_inputs()).sample
    (row,) = handle.report().rows()
    assert torch.isfinite(out).all() and all(0 < share < 1 for share in row["density"])


def test_values_per_head_reach_their_heads():
    model = video_models.wan(layers=1)
    policy = SparsePolicy(slice_m=16, dense_steps=0, layers={0: {"density": [0.1, 0.6]}}, density=1.0)
    with enable(model, policy) as handle, torch.no_grad():
        model(**video_models.wan_inputs())
    (row,) = handle.report().rows()
    assert row["density"] == [pytest.approx(0.1, abs=0.05), pytest.approx(0.6, abs=0.05)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "returned a NoneType"),
        (SliceMask.full(slice_m=16, slice_n=1, seqlen_q=96, seqlen_k=96), "seqlen 96 x 96, attention has 144"),
        (SliceMask.full(slice_m=16, slice_n=1, seqlen_q=144, seqlen_k=144, heads=3), r"1 x 3 \(batch, heads\)"),
    ],
)
def test_a_rule_that_returns_something_else_is_refused(mask, message):
    model = video_models.wan(layers=1)
    with (
        enable(model, SparsePolicy(rule=lambda site: mask, dense_steps=0)),
        pytest.raises((MaskError, InputError), match=message),
        torch.no_grad(),
    ):
        model(**video_models.wan_inputs())


# ---- guards -----------------------------------------------------------------------------------------------------
SOMETHING = SparsePolicy(slice_m=16, tau=0.01, dense_steps=0)


def test_unknown_models_are_refused_by_name():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(1, 8, in_channels=4, num_layers=1, sample_size=8)
    with pytest.raises(UnsupportedError, match="DiTTransformer2DModel") as error:
        enable(model, SOMETHING)
    assert "WanTransformer3DModel" in str(error.value), "the refusal says what works"
    with pytest.raises(InputError, match="neither a diffusers pipeline nor a transformer"):
        enable("wan", SOMETHING)
    with pytest.raises(InputError, match="not a SparsePolicy"):
        enable(video_models.wan(), {"tau": 0.1})


def test_a_pipeline_with_one_unknown_transformer_is_refused_whole():
    pipe = types.SimpleNamespace(components={"transformer": video_models.wan(), "transformer_2": torch.nn.Linear(1, 1)})
    with pytest.raises(UnsupportedError, match="transformer_2 Linear"):
        enable(pipe, SOMETHING)


def test_an_attention_processor_of_somebody_else_is_refused():
    model = video_models.wan()
    processor = model.blocks[1].attn1.processor
    model.blocks[1].attn1.processor = type("SageProcessor", (), {"__call__": lambda *_: None})()
    with pytest.raises(UnsupportedError, match="SageProcessor is not WanAttnProcessor"):
        enable(model, SOMETHING)
    assert type(model.blocks[0].attn1.processor) is type(processor), "a refusal changes nothing"


def test_a_processor_that_is_replaced_later_is_noticed():
    model = video_models.wan()
    with enable(model, SOMETHING):
        foreign = type(model.blocks[0].attn2.processor)()
        model.blocks[1].attn1.processor = foreign
        with pytest.raises(UnsupportedError, match="was replaced by WanAttnProcessor"), torch.no_grad():
            model(**video_models.wan_inputs())
    assert model.blocks[1].attn1.processor is foreign, "disable leaves what is not its own"


def test_attention_that_never_reaches_us_is_an_error_not_a_dense_result(monkeypatch):
    """A version of diffusers whose processor computes attention in another way."""
    from diffusers.models.transformers import transformer_wan

    model = video_models.wan()
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", lambda query, key, value, **_: value)
    with enable(model, SOMETHING), pytest.raises(FgAttnError, match="0 times"), torch.no_grad():
        model(**video_models.wan_inputs())


def test_enabling_twice_is_refused_and_enabling_again_works():
    model = video_models.wan()
    with enable(model, SOMETHING), pytest.raises(InputError, match="enabled for transformer already"):
        enable(model, SOMETHING)
    with enable(model, SOMETHING):
        pass


def test_old_diffusers_is_refused(monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(UnsupportedError, match=r"0\.31\.0 is older than 0\.36"):
        enable(video_models.wan(), SOMETHING)


def test_a_model_that_the_kernel_cannot_run_is_refused_before_anything_runs():
    model = video_models.wan()
    policy = SparsePolicy(slice_m=24, tau=0.1, backend="emulator")
    with pytest.raises(UnsupportedError) as error:
        enable(model, policy)
    for part in ("head_dim 24 is not one of 64", "weights are float32", "slice_m 24 is not a multiple of 16"):
        assert part in str(error.value)
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_policy_for_another_model_is_refused():
    model = video_models.wan(layers=2)
    for options, message in (
        ({"dense_layers": [7]}, "it names layers 7, transformer has 2"),
        ({"layers": {3: {"tau": 0.1}}}, "it names layers 3"),
        ({"layers": {1: {"tau": [0.1, 0.2, 0.3]}}}, "layer 1: tau holds 3 values, transformer has 2 heads"),
    ):
        with pytest.raises(InputError, match=message):
            enable(model, SparsePolicy(tau=0.1, **options))


def test_a_grid_that_is_not_told_is_asked_for():
    case = {c.name: c for c in video_models.CASES}["ltx"]
    model, inputs = case.build(), case.inputs()
    coordinates = torch.rand(2, 3, video_models.TOKENS)
    inputs |= {"num_frames": None, "height": None, "width": None, "video_coords": coordinates}
    policy = SparsePolicy(slice_m=16, rule="radial", dense_steps=0)
    with enable(model, policy), pytest.raises(InputError, match="without the size of its token grid"):
        model(**inputs)
    with enable(model, SOMETHING) as handle, torch.no_grad():
        model(**inputs)
    assert {row["action"] for row in handle.report().rows()} == {"find"}


def test_a_backend_of_the_users_serves_the_dense_steps_only(monkeypatch):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)  # diffusers never sets it back
    model = video_models.wan(layers=1)
    with enable(model, SOMETHING) as handle, torch.no_grad():
        model.set_attention_backend("_native_math")
        model(**video_models.wan_inputs())
        assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert handle.report().rows()[0]["action"] == "find"
    model.reset_attention_backend()


# ---- the document -----------------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name for field in dataclasses.fields(SparsePolicy)}


@pytest.mark.parametrize("name", ["docs/wan.md", "README.md"])
def test_what_documents_call_exists(name):
    """Imports from here resolve, policies in examples are made of existing fields, and are policies."""
    text, policies = (ROOT / name).read_text(), 0
    for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fgattn_cute"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SparsePolicy":
                SparsePolicy(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})
                policies += 1
    assert policies


def test_the_document_explains_every_field():
    text = (ROOT / "docs/wan.md").read_text()
    explained = set(re.findall(r"`(\w+)[`=]", text))
    assert FIELDS - explained <= {"rule_options", "backend", "measure_recall"}
    assert "SparsePolicy(measure_recall=True)" in text
