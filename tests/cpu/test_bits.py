# SPDX-License-Identifier: Apache-2.0
"""Word operations on packed bits, against lists of booleans."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fgattn_cute import bits


@st.composite
def rows(draw):
    """(bool (rows, columns), number of each row): empty, full and ordinary words, and more wanted than there are."""
    columns = draw(st.integers(1, 100))
    row = st.one_of(
        st.lists(st.booleans(), min_size=columns, max_size=columns),
        st.integers(0, columns).map(lambda n: [i < n for i in range(columns)]),
        st.integers(0, columns - 1).map(lambda n: [i == n for i in range(columns)]),
    )
    keep = draw(st.lists(row, min_size=1, max_size=4))
    return torch.tensor(keep), [draw(st.integers(-1, columns + 1)) for _ in keep]


@given(rows(), st.sampled_from([torch.int32, torch.int64]))
def test_first(case, dtype):
    keep, number = case
    found = bits.first(bits.pack(keep), torch.tensor(number, dtype=dtype))
    assert found.dtype == torch.int32
    for row, wanted, got in zip(keep, number, bits.unpack(found, keep.shape[1]), strict=True):
        assert got.nonzero().flatten().tolist() == row.nonzero().flatten().tolist()[: max(0, wanted)]
    assert torch.equal(bits.pack(bits.unpack(found, keep.shape[1])), found), "no bit past the last column"


def test_first_of_many_dimensions():
    words = torch.full((2, 3, 2), -1, dtype=torch.int32)
    number = torch.arange(6).view(2, 3) * 13
    assert torch.equal(bits.count(bits.first(words, number)), number.clamp(max=64))
