# SPDX-License-Identifier: Apache-2.0
"""Packed bits in plain torch: 32 columns per int32 word, column ``32 * w + j`` in bit ``j`` of word ``w``.

All functions run on any device without reading anything back to the host.
"""

from __future__ import annotations

import torch

WORD_BITS = 32


def num_words(columns: int) -> int:
    """Words that hold ``columns`` bits."""
    return -(-columns // WORD_BITS)


def _octet(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack(keep: torch.Tensor) -> torch.Tensor:
    """bool (..., columns) -> int32 (..., words); bits past the last column are zero."""
    columns = keep.shape[-1]
    width = num_words(columns) * WORD_BITS
    if width != columns:
        keep = torch.nn.functional.pad(keep, (0, width - columns))
    # Bytes first: a uint8 sum is exact, and four bytes read as one little-endian int32 word on every supported device.
    weights = torch.ones(8, dtype=torch.uint8, device=keep.device) << _octet(keep.device)
    grouped = keep.to(torch.uint8).reshape(*keep.shape[:-1], width // 8, 8)
    packed = (grouped * weights).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 (..., words) -> bool (..., columns)."""
    octets = words.contiguous().view(torch.uint8)
    wide = (octets.unsqueeze(-1) >> _octet(words.device)) & 1
    return wide.reshape(*words.shape[:-1], words.shape[-1] * WORD_BITS)[..., :columns].bool()


def popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each int32 word, as int32 of the same shape."""
    # The arithmetic shift of a negative word smears its sign, which every mask below cuts off again.
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F


def count(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each row: int32 (..., words) -> int64 (...)."""
    return popcount(words).sum(-1, dtype=torch.int64)


def first(words: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The first ``number`` set bits of each row, the others cleared: int32 (..., words), integer (...) -> int32."""
    per_word = popcount(words)
    ends = per_word.cumsum(-1, dtype=torch.int32)
    whole = ends <= number[..., None]
    # Of the one word that is cut, bit by bit. Where none is, the last one keeps all that it has.
    cut = whole.sum(-1, keepdim=True).clamp(max=words.shape[-1] - 1)
    bit = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    set_ = (words.gather(-1, cut) >> bit) & 1
    rank = set_.cumsum(-1, dtype=torch.int32) + (ends - per_word).gather(-1, cut)
    kept = (set_ * (rank <= number[..., None])) << bit
    return torch.where(whole, words, 0).scatter(-1, cut, kept.sum(-1, keepdim=True, dtype=torch.int32))


def full_bytes(words: torch.Tensor) -> torch.Tensor:
    """The bits of each int32 word whose whole byte (8 columns from a multiple of 8 on) is set."""
    octets = words.contiguous().view(torch.uint8)
    return torch.where(octets == 0xFF, octets, 0).view(torch.int32)


def last_column(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Whether the last column is set: int32 (..., words) -> bool (...)."""
    bit = (columns - 1) % WORD_BITS
    return ((words[..., (columns - 1) // WORD_BITS] >> bit) & 1).bool()


def tail_mask(columns: int, device: torch.device) -> torch.Tensor:
    """int32 (words,) with ones exactly at the legal columns."""
    return pack(torch.ones(columns, dtype=torch.bool, device=device))
