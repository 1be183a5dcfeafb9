# SPDX-License-Identifier: Apache-2.0
"""Orders of query blocks: permutations, whose unions are smaller where there is something to gain, and never larger."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fgattn_cute as fg
from fgattn_cute import orders
from fgattn_cute.predict import Video, spatial, temporal
from fgattn_cute.unions import rows_for
from perf.unions import pool_mask


def is_permutation(order, count):
    return torch.equal(order.sort(-1).values, torch.arange(count).expand_as(order))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(m, rows) for m in (16, 32, 48, 64, 96) for rows in rows_for(m)]),
    seqlens=st.tuples(st.integers(1, 900), st.integers(1, 200)),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_similar_is_a_permutation_and_never_worse(shape, seqlens, density, heads, seed):
    slice_m, rows = shape
    blocks = -(-seqlens[0] // slice_m)
    keep = torch.rand(1, heads, blocks, seqlens[1], generator=torch.Generator().manual_seed(seed)) < density
    mask = fg.SliceMask.from_dense(keep, slice_m=slice_m, slice_n=1, seqlen_q=seqlens[0], seqlen_k=seqlens[1])
    order = orders.similar(mask, rows)
    assert order.shape == (1, heads, blocks) and is_permutation(order, blocks)
    plan = fg.UnionPlan.from_mask(mask, "similar", rows=rows)
    assert plan.to_mask() == mask
    plain = fg.UnionPlan.from_mask(mask, rows=rows)
    assert (plan.lists.keys.sum(-1) <= plain.lists.keys.sum(-1)).all()


@pytest.mark.parametrize("slice_m", [16, 48])
def test_similar_finds_shuffled_groups_again(slice_m):
    mask = pool_mask(slice_m, 1.5, seqlen=3072, heads=2, density=0.2)
    blocks = torch.randperm(mask.blocks_q)
    shuffled = dataclasses.replace(mask, bits=mask.bits[:, :, blocks].contiguous())
    assert fg.UnionPlan.from_mask(shuffled).union_factor > 2
    assert fg.UnionPlan.from_mask(shuffled, "similar").union_factor == pytest.approx(1.5, rel=0.02)


def test_union_pairs_are_what_the_lists_hold():
    mask = pool_mask(32, 1.5, seqlen=500, heads=3, density=0.3)
    order = torch.stack([torch.randperm(mask.blocks_q) for _ in range(3)])[None]
    lists = fg.UnionPlan.from_mask(mask, order).lists
    rows = torch.tensor([128, 128, 128, 500 - 3 * 128])
    assert torch.equal(orders.union_pairs(mask, order, 128), (lists.keys * rows).sum(-1))


def test_the_cheapest_is_chosen_head_by_head():
    """A temporal head sees one place in all frames, a spatial one its frame: another order suits each."""
    video = Video(16, 16, 16)
    sizes = {"slice_m": 16, "slice_n": 1}
    heads = [temporal(video, **sizes), spatial(video, **sizes)]
    mask = dataclasses.replace(heads[0], bits=torch.cat([m.bits for m in heads], 1))
    asked = [orders.sequence(mask.blocks_q), orders.neighbours(video, 16, 128)]
    held = [orders.union_pairs(mask, order, 128)[0] for order in asked]
    assert held[1][0] < held[0][0] and held[0][1] < held[1][1]
    best = orders.cheapest(mask, asked, 128)
    assert torch.equal(best[0, 0], asked[1]) and torch.equal(best[0, 1], asked[0])


@pytest.mark.parametrize("text_first", [False, True])
def test_neighbours_are_close_in_space_and_time(text_first):
    """16 tokens are one row of an 8 x 8 grid of rows and frames: a union of 8 spans 2 x 4 of them, not 1 x 8."""
    video = Video(8, 8, 16, text=48, text_first=text_first)
    order = orders.neighbours(video, 16, 128)
    assert is_permutation(order, -(-video.seqlen // 16))
    frame, row, _ = video.coordinates()[:, (order * 16 + 8).clamp(max=video.seqlen - 1)]
    assert (frame[:64] >= 0).all() and (frame[64:] < 0).all()
    for first in range(0, 64, 8):
        part = slice(first, first + 8)
        extents = sorted(int(x[part].max() - x[part].min()) + 1 for x in (frame, row))
        assert extents == [2, 4] or extents == [3, 4], "a compact patch"


def test_tiled_tokens_and_text_alone():
    assert is_permutation(orders.neighbours(Video(5, 7, 9, tile=(2, 4, 4)), 16, 192), 20)
    assert is_permutation(orders.neighbours(Video(1, 1, 1, text=300), 32, 128), 10)


def test_bad_orders():
    mask = pool_mask(16, 1.5, seqlen=256, heads=1, density=0.2)
    with pytest.raises(fg.PlanError, match='"similar"'):
        fg.UnionPlan.from_mask(mask, "alike")
    with pytest.raises(fg.InputError, match="do not fill 128 rows"):
        orders.neighbours(Video(2, 2, 16), 48, 128)
