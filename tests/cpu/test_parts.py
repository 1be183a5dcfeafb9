# SPDX-License-Identifier: Apache-2.0
"""Lists in parts: what the plan puts where, and that every block gets its own softmax of them."""

import dataclasses
import itertools

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import emulator, parts
from fgattn_cute.gpu import from_config
from fgattn_cute.kernels.spec import PARTS_TILE_N as TILE
from fgattn_cute.kernels.spec import FwdSpec
from tests.numerics import assert_within_contract
from tests.shared_list_cases import emulated, inputs, quick

H200 = from_config("h200")


def masks():
    """Name -> mask: what three neighbouring blocks may have in common, and how unequal they may be."""
    generator = torch.Generator().manual_seed(0)

    def coin(*shape, p):
        return torch.rand(*shape, generator=generator) < p

    def mask(keep, seqlen_q):
        return fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=seqlen_q, seqlen_k=keep.shape[-1])

    yield "a pool", mask(coin(1, 2, 1, 1200, p=0.8) & coin(1, 2, 4, 1200, p=0.75), 256)
    one = coin(1, 2, 5, 700, p=0.4)
    one[0, 0, 0], one[0, 0, 1, 300:] = False, False
    one[0, 1, 1:] = False
    yield "empty and unequal blocks", mask(one, 300)
    yield "nothing in common", mask((torch.arange(500) % 3 == torch.arange(4)[:, None] % 3)[None, None], 256)
    yield "equal blocks, whole tiles", mask((torch.arange(700) < 640).expand(1, 1, 3, -1).contiguous(), 190)
    yield "one key", mask((torch.arange(90) == 89).expand(1, 1, 2, -1).contiguous(), 128)
    two = torch.zeros(1, 1, 3, 900, dtype=torch.bool)
    for block in range(3):
        two[:, :, block] = torch.arange(900) % 3 != block
    yield "every key of two blocks", mask(two, 192)
    yield "no key", mask(torch.zeros(2, 1, 4, 33, dtype=torch.bool), 250)


MASKS = dict(masks())
QUICK = ("a pool", "empty and unequal blocks", "one key")


