# SPDX-License-Identifier: Apache-2.0
"""Steps, branches and runs under guidance, exceptions, two transformers, checkpointing; masks reused on time."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")

from fgattn_cute.errors import InputError
from fgattn_cute.integrations import engine
from fgattn_cute.integrations.diffusers import SparsePolicy, enable
from fgattn_cute.predict import keep_tokens
from tests import video_models


class Recorder:
    """A rule that keeps the first half of the keys and writes down where it was asked."""

    __name__ = "recorder"

    def __init__(self):
        self.asked = []

    def __call__(self, site):
        self.asked.append((site.component, site.step, site.branch, site.layer))
        seqlen = site.q.shape[1]
        geometry = {"slice_m": 16, "slice_n": 1, "seqlen_q": seqlen, "seqlen_k": seqlen}
        return keep_tokens(0, seqlen // 2, rows=False, **geometry)


def policy(rule, **options):
    return SparsePolicy(slice_m=16, rule=rule, **{"dense_steps": 2, "refresh_every": 2} | options)


def actions(handle, run=0, **where):
    rows = [r for r in handle.report().rows() if r["run"] == run and all(r[k] == v for k, v in where.items())]
    return [(row["step"], row["action"]) for row in rows]


def test_guidance_in_two_passes():
    """Six steps, the first two dense, masks found at every second sparse step, apart for each pass."""
    pipe, rule = video_models.wan_pipeline(), Recorder()
    with enable(pipe, policy(rule, dense_layers=[0])) as handle:
        video_models.run_wan(pipe)
    assert rule.asked == [("transformer", step, branch, 1) for step in (2, 4) for branch in (0, 1)]
    expected = [(0, "dense"), (1, "dense"), (2, "find"), (3, "reuse"), (4, "find"), (5, "reuse")]
    for branch in (0, 1):
        assert actions(handle, layer=1, branch=branch) == expected
        assert actions(handle, layer=0, branch=branch) == [(step, "dense") for step in range(6)]
    assert len(handle.report().rows()) == 6 * 2 * 2


def test_guidance_in_one_batch_and_without_guidance():
    model, rule = video_models.wan(layers=1), Recorder()
    with enable(model, policy(rule, steps=4, dense_steps=0.25)) as handle, torch.no_grad():
        for timestep in (1000.0, 750.0, 500.0, 250.0):
            model(**video_models.wan_inputs(batch=2, timestep=timestep))
    assert actions(handle) == [(0, "dense"), (1, "find"), (2, "reuse"), (3, "find")]
    assert rule.asked == [("transformer", 1, 0, 0), ("transformer", 3, 0, 0)]


def test_a_share_of_dense_steps_is_rounded_up_and_needs_the_number_of_steps():
    pipe = video_models.wan_pipeline()
    with enable(pipe, policy(Recorder(), dense_steps=0.2)) as handle:
        video_models.run_wan(pipe, steps=6, guidance=1.0)
    assert [step for step, action in actions(handle, layer=0) if action == "dense"] == [0, 1]
    model = video_models.wan(layers=1)
    with enable(model, policy(Recorder(), dense_steps=0.2)), pytest.raises(InputError, match=r"steps=\.\.\."):
        model(**video_models.wan_inputs())


@pytest.mark.parametrize("interrupted_at", [0, 3])
def test_a_run_that_raises_does_not_disturb_the_next(interrupted_at):
    """Whether a step's callback or the second pass of a step fails: the next run counts from zero and finds anew."""
    pipe, rule = video_models.wan_pipeline(), Recorder()
    calm = video_models.wan_pipeline(transformer=pipe.transformer, scheduler=pipe.scheduler)
    expected_rule = Recorder()
    with enable(calm, policy(expected_rule)):
        expected = video_models.run_wan(calm)

    with enable(pipe, policy(rule)) as handle:
        calls = []

        def fail(module, args, kwargs):
            calls.append(module)
            if len(calls) == 2 * interrupted_at + 2:
                raise ConnectionError("second pass")

        hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail, with_kwargs=True)
        with pytest.raises(ConnectionError):
            video_models.run_wan(pipe)
        hook.remove()
        rule.asked.clear()
        again = video_models.run_wan(pipe)
    assert torch.equal(again, expected)
    assert rule.asked == expected_rule.asked
    assert actions(handle, run=1, layer=0, branch=0)[:3] == [(0, "dense"), (1, "dense"), (2, "find")]


def test_a_pass_that_raised_is_not_counted_as_a_branch():
    model, rule = video_models.wan(layers=2), Recorder()
    inputs = video_models.wan_inputs()
    with enable(model, policy(rule, dense_steps=0)) as handle, torch.no_grad():
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        model(**inputs)
        model(**inputs)
    assert {(row["step"], row["branch"]) for row in handle.report().rows()} == {(0, 0), (0, 1)}


def test_two_runs_are_alike_and_share_no_mask():
    pipe, rule = video_models.wan_pipeline(), Recorder()
    with enable(pipe, policy(rule)) as handle:
        first = video_models.run_wan(pipe)
        once = list(rule.asked)
        second = video_models.run_wan(pipe)
    assert torch.equal(first, second) and rule.asked == once * 2
    assert actions(handle, run=0) == actions(handle, run=1) != []


def test_bare_transformer_counts_steps_by_timestep_and_runs_by_their_turn():
    model, rule = video_models.wan(layers=1), Recorder()
    with enable(model, policy(rule, dense_steps=1, refresh_every=1)) as handle, torch.no_grad():
        for timestep in (900.0, 900.0, 600.0, 300.0, 900.0, 600.0):
            model(**video_models.wan_inputs(timestep=timestep))
    rows = handle.report().rows()
    assert [(r["run"], r["step"], r["branch"]) for r in rows] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 2, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_one_step_runs_are_told_apart_by_new_run():
    model = video_models.wan(layers=1)
    with enable(model, policy(Recorder(), dense_steps=0)) as handle, torch.no_grad():
        model(**video_models.wan_inputs())
        handle.new_run()
        model(**video_models.wan_inputs())
    assert [(r["run"], r["branch"], r["action"]) for r in handle.report().rows()] == [(0, 0, "find"), (1, 0, "find")]


