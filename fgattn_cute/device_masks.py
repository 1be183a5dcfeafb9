# SPDX-License-Identifier: Apache-2.0
"""The mask kernels as functions on torch tensors: bits to lists, and queries and keys to bits.

Nothing is read back to the host. A backend is "cuda" (tensors on a Hopper GPU) or "emulator" (CPU tensors, the same
compiled kernels).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch

from fgattn_cute.errors import InputError
from fgattn_cute.kernels.mask_spec import (
    BINS,
    HALVES_SUMS,
    PARTS_SUMS,
    SHARED_MAX_COLUMNS,
    SLAB_ROWS,
    CompactSpec,
    HalfListSpec,
    MemberSpec,
    PartListSpec,
    plan_mass,
)
from fgattn_cute.kernels.spec import HEAD_DIMS

BACKENDS = ("cuda", "emulator")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_WANTED_CTAS = 4 * 132  # enough for every SM to hold two of them twice
_ALIGN_ELEMS = 8  # rows of q and k start on 16 bytes


def backend_of(x: torch.Tensor) -> str:
    """Where work on a tensor runs unless somebody says otherwise: "cuda" on a GPU that runs the kernels, or "torch"."""
    return "cuda" if x.is_cuda and _runs_kernels(x.device.index) else "torch"


@functools.cache
def _runs_kernels(index: int) -> bool:
    from fgattn_cute import gpu

    return not gpu.from_cuda(index).reasons()


def backend_for_lists(mask, backend: str | None) -> str:
    """Where shared lists of a mask are made: as asked, but their kernels count tiles in 32 bits, so torch does longer
    ones."""
    return "torch" if mask.blocks_k > SHARED_MAX_COLUMNS else backend or backend_of(mask.bits)


def count(mask, words: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Length of every list of a mask.

    Args:
        mask: a SliceMask.
        words: its bits, contiguous.
        backend: "cuda" or "emulator".

    Returns:
        (segments int64, keys int32, segments in aligned runs int64), all (batch, heads, blocks_q).
    """
    shape = words.shape[:-1]
    packed = torch.empty(shape, dtype=torch.int64, device=words.device)
    keys = torch.empty(shape, dtype=torch.int32, device=words.device)
    shortfall = mask.blocks_k * mask.slice_n - mask.seqlen_k
    rows = words.flatten(0, -2)
    _launch(
        CompactSpec(step="count"),
        backend,
        (rows, packed.flatten(), keys.flatten(), mask.blocks_k - 1, mask.slice_n, shortfall),
    )
    return packed & 0xFFFFFFFF, keys, packed >> 32


def write_ids(
    words: torch.Tensor,
    offset: torch.Tensor,
    counts: torch.Tensor,
    ids: torch.Tensor,
    backend: str,
    runs: torch.Tensor | None = None,
) -> None:
    """Writes the first ``counts`` set columns of each row of ``words`` to ``ids`` from ``offset`` on, and 0 elsewhere.

    Args:
        words: int32 (batch, heads, blocks_q, words), contiguous.
        offset, counts: int64 (batch, heads, blocks_q), as ``compaction.fit`` returns them.
        ids: int32 (n,), written in full.
        backend: "cuda" or "emulator".
        runs: int64 (batch, heads, blocks_q), columns in aligned runs, which come first; None for ascending lists.
    """
    if runs is not None:
        counts = runs << 32 | counts
    rows = (words.flatten(0, -2), offset.flatten(), counts.flatten())
    _launch(CompactSpec(step="write"), backend, (*rows, ids))


def pack_members(rows, ids, offset, keys, starts, members, slice_n: int, backend: str) -> None:
    """Writes the keep-bits of every union's blocks by list position.

    Args:
        rows: int32 (unions, union_blocks, words), mask rows of the blocks.
        ids: int32 (n,), lists of the unions; offset int64 and keys int32 (unions,) place and measure them.
        starts: int64 (unions,), first word of each union.
        members: int32 (words, union_blocks), written where lists have words.
        slice_n: keys of an id.
        backend: "cuda" or "emulator".
    """
    _launch(MemberSpec(union_blocks=rows.shape[1]), backend, (rows, ids, offset, keys, starts, members, slice_n))


