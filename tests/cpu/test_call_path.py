# SPDX-License-Identifier: Apache-2.0
"""The short way of a call that was made before: the same kernel, and every fault found again."""

import dataclasses

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import checks
from fgattn_cute.presets import CONFIG_DIR
from perf import host


@pytest.fixture
def call():
    """(q, k, v, plan, calls of the stubbed kernel, specs chosen) after one sound call."""
    q, k, v, plan = host.example(seqlen=256)
    launched = []
    with host.stubbed_launch(plan, lambda *args: launched.append(args)) as chosen:
        fg.attention(q, k, v, plan)
        yield q, k, v, plan, launched, chosen
    assert len(launched) > 0


def test_the_second_call_launches_the_same_without_choosing_or_checking(call, monkeypatch):
    q, k, v, plan, launched, chosen = call
    monkeypatch.setattr(checks, "check", lambda *a, **k: pytest.fail("checked again"))
    out, lse = fg.attention(q, k, v, plan, return_lse=True)
    first, second = launched
    assert len(chosen) == 1 and second[3] is out and second[4] is lse
    assert second[5:10] == first[5:10], "ids, work, scale, slice_m, ctas_per_block"
    assert first[7] == 128**-0.5
    fg.attention(q, k, v, plan, scale=0.5, logit_bound=3.0)
    assert launched[-1][7] == 0.5
    other = fg.Plan.from_mask(plan.to_mask())
    fg.attention(q, k, v, other)
    assert launched[-1][5] is other.ids, "another plan of the same geometry takes its own lists"


def test_what_was_not_judged_is_not_taken_for_sound(call):
    """A call with checks="off" remembers its kernel, for calls with checks="off" alone."""
    q, k, v, plan, launched, _ = call
    for _ in range(2):
        fg.attention(q, k, v[:, :, :1], plan, checks="off")
    assert len(launched) == 3
    with pytest.raises(fg.InputError, match="differ in shape"):
        fg.attention(q, k, v[:, :, :1], plan)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda q, plan: {"scale": -1.0}, fg.InputError),
        (lambda q, plan: {"scale": float("nan")}, fg.InputError),
        (lambda q, plan: {"logit_bound": -1.0}, fg.InputError),
        (lambda q, plan: {"logit_bound": "3"}, fg.InputError),
        (lambda q, plan: {"layout": "sbhd"}, fg.InputError),
        (lambda q, plan: {"checks": "never"}, fg.InputError),
        (lambda q, plan: {"spec": ["no", "spec"]}, TypeError),  # not hashable, as ever
        (lambda q, plan: {"spec": "m0-d128"}, fg.PresetError),
        (lambda q, plan: {"q": q.clone().requires_grad_()}, fg.UnsupportedError),
        (lambda q, plan: {"q": q.float()}, fg.FgAttnError),
        (lambda q, plan: {"q": q[:, :-1]}, fg.PlanError),
        (lambda q, plan: {"q": None}, fg.InputError),
        (lambda q, plan: {"plan": "plan"}, fg.PlanError),
        (
            lambda q, plan: {"q": torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)},
            fg.InputError,
        ),  # 2 bytes on
    ],
)
def test_faults_are_found_after_a_sound_call(call, change, error):
    q, k, v, plan, launched, _ = call
    arguments = {"q": q, "k": k, "v": v, "plan": plan, **change(q, plan)}
    with pytest.raises(error):
        fg.attention(**arguments)
    assert len(launched) == 1


def test_another_preset_file_is_obeyed_at_once(call, monkeypatch, tmp_path):
    q, k, v, plan, _, chosen = call
    own = tmp_path / "own.yaml"
    own.write_text((CONFIG_DIR / "sm90.yaml").read_text().replace("tile: {m: 128, n: 128}", "tile: {m: 128, n: 96}"))
    monkeypatch.setenv("FGATTN_CONFIG", str(own))
    fg.attention(q, k, v, plan)
    assert [spec.tile_n for spec in chosen] == [128, 96]
    monkeypatch.delenv("FGATTN_CONFIG")
    fg.attention(q, k, v, plan)
    fg.attention(q, k, v, plan, spec=dataclasses.replace(chosen[0], tile_n=112))
    assert len(chosen) == 3 and chosen[2].tile_n == 112, "the first choice was remembered"
