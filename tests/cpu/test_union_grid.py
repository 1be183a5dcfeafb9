# SPDX-License-Identifier: Apache-2.0
"""Unions on the emulator against the oracle and against lists of the blocks' own, over all sizes and factors."""

import itertools

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import emulator
from fgattn_cute.unions import rows_for
from tests.numerics import assert_within_contract

SIZES = [(m, rows) for m in (16, 32, 48, 64, 96) for rows in rows_for(m)]
FACTORS = (1.0, 1.5, 2.0, 4.0, 8.0)
UNIONS = 3


def overlapping(slice_m, rows, factor, *, slice_n=1, heads=2, seed=0):
    """A mask whose unions have a factor: each of n blocks keeps ``own`` columns of its own and ``common`` of all.

    Pairs computed over kept are (common + n own) / (common + own). Per head one block inside a union keeps nothing and
    one union keeps nothing; a block's tail of queries and a column's tail of keys are cut off.
    """
    n = rows // slice_m
    common, own = (n - factor) / (n - 1), (factor - 1) / (n - 1)  # kept columns, in units of what a block keeps
    each = 72 if factor < 3 else 40  # more than a tile for a union, few enough for the emulator
    common, own = round(common * each), round(own * each)
    columns = 8 + common + n * own  # 8 that nobody keeps
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(1, heads, UNIONS * n, columns, dtype=torch.bool)
    for head, union in itertools.product(range(heads), range(UNIONS)):
        place = torch.randperm(columns - 8, generator=generator) + 8
        for block in range(n):
            first = common + block * own
            row = keep[0, head, union * n + block]
            row[place[:common]] = True
            row[place[first : first + own]] = True
    geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": UNIONS * rows - 7, "seqlen_k": columns * slice_n}
    if slice_n > 1:
        geometry["seqlen_k"] -= 1
    found = fg.SliceMask.from_dense(keep, **geometry)
    keep[:, 0, n + 1] = False  # inside the second union
    keep[:, -1, :n] = False  # the whole first union
    return found, fg.SliceMask.from_dense(keep, **geometry)


def possible(slice_m, rows, factor):
    """Disjoint blocks have the largest factor that there is."""
    return factor <= rows // slice_m


GRID = [(m, rows, u, softmax) for m, rows in SIZES for u in FACTORS for softmax in ("fixed_ref", "exact")]
GRID = [point for point in GRID if possible(*point[:3])]
QUICK = {(16, 128, 8.0, "fixed_ref"), (48, 192, 2.0, "fixed_ref")}


@pytest.mark.parametrize(
    ("slice_m", "rows", "factor"), [(m, r, u) for m, r in SIZES for u in FACTORS if possible(m, r, u)]
)
def test_the_masks_have_the_factor(slice_m, rows, factor):
    full, _ = overlapping(slice_m, rows, factor)
    assert fg.UnionPlan.from_mask(full, rows=rows).union_factor == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize(
    ("slice_m", "rows", "factor", "softmax"),
    [pytest.param(*point, marks=() if point in QUICK else pytest.mark.slow) for point in GRID],
)
def test_blocks_get_their_own_softmax(slice_m, rows, factor, softmax):
    """Two query heads to a key head, poisoned rows, keys that nobody keeps, a union and a block without keys."""
    slice_n = 3 if factor == 2.0 else 1
    _, mask = overlapping(slice_m, rows, factor, slice_n=slice_n)
    dtype = torch.bfloat16 if softmax == "fixed_ref" else torch.float16
    q = torch.randn(1, mask.seqlen_q, 2, 64)
    k, v = (torch.randn(1, mask.seqlen_k, 1, 64) for _ in range(2))
    q[:, ::37] *= 60  # rows that fixed_ref leaves to the redo launch
    q, k, v = (x.to(dtype) for x in (q, k, v))
    unused = ~mask.to_token_mask().any(2).any(1)[0]
    assert unused[:8].all()
    k[:, unused], v[:, unused] = float("nan"), float("nan")
    plan = fg.UnionPlan.from_mask(mask, rows=rows)
    with emulator.session(seed=slice_m, checks="all"):
        out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator")
    assert fg.explain(q, k, v, plan).choice.spec.softmax == softmax
    assert_within_contract(out, lse, q, k, v, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("slice_m", "rows"), SIZES)
def test_shared_and_own_lists_agree(slice_m, rows):
    """The padded kernel sums in another order, so they agree to the rounding of both."""
    _, mask = overlapping(slice_m, rows, 1.5)
    q, k, v = (torch.randn(1, n, 2, 128).bfloat16() for n in (mask.seqlen_q, mask.seqlen_k, mask.seqlen_k))
    plans = (
        fg.Plan.from_mask(mask),
        fg.UnionPlan.from_mask(mask, rows=rows),
        fg.UnionPlan.from_mask(mask, "similar", rows=rows),
    )
    with emulator.session(seed=7, checks="all"):
        (own, own_lse), *shared = (fg.attention(q, k, v, p, return_lse=True, backend="emulator") for p in plans)
    for out, lse in shared:
        assert torch.equal(lse == -torch.inf, own_lse == -torch.inf)
        kept = own_lse != -torch.inf
        assert torch.allclose(lse[kept], own_lse[kept], atol=2e-4)
        assert (out.float() - own.float()).abs().max() <= 2**-6
