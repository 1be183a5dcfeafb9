# SPDX-License-Identifier: Apache-2.0
"""Sparse attention over a sequence that several processes share, on the collectives of torch.distributed.

Two ways, both exact. ``ulysses``: an all-to-all gives each process all tokens of some heads, and the mask is cut by
head. ``ring``: each process keeps its queries, keys and values travel round, the mask is cut by key range, and partial
results are merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fgattn_cute import api
from fgattn_cute import bits as _bits
from fgattn_cute.errors import InputError, MaskError
from fgattn_cute.mask import SliceMask, blocks_of
from fgattn_cute.plan import Plan


# ---- cutting masks ----------------------------------------------------------------------------------------------
def head_range(heads: int, rank: int, world: int) -> range:
    """Heads of one process.

    Raises:
        InputError: the heads cannot be shared evenly.
    """
    if heads % world:
        raise InputError(f"{heads} heads cannot be shared by {world} processes: a divisor of {heads} works, or a ring")
    share = heads // world
    return range(rank * share, (rank + 1) * share)


def slice_heads(mask: SliceMask, heads: range) -> SliceMask:
    """The mask of some heads; a mask shared by all heads stays as it is."""
    return mask.select(heads=list(heads))


def slice_keys(mask: SliceMask, start: int, stop: int) -> SliceMask:
    """The mask of keys ``start`` to ``stop - 1``, counted from ``start``.

    Where ``start`` does not stand on a slice of keys the mask is refined to slices of one key.
    """
    if not 0 <= start < stop <= mask.seqlen_k:
        raise MaskError(f"keys {start} to {stop} are no part of {mask.seqlen_k}")
    if start % mask.slice_n or (stop % mask.slice_n and stop != mask.seqlen_k):
        mask = mask.refine(mask.slice_m, 1)
    first, last = start // mask.slice_n, blocks_of(stop, mask.slice_n)
    if first % 32 == 0:
        words = mask.bits[..., first // 32 : _bits.num_words(last)] & _bits.tail_mask(last - first, mask.device)
    else:
        rows = mask.bits.flatten(0, 2)
        words = torch.stack([_bits.pack(_bits.unpack(row, mask.blocks_k)[first:last]) for row in rows])
        words = words.unflatten(0, mask.bits.shape[:3])
    return SliceMask(words.contiguous(), mask.slice_m, mask.slice_n, mask.seqlen_q, stop - start)


def slice_queries(mask: SliceMask, start: int, stop: int) -> SliceMask:
    """The mask of queries ``start`` to ``stop - 1``.

    Where ``start`` does not stand on a query block the mask is refined to smaller blocks.

    Raises:
        MaskError: that would need blocks that are no multiple of 16 queries.
    """
    if not 0 <= start < stop <= mask.seqlen_q:
        raise MaskError(f"queries {start} to {stop} are no part of {mask.seqlen_q}")
    step = math.gcd(mask.slice_m, start)
    if stop != mask.seqlen_q:
        step = math.gcd(step, stop)
    if step % 16:
        raise MaskError(
            f"queries {start} to {stop} do not stand on blocks of 16: share the sequence in multiples of 16, better of "
            f"slice_m = {mask.slice_m}"
        )
    if step != mask.slice_m:
        mask = mask.refine(step, mask.slice_n)
    words = mask.bits[:, :, start // step : blocks_of(stop, step)].contiguous()
    return SliceMask(words, step, mask.slice_n, stop - start, mask.seqlen_k)


# ---- merging ----------------------------------------------------------------------------------------------------
def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from attention over each.

    Args:
        out_a, out_b: (batch, seqlen, heads, head_dim).
        lse_a, lse_b: fp32 (batch, heads, seqlen), natural log; -inf where a query saw no key.

    Returns:
        out in fp32 and lse.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # Where neither side saw a key lse is -inf, and both weights must be 0, not exp(-inf + inf).
    safe = torch.where(lse == -math.inf, 0.0, lse)
    weights = (torch.exp(part - safe).transpose(1, 2).unsqueeze(-1) for part in (lse_a, lse_b))
    parts = (out.float() * weight for out, weight in zip((out_a, out_b), weights, strict=True))
    return sum(parts), lse


# ---- Ulysses ----------------------------------------------------------------------------------------------------
def ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SliceMask,
    group=None,
    *,
    lengths: Sequence[int] | None = None,
    attend=api.attention,
    **options,
) -> torch.Tensor:
    """Attention over a sequence that the processes of ``group`` share, by sharing heads.

    Args:
        q, k, v: this process's tokens of all heads, (batch, its length, heads, head_dim), rank after rank in order.
        mask: of the whole sequence and all heads (heads may be shared), the same on every process.
        group: process group; None is the default one.
        lengths: tokens of each process; None means the same everywhere.
        attend: function like ``fgattn_cute.attention``; ``options`` are passed on to it.

    Returns:
        (batch, its length, heads, head_dim), this process's tokens.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    heads = head_range(q.shape[2], rank, world)
    lengths = _lengths(q, world, rank, lengths)
    q, k, v = (_gather_tokens(x, lengths, group) for x in (q, k, v))
    out = attend(q, k, v, slice_heads(mask, heads), **options)
    return _gather_heads(out, lengths, group)


