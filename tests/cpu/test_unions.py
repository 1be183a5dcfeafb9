# SPDX-License-Identifier: Apache-2.0
"""Union plans: what they hold, and that blocks which share a list get exactly their own softmax."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fgattn_cute as fg
from fgattn_cute import emulator
from fgattn_cute.unions import rows_for, word_starts
from tests.numerics import assert_within_contract


def random_mask(slice_m, slice_n, seqlens, *, batch=1, heads=2, density=0.3, seed=0):
    """Includes a union that keeps nothing, a block that keeps nothing inside one that does, and a one-key block."""
    generator = torch.Generator().manual_seed(seed)
    blocks, columns = -(-seqlens[0] // slice_m), -(-seqlens[1] // slice_n)
    keep = torch.rand(batch, heads, blocks, columns, generator=generator) < density
    size = rows_for(slice_m)[0] // slice_m
    keep[0, 0, :size] = False
    if blocks > size + 1:
        keep[0, 0, size] = False
        keep[0, 0, size + 1] = torch.arange(columns) == columns - 1
    geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlens[0], "seqlen_k": seqlens[1]}
    return fg.SliceMask.from_dense(keep, **geometry)


def inputs(mask, head_dim, dtype, heads=2, kv_heads=None, batch=1):
    q = torch.randn(batch, mask.seqlen_q, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, mask.seqlen_k, kv_heads or heads, head_dim).to(dtype) for _ in range(2))
    return q, k, v


# ---- the plan ------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(m, rows) for m in (16, 32, 48, 64, 96) for rows in rows_for(m)]),
    slice_n=st.sampled_from([1, 2, 3, 8, 100]),
    seqlens=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 9),
    shuffled=st.booleans(),
)
def test_the_mask_comes_back(shape, slice_n, seqlens, density, seed, shuffled):
    mask = random_mask(shape[0], slice_n, seqlens, density=density, seed=seed)
    order = torch.randperm(mask.blocks_q) if shuffled else None
    plan = fg.UnionPlan.from_mask(mask, order, rows=shape[1])
    assert plan.to_mask() == mask
    assert plan.union_blocks * plan.slice_m == plan.lists.slice_m == shape[1]
    assert plan.density == mask.density


def test_lists_are_the_unions():
    mask = random_mask(16, 1, (300, 200))
    plan = fg.UnionPlan.from_mask(mask)
    dense = mask.to_dense()
    for union in range(-(-mask.blocks_q // 8)):
        kept = dense[0, 1, 8 * union : 8 * union + 8].any(0).nonzero().flatten()
        start, keys = int(plan.lists.offset[0, 1, union]), int(plan.lists.keys[0, 1, union])
        assert torch.equal(plan.ids[start : start + keys].long(), kept)
    assert plan.union_blocks == 8 and plan.slice_m == 16 and plan.density == mask.density


def test_union_factor():
    """Equal blocks share everything, disjoint ones nothing."""
    keep = torch.zeros(1, 1, 8, 80, dtype=torch.bool)
    keep[..., :10] = True
    geometry = {"slice_m": 16, "slice_n": 1, "seqlen_q": 128, "seqlen_k": 80}
    assert fg.UnionPlan.from_mask(fg.SliceMask.from_dense(keep, **geometry)).union_factor == 1.0
    keep = torch.eye(8, dtype=torch.bool).repeat_interleave(10, 1)[None, None]
    assert fg.UnionPlan.from_mask(fg.SliceMask.from_dense(keep, **geometry)).union_factor == 8.0


def test_bad_input():
    mask = random_mask(16, 1, (300, 200))
    with pytest.raises(fg.PlanError, match="slice_m 48 does not share a CTA of 128 rows"):
        fg.UnionPlan.from_mask(random_mask(48, 1, (300, 200)), rows=128)
    with pytest.raises(fg.PlanError, match="slice_m 80 does not share a CTA of 128 or 192 rows"):
        fg.UnionPlan.from_mask(fg.SliceMask.full(slice_m=80, slice_n=1, seqlen_q=300, seqlen_k=200))
    with pytest.raises(fg.PlanError, match="order is not an int64 permutation of 19"):
        fg.UnionPlan.from_mask(mask, torch.arange(5))
    with pytest.raises(fg.PlanError, match="made from a SliceMask, not from Plan"):
        fg.UnionPlan.from_mask(fg.Plan.from_mask(mask))


@pytest.mark.parametrize(("slice_m", "slice_n"), [(16, 1), (32, 3)])
def test_the_kernel_packs_the_same_bits(slice_m, slice_n):
    mask = random_mask(slice_m, slice_n, (400, 333))
    order = torch.randperm(mask.blocks_q)
    expected = fg.UnionPlan.from_mask(mask, order, backend="torch")
    with emulator.session(seed=1, checks="all"):
        found = fg.UnionPlan.from_mask(mask, order, backend="emulator")
    assert torch.equal(found.members, expected.members)
    assert word_starts(found.lists).diff().min() >= 1


# ---- attention -----------------------------------------------------------------------------------------------------
CASES = {
    "16 x 1": {"slice_m": 16, "slice_n": 1, "seqlens": (300, 500)},
    "16 x 1, one tile": {"slice_m": 16, "slice_n": 1, "seqlens": (113, 100)},
    "16 x 1, one query and key": {"slice_m": 16, "slice_n": 1, "seqlens": (1, 1), "density": 1.0},
    "32 x 1, shuffled, grouped heads": {
        "slice_m": 32,
        "slice_n": 1,
        "seqlens": (257, 384),
        "kv_heads": 1,
        "shuffled": True,
    },
    "64 x 1, shared by batch": {"slice_m": 64, "slice_n": 1, "seqlens": (200, 333), "batch": 2, "shuffled": True},
    "16 x 8": {"slice_m": 16, "slice_n": 8, "seqlens": (200, 501), "density": 0.1},
    "16 x 1, everything": {"slice_m": 16, "slice_n": 1, "seqlens": (128, 257), "density": 1.0},
    "16 x 1, hardly anything": {"slice_m": 16, "slice_n": 1, "seqlens": (256, 700), "density": 0.01},
    "exact softmax": {"slice_m": 16, "slice_n": 1, "seqlens": (300, 500), "dtype": torch.float16, "shuffled": True},
    "48 x 1, four to 192 rows, grouped heads": {"slice_m": 48, "slice_n": 1, "seqlens": (400, 390), "kv_heads": 1},
    "head dim 64": {"slice_m": 16, "slice_n": 1, "seqlens": (300, 500), "head_dim": 64},
    "head dim 96": {"slice_m": 32, "slice_n": 1, "seqlens": (300, 500), "head_dim": 96},
    "head dim 256": {"slice_m": 16, "slice_n": 1, "seqlens": (150, 300), "head_dim": 256},
}
SLOW_CASES = {
    "96 x 2, two to 192 rows": {"slice_m": 96, "slice_n": 2, "seqlens": (290, 333), "shuffled": True},
    "16 x 1, twelve to 192 rows": {"slice_m": 16, "slice_n": 1, "seqlens": (300, 300), "rows": 192, "shuffled": True},
    "64 x 1, three to 192 rows, exact": {
        "slice_m": 64,
        "slice_n": 1,
        "seqlens": (330, 200),
        "rows": 192,
        "dtype": torch.float16,
    },
    "192 rows, head dim 64": {"slice_m": 32, "slice_n": 1, "seqlens": (250, 400), "head_dim": 64, "rows": 192},
}


def cases():
    yield from (pytest.param(case, id=name) for name, case in CASES.items())
    yield from (pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items())


@pytest.mark.parametrize("case", list(cases()))
def test_every_block_gets_its_own_softmax(case):
    case = {
        "density": 0.3,
        "shuffled": False,
        "batch": 1,
        "kv_heads": None,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "rows": None,
    } | case
    mask = random_mask(case["slice_m"], case["slice_n"], case["seqlens"], density=case["density"])
    plan = fg.UnionPlan.from_mask(mask, torch.randperm(mask.blocks_q) if case["shuffled"] else None, rows=case["rows"])
    q, k, v = inputs(mask, case["head_dim"], case["dtype"], kv_heads=case["kv_heads"], batch=case["batch"])
    # Keys that nobody keeps are NaN, key 0 among them where possible: it pads the lists.
    unused = ~mask.to_token_mask().any(2).any(1)[0]
    k[:, unused], v[:, unused] = float("nan"), float("nan")
    with emulator.session(seed=3, checks="all"):
        out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator")
    assert_within_contract(out, lse, q, k, v, mask)


@pytest.mark.parametrize("what", ["huge unkept key", "climbing", "sigma of 20 nats"])
def test_adversarial_logits(what):
    """A row's reference may come from a key that it does not keep: underflow must not cost bits, or rows."""
    mask = random_mask(16, 1, (128, 700), heads=1, density=0.2)
    q, k, v = inputs(mask, 128, torch.bfloat16, heads=1)
    if what == "huge unkept key":
        dense = mask.to_dense()
        dense[0, 0, :4, 5], dense[0, 0, 4:, 5] = False, True
        mask = fg.SliceMask.from_dense(dense, slice_m=16, slice_n=1, seqlen_q=128, seqlen_k=700)
        q = 0.5 + 0.02 * q
        k = 0.02 * k
        k[:, 5] = 40.0
    elif what == "climbing":
        q = 0.5 + 0.02 * q
        k = torch.linspace(0, 60, 700)[None, :, None, None] + 0.02 * k
    else:
        q = 20 * q
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    with emulator.session(seed=2, checks="all"):
        out, lse = fg.attention(q, k, v, fg.UnionPlan.from_mask(mask), return_lse=True, backend="emulator")
    assert_within_contract(out, lse, q, k, v, mask)


