# SPDX-License-Identifier: Apache-2.0
"""Unions in halves: what the plan puts where, and that every block gets its own softmax of it."""

import dataclasses
import itertools

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import emulator, halves
from fgattn_cute.gpu import from_config
from fgattn_cute.kernels.spec import HALVES_TILE_N as TILE
from fgattn_cute.kernels.spec import FwdSpec
from tests.numerics import assert_within_contract
from tests.shared_list_cases import emulated, inputs, quick

H200 = from_config("h200")


def mask_of(keep, slice_m, missing=0):
    """Of bool (batch, heads, blocks, seqlen_k). missing: queries that the last block lacks."""
    lengths = {"seqlen_q": slice_m * keep.shape[2] - missing, "seqlen_k": keep.shape[3]}
    return fg.SliceMask.from_dense(keep.contiguous(), slice_m=slice_m, slice_n=1, **lengths)


def masks():
    """Name -> mask: what two halves may have in common, and how unequal they and their blocks may be."""
    generator = torch.Generator().manual_seed(0)

    def coin(*shape, p):
        return torch.rand(*shape, generator=generator) < p

    yield "16: a pool", mask_of(coin(1, 2, 1, 1200, p=0.8) & coin(1, 2, 16, 1200, p=0.3), 16)
    one = coin(1, 2, 11, 500, p=0.4)
    one[0, 0, :4], one[0, 0, 5, 300:] = False, False  # the first half of a union keeps nothing
    one[0, 1, 4:] = False  # one half, and then a whole union of none
    yield "16: empty and unequal blocks", mask_of(one, 16, 5)
    yield "32: hardly anything in common", mask_of(coin(1, 2, 6, 901, p=0.35), 32, 31)
    keys = torch.arange(1100)
    yield "64: one half of many tiles", mask_of(torch.stack([keys < 1090, (keys > 80) & (keys < 90)])[None, None], 64)
    yield (
        "64: nothing in common, whole tiles",
        mask_of((keys[:768] % 2 == torch.arange(3)[:, None] % 2)[None, None], 64),
    )
    yield "32: equal blocks, whole tiles", mask_of((keys[:700] < 5 * TILE).expand(1, 1, 8, -1), 32)
    yield "64: one key", mask_of((keys[:90] == 89).expand(1, 1, 2, -1), 64)
    yield "32: no key", mask_of(torch.zeros(2, 1, 5, 33, dtype=torch.bool), 32, 1)


MASKS = dict(masks())
QUICK = ("16: empty and unequal blocks", "32: hardly anything in common", "64: one half of many tiles", "64: one key")


