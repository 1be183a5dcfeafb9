# SPDX-License-Identifier: Apache-2.0
"""Masks and plans as safetensors files: tensors plus the geometry in the file's metadata. Never a pickle."""

from __future__ import annotations

from pathlib import Path

import torch

from fgattn_cute.errors import UnsupportedError

FORMAT_VERSION = 1
_GEOMETRY = ("slice_m", "slice_n", "seqlen_q", "seqlen_k")
_OPTIONAL = ("grouped", "even")  # numbers that a file may lack


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise UnsupportedError(
            "saving and loading masks and plans needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def save(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], geometry: dict[str, int]) -> None:
    """Writes ``tensors`` with ``kind`` ("mask" or "plan") and ``geometry`` as metadata."""
    metadata = {"fgattn": kind, "version": str(FORMAT_VERSION)} | {k: str(v) for k, v in geometry.items()}
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    _safetensors().torch.save_file(contiguous, str(path), metadata=metadata)


def kind_of(path: str | Path) -> str | None:
    """What ``save`` wrote, "mask" or "plan"; None for anything else."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("fgattn")
    except safetensors.SafetensorError:
        return None


def load(path: str | Path, kind: str, names: tuple[str, ...], error: type) -> tuple[dict, dict]:
    """Reads what ``save`` wrote: (tensors on the CPU, geometry). Raises ``error`` for anything else."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata, present = file.metadata() or {}, set(file.keys())
            # A mapped file promises no alignment; a copy starts where torch allocates.
            tensors = {name: file.get_tensor(name).clone() for name in names if name in present}
    except safetensors.SafetensorError as cause:
        raise error(f"{path} is not a safetensors file: {cause}") from cause
    if metadata.get("fgattn") != kind or metadata.get("version") != str(FORMAT_VERSION) or len(tensors) != len(names):
        found = f"{metadata.get('fgattn', 'no')} version {metadata.get('version', '?')}"
        raise error(f"{path} is not a saved {kind} (format {FORMAT_VERSION}): it holds {found} with {sorted(present)}")
    try:
        geometry = {name: int(metadata[name]) for name in (*_GEOMETRY, *(n for n in _OPTIONAL if n in metadata))}
    except (KeyError, ValueError) as cause:
        raise error(f"{path}: the metadata lacks a whole number for {cause}") from cause
    return tensors, geometry
