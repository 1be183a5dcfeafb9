# SPDX-License-Identifier: Apache-2.0
"""torch FlexAttention: ``BlockMask`` and ``mask_mod`` functions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgattn_cute.convert.common import dense_from_lists
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask, blocks_of
from fgattn_cute.tokens import slices_from_tokens


def from_flex(block_mask, *, slice_m: int | None = None, slice_n: int | None = None) -> SliceMask:
    """Exact or refused: full blocks are kept whole, partial blocks where their ``mask_mod`` says so.

    Args:
        block_mask: a ``torch.nn.attention.flex_attention.BlockMask``.
        slice_m, slice_n: granularity; None takes the blocks of the BlockMask, which is exact when no block is cut by
            its ``mask_mod``.
    """
    block_m, block_n = block_mask.BLOCK_SIZE
    seqlen_q, seqlen_k = block_mask.seq_lengths
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    columns = blocks_of(seqlen_k, block_n)
    partial = _blocks(block_mask.kv_indices, block_mask.kv_num_blocks, columns)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _blocks(block_mask.full_kv_indices, block_mask.full_kv_num_blocks, columns)
    device = partial.device
    row_block = torch.arange(seqlen_q, device=device) // block_m
    column_block = torch.arange(seqlen_k, device=device) // block_n

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        def spread(blocks: torch.Tensor) -> torch.Tensor:
            return blocks.index_select(2, row_block[start:stop]).index_select(3, column_block)

        inside = spread(partial)
        if bool(inside.any()):
            inside &= _evaluate(block_mask.mask_mod, batch, heads, start, stop, seqlen_k, device)
        return spread(full) | inside

    return slices_from_tokens(
        tokens_of,
        batch=batch,
        heads=heads,
        slice_m=slice_m or block_m,
        slice_n=slice_n or block_n,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        exact=True,
    )


def to_flex(mask: SliceMask, BLOCK_SIZE: int | tuple[int, int] | None = None):
    """A ``BlockMask`` with the same kept pairs; exact.

    Args:
        mask: any mask.
        BLOCK_SIZE: FlexAttention's block, or (queries, keys) of it: multiples of the mask's slices, which they are by
            default. Its compiled kernels want 128 x 128 or more. Blocks that are kept in part are listed as partial
            with a ``mask_mod`` that looks the slice up.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE or (mask.slice_m, mask.slice_n)
    some = mask.coarsen(*size).to_dense()
    whole = ~(~mask).coarsen(*size).to_dense()
    # torch's create_block_mask lists a block that the lengths cut as partial, and its kernels rely on nothing else.
    whole[:, :, mask.seqlen_q // size[0] :] = False
    whole[..., mask.seqlen_k // size[1] :] = False
    partial = some & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(whole),
        BLOCK_SIZE=size,
        mask_mod=to_mask_mod(mask),
        seq_lengths=(mask.seqlen_q, mask.seqlen_k),
    )


def from_mask_mod(
    mask_mod: Callable,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device="cpu",
    *,
    slice_m: int,
    slice_n: int,
) -> SliceMask:
    """Exact or refused. The arguments of ``create_block_mask``, in its order.

    Args:
        mask_mod: function of (b, h, q_idx, kv_idx), int tensors without dimensions, returning a bool tensor.
        B, H: batch and heads; None or 1 means shared.
        Q_LEN, KV_LEN: lengths.
        device: where indices live and the function is evaluated, some query blocks at a time.
        slice_m, slice_n: granularity; a slice that the function cuts is refused.
    """
    if not callable(mask_mod):
        raise MaskError(f"mask_mod is a {type(mask_mod).__name__}, not a function of (b, h, q_idx, kv_idx)")
    batch, heads = B or 1, H or 1
    return slices_from_tokens(
        lambda start, stop: _evaluate(mask_mod, batch, heads, start, stop, KV_LEN, torch.device(device)),
        batch=batch,
        heads=heads,
        slice_m=slice_m,
        slice_n=slice_n,
        seqlen_q=Q_LEN,
        seqlen_k=KV_LEN,
        exact=True,
    )


def to_mask_mod(mask: SliceMask) -> Callable:
    """A ``mask_mod`` function that looks a pair's slice up; exact. It holds one bool per slice."""
    keep = mask.to_dense()
    shared_batch, shared_heads = mask.batch == 1, mask.heads == 1

    def mask_mod(b, h, q_idx, kv_idx):
        b = torch.zeros_like(b) if shared_batch else b
        h = torch.zeros_like(h) if shared_heads else h
        return keep[b, h, q_idx // mask.slice_m, kv_idx // mask.slice_n]

    return mask_mod


def _blocks(indices: torch.Tensor, counts: torch.Tensor, columns: int) -> torch.Tensor:
    return dense_from_lists("BlockMask", indices, counts, columns)


def _ordered(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_blocks, indices) of a block map, kept blocks first."""
    order = torch.sort((~keep).to(torch.uint8), dim=-1, stable=True).indices
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _evaluate(mask_mod, batch: int, heads: int, start: int, stop: int, seqlen_k: int, device) -> torch.Tensor:
    """bool (batch, heads, stop - start, seqlen_k) of a mask_mod, vectorised as FlexAttention itself does it."""
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_heads = torch.vmap(over_queries, in_dims=(None, 0, None, None))
    everything = torch.vmap(over_heads, in_dims=(0, None, None, None))
    b, h, q, kv = (
        torch.arange(first, last, device=device)
        for first, last in ((0, batch), (0, heads), (start, stop), (0, seqlen_k))
    )
    return everything(b, h, q, kv).bool()