def measure_parts(words: torch.Tensor, blocks: torch.Tensor, backend: str) -> torch.Tensor:
    """How much lists in parts have of each part: int32 (lists, PARTS_SUMS), columns as in ``mask_spec``.

    Args:
        words: int32 (batch, heads, blocks_q, words), contiguous.
        blocks: int32 (lists, 3), contiguous, query blocks of each list; blocks_q or more means none.
        backend: "cuda" or "emulator".
    """
    sums = torch.empty(len(blocks), PARTS_SUMS, dtype=torch.int32, device=words.device)
    _launch(PartListSpec(step="measure"), backend, (words.flatten(0, -2), blocks, sums, words.shape[2]))
    return sums


def write_parts(words, blocks, sums, offset, ids, members, backend: str) -> None:
    """Writes lists in parts, and which of their tiles each block takes.

    Args:
        words, blocks, backend: as for ``measure_parts``. sums: its result.
        offset: int64 (lists,), start of each list, one after the other.
        ids: int32 (n,), written in full: 0 past the last list.
        members: int32 (lists, 3, PARTS_PLACES + steps), written in full.
    """
    rows = (words.flatten(0, -2), blocks, sums)
    _launch(PartListSpec(step="write"), backend, (*rows, offset, ids, members, words.shape[2]))


def measure_halves(words: torch.Tensor, blocks: torch.Tensor, backend: str) -> torch.Tensor:
    """How much unions in halves have of each kind: int32 (lists, HALVES_SUMS), columns as in ``mask_spec``.

    Args:
        words, backend: as for ``measure_parts``.
        blocks: int32 (lists, 2, 4 or 8), contiguous, query blocks of each list; blocks_q or more means none.
    """
    sums = torch.empty(len(blocks), HALVES_SUMS, dtype=torch.int32, device=words.device)
    spec = HalfListSpec(step="measure", union_blocks=blocks.shape[1])
    _launch(spec, backend, (words.flatten(0, -2), blocks, sums, words.shape[2]))
    return sums


def write_halves(words, blocks, sums, offset, ids, members, backend: str) -> None:
    """Writes unions in halves, and what the halves take of them.

    Args:
        words, blocks, backend: as for ``measure_halves``. sums: its result.
        offset: int64 (lists,), start of each list, one after the other.
        ids: int32 (n,), written in full: 0 past the last list.
        members: int32 (words, blocks of a list), written in full.
    """
    spec = HalfListSpec(step="write", union_blocks=blocks.shape[1])
    _launch(spec, backend, (words.flatten(0, -2), blocks, sums, offset, ids, members, words.shape[2]))