def test_two_transformers_share_the_steps_and_keep_masks_of_their_own():
    """Wan 2.2: the first model does the noisy steps, the second the rest; its first step finds masks at once."""
    second = video_models.wan(layers=1)
    pipe = video_models.wan_pipeline(transformer_2=second, boundary_ratio=0.8)
    rule = Recorder()
    chosen = policy(rule, dense_steps=1, refresh_every=4, layers={"transformer_2.0": {"dense": False}})
    with enable(pipe, chosen) as handle:
        video_models.run_wan(pipe, guidance=1.0)
        steps = {name: [s for s, _ in actions(handle, transformer=name, layer=0)] for name in pipe.components}
    boundary = 0.8 * 1000
    early = [step for step, t in enumerate(pipe.scheduler.timesteps.tolist()) if t >= boundary]
    late = [step for step in range(6) if step not in early]
    assert early and late and steps["transformer"] == early and steps["transformer_2"] == late
    assert rule.asked[0] == ("transformer", 1, 0, 0)
    assert next(a for a in rule.asked if a[0] == "transformer_2") == ("transformer_2", late[0], 0, 0)


@pytest.mark.parametrize("case", video_models.CASES, ids=str)
def test_gradient_checkpointing_recomputes_with_the_same_masks(case):
    """With gradients the reference runs; the recomputation in the backward pass asks for no second mask."""
    rule = Recorder()
    model = case.build()
    model.train()
    results = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        rule.asked.clear()
        with enable(model, policy(rule, dense_steps=0)) as handle:
            out = model(**case.inputs()).sample
            out.square().mean().backward()
        asked = list(rule.asked)
        assert len(asked) == len(set(asked)) * len(set(case.text)), "one mask per layer and text length"
        layer = next(m for m in model.modules() if hasattr(m, "to_q") and m.to_q.weight.grad is not None)
        results.append((out.detach(), layer.to_q.weight.grad.clone(), asked, len(handle.report().rows())))
    plain, checkpointed = results
    assert torch.equal(plain[0], checkpointed[0])
    torch.testing.assert_close(plain[1], checkpointed[1])
    assert plain[2:] == checkpointed[2:]


def test_sequences_of_another_length_have_masks_of_their_own():
    model, rule = video_models.wan(layers=1), Recorder()
    small, large = (video_models.wan_inputs(grid=grid) for grid in ((2, 4, 4), (2, 4, 6)))
    with enable(model, policy(rule, dense_steps=0)) as handle, torch.no_grad():
        model(**small)
        handle.new_run()
        out = model(**large).sample
    assert out.shape == large["hidden_states"].shape and len(rule.asked) == 2


def test_key_lists_are_kept_or_made_again_with_the_same_result(monkeypatch):
    results, orders = [], []
    attend = engine.attend_bshd

    def watched(q, k, v, plan, **options):
        orders.append((plan.grouped, plan.even))
        return attend(q, k, v, plan, **options)

    monkeypatch.setattr(engine, "attend_bshd", watched)
    for memory in (0.0, 4.0):
        pipe = video_models.wan_pipeline(transformer=shared_transformer())
        with enable(pipe, policy(Recorder(), plan_memory_gb=memory, dense_steps=1, refresh_every=9)) as handle:
            results.append(video_models.run_wan(pipe))
            report = handle.report()
        assert (report.plan_bytes > 0) == (memory > 0) and report.mask_bytes > 0
        assert {row["plan_bytes"] > 0 for row in report.rows() if row["action"] != "dense"} == {memory > 0}
    assert torch.equal(*results)
    assert set(orders) == {(True, True)}, "half of the keys in one run: grouped and even whenever the lists are made"


def shared_transformer():
    torch.manual_seed(11)
    return video_models.wan(layers=2)


def test_report_says_what_was_kept_and_what_it_cost():
    pipe = video_models.wan_pipeline()
    with enable(pipe, policy("mass", tau=0.03, measure_recall=True)) as handle:
        assert "no attention call" in str(handle.report())
        video_models.run_wan(pipe, guidance=1.0)
    report = handle.report()
    for row in report.rows():
        assert row["ms"] > 0
        if row["action"] == "find":
            assert row["find_ms"] > 0 and len(row["recall"]) == len(row["density"]) == 2
            assert all(0 < kept < share < 1 for kept, share in zip(row["density"], row["recall"], strict=True))
        else:
            assert row["recall"] is None and row["find_ms"] == 0
    text = str(report)
    assert "12 self-attention calls, 4 dense, 8 sparse (4 masks found, 4 reused)" in text
    assert "transformer.0" in text and "transformer.1" in text


def test_compiled_blocks_run_the_same_attention():
    """A graph break at each attention: the state outside the graph is followed as before."""
    model, inputs = video_models.wan(layers=2), video_models.wan_inputs()
    with enable(model, policy(Recorder(), dense_steps=0)) as handle, torch.no_grad():
        expected = model(**inputs).sample
        handle.new_run()
        model.compile_repeated_blocks(backend="eager")
        out = model(**inputs).sample
    torch.testing.assert_close(out, expected)
    rows = [(r["run"], r["layer"], r["action"]) for r in handle.report().rows()]
    assert rows == [(run, layer, "find") for run in (0, 1) for layer in (0, 1)]
