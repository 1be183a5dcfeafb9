# SPDX-License-Identifier: Apache-2.0
"""attention() and explain() as a user calls them on a machine without a GPU."""

import gc
import json
import weakref

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import api, gpu


def case(batch=1, heads=2, kv_heads=2, seqlen_q=150, seqlen_k=210, head_dim=64, slice_m=64, slice_n=1, density=0.4):
    q = torch.randn(batch, seqlen_q, heads, head_dim).bfloat16()
    k, v = (torch.randn(batch, seqlen_k, kv_heads, head_dim).bfloat16() for _ in range(2))
    keep = torch.rand(batch, heads, -(-seqlen_q // slice_m), -(-seqlen_k // slice_n)) < density
    keep[0, 0, 0] = False
    mask = fg.SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return q, k, v, mask


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cpu_tensors_run_on_the_reference(backend):
    q, k, v, mask = case()
    plan = fg.Plan.from_mask(mask)
    out, lse = fg.attention(q, k, v, plan, return_lse=True, backend=backend)
    expected, expected_lse = fg.reference.attention(q, k, v, plan, return_lse=True)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert torch.equal(out, expected.bfloat16()) and torch.equal(lse, expected_lse)
    assert torch.all(out[0, :64, 0] == 0) and torch.all(lse[0, 0, :64] == -torch.inf)
    assert torch.equal(fg.attention(q, k, v, plan, backend=backend), out)


def test_scale_and_layout_reach_the_reference():
    q, k, v, mask = case()
    out = fg.attention(q, k, v, mask, scale=0.01)
    assert torch.equal(out, fg.reference.attention(q, k, v, mask, scale=0.01).bfloat16())
    assert not torch.equal(out, fg.attention(q, k, v, mask))
    across = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(fg.attention(*across, mask, scale=0.01, layout="bhsd").transpose(1, 2), out)


def test_a_masks_plan_is_made_once_and_dies_with_it(monkeypatch):
    q, k, v, mask = case()
    made = []
    original = fg.Plan.from_mask
    monkeypatch.setattr(api.Plan, "from_mask", lambda mask: made.append(1) or original(mask))
    first = fg.attention(q, k, v, mask)
    assert torch.equal(fg.attention(q, k, v, mask), first) and made == [1]
    plan = weakref.ref(vars(mask)[api._PLAN_OF_MASK])
    del mask
    gc.collect()
    assert plan() is None


@pytest.mark.parametrize("own_session", [True, False])
def test_the_compiled_kernel_runs_on_the_emulator(own_session):
    """The same result from a session of its own and inside one that the caller has opened."""
    q, k, v, mask = case()
    plan = fg.Plan.from_mask(mask)
    if own_session:
        out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator")
    else:
        with fg.emulator.session(seed=3, checks="fast") as emu:
            out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator")
        first, second = (launch.result for launch in emu.report().launches)
        assert "redo" in second.kernel and "redo" not in first.kernel
        spec = fg.explain(q, k, v, plan).choice.spec
        assert (first.dynamic_smem, first.block, first.grid) == (spec.smem_bytes(), (spec.num_threads, 1, 1), (6, 1, 1))
    expected, expected_lse = fg.reference.attention(q, k, v, plan, return_lse=True)
    assert (out.float() - expected).abs().max() < 0.02
    kept = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), kept)
    assert (lse - expected_lse)[kept].abs().max() < 1e-4


def test_dimensions_of_size_one_may_have_any_stride():
    """Such a stride addresses nothing, so it need not be a multiple of 8 as the others are."""
    q, k, v, mask = case(heads=1, kv_heads=1)
    expected = fg.attention(q, k, v, mask, backend="emulator")
    odd = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in (q, k, v)]
    assert torch.equal(fg.attention(*odd, mask, backend="emulator"), expected)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda k: k[..., :32], "mK.shape[3]"),
        (lambda k: torch.cat([k, k], -1)[..., ::2], "mK.strides[3]"),
        (lambda k: torch.cat([k, k[..., :4]], -1)[..., :64], "mK.strides"),
        (lambda k: torch.cat([k.flatten()[:1], k.flatten()])[1:].view(k.shape), "Misaligned"),
        (lambda k: k.half(), "Mismatched"),
    ],
)
def test_what_unchecked_calls_let_through_stops_at_the_kernels_signature(spoil, words):
    q, k, v, mask = case()
    with pytest.raises(fg.InputError) as caught:
        fg.attention(q, spoil(k), v, mask, backend="emulator", checks="off")
    assert words in str(caught.value) and 'checks="fast"' in str(caught.value)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"backend": "gpu"}, fg.InputError, ["'auto', 'cuda', 'emulator', 'reference'"]),
        ({"backend": "cuda"}, fg.InputError, ["the tensors are on cpu", 'backend="emulator"', 'backend="reference"']),
        ({"checks": "some"}, fg.InputError, ["'off', 'fast', 'full'"]),
        ({"layout": "sbhd"}, fg.InputError, ["'bshd', 'bhsd'"]),
        ({"logit_bound": -1.0}, fg.InputError, ["logit_bound -1.0"]),
        ({"logit_bound": float("nan")}, fg.InputError, ["not a finite number"]),
        ({"logit_bound": "20"}, fg.InputError, ["logit_bound is a str"]),
        ({"scale": -0.5}, fg.InputError, ["negate q"]),
        ({"spec": "m999", "backend": "emulator"}, fg.PresetError, ["m64-d64"]),
    ],
)
def test_arguments_that_make_no_sense(arguments, error, words):
    q, k, v, mask = case()
    with pytest.raises(error) as caught:
        fg.attention(q, k, v, mask, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_emulator_does_not_take_tensors_from_elsewhere():
    q, k, v, mask = case()
    away = [x.to("meta") for x in (q, k, v)]
    plan = fg.Plan.from_mask(mask)
    with pytest.raises(fg.InputError, match="backend emulator runs on the CPU"):
        api.pick_backend(*away, plan, "emulator")
    with pytest.raises(fg.UnsupportedError, match="the tensors are on meta"):
        api.pick_backend(*away, plan, "auto")


def test_another_gpu_is_refused_with_what_would_work(monkeypatch):
    q, _, _, _ = case()

    class OnGpu:
        device, shape, dtype = torch.device("cuda:0"), q.shape, q.dtype

    ampere = gpu.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20, "cuda:0")
    monkeypatch.setattr(gpu, "from_cuda", lambda device: ampere)
    for backend in ("auto", "cuda"):
        with pytest.raises(fg.UnsupportedError) as caught:
            api.pick_backend(OnGpu, OnGpu, OnGpu, None, backend)
        assert "A100-SXM4-80GB has compute capability 8.0" in str(caught.value)
        assert 'backend="reference"' in str(caught.value)


