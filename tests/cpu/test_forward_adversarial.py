# SPDX-License-Identifier: Apache-2.0
"""Logits that break a careless softmax, in both modes: the contract, and a band that eager rounding cannot widen.

Scores are exact products of small numbers and count in octaves: q = a e0, k = s e0 and scale = ln 2 give 2^(a s).
"""

import dataclasses
import math

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import launch
from tests.forward_cases import bits_of, emulate, named, only_first_pass, same_bits, tiny_spec
from tests.numerics import assert_within_contract

TILE = 64
TILES = 6
KEYS = TILES * TILE + 1  # the last tile holds one key
FIXED = tiny_spec(tile_n=TILE)
EXACT = tiny_spec(tile_n=TILE, softmax="exact")
HALF = tiny_spec(tile_n=TILE, softmax="exact", dtype="fp16")
WIDE = tiny_spec(tile_n=TILE, tile_m=192, ping_pong=True)
SPECS = {"fixed_ref": FIXED, "fixed_ref, ping-pong": WIDE, "exact": EXACT, "exact, fp16": HALF}
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

TILE_OF = torch.arange(KEYS) // TILE
IN_TILE = torch.arange(KEYS) % TILE


def climb(octaves):
    return TILE_OF * float(octaves)


def spike(octaves, at):
    return torch.where(torch.arange(KEYS) == at, float(octaves), 0.0)


# Octaves of each key for a row of weight 1. Rows have other weights too, see ROWS.
SCORES = {
    **{f"climbs {c} octaves a tile": climb(c) for c in (10, 40, 59, 61, 90, 99, 101, 130, 300)},
    "falls 130 octaves a tile": climb(-130),
    "up and down by 120 octaves": (TILE_OF % 2) * 120.0,
    "up and down by 50 octaves inside a tile": (IN_TILE % 3) * 50.0 - TILE_OF,
    "a first tile far below": torch.where(TILE_OF == 0, -1000.0, 0.0),
    "one huge key in the last full tile": spike(200, KEYS - 2),
    "one huge key alone in the tail": spike(200, KEYS - 1),
    "one low key alone in the tail": spike(-200, KEYS - 1),
    "one key at the guard's edge": spike(60, KEYS - 2),
    "one key below the overflow's edge": spike(99, KEYS - 70),
    "one key above the overflow's edge": spike(101, KEYS - 2),
    "all equal": torch.full((KEYS,), 7.0),
    "all zero": torch.zeros(KEYS),
}
ROWS = torch.tensor([1.0, 0.0, 0.5, -1.0, 0.25, 1.5, -0.125, 0.75])  # weights of the query rows, in turn


def vectors(spec, queries, octaves, extra=0.0):
    """q, k, v and a plan that keeps every key, with log2-scores queries x octaves."""
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float16
    q, k = torch.zeros(1, len(queries), 1, 64), torch.zeros(1, len(octaves), 1, 64)
    q[..., 0], k[..., 0] = queries[None, :, None], octaves[None, :, None]
    v = torch.randn(1, len(octaves), 1, 64) + extra
    plan = fg.SliceMask.full(slice_m=spec.tile_m, slice_n=spec.slice_n, seqlen_q=len(queries), seqlen_k=len(octaves))
    return q.to(dtype), k.to(dtype), v.to(dtype), fg.Plan.from_mask(plan, grouped=spec.kv_loads == "octets")


