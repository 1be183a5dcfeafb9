# SPDX-License-Identifier: Apache-2.0
"""Guided self-scheduling: who takes what, on the host and by the kernel itself."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fgattn_cute as fg
from fgattn_cute.kernels import phases
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.select import for_union
from tests.forward_cases import Case, Heads, emulate, named, tiny_spec
from tests.numerics import assert_within_contract


def by_the_rule(items, wave):
    """The rule written out: a phase has half of the rounds that are left, and a CTA for each of its first items."""
    start, found = 0, []
    while start < items:
        rounds = math.ceil((items - start) / (2 * wave))
        end = min(items, start + rounds * wave)
        found += [list(range(first, end, wave)) for first in range(start, min(start + wave, items))]
        start = end
    return found


@given(items=st.integers(0, 3000), wave=st.integers(1, 300))
def test_shares_follow_the_rule(items, wave):
    found = [list(share) for share in phases.shares(items, wave)]
    assert found == by_the_rule(items, wave)
    assert sorted(item for share in found for item in share) == list(range(items)) and all(found)
    assert phases.num_ctas(items, wave) == len(found)


def test_shares_shrink_by_half():
    """A hundred items on four slots: 25 rounds, of which 13, 6, 3, 2 and 1 make a phase."""
    assert [len(share) for share in phases.shares(100, 4)][::4] == [13, 6, 3, 2, 1]
    assert phases.num_ctas(100, 4) == 20


@given(items=st.integers(0, 3000), wave=st.integers(1, 300))
def test_zigzag_takes_every_item_once(items, wave):
    found = list(phases.zigzag(items, wave))
    assert sorted(item for share in found for item in share) == list(range(items)) and all(found)
    assert len(found) == min(items, wave) and all(share == sorted(share) for share in found)


def test_zigzag_turns_at_the_ends():
    assert list(phases.zigzag(7, 2)) == [[0, 3, 4], [1, 2, 5, 6]]
    assert list(phases.zigzag(2, 3)) == [[0], [1]]


def persistent(**fields):
    return tiny_spec(scheduler="persistent", **fields)


def zigzag(**fields):
    return tiny_spec(scheduler="zigzag", **fields)


# Items, SMs: fewer items than CTAs that fit, as many, one more, phases of every length and a last one that is not full.
SIZES = [(1, 2), (2, 2), (3, 2), (7, 2), (20, 3), (18, 3)]


@pytest.mark.parametrize(
    "spec, shares, sizes",
    [
        pytest.param(persistent(), 1, SIZES, id="gather"),
        pytest.param(persistent(slice_n=8, kv_loads="boxes"), 1, SIZES[2:5], id="boxes"),
        pytest.param(persistent(kv_loads="runs"), 1, SIZES[3:5], id="runs"),
        pytest.param(persistent(ctas_per_sm=2), 2, [(3, 2), (5, 1), (10, 2)], id="two CTAs to a block, two to an SM"),
        pytest.param(zigzag(), 1, [(1, 2), *SIZES[2:]], id="zigzag"),
        pytest.param(zigzag(softmax="exact"), 1, SIZES[3:4], id="zigzag, exact softmax"),
        pytest.param(zigzag(slice_n=8, kv_loads="boxes"), 1, SIZES[3:4], id="zigzag, boxes"),
        pytest.param(zigzag(ctas_per_sm=2), 2, [(5, 1)], id="zigzag, two CTAs to a block, two to an SM"),
    ],
)
def test_the_kernel_takes_every_item_once(spec, shares, sizes):
    """Poisoned results are all written, and the FLOPs and stored rows are those of each item once."""
    for items, num_sms in sizes:
        rows = shares * spec.tile_m
        case = Case(slice_m=rows, slice_n=spec.slice_n, seqlens=(items * rows - 20, 150), fill="ladder", spec=spec)
        q, k, v = case.tensors()
        q[:, ::37], k[:, 140:] = (
            60 * q[:, ::37],
            20 * k[:, 140:],
        )  # rows that the redo pass computes again *= 60  # rows that the redo pass computes again
        plan = fg.Plan.from_mask(case.mask())
        with named(f"{items} items, {num_sms} SMs"):
            result = emulate(q, k, v, plan, spec=spec, num_sms=num_sms, ctas_per_sm=spec.ctas_per_sm)
            assert_within_contract(result.out, result.lse, q, k, v, plan)
            main, *redo = result.report
            slots = num_sms * spec.ctas_per_sm
            ctas = len(by_the_rule(items * shares, slots)) if spec.scheduler == "persistent" else slots
            assert main.result.grid[0] == min(ctas, items * shares)
            tiles = shares * sum(-(-keys // spec.tile_n) for keys in plan.keys.flatten().tolist())
            assert main.result.counters["wgmma_flops"] == 4 * spec.tile_m * spec.tile_n * spec.head_dim * tiles
            assert main.result.counters["tma_store_bytes"] == -(-case.seqlens[0] // 16) * 16 * 2 * spec.head_dim
            assert len(redo) == (spec.softmax == "fixed_ref")
            if redo and items >= 5:
                assert redo[0].result.counters["wgmma_flops"] > 0


def test_unions_of_several_phases():
    """Ten unions of 128 rows on two SMs: 3, 1 and 1 rounds."""
    spec = for_union(FwdSpec(head_dim=64, tile_m=128, q_source="registers"), 8)
    spec = dataclasses.replace(spec, scheduler="persistent")
    case = Case(slice_m=16, seqlens=(5 * 128 - 40, 190), heads=Heads(1, 2, 1, 1, 2))
    q, k, v = case.tensors()
    q[:, ::37], k[:, 180:] = 60 * q[:, ::37], 20 * k[:, 180:]
    mask = case.mask()
    result = emulate(q, k, v, fg.UnionPlan.from_mask(mask), spec=spec, num_sms=2)
    assert_within_contract(result.out, result.lse, q, k, v, mask)
    assert [launched.result.grid[0] for launched in result.report] == [6, 2]
    assert result.report[1].result.counters["wgmma_flops"] > 0
