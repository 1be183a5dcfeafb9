# SPDX-License-Identifier: Apache-2.0
"""FlashInfer: ``BlockSparseAttentionWrapper`` (BSR) and ``VariableBlockSparseAttentionWrapper``."""

from __future__ import annotations

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.convert.common import need_tensor, need_whole_blocks, single, slices_from_blocks
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask


def from_flashinfer_bsr(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    M: int,
    N: int,
    R: int,
    C: int,
    mask: torch.Tensor | None = None,
) -> SliceMask:
    """Exact. The first arguments of ``BlockSparseAttentionWrapper.plan``, in its order.

    Args:
        indptr: integer (M / R + 1,), row starts in ``indices``.
        indices: integer (nnz,), block columns.
        M, N: rows (queries) and columns (keys).
        R, C: block rows and columns; they become slice_m and slice_n.
        mask: bool (nnz, R, C), kept pairs inside each block. With it the result has slices of 1 x 1.

    Returns:
        A mask shared by batch and heads, since the format has one pattern for all.
    """
    need_tensor("indptr", indptr, 1)
    need_tensor("indices", indices, 1)
    if min(M, N, R, C) < 1 or M % R or N % C:
        raise MaskError(f"a BSR matrix of {M} x {N} is not made of whole blocks of {R} x {C}")
    rows, columns, starts = M // R, N // C, indptr.long()
    lengths = starts.diff()
    ends_right = starts.numel() == rows + 1 and int(starts[0]) == 0 and int(starts[-1]) == indices.numel()
    if not ends_right or bool((lengths < 0).any()):
        raise MaskError(f"indptr must rise from 0 to {indices.numel()}, the number of indices, in {rows + 1} steps")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        raise MaskError(f"indices hold a block column outside 0..{columns - 1}")
    row_of = torch.repeat_interleave(torch.arange(rows, device=indices.device), lengths)
    keep = torch.zeros(rows, columns, dtype=torch.bool, device=indices.device)
    keep[row_of, indices.long()] = True
    if int(keep.sum()) != indices.numel():
        raise MaskError("indices list a block column twice in one row")
    if mask is None:
        return SliceMask.from_dense(keep[None, None], slice_m=R, slice_n=C, seqlen_q=M, seqlen_k=N)
    if mask.dtype != torch.bool or tuple(mask.shape) != (indices.numel(), R, C):
        raise MaskError(f"mask {tuple(mask.shape)} {mask.dtype} is not bool ({indices.numel()}, {R}, {C})")
    tokens = torch.zeros(rows, columns, R, C, dtype=torch.bool, device=indices.device)
    tokens[row_of, indices.long()] = mask
    tokens = tokens.transpose(1, 2).reshape(1, 1, M, N)
    return SliceMask.from_dense(tokens, slice_m=1, slice_n=1, seqlen_q=M, seqlen_k=N)


def to_flashinfer_bsr(mask: SliceMask) -> tuple[torch.Tensor, torch.Tensor, int, int, int, int]:
    """(indptr int32, indices int32, M, N, R, C) for ``BlockSparseAttentionWrapper.plan``; exact or refused.

    Refused where heads or batch entries differ (the format has one pattern for all) and where a length is no multiple
    of its slice.
    """
    need_whole_blocks(mask, "FlashInfer's BSR")
    keep = _bits.unpack(single(mask, "FlashInfer's BSR", ("batch", "heads"))[0, 0], mask.blocks_k)
    counts = keep.sum(-1, dtype=torch.int64)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    indices = keep.nonzero()[:, 1].to(torch.int32)
    return indptr, indices, mask.seqlen_q, mask.seqlen_k, mask.slice_m, mask.slice_n


def from_flashinfer_variable(
    block_mask_map: torch.Tensor,
    block_row_sz: torch.Tensor,
    block_col_sz: torch.Tensor,
    num_qo_heads: int | None = None,
    num_kv_heads: int | None = None,
    *,
    slice_m: int | None = None,
    slice_n: int | None = None,
) -> SliceMask:
    """Exact or refused. The first arguments of ``VariableBlockSparseAttentionWrapper.plan``, in its order.

    Args:
        block_mask_map: bool (kv heads, row blocks, column blocks).
        block_row_sz, block_col_sz: integer (kv heads, blocks), sizes in tokens.
        num_qo_heads, num_kv_heads: with both, each map is repeated for the query heads of its group.
        slice_m, slice_n: granularity; None takes the coarsest that cuts no block.
    """
    need_tensor("block_mask_map", block_mask_map, 3, "bool")
    need_tensor("block_row_sz", block_row_sz, 2)
    need_tensor("block_col_sz", block_col_sz, 2)
    kv_heads = block_mask_map.shape[0]
    if num_kv_heads not in (None, kv_heads):
        raise MaskError(f"block_mask_map holds {kv_heads} heads, num_kv_heads is {num_kv_heads}")
    mask = slices_from_blocks(
        block_mask_map[None], block_row_sz[None], block_col_sz[None], slice_m, slice_n, "flashinfer_variable"
    )
    if num_qo_heads in (None, kv_heads):
        return mask
    if num_qo_heads % kv_heads:
        raise MaskError(f"num_qo_heads {num_qo_heads} is not a multiple of the {kv_heads} kv heads")
    bits = mask.bits.repeat_interleave(num_qo_heads // kv_heads, 1)
    return SliceMask(bits, **mask.geometry)


def to_flashinfer_variable(
    mask: SliceMask, num_qo_heads: int | None = None, num_kv_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block_mask_map, block_row_sz, block_col_sz) for ``VariableBlockSparseAttentionWrapper.plan``; exact or refused.

    Args:
        mask: equal in all batch entries (the format has none).
        num_qo_heads, num_kv_heads: the call's heads; by default as many kv heads as the mask has heads. With fewer kv
            heads than query heads, the query heads of a group must have equal masks.

    Returns:
        bool (kv heads, query blocks, slice columns) and int32 (kv heads, blocks) twice.
    """
    target = "FlashInfer's variable block map"
    bits = single(mask, target, ("batch",))[0]
    heads = num_qo_heads or bits.shape[0]
    kv_heads = num_kv_heads or heads
    if bits.shape[0] not in (1, heads) or heads % kv_heads:
        raise MaskError(f"the mask has {bits.shape[0]} heads, the call {heads} query and {kv_heads} kv heads")
    grouped = bits.expand(heads, -1, -1).unflatten(0, (kv_heads, heads // kv_heads))
    if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
        raise MaskError(f"{target} has one pattern per kv head, and query heads of one group differ")

    def sizes(seqlen: int, block: int) -> torch.Tensor:
        starts = torch.arange(0, seqlen, block, device=mask.device, dtype=torch.int32)
        return (seqlen - starts).clamp(max=block).expand(kv_heads, -1).contiguous()

    keep = _bits.unpack(grouped[:, 0], mask.blocks_k)
    return keep, sizes(mask.seqlen_q, mask.slice_m), sizes(mask.seqlen_k, mask.slice_n)
