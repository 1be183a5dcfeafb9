# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn's ``mask_id`` of ``block_sparse_sage2_attn_cuda``, in both tile conventions.

The README of SpargeAttn states blocks of 128 queries by 64 keys; on sm_90 its kernel quantises blocks of 64 by 128
(SpargeAttn ``core.py``, issue 79), so the same call there means a map of the other shape.
"""

from __future__ import annotations

import torch

from fgattn_cute.convert.common import need_slices, seqlen_or
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask

CONVENTIONS = ((128, 64), (64, 128))


def from_sparge(
    mask_id: torch.Tensor,
    *,
    slice_m: int,
    slice_n: int,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
) -> SliceMask:
    """Exact.

    Args:
        mask_id: 0/1 integer or bool (batch, heads, ceil(seqlen_q / slice_m), ceil(seqlen_k / slice_n)).
        slice_m, slice_n: 128, 64, or on sm_90 64, 128.
        seqlen_q, seqlen_k: lengths; by default whole blocks.
    """
    _check_convention(slice_m, slice_n)
    if not isinstance(mask_id, torch.Tensor) or mask_id.ndim != 4 or mask_id.dtype.is_floating_point:
        raise MaskError("mask_id is a 0/1 integer or bool tensor (batch, heads, query blocks, key blocks)")
    if mask_id.dtype != torch.bool and bool(((mask_id != 0) & (mask_id != 1)).any()):
        raise MaskError("mask_id holds values other than 0 and 1")
    seqlen_q = seqlen_or(mask_id.shape[2], slice_m, seqlen_q, "seqlen_q")
    seqlen_k = seqlen_or(mask_id.shape[3], slice_n, seqlen_k, "seqlen_k")
    keep = mask_id.bool()
    return SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def to_sparge(mask: SliceMask) -> torch.Tensor:
    """``mask_id``, int32 0/1 (batch, heads, query blocks, key blocks); exact, for a mask of either convention."""
    if (mask.slice_m, mask.slice_n) not in CONVENTIONS:
        need_slices(mask, *CONVENTIONS[1], "SpargeAttn on sm_90 (128 x 64 elsewhere)")
    return mask.to_dense().to(torch.int32)


def _check_convention(slice_m: int, slice_n: int) -> None:
    if (slice_m, slice_n) not in CONVENTIONS:
        raise MaskError(f"SpargeAttn has blocks of 128 x 64, or 64 x 128 on sm_90, not {slice_m} x {slice_n}")