# ---- queries and keys ----------------------------------------------------------------------------------------------
def unfit(q: torch.Tensor, slice_m: int, slice_n: int, scale: float) -> list[str]:
    """Why the mass kernel cannot take slices of these queries: one sentence each, empty when it can."""
    why = []
    if q.dtype not in DTYPES:
        why.append(f"{str(q.dtype).removeprefix('torch.')} is not one of {', '.join(DTYPES.values())}")
    if q.shape[-1] not in HEAD_DIMS:
        why.append(f"head_dim {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if slice_m % SLAB_ROWS and (slice_m, slice_n) != (1, 1):
        why.append(f"slice_m {slice_m} is not a multiple of {SLAB_ROWS}")
    if not 0 <= scale < float("inf"):
        why.append(f"scale {scale} is not finite and at least 0 (negate q instead)")
    return why


def row_lse(q: torch.Tensor, k: torch.Tensor, *, scale: float, backend: str) -> torch.Tensor:
    """Log-sum-exp of every query over all keys: fp32 (batch, heads, seqlen_q), natural logarithm.

    Args:
        q: (batch, seqlen_q, heads, head_dim), k: (batch, seqlen_k, kv_heads, head_dim); 16-bit floats.
        scale: factor on q.k.
        backend: "cuda" or "emulator".
    """
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    _mass(q, k, lse, None, None, "lse", 1, 1, scale, "mean", backend)
    return lse


def slice_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    tau: torch.Tensor,
    *,
    slice_m: int,
    slice_n: int,
    scale: float,
    statistic: str,
    backend: str,
) -> torch.Tensor:
    """Keep-bits of all slices whose score is at least ``tau``; see ``predict.scores.slice_mass`` for the scores.

    Args:
        q, k, scale: as for ``row_lse``.
        lse: fp32 (batch, heads, seqlen_q), natural logarithm.
        tau: fp32, (batch, heads, ceil(seqlen_q / slice_m)) or what broadcasts to it.
        slice_m: a multiple of 16, or 1 together with slice_n = 1.
        slice_n: keys of a slice.
        statistic: "mean" or "max".
        backend: "cuda" or "emulator".

    Returns:
        int32 (batch, heads, ceil(seqlen_q / slice_m), words), as SliceMask holds them.
    """
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // slice_m))
    words = -(-k.shape[1] // (32 * slice_n))
    bits = torch.empty(*shape, words, dtype=torch.int32, device=q.device)
    _mass(q, k, lse, tau.expand(shape), bits, "bits", slice_m, slice_n, scale, statistic, backend)
    return bits


def histogram(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    edge: torch.Tensor,
    *,
    shift: int,
    unit: float | None,
    slice_m: int,
    slice_n: int,
    scale: float,
    statistic: str,
    backend: str,
) -> torch.Tensor:
    """Scores of each query block by size: int32 (batch, heads, ceil(seqlen_q / slice_m), BINS).

    Bin i holds the scores whose float bits, read as an integer, lie from ``edge + (i << shift)`` up to the next bin:
    2^(23 - shift) bins per octave.

    Args:
        edge: int32, as tau of ``slice_bits`` in shape: where the bins of a query block start.
        shift: bits that a bin spans.
        unit: what a score of 1 adds to its bin, which holds the sum of its scores then; None counts scores.
        q, k, lse, slice_m, slice_n, scale, statistic, backend: as for ``slice_bits``.
    """
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // slice_m))
    counts = torch.empty(*shape, BINS, dtype=torch.int32, device=q.device)
    weight = (0.0, 1.0) if unit is None else (unit, 0.5)
    edge = edge.expand(shape)
    _mass(q, k, lse, edge, counts, "histogram", slice_m, slice_n, scale, statistic, backend, (shift, *weight))
    return counts


def _mass(q, k, lse, edge, out, output, slice_m, slice_n, scale, statistic, backend, binning=(0, 0.0, 0.0)) -> None:
    spec, cut = plan_mass(
        head_dim=q.shape[-1],
        dtype=DTYPES[q.dtype],
        output=output,
        statistic=statistic,
        slice_m=slice_m,
        slice_n=slice_n,
        seqlen_k=k.shape[1],
    )
    words_per_cta = cut.num_words
    if output == "bits":
        # Keys are independent once log-sum-exp is known, so few query blocks still fill the GPU.
        ctas = -(-q.shape[1] // cut.rows_per_cta) * q.shape[0] * q.shape[2]
        batches = -(-cut.num_words // cut.words)
        words_per_cta = -(-batches * ctas // _WANTED_CTAS) if ctas < _WANTED_CTAS else batches
        words_per_cta *= cut.words
    lse, edge = (x if x is None else x.contiguous() for x in (lse, edge))
    tensors = (_aligned(q), _aligned(k), lse, edge, out)
    _launch(spec, backend, (*tensors, float(scale), *binning, words_per_cta, *dataclasses.astuple(cut)))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The same values in a form that TMA can read: rows contiguous and on 16 bytes."""
    odd = x.stride(-1) != 1 or any(stride % _ALIGN_ELEMS for stride in x.stride()[:-1]) or x.data_ptr() % 16
    return x.contiguous() if odd else x


# ---- launching -----------------------------------------------------------------------------------------------------
def _launch(spec, backend: str, arguments: tuple) -> None:
    """Runs a kernel on its arguments, the first of which is a tensor."""
    from fgattn_cute import compile as compiler

    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    kernel = compiler.get(spec, emulated=backend == "emulator").call
    with _place(backend, arguments[0].device):
        kernel(*arguments)


def _place(backend: str, device: torch.device):
    """Context in which a launch reaches its device."""
    if backend == "cuda":
        return torch.cuda.device(device)
    from fgattn_cute import emulator
    from fgattn_cute.emulator.launch import active_session

    return emulator.session() if active_session() is None else contextlib.nullcontext()
