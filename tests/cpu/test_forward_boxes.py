# SPDX-License-Identifier: Apache-2.0
"""Keys by TMA: segments as boxes of every size, and tiles of consecutive keys, on the emulator."""

import dataclasses

import pytest

import fgattn_cute as fg
from tests.forward_cases import Case, Heads, check, emulate, tiny_spec
from tests.numerics import assert_within_contract

HEADS = Heads(2, 4, 2, 2, 4)

# Every shape of a box: 8 rows of one atom and of several, several rows of one of several atoms, a whole tile, a part of
# a segment; and every producer's walk. The grid of test_forward_grid.py has more.
SHAPES = {
    "8 rows of two atoms": tiny_spec(head_dim=128, slice_n=8, tile_n=80, kv_loads="boxes"),
    "16 rows, segments of 64 across tiles of 80": tiny_spec(head_dim=128, slice_n=64, tile_n=80, kv_loads="boxes"),
    "a tile of three atoms": tiny_spec(head_dim=96, slice_n=128, kv_loads="boxes"),
    "a quarter of a segment": tiny_spec(slice_n=256, kv_loads="boxes"),
}
MORE_SHAPES = {
    "8 rows": tiny_spec(slice_n=8, kv_loads="boxes"),
    "8 rows of three atoms": tiny_spec(head_dim=96, slice_n=8, kv_loads="boxes"),
    "8 rows, segments of 24": tiny_spec(head_dim=128, slice_n=24, kv_loads="boxes"),
    "16 rows": tiny_spec(head_dim=128, slice_n=16, kv_loads="boxes"),
    "a tile": tiny_spec(head_dim=128, slice_n=64, kv_loads="boxes"),
    "four stages": tiny_spec(slice_n=32, kv_stages=4, softmax="exact", dtype="fp16", kv_loads="boxes"),
    "persistent": tiny_spec(slice_n=8, scheduler="persistent", kv_loads="boxes"),
    "two warpgroups": tiny_spec(
        head_dim=128, tile_m=128, slice_n=8, q_source="registers", scheduler="persistent", kv_loads="boxes"
    ),
    "three warpgroups": tiny_spec(tile_m=192, tile_n=80, slice_n=8, ping_pong=True, kv_loads="boxes"),
    "four atoms": tiny_spec(head_dim=256, slice_n=8, kv_loads="boxes"),
}


def box_case(spec, fill, seqlens, heads=HEADS):
    return Case(
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        slice_m=spec.tile_m,
        slice_n=spec.slice_n,
        seqlens=seqlens,
        fill=fill,
        heads=heads,
        spec=spec,
    )


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_boxes(spec):
    check_boxes(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MORE_SHAPES.values(), ids=MORE_SHAPES)
def test_more_boxes(spec):
    check_boxes(spec)


def check_boxes(spec):
    """A tail in the last segment, lists that end at and beside tiles, everything kept."""
    check(box_case(spec, "ladder", (spec.tile_m + 40, 4 * spec.tile_n + spec.slice_n // 2 + 1)))
    check(box_case(spec, "100 %", (77, 300), Heads()))


RUNS = {
    "segments of 3": tiny_spec(slice_n=3, kv_loads="runs"),
    "persistent": tiny_spec(tile_m=128, scheduler="persistent", q_source="registers", kv_loads="runs"),
    "a tight producer, segments of 5": tiny_spec(tile_m=192, tile_n=128, slice_n=5, softmax="exact", kv_loads="runs"),
}
MORE_RUNS = {
    "one warpgroup": tiny_spec(kv_loads="runs"),
    "two atoms, tiles of 80": tiny_spec(head_dim=128, tile_n=80, kv_loads="runs"),
    "segments of 48": tiny_spec(slice_n=48, tile_n=80, kv_loads="runs"),
    "three atoms": tiny_spec(head_dim=96, softmax="exact", kv_loads="runs"),
    "a tight producer": tiny_spec(tile_m=192, tile_n=128, kv_stages=3, ping_pong=True, kv_loads="runs"),
}


def keep_with_runs(case):
    """Every other list keeps all, others scattered keys and then a run, a run with one key missing, or nothing."""
    keep = case.keep()
    segments = keep.shape[3]
    flat = keep.view(-1, segments)
    flat[::4] = True
    flat[1::4, segments // 3 :] = True
    flat[2::4] = True
    flat[2::4, segments // 2] = False
    flat[3::8] = False
    return keep


@pytest.mark.parametrize("spec", RUNS.values(), ids=RUNS)
def test_runs(spec):
    check_runs(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MORE_RUNS.values(), ids=MORE_RUNS)
def test_more_runs(spec):
    check_runs(spec)


def check_runs(spec):
    """A box and a gather write the same stages in turn."""
    case = box_case(spec, "30 %", (4 * spec.tile_m, 7 * spec.tile_n + 5))
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(fg.SliceMask.from_dense(keep_with_runs(case), **case.geometry), grouped=False)
    result = emulate(q, k, v, plan, spec=spec)
    assert_within_contract(result.out, result.lse, q, k, v, plan)
    # Boxes came, and not all keys came so.
    gathered = emulate(q, k, v, plan, spec=dataclasses.replace(spec, kv_loads="gather"))
    boxed, copied = (run.report[0].result.counters for run in (result, gathered))
    assert 0 < boxed["cp_async_bytes"] < copied["cp_async_bytes"]
    assert boxed["tma_load_bytes"] > copied["tma_load_bytes"]