# ---- the plan ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MASKS)
def test_a_block_finds_its_keys_at_its_places(name):
    """Each once, in whole tiles but for the last; and no warpgroup is ever more than its neighbours' tiles away."""
    mask = MASKS[name]
    plan = fg.PartsPlan.from_mask(mask)
    keep = mask.to_dense()
    rows = plan.members.view(*plan.lists.keys.shape, 3, -1)
    for entry, head, number in itertools.product(*map(range, plan.lists.keys.shape)):
        start = int(plan.lists.offset[entry, head, number])
        end = int(plan.lists.keys[entry, head, number]) // TILE
        taken = set()
        for block in range(3):
            count, rounds, *places = rows[entry, head, number, block].tolist()
            places = places[: -(-count // TILE)]
            taken |= set(places)
            assert len(places) <= rounds
            assert all(0 < b - a <= 3 for a, b in itertools.pairwise(places))
            tiles = [plan.ids[start + p * TILE : start + (p + 1) * TILE] for p in places]
            found = torch.cat(tiles)[:count] if tiles else torch.zeros(0, dtype=torch.int32)
            query = number * 3 + block
            kept = keep[entry, head, query] if query < keep.shape[2] else torch.zeros(keep.shape[-1], dtype=torch.bool)
            assert torch.equal(found.long().sort().values, kept.nonzero().flatten())
            assert tiles == [] or kept[torch.cat(tiles)[count:].long()].all(), "filled up with what is kept"
        assert taken == set(range(end)), "no tile is nobody's"


def test_keys_in_common_are_loaded_once():
    plan = fg.PartsPlan.from_mask(MASKS["equal blocks, whole tiles"])
    assert int(plan.lists.keys.sum()) == 640 and plan.loads_per_key == pytest.approx(1 / 3)
    plan = fg.PartsPlan.from_mask(MASKS["every key of two blocks"])
    # 300 keys of each two: three tiles, and sixty keys over of each, which are 120 of each block's own.
    assert int(plan.lists.keys.sum()) == TILE * (3 * 3 + 3 * 2)


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_comes_back_and_what_is_wrong_is_said(name, monkeypatch):
    mask = MASKS[name]
    plan = fg.PartsPlan.from_mask(mask)
    assert plan.to_mask() == mask and plan.validate() == [] and plan.density == mask.density
    monkeypatch.setattr(parts, "_CHUNK_CELLS", 1)  # a list at a time
    monkeypatch.setattr("fgattn_cute.compaction._CHUNK_WORDS", 1)
    again = fg.PartsPlan.from_mask(mask)
    assert torch.equal(again.ids, plan.ids) and torch.equal(again.members, plan.members) and again.to_mask() == mask
    if not mask.density:
        return
    plan.ids[:TILE] = plan.ids[0]  # the first tile is somebody's, and has more than one key unless the mask has one
    assert plan.validate() == (["duplicate ids"] if name != "one key" else [])
    plan.ids[0] = mask.seqlen_k
    assert plan.validate() == [f"id outside 0..{mask.seqlen_k - 1}"]


@pytest.mark.parametrize("name", [name for name in MASKS if name != "no key"])
def test_what_a_plan_costs_is_known_before_it_is_made(name):
    """Of three blocks the one that keeps most sets the pace."""
    mask = MASKS[name]
    keys = torch.nn.functional.pad(mask.to_dense().sum(-1), (0, -mask.blocks_q % 3)).unflatten(-1, (-1, 3))
    pairs, loads = parts.cost(mask).tolist()
    assert loads == fg.PartsPlan.from_mask(mask).loads_per_key
    assert pairs / int(mask.kept_pairs().sum()) == pytest.approx(float(3 * keys.amax(-1).sum() / keys.sum()))


def test_an_order_puts_others_together():
    generator = torch.Generator().manual_seed(1)
    keep = (torch.rand(1, 2, 3, 640, generator=generator) < 0.4).repeat(1, 1, 3, 1)  # blocks 0, 3 and 6 are alike
    mask = fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=9 * 64, seqlen_k=640)
    order = torch.arange(9).view(3, 3).T.flatten()
    loads = [fg.PartsPlan.from_mask(mask, how).loads_per_key for how in (None, order, "similar")]
    assert loads[1] == loads[2] < 0.7 * loads[0]
    assert fg.PartsPlan.from_mask(mask, order).to_mask() == mask


def test_bad_input():
    full = {"seqlen_q": 128, "seqlen_k": 90}
    for slices in ({"slice_m": 128, "slice_n": 1}, {"slice_m": 64, "slice_n": 2}):
        with pytest.raises(fg.PlanError, match="want slices of 64 x 1, not"):
            fg.PartsPlan.from_mask(fg.SliceMask.full(**slices, **full))
    mask = MASKS["one key"]
    with pytest.raises(fg.PlanError, match="made from a SliceMask, not from Plan"):
        fg.PartsPlan.from_mask(fg.Plan.from_mask(mask))
    with pytest.raises(fg.PlanError, match="order is not an int64 permutation of 2"):
        fg.PartsPlan.from_mask(mask, torch.arange(3))
    plan = fg.PartsPlan.from_mask(mask)
    with pytest.raises(fg.PlanError, match="the plan was made for seqlen_k 90, the call has 91"):
        fg.attention(*(torch.zeros(1, n, 1, 128).bfloat16() for n in (128, 91, 91)), plan)


@pytest.mark.parametrize("head_dim", [96, 256])
def test_head_dims_without_such_kernels_are_refused(head_dim):
    q, k = (torch.zeros(1, n, 1, head_dim).bfloat16() for n in (128, 90))
    with pytest.raises(fg.UnsupportedError, match="192 rows that a list in parts can use"):
        fg.explain(q, k, k, fg.PartsPlan.from_mask(MASKS["one key"]), gpu=H200)


def test_specs_that_do_not_fit_are_refused():
    q, k, _ = inputs(MASKS["one key"])
    plan = fg.PartsPlan.from_mask(MASKS["one key"])
    good = fg.explain(q, k, k, plan, gpu=H200).choice.spec
    assert (good.tile_m, good.tile_n, good.kv_stages, good.union_lists) == (192, TILE, 4, "parts")
    assert good.reasons() == good.redo_spec().reasons() == []
    for change, why in (
        ({"kv_stages": 2}, "need as many kv_stages"),  # would wait for ever
        ({"tile_n": 64}, "have tiles of 80 keys, not 64"),
        ({"kv_loads": "runs"}, "kv_loads runs has no order"),
        ({"tile_m": 128, "consumer_registers": None, "producer_registers": None}, "tile_m 128 is not the 192 rows"),
    ):
        with pytest.raises(fg.UnsupportedError, match=why):
            fg.explain(q, k, k, plan, gpu=H200, spec=dataclasses.replace(good, **change))
    assert any("not segments of 2" in why for why in dataclasses.replace(good, slice_n=2).reasons())
    assert any(
        "one to a warpgroup, not 2 to 2" in why
        for why in FwdSpec(head_dim=64, tile_m=128, union_blocks=2, union_lists="parts").reasons()
    )


# ---- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", quick(MASKS, QUICK))
def test_every_block_gets_its_own_softmax(name):
    mask = MASKS[name]
    q, k, v = inputs(mask, batch=mask.batch)
    out, lse = emulated(q, k, v, fg.PartsPlan.from_mask(mask))
    assert_within_contract(out, lse, q, k, v, mask)


CALLS = {
    "exact softmax": {"dtype": torch.float16},
    "head dim 64": {"head_dim": 64},
    "head dim 64, exact softmax": {"head_dim": 64, "dtype": torch.float16},
    "grouped heads, shared by the batch": {"batch": 2, "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("name", quick(CALLS, ("exact softmax", "grouped heads, shared by the batch")))
def test_other_calls(name):
    call = CALLS[name]
    mask = MASKS["empty and unequal blocks"]
    if call.get("heads"):  # lists shared by the heads as well
        mask = dataclasses.replace(mask, bits=mask.bits[:, :1].contiguous())
    q, k, v = inputs(mask, **call)
    out, lse = emulated(q, k, v, fg.PartsPlan.from_mask(mask, torch.tensor([3, 0, 4, 1, 2])), scale=0.2)
    assert_within_contract(out, lse, q, k, v, mask, scale=0.2)


def test_persistent_ctas_with_the_fewest_stages():
    """Several lists to a CTA, among them one that keeps nothing in all but one block."""
    mask = MASKS["empty and unequal blocks"]
    q, k, v = inputs(mask)
    spec = FwdSpec(head_dim=128, tile_m=192, tile_n=TILE, kv_stages=3, scheduler="persistent", ping_pong=True)
    plan = fg.PartsPlan.from_mask(mask)
    with emulator.session(seed=5, checks="all", num_sms=1):
        out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator", spec=spec)
    assert_within_contract(out, lse, q, k, v, mask)


def test_any_layout_and_the_reference():
    mask = MASKS["one key"]
    plan = fg.PartsPlan.from_mask(mask)
    q, k, v = (x.transpose(1, 2) for x in inputs(mask))
    expected, _ = fg.attention(q, k, v, plan, layout="bhsd", return_lse=True, checks="full")
    found, _ = emulated(q, k, v, plan, layout="bhsd", checks="full")
    assert torch.equal(found, expected), "one key each: its value"


def test_poisoned_rows_are_redone():
    """Logits that climb by more than 2^100 after the first tile."""
    mask = MASKS["a pool"]
    q, k, v = (torch.randn(1, n, mask.heads, 128) for n in (mask.seqlen_q, *[mask.seqlen_k] * 2))
    q, k = 0.5 + 0.02 * q, torch.linspace(0, 60, mask.seqlen_k)[None, :, None, None] + 0.02 * k
    q, k, v = (x.bfloat16() for x in (q, k, v))
    plan = fg.PartsPlan.from_mask(mask)
    out, lse = emulated(q, k, v, plan)
    assert_within_contract(out, lse, q, k, v, mask)
    _, poisoned = emulated(q, k, v, plan, logit_bound=1.0)  # a bound that is not true leaves out the redo launch
    assert not poisoned.isfinite().all()