def _gather_tokens(x: torch.Tensor, lengths: Sequence[int], group) -> torch.Tensor:
    """(batch, own tokens, all heads, D) -> (batch, all tokens, own heads, D)."""
    world, own = len(lengths), x.shape[1]
    batch, _, heads, dim = x.shape
    parts = x.unflatten(2, (world, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
    received = x.new_empty(sum(lengths), batch, heads // world, dim)
    dist.all_to_all_single(received, parts, list(lengths), [own] * world, group=group)
    return received.transpose(0, 1)


def _gather_heads(x: torch.Tensor, lengths: Sequence[int], group) -> torch.Tensor:
    """(batch, all tokens, own heads, D) -> (batch, own tokens, all heads, D)."""
    world, own = len(lengths), lengths[dist.get_rank(group)]
    batch, _, heads, dim = x.shape
    received = x.new_empty(world * own, batch, heads, dim)
    dist.all_to_all_single(received, x.transpose(0, 1).contiguous(), [own] * world, list(lengths), group=group)
    return received.unflatten(0, (world, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


# ---- ring -------------------------------------------------------------------------------------------------------
def ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SliceMask,
    group=None,
    *,
    lengths: Sequence[int] | None = None,
    attend=api.attention,
    **options,
) -> torch.Tensor:
    """Attention over a sequence that the processes of ``group`` share, by passing keys and values round.

    Args:
        q, k, v: this process's tokens, (batch, its length, heads, head_dim), rank after rank in order.
        mask: of this process's queries and all keys; ``slice_queries`` cuts it out of a mask of everything.
        group, lengths, attend, options: as for ``ulysses``; ``attend`` is called with ``return_lse=True``.

    Returns:
        (batch, its length, heads, head_dim), typed like q.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = _lengths(k, world, rank, lengths)
    starts = [sum(lengths[:r]) for r in range(world)]
    if mask.seqlen_k != sum(lengths) or mask.seqlen_q != q.shape[1]:
        raise InputError(
            f"the mask is for seqlen {mask.seqlen_q} x {mask.seqlen_k}; this process has {q.shape[1]} queries, all "
            f"processes {sum(lengths)} keys"
        )
    both, out, lse = torch.stack([k, v]), None, None
    for turn in range(world):
        owner = (rank - turn) % world
        arriving, requests = None, []
        if turn + 1 < world:  # the next keys travel while these are attended to
            following = lengths[(rank - turn - 1) % world]
            arriving = both.new_empty(2, k.shape[0], following, *k.shape[2:])
            requests = _pass_on(both, arriving, rank, world, group)
        part = slice_keys(mask, starts[owner], starts[owner] + lengths[owner])
        new, new_lse = attend(q, both[0], both[1], Plan.from_mask(part), return_lse=True, **options)
        out, lse = (new.float(), new_lse) if out is None else merge(out, lse, new, new_lse)
        for request in requests:
            request.wait()
        both = arriving
    return out.to(q.dtype)


def _pass_on(sent: torch.Tensor, received: torch.Tensor, rank: int, world: int, group):
    """Starts sending to the next process and receiving from the one before."""
    target, source = (rank + 1) % world, (rank - 1) % world
    if group is not None:
        target, source = dist.get_global_rank(group, target), dist.get_global_rank(group, source)
    return dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, target, group), dist.P2POp(dist.irecv, received, source, group)]
    )


def gather_tokens(x: torch.Tensor, group=None, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """All processes' tokens: (batch, its length, ...) -> (batch, all, ...)."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = _lengths(x, world, rank, lengths)
    longest = max(lengths)
    padded = x.new_zeros(x.shape[0], longest, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], 1)


def _lengths(x: torch.Tensor, world: int, rank: int, lengths: Sequence[int] | None) -> list[int]:
    lengths = [x.shape[1]] * world if lengths is None else list(lengths)
    if len(lengths) != world or lengths[rank] != x.shape[1] or min(lengths) < 1:
        raise InputError(f"lengths {lengths} do not describe {world} processes of which number {rank} has {x.shape[1]}")
    return lengths
