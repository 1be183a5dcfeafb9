# SPDX-License-Identifier: Apache-2.0
"""Grouped lists of single keys on the emulator: tiles of aligned runs by TMA, the rest by the gather."""

import dataclasses

import pytest
import torch

import fgattn_cute as fg
from tests.forward_cases import Case, Heads, emulate, same_bits, tiny_spec
from tests.numerics import assert_within_contract

SPECS = {
    "two atoms, tiles of 80": tiny_spec(head_dim=128, tile_n=80, kv_loads="octets"),
    "persistent": tiny_spec(tile_m=128, q_source="registers", scheduler="persistent", kv_loads="octets"),
}
MORE_SPECS = {
    "one warpgroup": tiny_spec(kv_loads="octets"),
    "three atoms, exact": tiny_spec(head_dim=96, softmax="exact", dtype="fp16", kv_loads="octets"),
    "four atoms": tiny_spec(head_dim=256, kv_loads="octets"),
    "three warpgroups, no register to spare": tiny_spec(
        tile_m=192, tile_n=128, kv_stages=3, ping_pong=True, scale_reference="per_tile", kv_loads="octets"
    ),
    "three warpgroups, tiles of 80": tiny_spec(head_dim=128, tile_m=192, tile_n=80, ping_pong=True, kv_loads="octets"),
    "four stages, zigzag": tiny_spec(head_dim=128, tile_n=96, kv_stages=4, scheduler="zigzag", kv_loads="octets"),
}
HEADS = Heads(2, 4, 2, 1, 4)


def keep_of(lists, seqlen_k, generator):
    """bool (lists, seqlen_k): of each list (octets, singles), so many aligned runs and single keys at random."""
    octets = seqlen_k // 8
    keep = torch.zeros(len(lists), seqlen_k, dtype=torch.bool)
    for row, (runs, singles) in zip(keep, lists, strict=True):
        order = torch.randperm(octets, generator=generator)
        row[: 8 * octets].view(octets, 8)[order[:runs]] = True
        # Seven keys of an octet at most, so that they make no run, and all of the ragged end.
        within = torch.randint(8, (octets - runs, 1), generator=generator) + torch.arange(7)
        free = torch.cat([(8 * order[runs:, None] + within % 8).flatten(), torch.arange(8 * octets, seqlen_k)])
        row[free[torch.randperm(free.numel(), generator=generator)[:singles]]] = True
    return keep


def ladder(tile_n, seqlen_k):
    """(octets, singles) whose lists and runs end at and beside tiles."""
    o, everything = tile_n // 8, (seqlen_k // 8, seqlen_k % 8)
    return [
        *[(o, 0), (0, 0), (0, tile_n + 3), (o, 1), (2 * o, tile_n - 1), (1, 0), (o - 1, 8), everything],
        *[(3 * o + 1, 2), (0, 1), (2 * o + 3, tile_n), (o - 1, 7), (2 * o, 0), (1, tile_n), (o + 1, 0), (0, tile_n)],
    ]


def plan_and_tensors(spec):
    """Sixteen lists over four blocks and four heads."""
    seqlen_k = 5 * spec.tile_n + 5
    case = Case(
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        slice_m=spec.tile_m,
        seqlens=(4 * spec.tile_m - 5, seqlen_k),
        heads=HEADS,
    )
    lists = ladder(spec.tile_n, seqlen_k)
    keep = keep_of(lists, seqlen_k, case.generator()).view(1, 4, 4, seqlen_k)
    mask = fg.SliceMask.from_dense(keep, **case.geometry)
    return fg.Plan.from_mask(mask, grouped=True), case.tensors(), lists


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_octets(spec):
    check_octets(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MORE_SPECS.values(), ids=MORE_SPECS)
def test_more_octets(spec):
    check_octets(spec)


def check_octets(spec):
    plan, (q, k, v), lists = plan_and_tensors(spec)
    assert plan.validate() == []
    result = emulate(q, k, v, plan, spec=spec)
    assert_within_contract(result.out, result.lse, q, k, v, plan)
    # A tile comes by TMA if and only if it is full and made of runs.
    keys = [8 * runs + singles for runs, singles in lists]
    boxed = sum(8 * runs // spec.tile_n * spec.tile_n for runs, _ in lists)
    row_bytes, counters = 2 * spec.head_dim, result.report[0].result.counters
    assert plan.keys.flatten().tolist() == keys
    assert counters["cp_async_bytes"] == HEADS.batch * 2 * row_bytes * (sum(keys) - boxed)
    q_bytes = spec.tile_m * row_bytes * sum(n > 0 for n in keys)
    assert counters["tma_load_bytes"] == HEADS.batch * (2 * row_bytes * boxed + q_bytes)


def test_nothing_unlisted_is_read():
    """NaN in every row of K and V that no list of its head holds changes no bit."""
    spec = SPECS["two atoms, tiles of 80"]
    case = Case(head_dim=128, seqlens=(128, 500))
    keep = keep_of([(11, 3), (25, 9)], 500, case.generator()).view(1, 1, 2, 500)
    plan = fg.Plan.from_mask(fg.SliceMask.from_dense(keep, **case.geometry), grouped=True)
    q, k, v = case.tensors()
    clean = emulate(q, k, v, plan, spec=spec)
    unlisted = ~keep.any(2)[0, 0]
    k[:, unlisted], v[:, unlisted] = torch.nan, torch.nan
    poisoned = emulate(q, k, v, plan, spec=spec)
    assert same_bits(poisoned.out, clean.out) and same_bits(poisoned.lse, clean.lse)


def test_a_grouped_plan_is_legal_for_the_gather():
    spec = SPECS["two atoms, tiles of 80"]
    plan, (q, k, v), _ = plan_and_tensors(spec)
    result = emulate(q, k, v, plan, spec=dataclasses.replace(spec, kv_loads="gather"))
    assert_within_contract(result.out, result.lse, q, k, v, plan)