def test_the_order_of_blocks_changes_nothing_but_the_lists():
    mask = random_mask(16, 1, (256, 300))
    q, k, v = inputs(mask, 64, torch.bfloat16)
    results = []
    for order in (None, torch.arange(mask.blocks_q)):
        with emulator.session(seed=5, checks="all"):
            plan = fg.UnionPlan.from_mask(mask, order)
            results.append(fg.attention(q, k, v, plan, return_lse=True, backend="emulator"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_takes_a_union_plan():
    mask = random_mask(16, 2, (100, 90))
    q, k, v = inputs(mask, 64, torch.bfloat16)
    out = fg.attention(q, k, v, fg.UnionPlan.from_mask(mask))
    assert torch.equal(out, fg.attention(q, k, v, mask))


def test_explain_names_the_union():
    mask = random_mask(16, 1, (300, 200))
    q, k, v = inputs(mask, 128, torch.bfloat16)
    text = str(fg.explain(q, k, v, fg.UnionPlan.from_mask(mask)))
    assert "8 blocks to a union" in text and "_u8" in text


@pytest.mark.parametrize(("slice_m", "rows"), [(32, 128), (48, 192)])
def test_a_kernel_for_other_rows_is_refused(slice_m, rows):
    """Four blocks of 48 rows fill 192, four of 32 fill 128: the number of blocks alone does not tell them apart."""
    mask = random_mask(slice_m, 1, (400, 200))
    plan = fg.UnionPlan.from_mask(mask, rows=rows)
    q, k, v = inputs(mask, 128, torch.bfloat16)
    other = fg.FwdSpec(head_dim=128, tile_m=320 - rows, tile_n=64)
    with pytest.raises(fg.UnsupportedError, match=f"tile_m {320 - rows} is not the {rows} rows of a union"):
        fg.attention(q, k, v, plan, spec=other, backend="emulator")
    explained = fg.explain(q, k, v, plan)
    assert explained.choice.spec.tile_m == rows and explained.choice.spec.union_blocks == 4
    tuning = fg.autotune(q, k, v, plan)
    assert {c.spec.tile_m for c in tuning.candidates if c.rejected is None} == {rows}
