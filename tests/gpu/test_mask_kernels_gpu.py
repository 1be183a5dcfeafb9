# SPDX-License-Identifier: Apache-2.0
"""The mask kernels on a real GPU: sizes that the emulator has no time for, against the torch path on the same GPU."""

import warnings

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import device_masks, predict
from fgattn_cute.compaction import LIST_ALIGN, PLAN_SLACK, compact
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict.scores import slice_mass
from perf.unions import pool_mask

BAND = 1e-4  # relative distance from the threshold within which fp32 sums in another order may decide otherwise


def random_mask(slice_m, slice_n, heads, seqlen, density):
    keep = torch.rand(1, heads, -(-seqlen // slice_m), -(-seqlen // slice_n), device="cuda") < density
    keep[..., 3, :] = False
    return SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen)


@pytest.mark.parametrize("room", [None, 0.5, 1.5])
@pytest.mark.parametrize(("slice_m", "slice_n"), [(128, 1), (16, 1), (128, 8), (64, 3)])
def test_compaction_is_that_of_torch(slice_m, slice_n, room):
    mask = random_mask(slice_m, slice_n, heads=4, seqlen=9001, density=0.3)
    exact = compact(mask, None, "torch")
    capacity = None
    if room is not None:
        capacity = int((exact.ids.numel() - PLAN_SLACK) * room) // LIST_ALIGN * LIST_ALIGN
    wanted = exact if room is None else compact(mask, capacity, "torch")
    for _ in range(3):
        got = compact(mask, capacity, "cuda")
        assert got.grouped == wanted.grouped
        for name in ("ids", "offset", "keys", "overflow"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("octets", [0.05, 0.3, 1.0])
def test_grouped_lists_are_those_of_torch(octets):
    keep = torch.rand(1, 4, 30, 1126, device="cuda") < octets
    keep = keep.repeat_interleave(8, -1)[..., :9001] | (torch.rand(1, 4, 30, 9001, device="cuda") < 0.1)
    keep[..., 3, :] = False
    mask = SliceMask.from_dense(keep, slice_m=128, slice_n=1, seqlen_q=3840, seqlen_k=9001)
    wanted = compact(mask, None, "torch", grouped=True)
    for _ in range(3):
        got = compact(mask, None, "cuda", grouped=True)
        assert got.grouped and torch.equal(got.ids, wanted.ids) and torch.equal(got.offset, wanted.offset)


@pytest.mark.parametrize("seqlen", [9001, 16384])
@pytest.mark.parametrize("factor", [1.02, 1.25, 1.68])
@pytest.mark.parametrize(("kind", "slice_m"), [("PartsPlan", 64), ("HalvesPlan", 64), ("HalvesPlan", 16)])
def test_shared_lists_are_those_of_torch(kind, slice_m, factor, seqlen):
    """And room for them is made with one synchronisation."""
    kind = getattr(fg, kind)
    mask = pool_mask(slice_m, factor, seqlen=seqlen, heads=4, density=0.3, device="cuda")
    wanted = kind.from_mask(mask, backend="torch")
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                got = kind.from_mask(mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in said if "synchroniz" in str(w.message)]) == 1
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.lists.offset, wanted.lists.offset)
        assert torch.equal(got.members, wanted.members) and torch.equal(got.lists.keys, wanted.lists.keys)
    assert got.to_mask() == mask


@pytest.mark.parametrize("statistic", ["mean", "max"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "slice_m", "slice_n"),
    [
        (128, torch.bfloat16, 128, 1),
        (128, torch.bfloat16, 16, 1),
        (64, torch.float16, 192, 8),
        (96, torch.bfloat16, 48, 33),
        (256, torch.bfloat16, 128, 64),
        (128, torch.bfloat16, 400, 300),
    ],
)
def test_mass_bits(head_dim, dtype, slice_m, slice_n, statistic):
    q = torch.randn(1, 3001, 4, head_dim, device="cuda", dtype=dtype)
    k = torch.randn(1, 2999, 2, head_dim, device="cuda", dtype=dtype)
    options = {"slice_m": slice_m, "slice_n": slice_n, "scale": head_dim**-0.5, "statistic": statistic}
    lse = device_masks.row_lse(q, k, scale=head_dim**-0.5, backend="cuda")
    scores = torch.stack(
        [torch.cat([s for _, s in slice_mass(q[0, :, h], k[0, :, h // 2], lse[0, h], **options)]) for h in range(4)]
    )
    tau = scores.flatten(1).median(-1).values.view(1, 4, 1)
    found = [device_masks.slice_bits(q, k, lse, tau, **options, backend="cuda") for _ in range(5)]
    assert all(torch.equal(bits, found[0]) for bits in found)
    mask = SliceMask(found[0], slice_m, slice_n, 3001, 2999)
    flipped = mask.to_dense()[0] != (scores >= tau[0, :, :, None])
    assert ((scores / tau[0, :, :, None] - 1).abs()[flipped] <= BAND).all()


@pytest.mark.parametrize("select", [predict.TopK(300), predict.TopP(0.6), predict.Budget(0.2)], ids=repr)
@pytest.mark.parametrize("find", [predict.mass, predict.pooled])
def test_rules_keep_what_torch_keeps(find, select):
    q = torch.randn(1, 3001, 4, 128, device="cuda", dtype=torch.bfloat16) * 2
    k = torch.randn(1, 2999, 2, 128, device="cuda", dtype=torch.bfloat16)
    sizes = {"slice_m": 64, "slice_n": 1, "select": select}
    mine, theirs = (find(q, k, **sizes, backend=backend) for backend in ("cuda", "torch"))
    assert find(q, k, **sizes, backend="cuda") == mine
    assert mine.density == pytest.approx(theirs.density, rel=0.01)
    assert ((mine & theirs).density / theirs.density) > 0.98
    assert predict.recall(mine, q, k).mean() >= predict.recall(theirs, q, k).mean() - 1e-3
