# SPDX-License-Identifier: Apache-2.0
"""The kernels that make unions in halves, on the emulator: the plans of the torch path bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgattn_cute as fg
from fgattn_cute import compile as compiler
from fgattn_cute import cubin, device_masks, emulator, half_lists
from fgattn_cute.kernels.mask_spec import SHARED_MAX_COLUMNS, HalfListSpec
from fgattn_cute.kernels.spec import HALVES_TILE_N as TILE

INTS = st.integers


def mask_of(keep, slice_m):
    """Of bool (batch, heads, blocks, seqlen_k), the last block short of a query."""
    lengths = {"seqlen_q": slice_m * keep.shape[2] - 1, "seqlen_k": keep.shape[3]}
    return fg.SliceMask.from_dense(keep.contiguous(), slice_m=slice_m, slice_n=1, **lengths)


def pool_mask(slice_m, shape, pool, share, seed=0):
    """Blocks that keep a share of a pool each, every fifth none."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape[:2], 1, shape[3], generator=generator) < pool
    keep = keep & (torch.rand(*shape, generator=generator) < share)
    keep[:, :, 4::5] = False
    return mask_of(keep, slice_m)


def on_emulator(mask, order=None, seed=0):
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled: nothing is right by accident
    try:
        with emulator.session(seed=seed, checks="all"):
            return fg.HalvesPlan.from_mask(mask, order, "emulator")
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(got, wanted):
    for name in ("offset", "keys", "ids"):
        mine, theirs = getattr(got.lists, name), getattr(wanted.lists, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    assert got.members.dtype == torch.int32 and torch.equal(got.members, wanted.members)
    assert torch.equal(got.blocks, wanted.blocks)


def half_only(columns, half):
    """A mask of two blocks of 64, of which one keeps all keys and the other none."""
    return mask_of((torch.arange(2) == half)[None, None, :, None].expand(1, 1, 2, columns), 64)


MASKS = {
    # More than one stretch of 4 x 1024 keys, and more than one of a warp's batches in each.
    "overlapping": pool_mask(32, (1, 1, 8, 9000), 0.9, 0.6),
    "eight blocks, batch and heads": pool_mask(16, (2, 3, 9, 700), 0.6, 0.3),
    "two blocks, a missing one": pool_mask(64, (1, 2, 3, 1500), 1.0, 0.5),
    "all keys": mask_of(torch.ones(1, 1, 4, 4005, dtype=torch.bool), 32),
    "exactly full tiles": mask_of((torch.arange(640) % 2 == torch.arange(2)[:, None])[None, None], 64),
    "full common tiles": mask_of((torch.arange(700) < 5 * TILE).expand(1, 1, 2, -1), 64),
    "the first half alone": half_only(1200, 0),
    "the second half alone": half_only(1200, 1),
    "a key less than a tile": mask_of((torch.arange(300) < TILE - 1).expand(1, 1, 9, -1), 16),
    "no key": mask_of(torch.zeros(1, 1, 2, 40, dtype=torch.bool), 64),
}


@pytest.mark.parametrize("name", MASKS)
def test_same_plans_as_torch(name):
    mask = MASKS[name]
    plan = on_emulator(mask)
    assert_same(plan, fg.HalvesPlan.from_mask(mask, backend="torch"))
    assert plan.to_mask() == mask and plan.validate() == []
    end = int(plan.lists.keys.sum())
    assert plan.ids.numel() > end and not plan.ids[end:].any(), "what belongs to no list is 0"
    assert not plan.members[-half_lists.SLACK_ROWS - 1 :].any()


@st.composite
def masks(draw):
    """Every kind of key at a rate of its own: of nobody, of A, of B, of both; blocks of a half that differ; unions that
    lack blocks."""
    slice_m = draw(st.sampled_from([16, 32, 64]))
    size = 64 // slice_m
    shape = draw(INTS(1, 2)), draw(INTS(1, 2)), draw(INTS(1, 5 * size)), draw(INTS(1, 1500))
    weights = torch.tensor([draw(st.sampled_from([0, 1, 1, 5, 40])) for _ in range(4)]) + 1e-9
    share = draw(st.sampled_from([0.2, 0.7, 1.0]))
    generator = torch.Generator().manual_seed(draw(INTS(0, 2**31)))
    unions = -(-shape[2] // (2 * size))
    kinds = torch.multinomial(weights, shape[0] * shape[1] * unions * shape[3], True, generator=generator)
    halves = (kinds.view(*shape[:2], unions, 1, shape[3]) >> torch.arange(2)[:, None] & 1).bool().flatten(2, 3)
    keep = halves.repeat_interleave(size, 2)
    keep = keep & (torch.rand(keep.shape, generator=generator) < share)
    return mask_of(keep[:, :, : shape[2]], slice_m)


@given(masks(), st.booleans(), INTS(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_mask_comes_back_from_the_same_plan(mask, turned, seed):
    order = torch.arange(mask.blocks_q).flip(0) if turned else None
    plan = on_emulator(mask, order, seed)
    assert_same(plan, fg.HalvesPlan.from_mask(mask, order, "torch"))
    assert plan.to_mask() == mask and plan.validate() == []


def test_counts_alone_are_the_same():
    mask = MASKS["two blocks, a missing one"]
    blocks = torch.tensor([[2, 0], [1, 3]] * 2, dtype=torch.int32)
    with emulator.session(checks="all"):
        found = half_lists.TileCounts.of(mask, blocks, "emulator")
    wanted = half_lists.TileCounts.of(mask, blocks, "torch")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    rows = mask.to_dense()[0, 1]
    assert found.keys[2:].tolist() == [[int(rows[b].sum()) if b < 3 else 0 for b in two] for two in blocks[:2].tolist()]


def test_sequences_whose_tiles_would_not_count_in_32_bits_take_torch(monkeypatch):
    monkeypatch.setattr(device_masks, "measure_halves", lambda *_: pytest.fail("the kernel was launched"))
    geometry = {"slice_m": 64, "slice_n": 1, "seqlen_q": 64, "seqlen_k": SHARED_MAX_COLUMNS + 1}
    plan = fg.HalvesPlan.from_mask(fg.SliceMask.full(**geometry), backend="emulator")
    assert plan.kept_keys().tolist() == [[SHARED_MAX_COLUMNS + 1, 0]]


@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("step", ["measure", "write"])
def test_compiled_code(step, blocks):
    """No local memory; four CTAs of 8 warps to an SM, and three of 12."""
    artifact = compiler.artifact(HalfListSpec(step=step, union_blocks=blocks))
    assert artifact.facts["stack_bytes"] == 0 and artifact.facts["smem_bytes"] == 0
    assert artifact.facts["registers"] <= 56
    if cubin.nvdisasm() is None:
        pytest.skip("needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    instructions = cubin.opcodes(cubin.from_object(artifact.object_file))
    assert not [op for op in instructions if op.startswith(("STL", "LDL"))]
