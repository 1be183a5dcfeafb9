# SPDX-License-Identifier: Apache-2.0
"""Sparse VideoGen 2: cluster maps with the sizes of the clusters, over tokens permuted by cluster."""

from __future__ import annotations

import torch

from fgattn_cute.convert.common import need_tensor, slices_from_blocks
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask


def from_svg2(
    dynamic_map: torch.Tensor,
    qc_size: torch.Tensor,
    kc_size: torch.Tensor,
    k_permutation: torch.Tensor | None = None,
    *,
    slice_m: int | None = None,
    slice_n: int | None = None,
) -> SliceMask:
    """Exact or refused. The queries stay in cluster order; the keys do too unless their permutation is given.

    Args:
        dynamic_map: bool (batch, heads, query clusters, key clusters).
        qc_size, kc_size: integer (batch, heads, clusters), tokens of each cluster in permuted order.
        k_permutation: integer (batch, heads, seqlen_k): original key at each permuted position, as SVG2's
            ``permute_tensor_by_labels`` sorts them. With it the mask is over the original key order, so keys and
            values need not be moved at all; slice_n is then 1.
        slice_m, slice_n: granularity; None takes the coarsest that cuts no cluster. Clusters of odd sizes need
            slice_m=1; ``coarsen(16, 1)`` then makes a superset that the kernel runs.
    """
    need_tensor("dynamic_map", dynamic_map, 4, "bool")
    need_tensor("qc_size", qc_size, 3)
    need_tensor("kc_size", kc_size, 3)
    if k_permutation is None:
        return slices_from_blocks(dynamic_map, qc_size, kc_size, slice_m, slice_n, "svg2")
    if slice_n not in (None, 1):
        raise MaskError(f"keys in their original order are kept one by one: slice_n is 1, not {slice_n}")
    need_tensor("k_permutation", k_permutation, 3)
    mask = slices_from_blocks(dynamic_map, qc_size, kc_size, slice_m, 1, "svg2")
    # permute_keys wants the old position of each new key: the inverse of "original key at each permuted position".
    return mask.permute_keys(k_permutation.argsort(-1))


def to_svg2(mask: SliceMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dynamic_map, qc_size, kc_size) with one cluster per query block and per slice column; exact.

    dynamic_map bool (batch, heads, query blocks, slice columns); sizes int32 (batch, heads, clusters). The tokens stay
    where they are: the permutation is the identity.
    """

    def sizes(seqlen: int, block: int) -> torch.Tensor:
        starts = torch.arange(0, seqlen, block, device=mask.device, dtype=torch.int32)
        return (seqlen - starts).clamp(max=block).expand(mask.batch, mask.heads, -1).contiguous()

    return mask.to_dense(), sizes(mask.seqlen_q, mask.slice_m), sizes(mask.seqlen_k, mask.slice_n)
