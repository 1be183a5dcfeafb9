# SPDX-License-Identifier: Apache-2.0
"""Slices from token-level facts, some query blocks at a time: the token map of a whole head is never held."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgattn_cute import bits
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask, blocks_of, check_geometry

_CHUNK_PAIRS = 1 << 24  # (query, key) pairs judged at a time; a rule may hold several int64 of each


def slices_from_tokens(
    tokens_of: Callable[[int, int], torch.Tensor],
    *,
    batch: int,
    heads: int,
    slice_m: int,
    slice_n: int,
    seqlen_q: int,
    seqlen_k: int,
    exact: bool,
) -> SliceMask:
    """Builds a mask from token pairs.

    Args:
        tokens_of: given a range of queries, bool (batch, heads, stop - start, seqlen_k): which pairs are kept.
        batch, heads: leading sizes of what ``tokens_of`` returns.
        slice_m, slice_n, seqlen_q, seqlen_k: geometry of the mask.
        exact: refuse a slice that is kept in part. Otherwise such a slice is kept whole (a superset).

    Raises:
        MaskError: ``exact`` and some slice is kept in part. Reads one bool per chunk back.
    """
    check_geometry(MaskError, slice_m, slice_n, seqlen_q, seqlen_k)
    step = max(1, _CHUNK_PAIRS // (batch * heads * slice_m * seqlen_k)) * slice_m
    parts = []
    for start in range(0, seqlen_q, step):
        stop = min(seqlen_q, start + step)
        tokens = tokens_of(start, stop)
        some = _reduce(tokens, slice_m, slice_n, torch.any)
        if exact:
            torn = some & ~_reduce(tokens, slice_m, slice_n, torch.all)
            if bool(torn.any()):
                b, h, m, n = torn.nonzero()[0].tolist()
                m += start // slice_m
                raise MaskError(
                    f"slices of {slice_m} x {slice_n} cannot hold this mask: the slice at batch {b}, head {h}, "
                    f"row {m}, column {n} is kept in part. Finer slices hold it (1 x 1 always does); coarsen() makes a "
                    "superset of them"
                )
        parts.append(bits.pack(some))
    return SliceMask(torch.cat(parts, 2), slice_m, slice_n, seqlen_q, seqlen_k)


def _reduce(tokens: torch.Tensor, slice_m: int, slice_n: int, how) -> torch.Tensor:
    """bool (b, h, rows, keys) -> (b, h, row blocks, key blocks) by ``how`` (torch.any or torch.all)."""
    rows, keys = tokens.shape[-2:]
    m, n = blocks_of(rows, slice_m), blocks_of(keys, slice_n)
    if slice_n > 1:
        tokens = torch.nn.functional.pad(tokens, (0, n * slice_n - keys), value=how is torch.all)
        tokens = how(tokens.unflatten(-1, (n, slice_n)), -1)
    if slice_m > 1:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, m * slice_m - rows), value=how is torch.all)
        tokens = how(tokens.unflatten(-2, (m, slice_m)), -2)
    return tokens
