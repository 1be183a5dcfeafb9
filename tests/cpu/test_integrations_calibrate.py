# SPDX-License-Identifier: Apache-2.0
"""Calibration: a quality target goes in, and the policy that comes out reaches it."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")
pytest.importorskip("transformers", reason="pipelines of diffusers need transformers (pip install transformers)")

from fgattn_cute.errors import InputError
from fgattn_cute.integrations.calibrate import Meter
from fgattn_cute.integrations.diffusers import SparsePolicy, calibrate, enable
from tests import video_models

BASE = SparsePolicy(slice_m=16, tau=0.0, dense_steps=2, refresh_every=2, dense_layers=[0])


@pytest.fixture(scope="module")
def pipe():
    """Sharper than random weights are: attention that spreads evenly has nothing to calibrate."""
    torch.manual_seed(3)
    pipe = video_models.wan_pipeline(transformer=video_models.wan(layers=3))
    for index, block in enumerate(pipe.transformer.blocks):
        block.attn1.norm_q.weight.data *= 2.0 + index
        block.attn1.norm_q.weight.data[:24] *= 1.5  # the first head more than the second
    return pipe


class Runs:
    """The pipeline as ``calibrate`` calls it, with the embeddings in place of prompts; counts its runs."""

    def __init__(self, pipe):
        self.pipe, self.components, self.scheduler, self.seen = pipe, pipe.components, pipe.scheduler, []

    def __call__(self, prompt, **options):
        self.seen.append(prompt)
        video_models.run_wan(self.pipe, **options)

    @property
    def _current_timestep(self):
        return self.pipe._current_timestep


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_the_policy_reaches_the_target_on_the_same_prompts(pipe, target, tmp_path):
    path, runs = tmp_path / "policy.yaml", Runs(pipe)
    policy = calibrate(runs, ["a", "b"], target, path=path, base=BASE, guidance=1.0, sample=1000)
    assert runs.seen == ["a", "b"]
    read = SparsePolicy.from_yaml(path)
    assert read.layers == policy.layers and set(read.layers) == {"transformer.1", "transformer.2"}
    assert (read.dense_steps, read.refresh_every, list(read.dense_layers)) == (2, 2, [0])
    assert f"recall {target}" in path.read_text().splitlines()[0]

    measured = SparsePolicy(**{**vars(read), "measure_recall": True, "refresh_every": 2})
    with enable(pipe, measured) as handle:
        video_models.run_wan(pipe, guidance=1.0)
    found = [row for row in handle.report().rows() if row["action"] == "find"]
    assert {(row["layer"], row["step"]) for row in found} == {(layer, step) for layer in (1, 2) for step in (2, 4)}
    for layer in (1, 2):
        rows = [row for row in found if row["layer"] == layer]
        for head in range(2):
            reached = sum(row["recall"][head] for row in rows) / len(rows)
            # The calibration runs are dense: upstream layers differ a little from those of the sparse run.
            assert target - 0.02 < reached < target + 0.06
            assert sum(row["density"][head] for row in rows) / len(rows) < 0.98


def test_shares_can_be_chosen_in_place_of_thresholds(pipe):
    policy = calibrate(Runs(pipe), ["a"], 0.9, base=BASE, choose="density", guidance=1.0, sample=1000)
    for key in ("transformer.1", "transformer.2"):
        sharp, flat = policy.layers[key]["density"]
        assert 0 < sharp < flat < 1, "the sharper head needs less"
    assert policy.tau is None and policy.density == 1.0


def test_a_threshold_is_the_largest_that_reaches_the_target():
    """Scores 8, 4, 2, 1, 1 of 16 in one row, given as logarithms: what to keep for a share is known by hand."""
    shares = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]) / 16
    meter = Meter(slice_m=16, slice_n=1, sample=4)
    meter._add(("t", 0, 0), shares)
    curve = meter.curves[("t", 0, 0)]
    for target, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 5), (0.99, 5)):
        tau, recall, density = curve.threshold(target)
        assert int((shares >= tau).sum()) == kept and density == pytest.approx(kept / 5)
        assert recall == pytest.approx(float(shares[:kept].sum())) and recall >= target


def test_what_cannot_be_calibrated_is_refused(pipe):
    for options, message in (
        ({"target": 1.0}, "target=1.0"),
        ({"target": 0.9, "choose": "top_k"}, "choose='top_k'"),
        ({"target": 0.9, "prompts": []}, "nothing was measured in 0 runs"),
        ({"target": 0.9, "base": SparsePolicy(rule="radial")}, "rule 'radial'"),
        ({"target": 0.9, "base": SparsePolicy(tau=0.1, dense_steps=1.0)}, "dense_steps=1.0"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(Runs(pipe), **{"prompts": ["a"], "guidance": 1.0, "steps": 2} | options)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
