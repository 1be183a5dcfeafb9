# SPDX-License-Identifier: Apache-2.0
"""Masks found from queries and keys, against the softmax of the whole attention map written out in float64."""

import math

import pytest
import torch

from fgattn_cute import predict, reference
from fgattn_cute.errors import InputError
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict import Budget, Threshold, TopK, TopP, mass, pooled, recall, scores

SQ, SK, M, N = 70, 90, 16, 8
SIZES = {"slice_m": M, "slice_n": N}


def inputs(batch=2, heads=4, kv_heads=2, seqlen_q=SQ, seqlen_k=SK, spread=2.0):
    q = torch.randn(batch, seqlen_q, heads, 32) * spread
    return q, torch.randn(batch, seqlen_k, kv_heads, 32)


def probabilities(q, k, scale=None):
    """float64 (B, H, Sq, Sk)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale).softmax(-1)


def expected_scores(p, slice_m=M, slice_n=N, statistic="mean"):
    """float64 (B, H, blocks, columns), one slice after the other."""
    blocks, columns = -(-p.shape[2] // slice_m), -(-p.shape[3] // slice_n)
    out = p.new_zeros(*p.shape[:2], blocks, columns)
    for i in range(blocks):
        for j in range(columns):
            part = p[:, :, i * slice_m : (i + 1) * slice_m, j * slice_n : (j + 1) * slice_n]
            out[:, :, i, j] = part.sum(3).mean(2) if statistic == "mean" else part.amax((2, 3))
    return out


def dense_lse(q, k):
    full = SliceMask.full(slice_m=16, slice_n=1, seqlen_q=q.shape[1], seqlen_k=k.shape[1])
    return reference.attention(q, k, k, full, return_lse=True)[1]


@pytest.mark.parametrize("statistic", ["mean", "max"])
@pytest.mark.parametrize("slice_n", [1, 8, 64])
@pytest.mark.parametrize("with_lse", [False, True])
def test_mass_threshold(statistic, slice_n, with_lse):
    q, k = inputs()
    expected = expected_scores(probabilities(q, k), M, slice_n, statistic)
    tau = float(expected.median())
    lse = dense_lse(q, k) if with_lse else None
    mask = mass(q, k, lse, slice_m=M, slice_n=slice_n, select=Threshold(tau), statistic=statistic)
    differs = mask.to_dense() != (expected >= tau)
    # fp32 may move only slices whose score is within rounding of tau.
    assert ((expected[differs] - tau).abs() <= 1e-5 * tau).all()
    assert differs.sum() < 4


def test_mass_in_chunks_and_other_layout(monkeypatch):
    q, k = inputs()
    whole = mass(q, k, **SIZES, select=TopK(3))
    monkeypatch.setattr(scores, "_CHUNK_SCORES", 2 * M * SK)
    assert mass(q, k, **SIZES, select=TopK(3)) == whole
    turned = mass(q.transpose(1, 2), k.transpose(1, 2), **SIZES, select=TopK(3), layout="bhsd")
    assert turned == whole


def test_mass_respects_scale():
    q, k = inputs()
    expected = expected_scores(probabilities(q, k, scale=0.01)) >= 0.08
    assert torch.equal(mass(q, k, **SIZES, select=Threshold(0.08), scale=0.01).to_dense(), expected)


def test_topk():
    q, k = inputs()
    expected = expected_scores(probabilities(q, k))
    dense = mass(q, k, **SIZES, select=TopK(3)).to_dense()
    assert (dense.sum(-1) == 3).all()
    smallest_kept = expected.masked_fill(~dense, math.inf).amin(-1)
    largest_skipped = expected.masked_fill(dense, -math.inf).amax(-1)
    assert (smallest_kept >= largest_skipped * (1 - 1e-5)).all()
    assert mass(q, k, **SIZES, select=TopK(1000)).density == 1.0
    assert mass(q, k, **SIZES, select=TopK(0)).density == 0.0


def test_topp_keeps_the_fewest_that_reach_p():
    q, k = inputs()
    expected = expected_scores(probabilities(q, k))
    dense = mass(q, k, **SIZES, select=TopP(0.7)).to_dense()
    kept = (expected * dense).sum(-1)
    assert (kept >= 0.7 - 1e-5).all()
    without_smallest = kept - expected.masked_fill(~dense, math.inf).amin(-1)
    assert (without_smallest < 0.7 + 1e-5).all()
    assert mass(q, k, **SIZES, select=TopP(0.0)).density == 0.0
    assert mass(q, k, **SIZES, select=TopP(1.0)).density > 0.99


def test_budget_is_met_over_all_heads_or_in_each():
    q, k = inputs(batch=1, seqlen_q=512, seqlen_k=640)
    q[:, :, 0] *= 4  # a head with sharp attention, another with even attention
    q[:, :, 1] *= 0.1
    shared = mass(q, k, **SIZES, select=Budget(0.3, sample=1000))
    assert shared.density == pytest.approx(0.3, abs=0.01)
    own = mass(q, k, **SIZES, select=Budget([0.1, 0.2, 0.3, 0.4], sample=1000))
    assert [own.select(heads=[h]).density for h in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)
    even = mass(q, k, **SIZES, select=Budget([0.3] * 4, sample=1000))
    assert recall(shared, q, k).mean() > recall(even, q, k).mean() + 0.001  # heads that compete keep more in all
    sampled = mass(q, k, **SIZES, select=Budget(0.3, sample=8))
    assert sampled.density == pytest.approx(0.3, abs=0.1)
    assert mass(q, k, **SIZES, select=Budget(0.0)).density == 0.0


def test_budget_does_not_keep_scores_that_vanished():
    q, k = inputs(batch=1, heads=1, kv_heads=1, spread=2000.0)
    mask = mass(q, k, slice_m=16, slice_n=1, select=Budget(0.9))
    assert 0 < mask.density < 0.5


def test_values_per_head():
    q, k = inputs()
    mask = mass(q, k, **SIZES, select=TopK([1, 2, 3, 4]))
    assert mask.to_dense().sum(-1)[1, :, 0].tolist() == [1, 2, 3, 4]
    expected = expected_scores(probabilities(q, k))
    taus = [0.01, 0.05, 0.1, 1.0]
    for head, tau in enumerate(taus):
        got = mass(q, k, **SIZES, select=Threshold(taus)).to_dense()[:, head]
        assert torch.equal(got, expected[:, head] >= tau)


@pytest.mark.parametrize("slice_n", [1, 8])
def test_pooled(slice_n):
    q, k = inputs()
    means_q = torch.stack([q[:, i : i + M].double().mean(1) for i in range(0, SQ, M)], 1)
    means_k = torch.stack([k[:, j : j + slice_n].double().mean(1) for j in range(0, SK, slice_n)], 1)
    expected = probabilities(means_q, means_k, scale=32**-0.5)
    mask = pooled(q, k, slice_m=M, slice_n=slice_n, select=Threshold(0.05))
    assert (mask.slice_m, mask.slice_n, mask.seqlen_q, mask.seqlen_k) == (M, slice_n, SQ, SK)
    assert torch.equal(mask.to_dense(), expected >= 0.05)
    assert (pooled(q, k, slice_m=M, slice_n=slice_n, select=TopK(2)).to_dense().sum(-1) == 2).all()


def test_recall_is_the_kept_share_of_the_softmax():
    q, k = inputs()
    p = probabilities(q, k)
    for heads in (1, 4):
        keep = torch.rand(1, heads, 5, 12) < 0.4
        mask = SliceMask.from_dense(keep, **SIZES, seqlen_q=SQ, seqlen_k=SK)
        expected = (p * mask.to_token_mask()).sum(-1).mean(-1)
        torch.testing.assert_close(recall(mask, q, k), expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(recall(mask, q, k, dense_lse(q, k)), expected.float(), rtol=1e-5, atol=1e-6)
    assert recall(SliceMask.full(**SIZES, seqlen_q=SQ, seqlen_k=SK), q, k).min() > 1 - 1e-5


def test_exact_mass_recalls_more_than_chance_and_than_pooling_at_equal_density():
    q, k = inputs(batch=1)
    by_mass = mass(q, k, **SIZES, select=TopK(3))
    by_pool = pooled(q, k, **SIZES, select=TopK(3))
    chance = SliceMask.from_dense(torch.rand(1, 4, 5, 12).argsort(-1) < 3, **SIZES, seqlen_q=SQ, seqlen_k=SK)
    found, stand_in, random = (float(recall(mask, q, k).mean()) for mask in (by_mass, by_pool, chance))
    assert found > stand_in and found > random + 0.05


def test_composition():
    q, k = inputs(batch=1)
    coarse = pooled(q, k, slice_m=32, slice_n=16, select=TopK(2)).refine(M, N)
    text = predict.sinks(10, **SIZES, seqlen_q=SQ, seqlen_k=SK)
    both = text | coarse | mass(q, k, **SIZES, select=Threshold(0.1))
    assert both.heads == 4 and (both & text).density == text.density
    assert recall(both, q, k).min() >= recall(coarse, q, k).min()


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        (Threshold, 1.5, "tau=1.5 is not a number from 0.0 to 1.0"),
        (Threshold, -0.1, "tau=-0.1"),
        (Threshold, "0.5", "tau='0.5'"),
        (Threshold, [], r"tau=\[\]"),
        (Threshold, math.nan, "tau=nan"),
        (TopK, -1, "n=-1 is not a whole number of at least 0"),
        (TopK, 2.5, "n=2.5"),
        (TopP, 2, "p=2 is not a number from 0.0 to 1.0"),
        (Budget, 1.01, "density=1.01"),
    ],
)
def test_rules_refuse_bad_values(rule, value, message):
    with pytest.raises(InputError, match=message):
        rule(value)


def test_refusals_list_every_reason():
    q, k = inputs()
    with pytest.raises(InputError, match=r"q is not a float tensor .*; select is a float, not a Threshold, TopK"):
        mass(q[0], k, **SIZES, select=0.5)
    with pytest.raises(
        InputError, match=r"differ in batch or head_dim; 3 query heads are not a multiple of 2 key heads"
    ):
        mass(q[:1, :, :3], k, **SIZES, select=TopK(1))
    with pytest.raises(InputError, match=r"lse \(2, 70\) cpu is not \(batch, heads, seqlen_q\) = \(2, 4, 70\)"):
        mass(q, k, torch.zeros(2, 70), **SIZES, select=TopK(1))
    with pytest.raises(InputError, match="statistic='median' is not one of 'mean', 'max'"):
        mass(q, k, **SIZES, select=TopK(1), statistic="median")
    with pytest.raises(InputError, match="Threshold holds 2 values, q has 4 heads"):
        mass(q, k, **SIZES, select=Threshold([0.1, 0.2]))
    with pytest.raises(InputError, match="slice_n=0"):
        mass(q, k, slice_m=16, slice_n=0, select=TopK(1))
    with pytest.raises(InputError, match="the mask is for seqlen 70 x 91, q and k have 70 x 90"):
        recall(SliceMask.full(**SIZES, seqlen_q=70, seqlen_k=91), q, k)
    with pytest.raises(InputError, match=r"the mask holds 1 x 3 \(batch, heads\), q has 2 x 4"):
        recall(SliceMask.full(**SIZES, seqlen_q=70, seqlen_k=90, heads=3), q, k)
