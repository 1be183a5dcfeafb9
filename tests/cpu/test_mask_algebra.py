# SPDX-License-Identifier: Apache-2.0
"""Set algebra, granularity, key order, selection and storage of masks, against the same operations on token masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgattn_cute import mask as mask_module
from fgattn_cute import reference
from fgattn_cute.errors import MaskError, UnsupportedError
from fgattn_cute.mask import SliceMask
from tests.strategies import dense_maps, geometries, maps

GEOMETRY = {"slice_m": 16, "slice_n": 4, "seqlen_q": 40, "seqlen_k": 130}


def random_mask(density=0.4, batch=1, heads=2, **changes):
    geometry = GEOMETRY | changes
    shape = (
        batch,
        heads,
        -(-geometry["seqlen_q"] // geometry["slice_m"]),
        -(-geometry["seqlen_k"] // geometry["slice_n"]),
    )
    return SliceMask.from_dense(torch.rand(shape) < density, **geometry)


@settings(deadline=None, max_examples=50)
@given(st.data(), geometries())
def test_set_algebra(data, geometry):
    a, b = (SliceMask.from_dense(data.draw(dense_maps(geometry)), **geometry) for _ in range(2))
    if 1 not in (a.batch, b.batch) and a.batch != b.batch:
        return
    x, y = a.to_dense(), b.to_dense()
    assert torch.equal((a | b).to_dense(), x | y)
    assert torch.equal((a & b).to_dense(), x & y)
    assert torch.equal((a - b).to_dense(), x & ~y)
    assert torch.equal((~a).to_dense(), ~x)
    assert (~a).density == pytest.approx(1 - a.density)
    assert ~~a == a and (a | ~a).density == 1.0 and (a & ~a).density == 0.0


def test_masks_that_do_not_fit_are_refused():
    a = random_mask()
    with pytest.raises(MaskError, match=r"slice_m 16 \| 32 \(bring both to one granularity with refine or coarsen\)"):
        a | random_mask(slice_m=32)
    with pytest.raises(MaskError, match="seqlen_k 130 & 131"):
        a & random_mask(seqlen_k=131)
    with pytest.raises(MaskError, match="heads 2 - 3"):
        a - random_mask(heads=3)
    with pytest.raises(TypeError):
        a | torch.ones(1)


@settings(deadline=None, max_examples=50)
@given(maps(slice_ms=(16, 48, 64), slice_ns=(1, 6, 64)), st.data())
def test_refine_is_exact(case, data):
    keep, geometry = case
    mask = SliceMask.from_dense(keep, **geometry)
    fine_m = data.draw(st.sampled_from([d for d in (1, 2, 8, 16, 48, 64) if geometry["slice_m"] % d == 0]))
    fine_n = data.draw(st.sampled_from([d for d in (1, 2, 3, 6, 32, 64) if geometry["slice_n"] % d == 0]))
    fine = mask.refine(fine_m, fine_n)
    assert (fine.slice_m, fine.slice_n) == (fine_m, fine_n)
    assert torch.equal(fine.to_token_mask(), mask.to_token_mask())
    assert fine.density == mask.density
    assert fine.coarsen(geometry["slice_m"], geometry["slice_n"]) == mask


@settings(deadline=None, max_examples=50)
@given(maps(max_len=24, slice_ms=(1, 4), slice_ns=(1, 3, 8)), st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 40]))
def test_coarsen_is_the_smallest_superset(case, times_m, times_n):
    keep, geometry = case
    mask = SliceMask.from_dense(keep, **geometry)
    m, n = geometry["slice_m"] * times_m, geometry["slice_n"] * times_n
    coarse = mask.coarsen(m, n)
    tokens = mask.to_token_mask()
    assert not (tokens & ~coarse.to_token_mask()).any()
    for i in range(coarse.blocks_q):
        for j in range(coarse.blocks_k):
            part = tokens[:, :, i * m : (i + 1) * m, j * n : (j + 1) * n]
            assert torch.equal(coarse.to_dense()[:, :, i, j], part.flatten(2).any(-1))


def test_reshaping_in_chunks_is_the_same(monkeypatch):
    mask = random_mask(heads=3)
    expected = mask.refine(8, 1), mask.coarsen(32, 12)
    monkeypatch.setattr(mask_module, "_CHUNK_CELLS", 200)
    assert (mask.refine(8, 1), mask.coarsen(32, 12)) == expected


def test_a_mask_and_its_refinement_attend_alike():
    mask = random_mask()
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 130, 2, 16), torch.randn(1, 130, 2, 16)
    coarse = reference.attention(q, k, v, mask, dtype=torch.float64)
    fine = reference.attention(q, k, v, mask.refine(8, 1), dtype=torch.float64)
    torch.testing.assert_close(fine, coarse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("verb", "sizes", "message"),
    [
        ("refine", (32, 4), "cannot refine slices of 16 x 4 to 32 x 4: divisors work"),
        ("refine", (16, 3), "to 16 x 3: divisors work"),
        ("refine", (16, 0), "to 16 x 0"),
        ("coarsen", (24, 4), "cannot coarsen slices of 16 x 4 to 24 x 4: multiples work"),
        ("coarsen", (8, 4), "to 8 x 4: multiples work"),
    ],
)
def test_granularities_that_do_not_nest_are_refused(verb, sizes, message):
    with pytest.raises(MaskError, match=message):
        getattr(random_mask(), verb)(*sizes)


@pytest.mark.parametrize("per_head", [False, True])
def test_permuted_keys_attend_alike(per_head):
    mask = random_mask(slice_n=1)
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 130, 2, 16), torch.randn(1, 130, 2, 16)
    if per_head:
        order = torch.stack([torch.randperm(130) for _ in range(2)]).unsqueeze(0)
        index = order.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 16)
        moved = [x.gather(1, index) for x in (k, v)]
    else:
        order = torch.randperm(130)
        moved = [x[:, order] for x in (k, v)]
    plain = reference.attention(q, k, v, mask, dtype=torch.float64)
    permuted = reference.attention(q, *moved, mask.permute_keys(order), dtype=torch.float64)
    torch.testing.assert_close(permuted, plain, rtol=1e-12, atol=1e-12)


def test_permute_keys_broadcasts_a_shared_mask_and_refuses_nonsense():
    mask = random_mask(slice_n=1, heads=1)
    order = torch.stack([torch.randperm(130) for _ in range(6)]).view(2, 3, 130)
    moved = mask.permute_keys(order)
    assert (moved.batch, moved.heads) == (2, 3)
    assert torch.equal(moved.to_dense()[1, 2], mask.to_dense()[0, 0][:, order[1, 2]])
    with pytest.raises(MaskError, match=r"slice_n is 4: refine\(16, 1\) first"):
        random_mask().permute_keys(torch.arange(130))
    with pytest.raises(MaskError, match="no permutation of 130 keys"):
        mask.permute_keys(torch.zeros(130, dtype=torch.int64))
    with pytest.raises(MaskError, match="no permutation of 130 keys"):
        mask.permute_keys(torch.arange(129))


def test_select():
    mask = random_mask(batch=2, heads=4)
    dense = mask.to_dense()
    assert torch.equal(mask.select(heads=slice(1, 3)).to_dense(), dense[:, 1:3])
    assert torch.equal(mask.select(batch=[1], heads=[3, 0]).to_dense(), dense[1:][:, [3, 0]])
    shared = random_mask(heads=1)
    assert shared.select(heads=slice(4, 8)) == shared
    with pytest.raises(MaskError, match="selects no list of entries"):
        mask.select(heads=slice(4, 4))


def test_storage(tmp_path):
    pytest.importorskip("safetensors")
    mask = random_mask(batch=2)
    mask.save(tmp_path / "mask.safetensors")
    assert SliceMask.load(tmp_path / "mask.safetensors") == mask
    with pytest.raises(MaskError, match=r"is not a saved mask .*: it holds plan version 1"):
        from fgattn_cute.plan import Plan

        Plan.from_mask(mask).save(tmp_path / "plan.safetensors")
        SliceMask.load(tmp_path / "plan.safetensors")
    SliceMask(mask.bits | -(2**31), **GEOMETRY).save(tmp_path / "bad")
    with pytest.raises(MaskError, match="bits are set past the last of 33 slice columns"):
        SliceMask.load(tmp_path / "bad")


def test_storage_without_safetensors_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(UnsupportedError, match="pip install safetensors"):
        random_mask().save(tmp_path / "mask")
