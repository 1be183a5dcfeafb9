# SPDX-License-Identifier: Apache-2.0
"""Lists of key blocks per query block: FastVideo VSA (``q2k_idx``, ``q2k_num``), cuDNN BSA (``q2k_block_index``,
``q2k_block_nums``), and FA4's ``BlockSparseTensors`` (``full_block_idx``, ``full_block_cnt``; no partial blocks)."""

from __future__ import annotations

import torch

from fgattn_cute.convert.common import dense_from_lists, lists_from_dense, need_tensor, seqlen_or
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask


def from_q2k(
    q2k_idx: torch.Tensor,
    q2k_num: torch.Tensor,
    variable_block_sizes: torch.Tensor | None = None,
    *,
    slice_m: int,
    slice_n: int,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
) -> SliceMask:
    """Exact.

    Args:
        q2k_idx: integer (batch, heads, query blocks, L), key blocks in any order, unique in the first ``q2k_num``.
        q2k_num: integer (batch, heads, query blocks).
        variable_block_sizes: integer (key blocks,), valid keys at the start of each key block of ``slice_n``. Blocks
            other than the last must be whole: a padded block inside the sequence has keys to skip, which needs
            finer slices (``from_token_mask``).
        slice_m, slice_n: the library's block sizes.
        seqlen_q, seqlen_k: lengths; by default whole blocks, the key blocks as many as L or as the sizes given.
    """
    need_tensor("q2k_idx", q2k_idx, 4)
    need_tensor("q2k_num", q2k_num, 3)
    blocks_k = q2k_idx.shape[-1] if seqlen_k is None else -(-seqlen_k // slice_n)
    if variable_block_sizes is not None:
        need_tensor("variable_block_sizes", variable_block_sizes, 1)
        sizes = variable_block_sizes.tolist()
        if any(size != slice_n for size in sizes[:-1]) or not 0 < sizes[-1] <= slice_n:
            raise MaskError(f"variable_block_sizes: only the last block may hold fewer than {slice_n} keys: {sizes}")
        blocks_k = len(sizes)
        seqlen_k = (blocks_k - 1) * slice_n + sizes[-1] if seqlen_k is None else seqlen_k
    seqlen_q = seqlen_or(q2k_num.shape[2], slice_m, seqlen_q, "seqlen_q")
    seqlen_k = seqlen_or(blocks_k, slice_n, seqlen_k, "seqlen_k")
    keep = dense_from_lists("q2k", q2k_idx, q2k_num, blocks_k)
    return SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def to_q2k(mask: SliceMask) -> tuple[torch.Tensor, torch.Tensor]:
    """(q2k_idx int32 (batch, heads, query blocks, key blocks), q2k_num int32 (batch, heads, query blocks)); exact.

    Block sizes are the mask's slices. A shared batch or heads dimension stays 1. Entries behind ``q2k_num`` are the
    skipped blocks.
    """
    return lists_from_dense(mask.to_dense())