def assert_tight(out, lse, q, k, v, plan, scale, rows=slice(None)):
    """Error against the fp64 oracle at most one rounding of P and one of out, whatever eager attention does.

    rows: which (batch, head, query) to look at.
    """
    want, want_lse = fg.reference.attention(q, k, v, plan, scale=scale, return_lse=True, dtype=torch.float64)
    largest = scale * q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()
    of_scores = 2.0**-22 * (1 + largest)  # rounding of scores and references in fp32
    error = (out.double() - want).transpose(1, 2).abs().amax(-1)[rows]
    assert error.max() <= v.double().abs().max() * (EPSILON[q.dtype] + of_scores), "out"
    assert (lse.double() - want_lse)[rows].abs().max() <= 1e-5 + of_scores, "lse"


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mode", SPECS)
def test_adversarial_scores_stay_within_the_contract(mode, name):
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, ROWS.repeat(spec.tile_m // 8), SCORES[name])
    out, lse, report = emulate(q, k, v, plan, spec=spec, scale=math.log(2))
    assert_tight(out, lse, q, k, v, plan, math.log(2))
    assert_within_contract(out, lse, q, k, v, plan, scale=math.log(2))
    assert len(report) == (2 if spec.softmax == "fixed_ref" else 1)


@pytest.mark.parametrize("sigma", [1, 20, 60])
@pytest.mark.parametrize("mode", SPECS)
def test_wide_logits(mode, sigma):
    """Scores with a standard deviation of 20 and 60 nats: one key of a row takes nearly everything."""
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, torch.zeros(spec.tile_m + 30), torch.zeros(KEYS + 100))
    q, k = torch.randn_like(q), torch.randn_like(k)
    scale = sigma / 8  # |q.k| has a deviation of sqrt(64)
    out, lse, _ = emulate(q, k, v, plan, spec=spec, scale=scale)
    assert_tight(out, lse, q, k, v, plan, scale)
    assert_within_contract(out, lse, q, k, v, plan, scale=scale)


@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-45, 0.0])
def test_scale_that_underflows_gives_equal_weights(mode, scale):
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, ROWS.repeat(spec.tile_m // 8), SCORES["climbs 10 octaves a tile"])
    out, lse, _ = emulate(q, k, v, plan, spec=spec, scale=scale)
    assert_within_contract(out, lse, q, k, v, plan, scale=scale)
    assert (lse - math.log(KEYS)).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["fixed_ref", "exact"])
@pytest.mark.parametrize("where", ["nowhere else", "in the first tile", "all but one key"])
def test_scores_that_overflow_to_minus_infinity(mode, where):
    """q.k = -2^128 is -inf in fp32: such a key weighs nothing, and a first tile of them gives no reference."""
    spec = SPECS[mode]
    low = {
        "nowhere else": torch.arange(KEYS) == 100,
        "in the first tile": TILE_OF == 0,
        "all but one key": torch.arange(KEYS) != KEYS - 1,
    }[where]
    q, k, v, plan = vectors(spec, torch.full((64,), 2.0**100), torch.where(low, -(2.0**100), 0.0))
    out, lse, _ = emulate(q, k, v, plan, spec=spec, scale=1.0)
    kept = (~low).nonzero().flatten()
    want = v[0, kept, 0].double().mean(0)
    assert (out[0, :, 0].double() - want).abs().max() <= 2 * EPSILON[v.dtype] * v.double().abs().max()
    assert (lse - math.log(len(kept))).abs().max() < 1e-5


