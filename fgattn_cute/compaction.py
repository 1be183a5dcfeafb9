# SPDX-License-Identifier: Apache-2.0
"""Mask bits to sorted id lists, on whatever device holds the mask.

``compact`` measures the lists, lays them out and fills them. The first and the last step are kernels on a Hopper GPU
(``device_masks``) and plain torch elsewhere, with the same result bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import device_masks

LIST_ALIGN = 8  # ids: a list starts on 32 bytes
PLAN_SLACK = 256  # ids past the last list, at least one largest tile, so that a tail read stays inside the buffer
# Share of all keys in aligned runs from which on lists have those first. Measured on an H200 (docs/kernel.md): at half,
# boxes gain 6 to 10 % at M = 128 and 1 to 2 % at M = 192; at M = 64 they lose 2 % there and gain 3 to 4 % at the whole.
GROUPED_SHARE = 0.5
GROUPED_SHARE_OF_FINE = 0.9  # slice_m below 128
EVEN_TENTHS = 11  # lists are even if the longest is at most so many tenths of the mean
_CHUNK_WORDS = 1 << 22  # mask words expanded at a time: bounds the temporaries of write_ids to about 100 MiB


class Lists(NamedTuple):
    """Output of ``compact``.

    ids: int32 (capacity + PLAN_SLACK,); zero wherever no list writes.
    offset: int64 (batch, heads, blocks_q), start of each list in ids.
    keys: int32 (batch, heads, blocks_q), keys of each list, clipped at the end of the sequence.
    overflow: bool (), True if the capacity cut lists off; on the device of the mask.
    grouped: whether the keys of aligned runs stand first in each list.
    even: whether the lists are known to be of nearly the same length, see ``is_even``.
    """

    ids: torch.Tensor
    offset: torch.Tensor
    keys: torch.Tensor
    overflow: torch.Tensor
    grouped: bool
    even: bool


def is_even(longest: int, total: int, lists: int) -> bool:
    """Whether no list is much longer than the mean. longest, total: segments; lists of none count in the mean."""
    return 10 * lists * longest <= EVEN_TENTHS * total


def align_up(value, multiple: int):
    """``value`` (int or integer tensor) rounded up to a multiple."""
    return (value + multiple - 1) // multiple * multiple


def layout(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places lists one after the other: int64 counts (...) -> (offset (...), ids needed in all ())."""
    padded = align_up(counts.reshape(-1), LIST_ALIGN)
    ends = padded.cumsum(0)
    return (ends - padded).view(counts.shape), ends[-1]


def fit(offset: torch.Tensor, counts: torch.Tensor, needed: torch.Tensor, capacity: int):
    """Cuts lists to what ``capacity`` ids hold: (offset, counts, overflow), nothing read back."""
    return offset.clamp(max=capacity), torch.minimum(counts, (capacity - offset).clamp(min=0)), needed > capacity


def compact(mask, capacity: int | None, backend: str | None = None, grouped: bool | None = None) -> Lists:
    """Lists of kept slice columns, one per query block: ascending, or grouped.

    An aligned run is keys 8 g to 8 g + 7, all kept. A grouped list has the keys of its aligned runs first, ascending,
    then the others, ascending.

    Args:
        mask: a SliceMask.
        capacity: ids to make room for, a multiple of 8. None takes the exact number, which costs one read-back of
            totals (a synchronisation on CUDA); with a capacity nothing is read back and lists that do not fit are cut.
        backend: "cuda" or "emulator" for the kernels, "torch"; None takes the kernels where the mask lies on a GPU
            that runs them.
        grouped: whether lists are; only those of single keys (slice_n 1) can be. None groups them if GROUPED_SHARE
            (below slice_m 128 GROUPED_SHARE_OF_FINE) of all keys or more are in aligned runs and no capacity is given,
            because that is known by a read-back only.
    """
    backend = backend or device_masks.backend_of(mask.bits)
    words = mask.bits.contiguous()
    if backend == "torch":
        counts, keys = mask.kept_slices(), mask.kept_keys().to(torch.int32)
        runs = _bits.count(_bits.full_bytes(words))
    else:
        counts, keys, runs = device_masks.count(mask, words, backend)
    offset, needed = layout(counts)
    even = False
    if capacity is None:
        numbers = torch.stack([needed, counts.sum(), counts.max(), runs.sum()])
        capacity, total, longest, in_runs = numbers.tolist()
        even = is_even(longest, total, counts.numel())
        if grouped is None:
            share = GROUPED_SHARE if mask.slice_m >= 128 else GROUPED_SHARE_OF_FINE
            grouped = mask.slice_n == 1 and in_runs >= max(1, share * total)
    if not grouped:
        runs = None
    offset, counts, overflow = fit(offset, counts, needed, capacity)
    # An uncut list keeps its keys. A cut one has lost its last segment, so whole ones are left of it.
    keys = torch.minimum(counts * mask.slice_n, keys).to(torch.int32)
    if backend == "torch":
        ids = torch.zeros(capacity + PLAN_SLACK, dtype=torch.int32, device=words.device)
        write_ids(words, offset, counts, ids, runs)
    else:
        ids = torch.empty(capacity + PLAN_SLACK, dtype=torch.int32, device=words.device)
        device_masks.write_ids(words, offset, counts, ids, backend, runs)
    return Lists(ids, offset, keys, overflow, bool(grouped), even)


def write_ids(
    words: torch.Tensor,
    offset: torch.Tensor,
    counts: torch.Tensor,
    ids: torch.Tensor,
    runs: torch.Tensor | None = None,
) -> None:
    """Writes the first ``counts`` set columns of each row of ``words`` to ``ids`` from ``offset`` on.

    Args:
        words: int32 (batch, heads, blocks_q, words), contiguous.
        offset, counts: int64 (batch, heads, blocks_q).
        ids: int32 (n,), written in place; positions outside the lists stay untouched. Its last element belongs to no
            list.
        runs: int64 (batch, heads, blocks_q), columns in aligned runs, which come first; None for ascending lists.
    """
    if runs is not None:
        full = _bits.full_bytes(words)
        write_ids(full, offset, torch.minimum(counts, runs), ids)
        write_ids(words ^ full, offset + runs, counts - runs, ids)
        return
    width = words.shape[-1]
    rows = words.reshape(-1, width)
    flat_offset, flat_counts = offset.reshape(-1, 1), counts.reshape(-1, 1)
    # A set bit's place in its list is the number of set bits before it: those of earlier words, then those below it in
    # its own word. One pass per bit position keeps the temporaries at the size of the words, not of the columns. Bits
    # that are clear or cut off go to the last element of the slack, so that nothing depends on a count on the host.
    column = torch.arange(width, dtype=torch.int32, device=words.device) * _bits.WORD_BITS
    spare = ids.numel() - 1
    step = max(1, _CHUNK_WORDS // width)
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        per_word = _bits.popcount(part)
        rank = per_word.cumsum(-1, dtype=torch.int64) - per_word
        start, limit = flat_offset[first : first + step], flat_counts[first : first + step]
        for bit in range(_bits.WORD_BITS):
            is_set = ((part >> bit) & 1).bool()
            place = torch.where(is_set & (rank < limit), start + rank, spare)
            ids.scatter_(0, place.reshape(-1), (column + bit).expand_as(part).reshape(-1))
            rank += is_set
    ids[spare:].zero_()
