# SPDX-License-Identifier: Apache-2.0
"""What several converters share: requirements on a mask, lists to bool maps, variable blocks to slices."""

from __future__ import annotations

import math

import torch

from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask, blocks_of


def need_tensor(name: str, tensor, ndim: int, kind: str = "integer") -> None:
    """Refuses anything but a tensor of that rank, of integer (or bool, for kind "bool") type."""
    legal = isinstance(tensor, torch.Tensor) and tensor.ndim == ndim
    if legal:
        integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
        legal = tensor.dtype == torch.bool if kind == "bool" else integer and tensor.dtype != torch.bool
    if not legal:
        given = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise MaskError(f"{name} is {given}, not a tensor of {kind} values and rank {ndim}")


def need_slices(mask: SliceMask, slice_m: int, slice_n: int, target: str) -> None:
    """Refuses a mask of another granularity than the target format's."""
    if (mask.slice_m, mask.slice_n) != (slice_m, slice_n):
        raise MaskError(
            f"{target} has slices of {slice_m} x {slice_n}, the mask has {mask.slice_m} x {mask.slice_n}: refine() to "
            "them where they divide (exact), or coarsen() where they are multiples (a superset)"
        )


def need_whole_blocks(mask: SliceMask, target: str, sides: str = "qk") -> None:
    """Refuses lengths that are no multiple of the slices."""
    ragged = [
        f"seqlen_{side} {length} is not a multiple of slice_{letter} {size}"
        for side, letter, length, size in (
            ("q", "m", mask.seqlen_q, mask.slice_m),
            ("k", "n", mask.seqlen_k, mask.slice_n),
        )
        if side in sides and length % size
    ]
    if ragged:
        raise MaskError(f"{target} knows whole blocks only: {', '.join(ragged)} (refine to a divisor)")


def single(mask: SliceMask, target: str, dims: tuple[str, ...]) -> torch.Tensor:
    """Packed bits with the named dims ("batch", "heads") proven equal and cut to 1; refuses where they differ."""
    bits = mask.bits
    for dim, name in enumerate(("batch", "heads")):
        if name in dims and bits.shape[dim] > 1:
            first = bits.narrow(dim, 0, 1)
            if not torch.equal(bits, first.expand_as(bits)):
                raise MaskError(
                    f"{target} has one pattern for all {name}, the mask differs among them: convert one by one"
                )
            bits = first
    return bits


def dense_from_lists(name: str, ids: torch.Tensor, counts: torch.Tensor, columns: int) -> torch.Tensor:
    """bool (..., columns) from padded id rows (..., L) and counts (...); refuses bad counts, ids and repeats."""
    width = ids.shape[-1]
    if ids.shape[:-1] != counts.shape:
        raise MaskError(f"{name}: ids {tuple(ids.shape)} and counts {tuple(counts.shape)} differ")
    valid = torch.arange(width, device=ids.device) < counts.unsqueeze(-1)
    listed = ids.long()
    faults = torch.stack(
        [
            ((counts < 0) | (counts > width)).any(),
            (valid & ((listed < 0) | (listed >= columns))).any(),
        ]
    ).tolist()
    if faults[0]:
        raise MaskError(f"{name}: a count lies outside 0..{width}, the width of the rows")
    if faults[1]:
        raise MaskError(f"{name}: an id lies outside 0..{columns - 1}")
    keep = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=ids.device)
    keep.scatter_(-1, torch.where(valid, listed, columns), True)
    keep = keep[..., :columns]
    if not torch.equal(keep.sum(-1), counts.long()):
        raise MaskError(f"{name}: a row lists an id twice")
    return keep


def lists_from_dense(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 rows as wide as the map, kept columns first and ascending, then the others; and int32 counts."""
    order = torch.sort((~keep).to(torch.uint8), dim=-1, stable=True).indices
    return order.to(torch.int32), keep.sum(-1, dtype=torch.int32)


def seqlen_or(blocks: int, block: int, seqlen: int | None, name: str) -> int:
    """A given length, checked against its block count; by default all blocks are whole."""
    if seqlen is None:
        return blocks * block
    if blocks_of(seqlen, block) != blocks:
        raise MaskError(f"{name} {seqlen} takes {blocks_of(seqlen, block)} blocks of {block}, the map has {blocks}")
    return seqlen


def slices_from_blocks(
    keep: torch.Tensor,
    row_sizes: torch.Tensor,
    column_sizes: torch.Tensor,
    slice_m: int | None,
    slice_n: int | None,
    source: str,
) -> SliceMask:
    """A mask from blocks of individual sizes; exact or refused.

    Args:
        keep: bool (batch, heads, row blocks, column blocks).
        row_sizes: (batch, heads, row blocks), queries of each block; the same total everywhere. Zero is allowed.
        column_sizes: (batch, heads, column blocks), keys.
        slice_m, slice_n: granularity of the mask; None takes the coarsest that cuts no block.
    """
    rows, seqlen_q, slice_m = _positions(row_sizes, slice_m, keep.shape[:3], f"{source}: row sizes", "slice_m")
    columns, seqlen_k, slice_n = _positions(
        column_sizes, slice_n, (*keep.shape[:2], keep.shape[3]), f"{source}: column sizes", "slice_n"
    )
    batch, heads = keep.shape[:2]
    out = keep.new_zeros(batch, heads, rows.shape[-1], columns.shape[-1])
    for b in range(batch):
        for h in range(heads):
            out[b, h] = keep[b, h].index_select(0, rows[b, h]).index_select(1, columns[b, h])
    return SliceMask.from_dense(out, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def _positions(sizes, step, shape, what: str, name: str):
    """(block of each slice (batch, heads, slices), total length, step)."""
    sizes = sizes.long()
    if tuple(sizes.shape) != tuple(shape):
        raise MaskError(f"{what} {tuple(sizes.shape)} do not match the map, which needs {tuple(shape)}")
    ends = sizes.cumsum(-1)
    totals = ends[..., -1].unique()
    if totals.numel() != 1 or bool((sizes < 0).any()) or int(totals[0]) < 1:
        raise MaskError(f"{what} must be non-negative and add up to one length in every head, not {totals.tolist()}")
    total = int(totals[0])
    cuts = [int(end) for end in ends.unique() if int(end) != total]
    coarsest = math.gcd(*cuts) if any(cuts) else total
    if step is None:
        step = coarsest
    if step < 1 or any(cut % step for cut in cuts):
        raise MaskError(
            f"{what} start blocks at positions that {name}={step} would cut: divisors of {coarsest} are exact"
        )
    starts = torch.arange(0, total, step, device=sizes.device).expand(*shape[:2], -1)
    return torch.searchsorted(ends, starts.contiguous(), right=True), total, step