# ---- explain ---------------------------------------------------------------------------------------------------------
def test_explain_says_what_why_and_at_what_cost(monkeypatch):
    monkeypatch.setenv("FGATTN_GPU", "h200")
    q, k, v, mask = case(batch=2, heads=4, kv_heads=2, head_dim=128, slice_m=192, seqlen_q=400)
    told = fg.explain(q, k, v, mask)
    assert told.choice.preset_id == "m192-d128"
    assert told.effective_flops == 4 * 128 * 400 * 210 * 2 * 4
    assert told.packed_flops == pytest.approx(told.effective_flops * mask.density, abs=1)
    assert told.grid == 2 * 4 * 3
    text = str(told)
    for words in ("NVIDIA H200", "m192-d128", "132,096 bytes", "ping-pong", "density", "packed", "m192-exact-d128"):
        assert words in text
    data = json.loads(json.dumps(told.as_dict()))
    assert data["choice"]["spec"]["tile_n"] == 80 and data["choice"]["smem_bytes"] == 132096
    assert data["gpu"]["source"] == "configs/h200.yaml"
    assert data["runners_up"][0]["preset"] == "m192-exact-d128"


def test_explain_shares_lists_and_counts_idle_rows():
    q, k, v, mask = case(head_dim=128, slice_m=80)
    told = fg.explain(q, k, v, mask)
    assert told.choice.spec.tile_m == 128 and told.row_efficiency == 80 / 128
    assert "62% of their rows in use" in str(told)
    shared = fg.explain(*case(head_dim=128, slice_m=256, seqlen_q=512))
    assert "2 CTAs share a list" in str(shared)


def test_explain_of_a_call_that_would_be_refused():
    q, k, v, mask = case()
    told = fg.explain(q.float(), k.float(), v.float(), mask)
    assert told.choice is None and any("float32" in reason for reason in told.refused)
    assert "float32" in str(told) and json.dumps(told.as_dict())


def test_explain_with_a_spec_of_ones_own():
    q, k, v, mask = case()
    told = fg.explain(q, k, v, mask, spec=fg.FwdSpec(head_dim=64, tile_m=64, tile_n=48))
    assert told.choice.source == "explicit" and "n48" in told.choice.spec.name
    assert any(r.preset_id == "m64-d64" for r in told.runners_up)


@pytest.mark.parametrize("slice_n, loads", [(1, "gathered, aligned runs of 8 keys by TMA"), (8, "by TMA boxes")])
def test_explain_says_how_keys_come(slice_n, loads):
    q = torch.zeros(1, 200, 1, 128, dtype=torch.bfloat16)
    mask = fg.SliceMask.full(slice_m=192, slice_n=slice_n, seqlen_q=200, seqlen_k=200)
    assert f"K and V {loads}, grid" in str(fg.explain(q, q, q, fg.Plan.from_mask(mask)))


def test_explain_says_how_work_is_shared_out():
    """128 rows: in zigzag where the plan knows that its lists are even, else in waves."""
    q = torch.zeros(1, 512, 1, 128, dtype=torch.bfloat16)
    mask = fg.SliceMask.from_dense(torch.rand(1, 1, 4, 512) < 0.3, slice_m=128, slice_n=1, seqlen_q=512, seqlen_k=512)
    for even, said in (
        (True, "persistent CTAs in zigzag (lists are even)"),
        (False, "persistent CTAs in waves (lists"),
    ):
        assert said in str(fg.explain(q, q, q, fg.Plan.from_mask(mask, even=even)))
