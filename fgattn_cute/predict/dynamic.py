# SPDX-License-Identifier: Apache-2.0
"""Masks found from queries and keys, by exact softmax mass or by pooled stand-ins; and the mass that a mask keeps."""

from __future__ import annotations

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import device_masks
from fgattn_cute.errors import InputError
from fgattn_cute.mask import SliceMask, block_rows, blocks_of, check_geometry
from fgattn_cute.predict.histograms import select_bits
from fgattn_cute.predict.scores import STATISTICS, slice_mass, slice_mass_bits
from fgattn_cute.predict.select import Budget, Threshold, TopK, TopP
from fgattn_cute.problem import LAYOUTS, as_bshd


def mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    slice_m: int,
    slice_n: int,
    select,
    scale: float | None = None,
    statistic: str = "mean",
    layout: str = "bshd",
    backend: str | None = None,
) -> SliceMask:
    """Keeps slices by their exact softmax mass.

    The score of a slice is the share of its queries' probability that falls onto its keys. Nothing is read back to the
    host, and the scores of a whole head are never held.

    Args:
        q: (batch, seqlen_q, heads, head_dim), k: (batch, seqlen_k, kv_heads, head_dim); any float dtype.
        lse: fp32 (batch, heads, seqlen_q), natural log of the sum of exponentials, as attention returns it; None
            computes it on the way.
        slice_m, slice_n: slices of the mask.
        select: Threshold, TopK, TopP or Budget.
        scale: factor on q.k; None means head_dim ** -0.5.
        statistic: "mean" over the queries of a block (scores of a block add up to 1), or "max", the largest single
            probability in the slice.
        layout: "bshd" or "bhsd".
        backend: "cuda" or "emulator" for the kernel (16-bit floats, slice_m a multiple of 16), "torch" for any device
            and type; None takes the kernel where q lies on a GPU that runs it. ``predict/histograms.py`` says what the
            rules mean there.

    Raises:
        InputError: shapes, devices or arguments that do not fit, every reason listed.
    """
    _check(q, k, lse, slice_m, slice_n, select, statistic, layout)
    q, k = as_bshd(q, layout), as_bshd(k, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _backend(q, slice_m, slice_n, scale, backend)
    bits = _selected(q, k, lse, slice_m, slice_n, select, scale, statistic, backend)
    return SliceMask(bits, slice_m, slice_n, q.shape[1], k.shape[1])


def pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    slice_m: int,
    slice_n: int,
    select,
    scale: float | None = None,
    layout: str = "bshd",
    backend: str | None = None,
) -> SliceMask:
    """Keeps slices by the softmax of mean-pooled queries against keys (slice_n = 1) or mean-pooled keys.

    Costs about 1 / (slice_m * slice_n) of ``mass``. The scores of a query block add up to 1. Arguments as for ``mass``;
    the kernel takes means that are rounded to the type of q and k.
    """
    _check(q, k, None, slice_m, slice_n, select, "mean", layout)
    q, k = as_bshd(q, layout), as_bshd(k, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _backend(q, 1, 1, scale, backend)
    means = _pool(q, slice_m), _pool(k, slice_n)
    if backend != "torch":
        means = tuple(x.to(q.dtype) for x in means)
    bits = _selected(*means, None, 1, 1, select, scale, "mean", backend)
    return SliceMask(bits, slice_m, slice_n, q.shape[1], k.shape[1])


def recall(
    mask: SliceMask,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    layout: str = "bshd",
) -> torch.Tensor:
    """Share of the exact softmax mass that a mask keeps: fp32 (batch, heads), 0 to 1, averaged over queries.

    Args:
        mask: for the lengths of q and k; batch or heads may be shared.
        q, k, lse, scale, layout: as for ``mass``; ``lse`` is that of dense attention.
    """
    _check(q, k, lse, mask.slice_m, mask.slice_n, None, "mean", layout)
    q, k = as_bshd(q, layout), as_bshd(k, layout)
    batch, seqlen_q, heads, _ = q.shape
    if (mask.seqlen_q, mask.seqlen_k) != (seqlen_q, k.shape[1]):
        raise InputError(
            f"the mask is for seqlen {mask.seqlen_q} x {mask.seqlen_k}, q and k have {seqlen_q} x {k.shape[1]}"
        )
    if mask.batch not in (1, batch) or mask.heads not in (1, heads):
        raise InputError(f"the mask holds {mask.batch} x {mask.heads} (batch, heads), q has {batch} x {heads}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = heads // k.shape[2]
    rows = block_rows(seqlen_q, mask.slice_m, q.device)
    words = mask.bits.expand(batch, heads, -1, -1)
    kept = torch.zeros(batch, heads, device=q.device)
    for b in range(batch):
        for h in range(heads):
            row = None if lse is None else lse[b, h]
            for first, scores in slice_mass(
                q[b, :, h], k[b, :, h // group], row, slice_m=mask.slice_m, slice_n=mask.slice_n, scale=scale
            ):
                part = slice(first, first + scores.shape[0])
                inside = (scores * _bits.unpack(words[b, h, part], mask.blocks_k)).sum(-1)
                kept[b, h] += (inside * rows[part]).sum()
    return kept / seqlen_q


def _backend(q: torch.Tensor, slice_m: int, slice_n: int, scale: float, backend: str | None) -> str:
    """Where scores are computed. Only a choice that nobody made falls back to torch."""
    if backend == "torch":
        return backend
    why = device_masks.unfit(q, slice_m, slice_n, scale)
    if backend is None:
        return "torch" if why else device_masks.backend_of(q)
    if why:
        raise InputError(f"the mass kernel cannot find this mask (backend='torch' can): {'; '.join(why)}")
    return backend


def _selected(q, k, lse, slice_m, slice_n, select, scale, statistic, backend) -> torch.Tensor:
    """Keep-bits int32 (batch, heads, query blocks, words) by any rule."""
    batch, _, heads, _ = q.shape
    options = {"slice_m": slice_m, "slice_n": slice_n, "scale": scale, "statistic": statistic}
    if backend != "torch":
        return select_bits(q, k, lse, select, **options, backend=backend)
    if isinstance(select, Threshold):
        tau = select.of_heads(heads, q.device).expand(batch, -1)
        return slice_mass_bits(q, k, lse, tau, **options)
    if isinstance(select, Budget):
        tau = torch.stack([_budget(q[b], k[b], None if lse is None else lse[b], select, options) for b in range(batch)])
        return slice_mass_bits(q, k, lse, tau, **options)
    group = heads // k.shape[2]
    words = []
    for b in range(batch):
        for h in range(heads):
            row = None if lse is None else lse[b, h]
            words += [
                _bits.pack(select.choose(scores, h))
                for _, scores in slice_mass(q[b, :, h], k[b, :, h // group], row, **options)
            ]
    return torch.cat(words).unflatten(0, (batch, heads, -1))


def _budget(q, k, lse, select: Budget, options: dict) -> torch.Tensor:
    """fp32 (heads,) thresholds of one batch entry from a sample of its query blocks."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    total = blocks_of(q.shape[0], options["slice_m"])
    count = min(total, select.sample)
    blocks = torch.arange(count, device=q.device) * total // count
    sampled = []
    for h in range(heads):
        row = None if lse is None else lse[h]
        parts = [scores.flatten() for _, scores in slice_mass(q[:, h], k[:, h // group], row, blocks=blocks, **options)]
        sampled.append(torch.cat(parts))
    return select.threshold(torch.stack(sampled))


def _pool(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means over blocks of tokens: (batch, seqlen, heads, head_dim) -> fp32 (batch, blocks, heads, head_dim)."""
    if block == 1:
        return x
    whole = x.shape[1] // block * block
    means = [x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=torch.float32)] if whole else []
    if whole < x.shape[1]:
        means.append(x[:, whole:].mean(1, keepdim=True, dtype=torch.float32))
    return torch.cat(means, 1)


def _check(q, k, lse, slice_m, slice_n, select, statistic, layout) -> None:
    """Refuses what cannot be judged, every reason at once."""
    why = []
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.dtype.is_floating_point:
            why.append(f"{name} is not a float tensor (batch, seqlen, heads, head_dim)")
    if layout not in LAYOUTS:
        why.append(f"layout={layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    if statistic not in STATISTICS:
        why.append(f"statistic={statistic!r} is not one of {', '.join(map(repr, STATISTICS))}")
    if select is not None and not isinstance(select, (Threshold, TopK, TopP, Budget)):
        why.append(f"select is a {type(select).__name__}, not a Threshold, TopK, TopP or Budget")
    if not why:
        q, k = as_bshd(q, layout), as_bshd(k, layout)
        check_geometry(InputError, slice_m, slice_n, q.shape[1], k.shape[1])
        if q.device != k.device:
            why.append(f"q is on {q.device}, k on {k.device}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            why.append(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head_dim")
        if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
            why.append(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
        expected = (q.shape[0], q.shape[2], q.shape[1])
        if lse is not None and (tuple(lse.shape) != expected or lse.device != q.device):
            why.append(
                f"lse {tuple(lse.shape)} {lse.device} is not (batch, heads, seqlen_q) = {expected} on {q.device}"
            )
    if why:
        raise InputError("cannot find a mask: " + "; ".join(why))
