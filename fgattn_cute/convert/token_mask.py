# SPDX-License-Identifier: Apache-2.0
"""Token-level bool masks, as torch's scaled_dot_product_attention takes them."""

from __future__ import annotations

import torch

from fgattn_cute.convert.common import need_tensor
from fgattn_cute.mask import SliceMask
from fgattn_cute.tokens import slices_from_tokens


def from_token_mask(keep: torch.Tensor, *, slice_m: int, slice_n: int) -> SliceMask:
    """Exact, or refused where a slice of that size is kept in part (1 x 1 always works, then ``coarsen``).

    Args:
        keep: bool (batch, heads, seqlen_q, seqlen_k), True where the pair takes part. Batch or heads may be 1 (shared).
        slice_m, slice_n: granularity of the mask.
    """
    need_tensor("keep", keep, 4, "bool")
    batch, heads, seqlen_q, seqlen_k = keep.shape
    return slices_from_tokens(
        lambda start, stop: keep[:, :, start:stop],
        batch=batch,
        heads=heads,
        slice_m=slice_m,
        slice_n=slice_n,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        exact=True,
    )


def to_token_mask(mask: SliceMask) -> torch.Tensor:
    """bool (batch, heads, seqlen_q, seqlen_k); exact."""
    return mask.to_token_mask()
