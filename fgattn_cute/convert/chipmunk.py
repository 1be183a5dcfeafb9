# SPDX-License-Identifier: Apache-2.0
"""Chipmunk's column-sparse lists: groups of 192 queries, single keys, ``indices`` and ``counts`` of ``csp_attn``."""

from __future__ import annotations

import torch

from fgattn_cute.convert.common import dense_from_lists, lists_from_dense, need_slices, need_tensor, seqlen_or
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask

GROUP = 192  # queries that share a list


def from_chipmunk(
    indices: torch.Tensor, counts: torch.Tensor, *, seqlen_q: int | None = None, seqlen_k: int | None = None
) -> SliceMask:
    """Exact: keeps the first ``counts`` columns of each row, which is what Chipmunk computes.

    Where counts were rounded up to a multiple of 112 or 128, the padding columns are part of that. Pass the true
    counts to leave them out.

    Args:
        indices: integer (batch, heads, ceil(seqlen_q / 192), width), rows of key ids.
        counts: integer (batch, heads, ceil(seqlen_q / 192)).
        seqlen_q, seqlen_k: lengths; by default whole groups and ``width`` keys.
    """
    need_tensor("indices", indices, 4)
    need_tensor("counts", counts, 3)
    seqlen_q = seqlen_or(counts.shape[2], GROUP, seqlen_q, "seqlen_q")
    seqlen_k = indices.shape[-1] if seqlen_k is None else seqlen_k
    keep = dense_from_lists("chipmunk", indices, counts, seqlen_k)
    return SliceMask.from_dense(keep, slice_m=GROUP, slice_n=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def to_chipmunk(mask: SliceMask, multiple_of: int, pad_to_multiple_of: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, counts) as ``mask_to_indices(mask, multiple_of, pad_to_multiple_of)`` shapes them; exact or refused.

    Chipmunk's kernels take counts that are multiples of 112 (``csp_attn``) or 128 (``csp_128_attn``) and compute the
    columns that fill them up. A mask whose counts are no multiples has no exact form there.

    Args:
        mask: slices of 192 x 1.
        multiple_of: what counts must be a multiple of: 112, 128, or 1 for the bare lists.
        pad_to_multiple_of: rows are padded with zeros to a multiple of this width.

    Returns:
        indices int32 (batch, heads, groups, width), kept columns first; counts int32 (batch, heads, groups).
    """
    need_slices(mask, GROUP, 1, "Chipmunk")
    indices, counts = lists_from_dense(mask.to_dense())
    if bool((counts % multiple_of).any()):
        raise MaskError(
            f"Chipmunk fills counts up to a multiple of {multiple_of} with further columns and computes them, and some "
            "list of this mask has another count: keep whole multiples, or pass multiple_of=1 for the bare lists"
        )
    spare = -indices.shape[-1] % pad_to_multiple_of
    return torch.nn.functional.pad(indices, (0, spare)), counts
