# SPDX-License-Identifier: Apache-2.0
"""The kernels that make lists in parts, on the emulator: the plans of the torch path bit for bit, whatever the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgattn_cute as fg
from fgattn_cute import compile as compiler
from fgattn_cute import cubin, device_masks, emulator, part_lists
from fgattn_cute.kernels.mask_spec import SHARED_MAX_COLUMNS, PartListSpec
from fgattn_cute.kernels.spec import PARTS_TILE_N as TILE

INTS = st.integers


def mask_of(keep):
    """Of bool (batch, heads, blocks, seqlen_k), the last block short of a query."""
    return fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=64 * keep.shape[2] - 1, seqlen_k=keep.shape[3])


def pool_mask(shape, pool, share, seed=0):
    """Blocks that keep a share of a pool each, every fifth none."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape[:2], 1, shape[3], generator=generator) < pool
    keep = keep & (torch.rand(*shape, generator=generator) < share)
    keep[:, :, 4::5] = False
    return mask_of(keep)


def on_emulator(mask, order=None, seed=0):
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled: nothing is right by accident
    try:
        with emulator.session(seed=seed, checks="all"):
            return fg.PartsPlan.from_mask(mask, order, "emulator")
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(got, wanted):
    for name in ("offset", "keys", "ids"):
        mine, theirs = getattr(got.lists, name), getattr(wanted.lists, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    assert got.members.dtype == torch.int32 and torch.equal(got.members, wanted.members)
    assert torch.equal(got.blocks, wanted.blocks)


MASKS = {
    # More than one stretch of 1024 keys, and of 32 tiles.
    "overlapping": pool_mask((1, 2, 7, 3100), 0.5, 0.8),
    "all keys": mask_of(torch.ones(1, 1, 3, 4005, dtype=torch.bool)),
    "whole tiles of each two": mask_of((torch.arange(1200) % 3 != torch.arange(3)[:, None])[None, None]),
    "whole tiles of one's own": mask_of((torch.arange(960) % 3 == torch.arange(3)[:, None])[None, None]),
    "one block of a list": mask_of(torch.rand(1, 3, 1, 333, generator=torch.Generator().manual_seed(1)) < 0.7),
    "batch and heads": pool_mask((2, 3, 5, 700), 0.6, 0.7),
    "a key less than a tile": mask_of((torch.arange(300) < TILE - 1).expand(1, 1, 4, -1).contiguous()),
    "no key": mask_of(torch.zeros(1, 1, 2, 40, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", MASKS)
def test_same_plans_as_torch(name):
    mask = MASKS[name]
    plan = on_emulator(mask)
    assert_same(plan, fg.PartsPlan.from_mask(mask, backend="torch"))
    assert plan.to_mask() == mask and plan.validate() == []
    end = int(plan.lists.keys.sum())
    assert plan.ids.numel() > end and not plan.ids[end:].any(), "what belongs to no list is 0"


@st.composite
def masks(draw):
    """Every kind of key at a rate of its own: of no block, of one, of two, of all; lists that lack blocks."""
    shape = draw(INTS(1, 2)), draw(INTS(1, 2)), draw(INTS(1, 5)), draw(INTS(1, 1500))
    weights = torch.tensor([draw(st.sampled_from([0, 1, 1, 5, 40])) for _ in range(8)]) + 1e-9
    generator = torch.Generator().manual_seed(draw(INTS(0, 2**31)))
    lists = -(-shape[2] // 3)
    kinds = torch.multinomial(weights, shape[0] * shape[1] * lists * shape[3], True, generator=generator)
    kinds = kinds.view(*shape[:2], lists, 1, shape[3]) >> torch.arange(3)[:, None] & 1
    return mask_of(kinds.bool().flatten(2, 3)[:, :, : shape[2]].contiguous())


@given(masks(), st.booleans(), INTS(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_mask_comes_back_from_the_same_plan(mask, turned, seed):
    order = torch.arange(mask.blocks_q).flip(0) if turned else None
    plan = on_emulator(mask, order, seed)
    assert_same(plan, fg.PartsPlan.from_mask(mask, order, "torch"))
    assert plan.to_mask() == mask and plan.validate() == []


def test_counts_alone_are_the_same():
    mask = MASKS["overlapping"]
    blocks = torch.tensor([[0, 3, 1], [2, 6, 4], [5, 7, 8]] * 2, dtype=torch.int32)
    with emulator.session(checks="all"):
        found = part_lists.TileCounts.of(mask, blocks, "emulator")
    wanted = part_lists.TileCounts.of(mask, blocks, "torch")
    assert all(torch.equal(mine.long(), theirs.long()) for mine, theirs in zip(found, wanted, strict=True))
    rows = mask.to_dense()[0, 1]
    assert found.keys[3:].tolist() == [
        [int(rows[b].sum()) if b < 7 else 0 for b in three] for three in blocks[:3].tolist()
    ]


def test_sequences_whose_tiles_would_not_count_in_32_bits_take_torch(monkeypatch):
    monkeypatch.setattr(device_masks, "measure_parts", lambda *_: pytest.fail("the kernel was launched"))
    geometry = {"slice_m": 64, "slice_n": 1, "seqlen_q": 64, "seqlen_k": SHARED_MAX_COLUMNS + 1}
    plan = fg.PartsPlan.from_mask(fg.SliceMask.full(**geometry), backend="emulator")
    assert plan.kept_keys().tolist() == [[SHARED_MAX_COLUMNS + 1, 0, 0]]
    tiles = SHARED_MAX_COLUMNS // TILE + 1
    assert 2 * (tiles // 2 + 1) ** 2 < 2**31, "the largest product, of two kinds that share the tiles"


@pytest.mark.parametrize("step, registers", [("measure", 32), ("write", 56)])
def test_compiled_code(step, registers):
    """No local memory; eight CTAs of 8 warps to an SM, and five of 7."""
    artifact = compiler.artifact(PartListSpec(step=step))
    assert artifact.facts["stack_bytes"] == 0 and artifact.facts["smem_bytes"] == 0
    assert artifact.facts["registers"] <= registers
    if cubin.nvdisasm() is None:
        pytest.skip("needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    instructions = cubin.opcodes(cubin.from_object(artifact.object_file))
    assert not [op for op in instructions if op.startswith(("STL", "LDL"))]
