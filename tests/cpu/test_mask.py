# SPDX-License-Identifier: Apache-2.0
"""SliceMask: packing, counting, equality, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgattn_cute import bits
from fgattn_cute.errors import FgAttnError, MaskError
from fgattn_cute.mask import SliceMask
from tests.strategies import expand_to_tokens, maps

GEOMETRY = {"slice_m": 16, "slice_n": 4, "seqlen_q": 40, "seqlen_k": 130}


@settings(deadline=None, max_examples=60)
@given(maps())
def test_round_trip_and_exact_density(case):
    keep, geometry = case
    mask = SliceMask.from_dense(keep, **geometry)
    assert torch.equal(mask.to_dense(), keep)
    tokens = expand_to_tokens(keep, geometry)
    assert torch.equal(mask.to_token_mask(), tokens)
    assert mask.density == int(tokens.sum()) / tokens.numel()
    assert torch.equal(mask.kept_keys(), tokens[:, :, :: geometry["slice_m"]].sum(-1))


def test_bit_layout_is_column_32w_plus_j():
    keep = torch.zeros(1, 1, 3, 33, dtype=torch.bool)
    keep[0, 0, 0, 0] = keep[0, 0, 0, 31] = keep[0, 0, 1, 5] = keep[0, 0, 2, 32] = True
    mask = SliceMask.from_dense(keep, **GEOMETRY)
    expected = [[1 - 2**31, 0], [32, 0], [0, 1]]
    assert mask.bits.dtype == torch.int32 and mask.bits[0, 0].tolist() == expected


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8))
def test_popcount(words):
    expected = [bin(word & 0xFFFFFFFF).count("1") for word in words]
    assert bits.popcount(torch.tensor(words, dtype=torch.int32)).tolist() == expected


def test_padding_bits_are_zero_in_full():
    mask = SliceMask.full(**GEOMETRY, heads=2)
    assert mask.bits.shape == (1, 2, 3, 2) and mask.bits[0, 1, 2].tolist() == [-1, 1]
    assert mask.density == 1.0 and SliceMask.empty(**GEOMETRY).density == 0.0


def test_expanded_dimensions_are_stored_once():
    keep = (torch.rand(1, 1, 3, 33) < 0.5).expand(4, 6, -1, -1)
    mask = SliceMask.from_dense(keep, **GEOMETRY)
    assert (mask.batch, mask.heads) == (1, 1)
    assert mask.nbytes == 3 * 2 * 4
    assert "batch shared" in repr(mask) and "heads shared" in repr(mask)


def test_equality_is_geometry_and_bits():
    keep = torch.rand(1, 2, 3, 33) < 0.5
    mask = SliceMask.from_dense(keep, **GEOMETRY)
    assert mask == SliceMask.from_dense(keep.clone(), **GEOMETRY)
    assert mask.to("cpu") is mask
    flipped = keep.clone()
    flipped[0, 1, 2, 32] ^= True
    assert mask != SliceMask.from_dense(flipped, **GEOMETRY)
    assert mask != SliceMask.from_dense(keep, **GEOMETRY | {"seqlen_k": 131})
    assert mask != SliceMask.from_dense(keep[:, :1], **GEOMETRY)
    assert mask != "mask"


@pytest.mark.parametrize(
    ("keep", "changes", "message"),
    [
        (torch.zeros(1, 1, 3, 33), {}, "torch.float32, not a bool tensor: compare it first"),
        ([[True]], {}, "list, not a bool tensor"),
        (torch.zeros(3, 33, dtype=torch.bool), {}, r"keep\[None, None\]"),
        (torch.zeros(1, 1, 3, 32, dtype=torch.bool), {}, r"\(batch, heads, 3, 33\)"),
        (torch.zeros(1, 0, 3, 33, dtype=torch.bool), {}, r"must be \(batch, heads, 3, 33\)"),
        (torch.zeros(1, 1, 3, 33, dtype=torch.bool), {"slice_n": 0}, "slice_n=0: slice sizes and lengths"),
        (torch.zeros(1, 1, 3, 33, dtype=torch.bool), {"seqlen_q": 40.0}, "seqlen_q=40.0"),
    ],
)
def test_refusals(keep, changes, message):
    with pytest.raises(MaskError, match=message) as caught:
        SliceMask.from_dense(keep, **GEOMETRY | changes)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FgAttnError)


def test_bits_of_another_geometry_are_refused():
    with pytest.raises(MaskError, match=r"does not hold 3 x 33 slices: \(batch, heads, 3, 2\) does"):
        SliceMask(torch.zeros(1, 1, 3, 1, dtype=torch.int32), **GEOMETRY)
    with pytest.raises(MaskError, match="from_dense packs a bool one"):
        SliceMask(torch.zeros(1, 1, 3, 2), **GEOMETRY)