def rows_of_lists(plan):
    """(first id, members from the keys of the halves to the row of zeros) of each list, by the plan's docstring."""
    offset, keys = plan.lists.offset.flatten().tolist(), plan.lists.keys.flatten().tolist()
    assert offset == [sum(keys[:number]) for number in range(len(keys))]
    begin = 0
    for start, length in zip(offset, keys, strict=True):
        end = begin + 2 + 5 * (length // TILE)
        yield start, plan.members[begin:end].tolist()
        begin = end
    assert len(plan.members) == begin + 32 and not plan.members[begin:].any()


# ---- the order of tiles --------------------------------------------------------------------------------------------
def waits_for_ever(order, stages=3):
    """Whether some interleaving of a producer and two halves stops, or lets a half take a tile that has not landed.

    order: of each tile in the list, the halves that take it. A barrier tells by its parity alone whether the filling
    that is waited for is the last one.
    """
    programs = [
        [step for place, users in enumerate(order) if half in users for step in (("wait", place), ("free", place))]
        for half in range(2)
    ]
    seen = {(0, 0, 0, (0,) * stages)}
    left = list(seen)
    while left:
        *at, filled, freed = left.pop()
        following = []
        if filled < len(order) and freed[filled % stages] >= 2 * (filled // stages):
            following.append((*at, filled + 1, freed))
        for half, program in enumerate(programs):
            if at[half] == len(program):
                continue
            kind, place = program[at[half]]
            slot, moved = place % stages, tuple(n + (which == half) for which, n in enumerate(at))
            if kind == "free":
                arrivals = 2 // len(order[place])
                now = tuple(n + arrivals * (which == slot) for which, n in enumerate(freed))
                following.append((*moved, filled, now))
            else:
                fillings = (filled - slot + stages - 1) // stages
                if (fillings - 1 - place // stages) % 2 == 0:
                    if fillings <= place // stages:
                        return True
                    following.append((*moved, filled, freed))
        if not following and any(n < len(program) for n, program in zip(at, programs, strict=True)):
            return True
        left += [state for state in following if state not in seen]
        seen.update(following)
    return False


def test_the_search_finds_what_waits_for_ever():
    assert waits_for_ever([(0, 1), (1,), (1,), (1,), (0, 1)]), "three tiles of B between two of A's"
    assert not waits_for_ever([(0, 1), (1,), (1,), (0, 1)])


def test_tiles_of_any_numbers_are_spread_and_never_waited_for_in_vain():
    """Each half's tiles: its partial one last, no more than two of the other's before and between them; an excess of
    one half's own last; every list ends."""
    counts = list(itertools.product(range(6), repeat=3))
    rows = []
    for common, *own in counts:
        keys = torch.arange(15 * TILE)
        both, begin = keys < common * TILE, common * TILE
        for tiles in own:  # the last one a key short
            rows.append(both | ((keys >= begin) & (keys < begin + tiles * TILE - 1)))
            begin += tiles * TILE
    plan = fg.HalvesPlan.from_mask(mask_of(torch.stack(rows)[None, None], 64))
    for (common, *own), (_, members) in zip(counts, rows_of_lists(plan), strict=True):
        order = [()] * (common + sum(own))
        for half in range(2):
            keys = members[0][half]
            assert keys == max((common + own[half]) * TILE - 1, 0) if own[half] else keys == common * TILE
            said = [members[1 + 5 * tile][half] for tile in range(common + own[half])]
            places = [number >> 1 for number in said]
            assert all(0 < b - a <= 3 for a, b in itertools.pairwise([-1, *places]))
            assert [number & 1 for number in said].count(1) == own[half]
            assert not own[half] or said[-1] & 1, "the tile that is not full is its last"
            for number in said:
                order[number >> 1] += (half,)
                assert number & 1 == 0 or order[number >> 1] == (half,)
        assert all(order) and sum(len(users) == 2 for users in order) == common
        assert not waits_for_ever(order)
        excess = max(own[0] - max(common, own[1]), own[1] - max(common, own[0]))
        if excess > 0:
            assert set(order[-excess:]) == {(int(own[1] > own[0]),)}
        spread = order[: len(order) - max(excess, 0)]
        assert all(len(a) == 2 or a != b for a, b in itertools.pairwise(spread)), "A and B in turn"
        for users in ((0, 1), (0,), (1,)):
            assert abs(spread[: len(spread) // 2].count(users) - spread.count(users) / 2) <= 1


# ---- the plan ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MASKS)
def test_a_block_finds_its_keys_in_the_tiles_of_its_half(name):
    mask = MASKS[name]
    plan = fg.HalvesPlan.from_mask(mask)
    keep, size = mask.to_dense().flatten(0, 1), 64 // mask.slice_m
    none = torch.zeros(mask.seqlen_k, dtype=torch.bool)
    unions = -(-mask.blocks_q // (2 * size))
    for number, (start, members) in enumerate(rows_of_lists(plan)):
        assert not any(members[0][2:]) and not any(members[-1])
        for half in range(2):
            blocks = [number % unions * 2 * size + half * size + i for i in range(size)]
            kept = [keep[number // unions, b] if b < mask.blocks_q else none for b in blocks]
            count = members[0][half]
            assert count == int(torch.stack(kept).any(0).sum())
            found = [[] for _ in kept]
            for tile in range((len(members) - 2) // 5):
                said, *words = members[1 + 5 * tile : 6 + 5 * tile]
                assert not any(said[2:])
                if tile * TILE >= count:
                    assert said[half] == 0 and not any(word[half * size + i] for word in words for i in range(size))
                    continue
                first = start + (said[half] >> 1) * TILE
                ids = plan.ids[first : first + TILE].tolist()
                for position, key in enumerate(ids):
                    bits = [words[position // 32][half * size + i] >> position % 32 & 1 for i in range(size)]
                    assert any(bits) == (tile * TILE + position < count), "each key is somebody's, the rest nobody's"
                    for i in range(size):
                        found[i] += [key] * bits[i]
                assert len(set(ids[count - tile * TILE - 1 :])) <= 1 or count >= (tile + 1) * TILE, "filled up"
            assert [sorted(keys) for keys in found] == [rows.nonzero().flatten().tolist() for rows in kept]


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_comes_back_and_what_it_costs_is_known_before(name, monkeypatch):
    mask = MASKS[name]
    plan = fg.HalvesPlan.from_mask(mask)
    assert plan.to_mask() == mask and plan.validate() == [] and plan.density == mask.density
    monkeypatch.setattr(halves, "_CHUNK_CELLS", 1)  # a union at a time
    monkeypatch.setattr("fgattn_cute.half_lists._CHUNK_TILES", 1)
    again = fg.HalvesPlan.from_mask(mask)
    assert torch.equal(again.ids, plan.ids) and torch.equal(again.members, plan.members) and again.to_mask() == mask
    kept = int(mask.kept_pairs().sum())
    if kept:
        pairs, loads = halves.cost(mask).tolist()
        assert loads == plan.loads_per_key and pairs / kept == pytest.approx(plan.union_factor)
        assert plan.describe()["loads_per_key"] == loads
    else:
        assert plan.union_factor == plan.loads_per_key == 1.0


def test_what_is_saved():
    """Equal blocks compute and load as a union does; halves that share nothing compute half of it."""
    plan = fg.HalvesPlan.from_mask(MASKS["32: equal blocks, whole tiles"])
    assert plan.union_factor == 1.0 and plan.loads_per_key == 1 / 4
    mask = mask_of((torch.arange(768) % 2 == torch.arange(2)[:, None])[None, None], 64)
    assert (fg.UnionPlan.from_mask(mask, rows=128).union_factor, fg.HalvesPlan.from_mask(mask).union_factor) == (2, 1)


def test_an_order_puts_others_together():
    generator = torch.Generator().manual_seed(1)
    keep = (torch.rand(1, 2, 4, 640, generator=generator) < 0.5).repeat(1, 1, 2, 1)  # blocks i and i + 4 are alike
    mask = mask_of(keep, 64)
    order = torch.arange(8).view(2, 4).T.flatten()
    factors = [fg.HalvesPlan.from_mask(mask, how).union_factor for how in (order, "similar", None)]
    loads = [fg.HalvesPlan.from_mask(mask, how).loads_per_key for how in (order, "similar", None)]
    assert factors[0] == factors[1] and loads[0] == loads[1] < 0.85 * loads[2]
    assert fg.HalvesPlan.from_mask(mask, order).to_mask() == mask


SPOILED = {
    "id outside 0..1199": lambda p: p.ids.__setitem__(0, 1200),
    "duplicate ids": lambda p: p.ids.__setitem__(slice(0, TILE), p.ids[0].clone()),
    "key count outside 0..1200": lambda p: p.members[0].__setitem__(1, -1),
    "half of more tiles than its list": lambda p: p.members[0].__setitem__(0, 1200),
    "tile outside its list": lambda p: p.members[1].__setitem__(0, 2000),
    "tiles of a half out of order": lambda p: p.members[1].__setitem__(0, p.members[6, 0].clone()),
    "more than 2 tiles between two of a half": lambda p: p.members[1].__setitem__(1, 2 * 4),
    "tile of nobody, or of both halves and called one's own": lambda p: p.members[1].add_(torch.tensor([1] + [0] * 7)),
    "keep-bit past the keys of its half": lambda p: p.members[0].sub_(torch.tensor([1] + [0] * 7)),
}


@pytest.mark.parametrize("said", SPOILED)
def test_what_is_wrong_is_said(said):
    plan = fg.HalvesPlan.from_mask(MASKS["16: a pool"])
    SPOILED[said](plan)
    assert said in plan.validate()


def test_bad_input():
    full = {"seqlen_q": 128, "seqlen_k": 90}
    for slices in ({"slice_m": 128, "slice_n": 1}, {"slice_m": 48, "slice_n": 1}, {"slice_m": 16, "slice_n": 2}):
        with pytest.raises(fg.PlanError, match="want slices of 16, 32, 64 x 1, not"):
            fg.HalvesPlan.from_mask(fg.SliceMask.full(**slices, **full))
    mask = MASKS["64: one key"]
    with pytest.raises(fg.PlanError, match="made from a SliceMask, not from Plan"):
        fg.HalvesPlan.from_mask(fg.Plan.from_mask(mask))
    with pytest.raises(fg.PlanError, match="order is not an int64 permutation of 2"):
        fg.HalvesPlan.from_mask(mask, torch.arange(3))


def test_specs_that_do_not_fit_are_refused():
    mask = MASKS["16: a pool"]
    q, k, _ = inputs(mask)
    plan = fg.HalvesPlan.from_mask(mask)
    good = fg.explain(q, k, k, plan, gpu=H200).choice.spec
    assert (good.tile_m, good.tile_n, good.kv_stages, good.union_blocks) == (128, TILE, 3, 8)
    assert good.union_lists == "halves" and good.reasons() == good.redo_spec().reasons() == []
    for change, why in (
        ({"kv_stages": 2}, "need 3 kv_stages"),  # would wait for ever
        ({"tile_n": 64}, "have tiles of 128 keys, not 64"),
        ({"ping_pong": True}, "have no turns"),
        ({"slice_n": 2}, "not segments of 2"),
    ):
        assert any(why in reason for reason in dataclasses.replace(good, **change).reasons()), why
    q, k = (torch.zeros(1, n, 2, 256).bfloat16() for n in (mask.seqlen_q, mask.seqlen_k))
    with pytest.raises(fg.UnsupportedError, match="128 rows that a union in halves can use"):
        fg.explain(q, k, k, plan, gpu=H200)


# ---- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", quick(MASKS, QUICK))
def test_every_block_gets_its_own_softmax(name):
    mask = MASKS[name]
    q, k, v = inputs(mask, batch=mask.batch, head_dim=128 if mask.slice_m == 16 else 64)
    out, lse = emulated(q, k, v, fg.HalvesPlan.from_mask(mask))
    assert_within_contract(out, lse, q, k, v, mask)


CALLS = {
    "exact softmax": {"dtype": torch.float16},
    "head dim 64": {"head_dim": 64},
    "head dim 96, exact softmax": {"head_dim": 96, "dtype": torch.float16},
    "grouped heads, shared by the batch": {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64},
}


@pytest.mark.parametrize("name", quick(CALLS, ("exact softmax", "grouped heads, shared by the batch")))
def test_other_calls(name):
    call = CALLS[name]
    mask = MASKS["16: empty and unequal blocks"]
    if call.get("heads"):  # lists shared by the heads as well
        mask = dataclasses.replace(mask, bits=mask.bits[:, :1].contiguous())
    q, k, v = inputs(mask, **call)
    out, lse = emulated(q, k, v, fg.HalvesPlan.from_mask(mask, torch.arange(11).flip(0)), scale=0.2)
    assert_within_contract(out, lse, q, k, v, mask, scale=0.2)


@pytest.mark.parametrize("seed", [1, 4, 8])
def test_persistent_ctas(seed):
    """Several lists to a CTA, with an excess of either half's tiles at the end."""
    tiles = [(1, 0, 3), (2, 4, 0), (0, 1, 3), (3, 0, 0), (0, 0, 2)]
    keys = torch.arange(6 * TILE)
    rows = []
    for common, a, b in tiles:
        own = keys >= (common + a) * TILE
        rows += [keys < (common + a) * TILE, (keys < common * TILE) | (own & (keys < (common + a + b) * TILE))]
    mask = mask_of(torch.stack(rows)[None, None], 64)
    q, k, v = inputs(mask, head_dim=64)
    spec = FwdSpec(head_dim=64, tile_m=128, tile_n=TILE, kv_stages=3, scheduler="persistent")
    with emulator.session(seed=seed, checks="all", num_sms=1):
        out, lse = fg.attention(q, k, v, fg.HalvesPlan.from_mask(mask), return_lse=True, backend="emulator", spec=spec)
    assert_within_contract(out, lse, q, k, v, mask)


def test_poisoned_rows_are_redone():
    """Logits that climb by more than 2^100 after the first tile."""
    mask = MASKS["32: hardly anything in common"]
    q, k, v = (torch.randn(1, n, mask.heads, 128) for n in (mask.seqlen_q, *[mask.seqlen_k] * 2))
    q, k = 0.5 + 0.02 * q, torch.linspace(0, 60, mask.seqlen_k)[None, :, None, None] + 0.02 * k
    q, k, v = (x.bfloat16() for x in (q, k, v))
    plan = fg.HalvesPlan.from_mask(mask)
    out, lse = emulated(q, k, v, plan)
    assert_within_contract(out, lse, q, k, v, mask)
    _, poisoned = emulated(q, k, v, plan, logit_bound=1.0)  # a bound that is not true leaves out the redo launch
    assert not poisoned.isfinite().all()


def test_own_lists_give_the_same_to_rounding():
    mask = MASKS["16: empty and unequal blocks"]
    q, k, v = inputs(mask)
    (own, own_lse), (out, lse) = (emulated(q, k, v, kind.from_mask(mask)) for kind in (fg.Plan, fg.HalvesPlan))
    kept = own_lse != -torch.inf
    assert torch.equal(lse != -torch.inf, kept) and torch.allclose(lse[kept], own_lse[kept], atol=2e-4)
    assert (out.float() - own.float()).abs().max() <= 2**-6
