# SPDX-License-Identifier: Apache-2.0
"""The compaction kernels on the emulator: the lists of the torch path bit for bit, whatever the mask and the room."""

import pytest
import torch

from fgattn_cute import compile as compiler
from fgattn_cute import cubin, emulator
from fgattn_cute.compaction import LIST_ALIGN, PLAN_SLACK, Lists, compact
from fgattn_cute.errors import InputError
from fgattn_cute.kernels.mask_spec import CompactSpec
from fgattn_cute.mask import SliceMask

# batch, heads, seqlen_q, seqlen_k, slice_m, slice_n: rows beside the 8 of a CTA, words beside the 32 of a warp, and
# sequence ends inside a word, a slice, or neither.
GEOMETRIES = {
    "one bit": (1, 1, 16, 1, 16, 1),
    "a word less one": (1, 2, 48, 31, 16, 1),
    "a whole word": (1, 3, 40, 32, 16, 1),
    "a chunk and a bit": (1, 1, 130, 1025, 16, 1),
    "batch and heads": (2, 3, 100, 700, 16, 1),
    "segments of 8, cut": (1, 2, 200, 4097, 64, 8),
    "segments of 3, cut": (2, 1, 100, 3001, 16, 3),
    "segments longer than the sequence": (1, 2, 50, 60, 16, 128),
}


def random_mask(geometry, density, octets=0.0):
    """Kept slices at random, the last column often, every third block empty, and a share of all octets kept."""
    batch, heads, seqlen_q, seqlen_k, slice_m, slice_n = geometry
    keep = torch.rand(batch, heads, -(-seqlen_q // slice_m), -(-seqlen_k // slice_n)) < density
    whole = torch.rand(*keep.shape[:3], keep.shape[3] // 8 + 1) < octets
    keep |= whole.repeat_interleave(8, 3)[..., : keep.shape[3]]
    keep[..., -1] |= torch.rand(keep.shape[:-1]) < 0.5
    keep[..., 2::3, :] = False
    return SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def on_emulator(mask, capacity, seed=0, grouped=None) -> Lists:
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled: nothing is right by accident
    try:
        with emulator.session(seed=seed):
            return compact(mask, capacity, "emulator", grouped)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(got: Lists, wanted: Lists):
    assert (got.grouped, got.even) == (wanted.grouped, wanted.even)
    for name in ("ids", "offset", "keys", "overflow"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@pytest.mark.parametrize("density", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_same_lists_as_torch(geometry, density):
    mask = random_mask(geometry, density)
    assert_same(on_emulator(mask, None), compact(mask, None, "torch"))


@pytest.mark.parametrize("density, octets", [(0.02, 0.3), (0.3, 0.3), (0.5, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name[:8] != "segments"])
def test_same_grouped_lists_as_torch(geometry, density, octets):
    mask = random_mask(GEOMETRIES[geometry], density, octets)
    got = on_emulator(mask, None, grouped=True)
    assert_same(got, compact(mask, None, "torch", grouped=True))
    plain = compact(mask, None, "torch", grouped=False)
    assert torch.equal(got.offset, plain.offset) and torch.equal(got.keys, plain.keys)
    ids, offset = got.ids.tolist(), got.offset.flatten().tolist()
    for row, start in zip(mask.to_dense().flatten(0, 2).tolist(), offset, strict=True):
        listed = ids[start : start + sum(row)]
        runs = [c for c in range(len(row)) if all(row[c // 8 * 8 :][:8]) and c // 8 * 8 + 8 <= len(row)]
        assert listed == runs + [c for c, kept in enumerate(row) if kept and c not in runs]


@pytest.mark.parametrize("room", [0.0, 0.3, 0.9, 1.0, 3.0])
def test_grouped_lists_are_cut_at_the_end(room):
    mask = random_mask(GEOMETRIES["batch and heads"], 0.4, 0.3)
    whole = compact(mask, None, "torch", grouped=True)
    capacity = int((whole.ids.numel() - PLAN_SLACK) * room) // LIST_ALIGN * LIST_ALIGN
    got = on_emulator(mask, capacity, grouped=True)
    assert_same(got, compact(mask, capacity, "torch", grouped=True))
    same = min(capacity, whole.ids.numel() - PLAN_SLACK)
    assert torch.equal(got.ids[:same], whole.ids[:same]) and not got.ids[same:].any()


@pytest.mark.parametrize("room", [0.0, 0.3, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("geometry", ["batch and heads", "segments of 3, cut"])
def test_any_capacity_is_safe_and_same(geometry, room):
    """Too little cuts lists, flags it and never writes outside (the emulator would fault); too much is zeroed."""
    mask = random_mask(GEOMETRIES[geometry], 0.4)
    needed = compact(mask, None, "torch").ids.numel() - PLAN_SLACK
    capacity = int(needed * room) // LIST_ALIGN * LIST_ALIGN
    got = on_emulator(mask, capacity)
    assert_same(got, compact(mask, capacity, "torch"))
    assert bool(got.overflow) == (capacity < needed)
    segments = -(-got.keys.long() // mask.slice_n)
    assert (got.offset + segments <= capacity).all(), "a list ends past the capacity"
    # The lists that remain are the beginnings of the true ones.
    for b, h, m in torch.cartesian_prod(*map(torch.arange, got.keys.shape)).tolist():
        start, length = int(got.offset[b, h, m]), int(segments[b, h, m])
        assert (
            got.ids[start : start + length].tolist() == mask.to_dense()[b, h, m].nonzero().flatten()[:length].tolist()
        )


def test_empty_mask():
    mask = SliceMask.empty(slice_m=16, slice_n=1, seqlen_q=70, seqlen_k=90)
    got = on_emulator(mask, None)
    assert got.ids.numel() == PLAN_SLACK and not got.ids.any() and not got.keys.any() and not got.overflow


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_schedule_gives_the_same(seed):
    mask = random_mask(GEOMETRIES["batch and heads"], 0.4)
    assert_same(on_emulator(mask, None, seed), on_emulator(mask, None))


def test_unknown_backend():
    with pytest.raises(InputError, match="backend='cpu' is not one of 'cuda', 'emulator'"):
        compact(SliceMask.empty(slice_m=16, slice_n=1, seqlen_q=16, seqlen_k=16), None, "cpu")


@pytest.mark.parametrize("step", ["count", "write"])
def test_compiled_code(step):
    """No local memory, full occupancy, and 16-byte stores where the buffer is cleared."""
    artifact = compiler.artifact(CompactSpec(step=step))
    assert artifact.facts["stack_bytes"] == 0 and artifact.facts["smem_bytes"] == 0
    assert artifact.facts["registers"] <= 32, "2048 threads of an SM share 65536 registers"
    if cubin.nvdisasm() is None:
        pytest.skip("needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    instructions = cubin.opcodes(cubin.from_object(artifact.object_file))
    assert not [op for op in instructions if op.startswith(("STL", "LDL"))]
    if step == "write":
        assert "STG.E.128" in instructions
