# SPDX-License-Identifier: Apache-2.0
"""Plan: lists, work order, capacity, validation, storage."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from fgattn_cute import plan as plan_module
from fgattn_cute.compaction import PLAN_SLACK
from fgattn_cute.errors import PlanError
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from tests.strategies import expand_to_tokens, maps

GEOMETRY = {"slice_m": 16, "slice_n": 4, "seqlen_q": 40, "seqlen_k": 130}


def random_mask(density=0.3, seed=0, batch=2, heads=3):
    generator = torch.Generator().manual_seed(seed)
    return SliceMask.from_dense(torch.rand(batch, heads, 3, 33, generator=generator) < density, **GEOMETRY)


def lists_of(plan):
    """[[ids of each block]] in (batch, head, block) order, read straight off the buffers."""
    counts = -(-plan.keys // plan.slice_n)
    flat = zip(plan.offset.flatten().tolist(), counts.flatten().tolist(), strict=True)
    return [plan.ids[start : start + count].tolist() for start, count in flat]


@settings(deadline=None, max_examples=60)
@given(maps())
def test_dense_mask_plan_round_trip(case):
    keep, geometry = case
    mask = SliceMask.from_dense(keep, **geometry)
    plan = Plan.from_mask(mask, grouped=False)
    assert lists_of(plan) == [row.nonzero().flatten().tolist() for row in keep.flatten(0, 2)]
    tokens = expand_to_tokens(keep, geometry)
    assert plan.density == mask.density == int(tokens.sum()) / tokens.numel()
    assert torch.equal(plan.keys, tokens[:, :, :: geometry["slice_m"]].sum(-1, dtype=torch.int32))
    assert plan.to_mask() == mask
    assert plan.validate() == []


@settings(deadline=None, max_examples=40)
@given(maps())
def test_format(case):
    keep, geometry = case
    plan = Plan.from_mask(SliceMask.from_dense(keep, **geometry))
    assert plan.ids.dtype == torch.int32 and plan.offset.dtype == torch.int64 and plan.keys.dtype == torch.int32
    assert (plan.offset % 8 == 0).all() and plan.ids.data_ptr() % 32 == 0
    padded = (keep.sum(-1).flatten() + 7) // 8 * 8
    assert plan.offset.flatten().tolist() == (padded.cumsum(0) - padded).tolist()
    assert plan.ids.numel() == int(padded.sum()) + PLAN_SLACK
    assert (plan.ids >= 0).all() and (plan.ids < plan.blocks_k).all()


@settings(deadline=None, max_examples=30)
@given(maps())
def test_from_lists_equals_from_mask(case):
    keep, geometry = case
    counts = keep.sum(-1, dtype=torch.int32)
    width = int(counts.max()) + 3
    ids = torch.full((*keep.shape[:3], width), -7, dtype=torch.int32)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).reshape(-1, 3).tolist():
        row = keep[tuple(index)].nonzero().flatten()
        ids[tuple(index)][: row.numel()] = row
    plan = Plan.from_lists(ids, counts, **geometry)
    other = Plan.from_mask(SliceMask.from_dense(keep, **geometry), grouped=False)
    for name in ("ids", "offset", "keys"):
        assert torch.equal(getattr(plan, name), getattr(other, name))


def grouped_order(row):
    """The columns of a bool list: those of whole kept octets, then the others."""
    in_run = lambda column: column // 8 < len(row) // 8 and all(row[column // 8 * 8 + i] for i in range(8))
    kept = [column for column, keep in enumerate(row) if keep]
    return sorted(kept, key=lambda column: (not in_run(column), column)), sum(map(in_run, kept))


@settings(deadline=None, max_examples=60)
@given(maps(slice_ns=(1,)))
def test_grouped_lists_have_their_aligned_runs_first(case):
    keep, geometry = case
    mask = SliceMask.from_dense(keep, **geometry)
    plan = Plan.from_mask(mask, grouped=True)
    expected = [grouped_order(row) for row in keep.flatten(0, 2).tolist()]
    assert plan.grouped and lists_of(plan) == [columns for columns, _ in expected]
    assert plan.to_mask() == mask and plan.validate() == []
    plain = Plan.from_mask(mask, grouped=False)
    assert not plain.grouped and plain.signature != plan.signature
    assert torch.equal(plain.keys, plan.keys) and torch.equal(plain.offset, plan.offset)
    # Unless told, lists are grouped where half of all keys or more stand in runs, nine tenths below slice_m 128.
    in_runs, total = sum(runs for _, runs in expected), int(keep.sum())
    tenths = 5 if mask.slice_m >= 128 else 9
    assert Plan.from_mask(mask).grouped == (total > 0 and 10 * in_runs >= tenths * total)


@pytest.mark.parametrize(
    ("slice_m", "singles", "wanted"), [(128, 16, True), (128, 17, False), (64, 1, True), (64, 2, False)]
)
def test_fine_slices_group_later(slice_m, singles, wanted):
    """Two aligned runs and single keys of other octets: a share of 16 / (16 + singles) in runs."""
    keep = torch.zeros(1, 1, 1, 256, dtype=torch.bool)
    keep[..., :16] = True
    keep[..., 24 : 24 + 8 * singles : 8] = True
    mask = SliceMask.from_dense(keep, slice_m=slice_m, slice_n=1, seqlen_q=slice_m, seqlen_k=256)
    assert Plan.from_mask(mask).grouped == wanted


def test_what_is_never_grouped():
    geometry = {**GEOMETRY, "slice_n": 1}
    full = SliceMask.full(**geometry)
    assert Plan.from_mask(full).grouped and "grouped" in repr(Plan.from_mask(full))
    assert not Plan.from_mask(full, capacity=1000).grouped
    assert not Plan.from_mask(SliceMask.full(**GEOMETRY)).grouped
    assert not Plan.from_mask(SliceMask.empty(**geometry)).grouped
    with pytest.raises(PlanError, match="segments of 4 keys are not grouped"):
        Plan.from_mask(SliceMask.full(**GEOMETRY), grouped=True)
    plan = Plan.from_mask(SliceMask.full(**GEOMETRY))
    with pytest.raises(PlanError, match="segments of 4 keys are not grouped"):
        Plan(plan.ids, plan.offset, plan.keys, **GEOMETRY, grouped=True)


@pytest.mark.parametrize(
    "counts, wanted",
    [
        ([20, 20, 20, 20], True),
        ([22, 22, 18, 18], True),  # 1.1 of the mean
        ([23, 21, 18, 18], False),
        ([20, 20, 20, 0], False),  # an empty list counts: 1.33
        ([0, 0, 0, 0], True),
    ],
)
def test_even_lists(counts, wanted, tmp_path):
    """From masks and from lists alike, and kept by whatever hands a plan on."""
    geometry = {"slice_m": 16, "slice_n": 2, "seqlen_q": 64, "seqlen_k": 100}
    keep = torch.arange(50) < torch.tensor(counts)[None, None, :, None]
    mask = SliceMask.from_dense(keep, **geometry)
    ids = torch.arange(50, dtype=torch.int32).expand(1, 1, 4, 50)
    lists = torch.tensor(counts, dtype=torch.int32)[None, None]
    for plan in (Plan.from_mask(mask), Plan.from_lists(ids, lists, **geometry)):
        assert plan.even == wanted == plan.to("meta").even == ("even" in repr(plan)) == plan.describe()["even"]
        plan.save(tmp_path / "plan.safetensors")
        assert Plan.load(tmp_path / "plan.safetensors").even == wanted
        assert (plan.signature == dataclasses.replace(plan, even=False).signature) == (not wanted)


def test_what_is_not_known_is_not_even():
    geometry = {"slice_m": 16, "slice_n": 2, "seqlen_q": 64, "seqlen_k": 100}
    mask = SliceMask.full(**geometry)
    ids, counts = torch.arange(50, dtype=torch.int32).expand(1, 1, 4, 50), torch.full((1, 1, 4), 50, dtype=torch.int32)
    assert Plan.from_mask(mask).even and not Plan.from_mask(mask, capacity=400).even
    assert Plan.from_mask(mask, capacity=400, even=True).even
    assert not Plan.from_lists(ids, counts, **geometry, capacity=400).even


def test_validate_knows_the_order_of_grouped_lists():
    geometry = {"slice_m": 16, "slice_n": 1, "seqlen_q": 16, "seqlen_k": 37}
    keep = torch.zeros(1, 1, 1, 37, dtype=torch.bool)
    keep[..., 3] = keep[..., 8:16] = keep[..., 24:37] = True
    plan = Plan.from_mask(SliceMask.from_dense(keep, **geometry), grouped=True)
    assert lists_of(plan) == [[*range(8, 16), *range(24, 32), 3, *range(32, 37)]]
    plain = Plan.from_mask(SliceMask.from_dense(keep, **geometry), grouped=False)
    for ids, grouped, words in (
        (plan.ids, False, "ids not ascending"),
        (plain.ids, True, "ids not aligned runs first, then the rest, each ascending"),
    ):
        said = Plan(ids, plan.offset, plan.keys, **geometry, grouped=grouped).validate()
        assert [why.split(":")[0] for why in said] == [words]


def test_compaction_in_chunks_is_the_same(monkeypatch):
    mask = random_mask()
    whole = Plan.from_mask(mask)
    monkeypatch.setattr("fgattn_cute.compaction._CHUNK_WORDS", 4)
    monkeypatch.setattr(plan_module, "_CHUNK_CELLS", 40)
    chunked = Plan.from_mask(mask)
    assert torch.equal(whole.ids, chunked.ids)
    assert chunked.to_mask() == mask and chunked.validate() == []


def test_work_is_head_major_in_groups_with_the_longest_first(monkeypatch):
    monkeypatch.setattr(plan_module, "WORK_L2_BYTES", 2 * 130 * 512)  # two heads of K and V
    plan = Plan.from_mask(random_mask(batch=2, heads=5))
    work = plan.work(2, 5)
    assert work.dtype == torch.int32 and work.shape == (2 * 5 * 3, 4) and work.is_contiguous()
    expected = []
    for b in range(2):
        for heads in ([0, 1], [2, 3], [4]):
            group = [(h, m) for h in heads for m in range(3)]
            group.sort(key=lambda item: -int(plan.keys[b, item[0], item[1]]))
            expected += [[m, h | b << 16, int(plan.keys[b, h, m]), int(plan.offset[b, h, m]) // 8] for h, m in group]
    assert work.tolist() == expected
    assert plan.work(2, 5) is work


def test_work_of_a_shared_plan_repeats_its_lists():
    plan = Plan.from_mask(random_mask(batch=1, heads=1))
    work = plan.work(2, 4)
    assert work.shape[0] == 2 * 4 * 3
    seen = {(int(m), int(hb) & 0xFFFF, int(hb) >> 16) for m, hb in work[:, :2]}
    assert seen == {(m, h, b) for m in range(3) for h in range(4) for b in range(2)}
    assert sorted(work[:, 3].unique().tolist()) == sorted((plan.offset // 8).flatten().tolist())
    with pytest.raises(PlanError, match="holds 3 heads, the call has 4"):
        Plan.from_mask(random_mask()).work(2, 4)


def test_capacity_large_enough_changes_nothing_but_room():
    mask = random_mask()
    exact, roomy = Plan.from_mask(mask), Plan.from_mask(mask, capacity=1001)
    assert roomy.capacity == 1008 and not bool(roomy.overflow) and exact.overflow is None
    assert lists_of(roomy) == lists_of(exact) and roomy.validate() == []


@pytest.mark.parametrize("capacity", [0, 8, 64, 120])
def test_capacity_too_small_cuts_lists_and_says_so(capacity):
    mask = random_mask(density=0.6)
    exact, cut = Plan.from_mask(mask), Plan.from_mask(mask, capacity=capacity)
    assert bool(cut.overflow)
    assert cut.validate()[0] == f"capacity {capacity} ids was too small: lists are cut"
    assert (cut.offset + cut.counts() <= capacity).all() and cut.ids.numel() == capacity + PLAN_SLACK
    for short, full in zip(lists_of(cut), lists_of(exact), strict=True):
        assert short == full[: len(short)]
    dense = (cut.to_mask().bits & ~mask.bits) != 0
    assert not dense.any()


def test_validate_names_each_fault():
    plan = Plan.from_mask(random_mask(batch=1, heads=1, density=0.5))
    assert plan.validate() == []

    def broken(**cells):
        ids = plan.ids.clone()
        for position, value in cells.items():
            ids[int(position[1:])] = value
        return Plan(ids, plan.offset, plan.keys, **GEOMETRY).validate()

    first = plan.ids[0].item()
    assert any(
        why.startswith("duplicate ids: 1 lists, the first is batch 0, head 0, query block 0")
        for why in broken(_1=first)
    )
    assert any(why.startswith("id outside 0..32: 1 lists") for why in broken(_0=-1))
    assert any(why.startswith("id outside 0..32: 1 lists") for why in broken(_0=33))
    second = plan.ids[1].item()
    swapped = broken(_0=second, _1=first)
    assert [why.split(":")[0] for why in swapped] == ["ids not ascending"]
    keys = plan.keys.clone()
    keys[0, 0, 1] = 131
    assert Plan(plan.ids, plan.offset, keys, **GEOMETRY).validate()[0].startswith("key count outside 0..130")
    keys[0, 0, 1] = int(plan.keys[0, 0, 1]) - 1
    assert Plan(plan.ids, plan.offset, keys, **GEOMETRY).validate()[0].startswith("key count does not match the list")
    assert Plan(plan.ids, plan.offset + 1, plan.keys, **GEOMETRY).validate()[0].startswith("list does not start")
    far = plan.offset.clone()
    far[0, 0, 2] = 1 << 33
    assert Plan(plan.ids, far, plan.keys, **GEOMETRY).validate()[0].startswith("list outside the id buffer")


def test_storage_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    plan = Plan.from_mask(random_mask())
    plan.save(tmp_path / "plan.safetensors")
    back = Plan.load(tmp_path / "plan.safetensors")
    assert back.geometry == GEOMETRY
    for name in ("ids", "offset", "keys"):
        assert torch.equal(getattr(back, name), getattr(plan, name))
    assert not back.grouped
    full = Plan.from_mask(SliceMask.full(**{**GEOMETRY, "slice_n": 1}))
    full.save(tmp_path / "grouped.safetensors")
    assert full.grouped and Plan.load(tmp_path / "grouped.safetensors").grouped
    (tmp_path / "noise").write_bytes(b"not a file of tensors")
    with pytest.raises(PlanError, match="is not a safetensors file"):
        Plan.load(tmp_path / "noise")


def test_load_refuses_unsound_lists(tmp_path):
    pytest.importorskip("safetensors")
    plan = Plan.from_mask(random_mask())
    Plan(plan.ids - 40, plan.offset, plan.keys, **GEOMETRY).save(tmp_path / "bad")
    with pytest.raises(PlanError, match=r"id outside 0\.\.32"):
        Plan.load(tmp_path / "bad")


def test_identity_and_geometry():
    plan = Plan.from_mask(random_mask())
    assert plan == plan and plan != Plan.from_mask(random_mask()) and len({plan, plan}) == 1
    assert plan.to("cpu") is plan
    assert (plan.batch, plan.heads, plan.blocks_q, plan.blocks_k) == (2, 3, 3, 33)
    assert plan.nbytes == 4 * plan.ids.numel() + (8 + 4) * 18


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        (torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3).int(), "ids is torch.float32, not an int32 tensor"),
        (torch.zeros(1, 1, 2, 4).int(), torch.zeros(1, 1, 3).int(), r"is not \(batch, heads, 3, L\)"),
        (torch.zeros(1, 1, 3, 4).int(), torch.zeros(1, 3).int(), r"counts \(1, 3\) is not \(batch, heads, 3\)"),
        (torch.zeros(1, 2, 3, 4).int(), torch.zeros(1, 1, 3).int(), "differ in batch or heads"),
        (torch.zeros(1, 1, 3, 4).int(), torch.tensor([[[0, 5, -1]]]).int(), "2 counts lie outside 0..4"),
    ],
)
def test_from_lists_refusals(ids, counts, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_lists(ids, counts, **GEOMETRY)


def test_construction_refusals():
    plan = Plan.from_mask(random_mask())
    with pytest.raises(PlanError, match="made from a SliceMask, not from Tensor"):
        Plan.from_mask(torch.ones(3))
    with pytest.raises(PlanError, match="capacity -8 is not a whole number"):
        Plan.from_mask(random_mask(), capacity=-8)
    with pytest.raises(PlanError, match="fewer than the slack of 256"):
        Plan(plan.ids[:100], plan.offset, plan.keys, **GEOMETRY)
    with pytest.raises(PlanError, match="ids does not start on 32 bytes"):
        Plan(plan.ids[1:], plan.offset, plan.keys, **GEOMETRY)
    with pytest.raises(PlanError, match=r"offset .* is not a contiguous torch.int64"):
        Plan(plan.ids, plan.offset.int(), plan.keys, **GEOMETRY)
