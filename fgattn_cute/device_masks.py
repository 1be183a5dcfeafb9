# SPDX-License-Identifier: Apache-2.0
"""The mask kernels as functions on torch tensors: bits to lists.

Nothing is read back to the host. A backend is "cuda" (tensors on a Hopper GPU) or "emulator" (CPU tensors, the same
compiled kernels).
"""

from __future__ import annotations

import contextlib
import functools

import torch

from fgattn_cute.errors import InputError
from fgattn_cute.kernels.mask_spec import CompactSpec

BACKENDS = ("cuda", "emulator")


def backend_of(x: torch.Tensor) -> str:
    """Where work on a tensor runs unless somebody says otherwise: "cuda" on a GPU that runs the kernels, or "torch"."""
    return "cuda" if x.is_cuda and _runs_kernels(x.device.index) else "torch"


@functools.cache
def _runs_kernels(index: int) -> bool:
    from fgattn_cute import gpu

    return not gpu.from_cuda(index).reasons()


def count(mask, words: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Length of every list of a mask.

    Args:
        mask: a SliceMask.
        words: its bits, contiguous.
        backend: "cuda" or "emulator".

    Returns:
        (segments int64, keys int32), both (batch, heads, blocks_q).
    """
    shape = words.shape[:-1]
    counts = torch.empty(shape, dtype=torch.int64, device=words.device)
    keys = torch.empty(shape, dtype=torch.int32, device=words.device)
    shortfall = mask.blocks_k * mask.slice_n - mask.seqlen_k
    rows = words.flatten(0, -2)
    _launch(
        CompactSpec(step="count"),
        backend,
        (rows, counts.flatten(), keys.flatten(), mask.blocks_k - 1, mask.slice_n, shortfall),
    )
    return counts, keys


def write_ids(words: torch.Tensor, offset: torch.Tensor, counts: torch.Tensor, ids: torch.Tensor, backend: str) -> None:
    """Writes the first ``counts`` set columns of each row of ``words`` to ``ids`` from ``offset`` on, and 0 elsewhere.

    Args:
        words: int32 (batch, heads, blocks_q, words), contiguous.
        offset, counts: int64 (batch, heads, blocks_q), as ``compaction.fit`` returns them.
        ids: int32 (n,), written in full.
        backend: "cuda" or "emulator".
    """
    rows = (words.flatten(0, -2), offset.flatten(), counts.flatten())
    _launch(CompactSpec(step="write"), backend, (*rows, ids))


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
