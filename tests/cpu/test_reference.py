# SPDX-License-Identifier: Apache-2.0
"""The oracle against formulas that know nothing of it: masked softmax in float64, torch's own attention, NaN poison."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgattn_cute import reference
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from tests.numerics import assert_within_contract, eager, token_mask
from tests.strategies import dense_maps, expand_to_tokens, geometries


def masked_softmax(q, k, v, tokens, scale):
    """float64 attention by the textbook formula over an explicit token mask. (B, S, H, D) in and out."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = scores.exp() * tokens
    total = weights.sum(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v) / total.transpose(1, 2).unsqueeze(-1).clamp(min=1e-300)
    return out, total.log()


def make(batch=1, seqlen_q=40, seqlen_k=56, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32):
    q = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype)
    k = torch.randn(batch, seqlen_k, kv_heads, head_dim).to(dtype)
    return q, k, torch.randn_like(k)


@settings(deadline=None, max_examples=40)
@given(st.data(), geometries(max_len=70), st.sampled_from([(1, 1), (3, 1), (6, 3)]), st.booleans())
def test_equals_the_formula(data, geometry, heads, as_mask):
    batch = 2
    keep = data.draw(dense_maps(geometry, batches=(1, batch), heads=(1, heads[0])))
    q, k, v = make(batch, geometry["seqlen_q"], geometry["seqlen_k"], *heads)
    mask = SliceMask.from_dense(keep, **geometry)
    plan = mask if as_mask else Plan.from_mask(mask)
    out, lse = reference.attention(q, k, v, plan, scale=0.3, return_lse=True, dtype=torch.float64)
    expected, expected_lse = masked_softmax(q, k, v, expand_to_tokens(keep, geometry), 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.expand(batch, -1, -1), rtol=1e-12, atol=1e-12)


def test_full_plan_equals_torch_attention():
    q, k, v = make(batch=2, heads=4, kv_heads=2)
    plan = Plan.from_mask(SliceMask.full(slice_m=16, slice_n=8, seqlen_q=40, seqlen_k=56))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
    out = reference.attention(*heads_first, plan, layout="bhsd")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.attention(q, k, v, plan), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_unselected_nan_changes_nothing():
    q, k, v = make(heads=1, kv_heads=1)
    keep = torch.rand(1, 1, 3, 56) < 0.3
    keep[..., :4] = False  # row 0 is where padded cells point
    plan = Plan.from_mask(SliceMask.from_dense(keep, slice_m=16, slice_n=1, seqlen_q=40, seqlen_k=56))
    clean = reference.attention(q, k, v, plan, return_lse=True)
    unused = ~keep.any(2).flatten()
    assert unused.sum() > 4
    k[:, unused], v[:, unused] = math.nan, math.inf
    poisoned = reference.attention(q, k, v, plan, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_empty_rows():
    q, k, v = make()
    keep = torch.zeros(1, 2, 3, 56, dtype=torch.bool)
    keep[0, 0, 1, 5] = True
    plan = Plan.from_mask(SliceMask.from_dense(keep, slice_m=16, slice_n=1, seqlen_q=40, seqlen_k=56))
    out, lse = reference.attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close(out[0, 16:32, 0], v[0, 5, 0].expand(16, -1))
    torch.testing.assert_close(lse[0, 0, 16:32], (q[0, 16:32, 0] * k[0, 5, 0]).sum(-1) / 4)
    assert (out[0, :, 1] == 0).all() and (out[0, :16, 0] == 0).all() and (out[0, 32:, 0] == 0).all()
    assert (lse[0, 1] == -math.inf).all() and lse.dtype == torch.float32 and lse.shape == (1, 2, 40)


def test_chunks_do_not_matter(monkeypatch):
    q, k, v = make(seqlen_q=300)
    keep = torch.rand(1, 2, 19, 56) < 0.4
    plan = Plan.from_mask(SliceMask.from_dense(keep, slice_m=16, slice_n=1, seqlen_q=300, seqlen_k=56))
    whole = reference.attention(q, k, v, plan, return_lse=True)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1200)
    for a, b in zip(whole, reference.attention(q, k, v, plan, return_lse=True), strict=True):
        torch.testing.assert_close(a, b)


def test_large_logits_do_not_overflow():
    q, k, v = make(dtype=torch.bfloat16)
    plan = Plan.from_mask(SliceMask.full(slice_m=16, slice_n=1, seqlen_q=40, seqlen_k=56))
    out, lse = reference.attention(q * 100, k * 100, v, plan, return_lse=True)
    expected, expected_lse = (x.float() for x in _log_domain(q * 100, k * 100, v))
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def _log_domain(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


# ---- the rule itself must be able to fail ---------------------------------------------------------------------------
def rule_case(dtype=torch.bfloat16):
    q, k, v = make(batch=2, heads=4, kv_heads=2, dtype=dtype)
    keep = torch.rand(2, 4, 3, 14) < 0.5
    keep[0, 0, 1] = False
    plan = Plan.from_mask(SliceMask.from_dense(keep, slice_m=16, slice_n=4, seqlen_q=40, seqlen_k=56))
    return q, k, v, plan, *reference.attention(q, k, v, plan, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rule_accepts_the_rounded_oracle_and_eager(dtype):
    q, k, v, plan, out, lse = rule_case(dtype)
    assert_within_contract(out.to(dtype), lse, q, k, v, plan)
    assert_within_contract(eager(q, k, v, plan), None, q, k, v, plan)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    assert_within_contract(out.to(dtype).transpose(1, 2), lse, *turned, plan, layout="bhsd")


def test_the_rule_rejects_faults():
    q, k, v, plan, out, lse = rule_case()
    good = out.to(q.dtype)

    def reject(message, out=good, lse=lse):
        with pytest.raises(AssertionError, match=message):
            assert_within_contract(out, lse, q, k, v, plan)

    wrong = good.clone()
    wrong[1, 7, 2, 3] += 0.1
    reject("error .* exceeds", out=wrong)
    leaky = good.clone()
    leaky[0, 20, 0, 0] = 1e-6
    reject("not exactly 0", out=leaky)
    nan = good.clone()
    nan[0, 0, 0, 0] = math.nan
    reject("NaN", out=nan)
    reject("LSE differs", lse=lse + 1e-3)
    finite = lse.clone()
    finite[0, 0, 20] = -1e30
    reject("-inf of the LSE", lse=finite)


def test_token_mask_of_a_plan_is_the_slice_definition():
    keep = torch.rand(1, 2, 3, 14) < 0.5
    geometry = {"slice_m": 16, "slice_n": 4, "seqlen_q": 40, "seqlen_k": 54}
    plan = Plan.from_mask(SliceMask.from_dense(keep, **geometry))
    assert torch.equal(token_mask(plan), expand_to_tokens(keep, geometry))