@pytest.mark.parametrize("largest", [2.0**20, 2.0**60, 2.0**100])
@pytest.mark.parametrize("mode", ["fixed_ref", "exact"])
def test_large_values(mode, largest):
    """|V| far above 1, with scores that spread over 25 octaves: neither sums nor products may overflow."""
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, ROWS.repeat(spec.tile_m // 8), climb(4) + IN_TILE / 32)
    v = (v * largest).to(v.dtype)
    out, lse, _ = emulate(q, k, v, plan, spec=spec, scale=math.log(2))
    assert_tight(out, lse, q, k, v, plan, math.log(2))
    assert_within_contract(out, lse, q, k, v, plan, scale=math.log(2))


# ---- fixed_ref: the guard, the poison and the redo pass --------------------------------------------------------------
def poisoned_rows(lse):
    return lse.isnan() | (lse == math.inf)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mode", ["fixed_ref", "fixed_ref, ping-pong"])
def test_the_first_pass_is_right_or_says_that_it_is_not(mode, name):
    """No row may be wrong and look right: only rows with LSE = +inf reach the redo pass."""
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, ROWS.repeat(spec.tile_m // 8), SCORES[name])
    out, lse, _ = only_first_pass(q, k, v, plan, spec=spec, scale=math.log(2))
    bad = poisoned_rows(lse)
    assert_tight(out, lse, q, k, v, plan, math.log(2), rows=~bad)
    # Octaves that a row's scores reach above its first tile, which is the reference.
    scores = ROWS.repeat(spec.tile_m // 8)[:, None] * SCORES[name].bfloat16().float()
    rise = scores.amax(-1) - scores[:, :TILE].amax(-1)
    assert bad[0, 0][rise > 100 + 60 * (TILES - 1)].all(), "above what guards can follow"
    assert not bad[0, 0][rise < 90].any(), "nothing to poison"


def test_values_that_overflow_in_the_first_pass_only():
    """2^24 times |V| = 2^110 is no fp32 number, though the mean is: the row must be poisoned, then repaired."""
    q, k, v, plan = vectors(FIXED, ROWS.repeat(8), climb(4) + IN_TILE / 32)
    v = (v * 2.0**110).to(v.dtype)
    first = only_first_pass(q, k, v, plan, spec=FIXED, scale=math.log(2))
    bad = poisoned_rows(first.lse)
    assert bad.any() and not bad.all()
    assert_tight(first.out, first.lse, q, k, v, plan, math.log(2), rows=~bad)
    both = emulate(q, k, v, plan, spec=FIXED, scale=math.log(2))
    assert_tight(both.out, both.lse, q, k, v, plan, math.log(2))


@pytest.mark.parametrize(
    "name", ["climbs 130 octaves a tile", "one huge key in the last full tile", "a first tile far below"]
)
@pytest.mark.parametrize("mode", ["fixed_ref", "fixed_ref, ping-pong"])
def test_the_redo_pass_repairs_what_fixed_ref_alone_gets_wrong(mode, name):
    spec = SPECS[mode]
    q, k, v, plan = vectors(spec, ROWS.repeat(spec.tile_m // 8), SCORES[name])
    case = (q, k, v, plan)
    first = only_first_pass(*case, spec=spec, scale=math.log(2))
    assert poisoned_rows(first.lse).any()
    with pytest.raises(AssertionError):
        assert_within_contract(first.out, first.lse, *case, scale=math.log(2))
    both = emulate(*case, spec=spec, scale=math.log(2))
    assert [("redo" in name) for name in both.kernels] == [False, True]
    assert_within_contract(both.out, both.lse, *case, scale=math.log(2))
    assert_tight(both.out, both.lse, *case, math.log(2))


REDONE = {
    "grid": ({}, 2),
    "persistent": ({"scheduler": "persistent"}, 1),
    "runs": ({"kv_loads": "runs"}, 1),
    "octets": ({"kv_loads": "octets"}, 1),
    "boxes": ({"kv_loads": "boxes", "slice_n": 8}, 1),
}


@pytest.mark.parametrize("fields, num_sms", REDONE.values(), ids=REDONE)
def test_redo_recomputes_the_poisoned_blocks_and_touches_no_other(fields, num_sms):
    """Six blocks of which two hold a bad row each, one row in the last, partial block. The others keep every bit."""
    spec = tiny_spec(**fields)
    queries = torch.ones(64 * 5 + 20) * 0.01
    bad_rows = (64 + 37, 64 * 5 + 19)
    queries[list(bad_rows)] = 1.0
    q, k, v, plan = vectors(spec, queries, SCORES["one huge key in the last full tile"])
    arguments = {"scale": math.log(2), "num_sms": num_sms}
    first = only_first_pass(q, k, v, plan, spec=spec, **arguments)
    assert poisoned_rows(first.lse).nonzero()[:, 2].tolist() == list(bad_rows)
    both = emulate(q, k, v, plan, spec=spec, **arguments)
    like_redo = {"softmax": "exact", "scheduler": "grid", "kv_loads": spec.redo_spec().kv_loads}
    exact = emulate(q, k, v, plan, spec=dataclasses.replace(spec, **like_redo), **arguments)
    for block in range(6):
        rows = slice(64 * block, 64 * block + 64)
        source = exact if block in (1, 5) else first
        assert same_bits(both.out[:, rows].contiguous(), source.out[:, rows].contiguous())
        assert same_bits(both.lse[..., rows].contiguous(), source.lse[..., rows].contiguous())
    assert not same_bits(first.out[:, :64].contiguous(), exact.out[:, :64].contiguous()), "the modes round differently"
    products = [launched.result.counters["instructions.wgmma"] for launched in both.report]
    assert products[1] * 6 == products[0] * 2, "two blocks of six, with lists of the same length"


def lane_of(position):
    """Which of a row's four lanes owns a list position of a tile (slice_n 1), as kernels/gather.py places them."""
    groups = FIXED.row_groups
    row = position % FIXED.rows_per_thread * groups + position // FIXED.rows_per_thread
    return row % 8 // 2


@pytest.mark.parametrize("octaves", [59, 61, 80])
@pytest.mark.parametrize("lane", range(4))
def test_a_guard_that_only_one_lane_sees(lane, octaves):
    """One lane's part of a row passes 2^60 and the other three stay small: all four must move the reference."""
    position = next(p for p in range(TILE) if lane_of(p) == lane)
    scores = torch.zeros(KEYS)
    scores[TILE + position] = octaves
    scores[3 * TILE + position + 1] = octaves + 8  # again, above the moved reference
    scores[4 * TILE :] = octaves + 3
    q, k, v, plan = vectors(FIXED, torch.tensor([1.0, 0.0, -1.0]).repeat(11), scores)
    out, lse, _ = only_first_pass(q, k, v, plan, spec=FIXED, scale=math.log(2))
    assert not poisoned_rows(lse).any()
    assert_tight(out, lse, q, k, v, plan, math.log(2))


def test_the_positions_that_lanes_own():
    """Each lane must own a quarter, or the test above does not test what it says."""
    assert sorted(lane_of(p) for p in range(TILE)) == sorted(list(range(4)) * 16)


def test_a_guard_leaves_the_rows_beside_it_alone():
    """A warp takes the guard's path together; rows that did not need it must not change by a bit."""
    quiet = torch.linspace(-0.01, 0.01, 64)
    loud = quiet.clone()
    loud[10] = loud[45] = 1.0
    results = []
    for queries in (quiet, loud):
        q, k, v, plan = vectors(FIXED, queries, climb(40) + IN_TILE / 16)
        torch.manual_seed(1)
        results.append(only_first_pass(q, k, torch.randn_like(v), plan, spec=FIXED, scale=math.log(2)))
    rest = [i for i in range(64) if i not in (10, 45)]
    (a, b) = results
    assert same_bits(a.out[:, rest], b.out[:, rest]) and same_bits(a.lse[..., rest], b.lse[..., rest])
    assert not torch.equal(bits_of(a.lse), bits_of(b.lse))


@pytest.mark.parametrize("keys", [1, 65, 385])
def test_the_bound_that_spares_the_redo_launch(keys):
    """At the bound the second launch is made, just below it is not, and scores at the bound need none."""
    edge = (launch.SAFE_OCTAVES - math.log2(keys)) * math.log(2) / 2
    octaves = edge / math.log(2)
    swing = torch.where(torch.arange(keys) < 64, -octaves, octaves)  # from the lower bound to the upper one
    q, k, v, plan = vectors(FIXED, torch.tensor([1.0, -1.0, 0.0]), swing)
    k = torch.nextafter(k, torch.zeros_like(k))  # bf16 rounds: stay inside
    for factor, launches in ((0.999, 1), (1.001, 2)):
        result = emulate(q, k, v, plan, spec=FIXED, scale=math.log(2), logit_bound=edge * factor)
        with named(f"{factor} of the bound"):
            assert len(result.kernels) == launches
            assert not poisoned_rows(result.lse).any()
            assert_tight(result.out, result.lse, q, k, v, plan, math.log(2))
    assert len(emulate(q, k, v, plan, spec=EXACT, scale=math.log(2)).kernels) == 1
