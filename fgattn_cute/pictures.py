# SPDX-License-Identifier: Apache-2.0
"""Pictures of masks. matplotlib is imported when one is drawn and not before."""

from __future__ import annotations

from pathlib import Path

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.errors import InputError, UnsupportedError
from fgattn_cute.mask import SliceMask

MAX_PIXELS = 1024  # larger maps are averaged down to about this many cells a side


def mask_image(mask: SliceMask, batch: int = 0, head: int = 0, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """fp32 (rows, columns) in 0..1 on the CPU: the kept share of the slices under each cell of one head.

    Args:
        mask: any mask; a shared batch or heads dimension answers for every index.
        batch, head: which map.
        max_pixels: largest number of rows and of columns; cells are then averages over whole slices.
    """
    for name, index, size in (("batch", batch, mask.batch), ("head", head, mask.heads)):
        if index < 0 or (size > 1 and index >= size):
            raise InputError(f"{name} {index} lies outside 0..{size - 1}")
    words = mask.bits[batch if mask.batch > 1 else 0, head if mask.heads > 1 else 0].cpu()
    row_step, column_step = (-(-size // max_pixels) for size in (mask.blocks_q, mask.blocks_k))
    rows = []
    for first in range(0, mask.blocks_q, row_step):
        keep = _bits.unpack(words[first : first + row_step], mask.blocks_k).float().mean(0)
        spare = -mask.blocks_k % column_step
        padded = torch.nn.functional.pad(keep, (0, spare), value=torch.nan).view(-1, column_step)
        rows.append(padded.nanmean(1))
    return torch.stack(rows)


def plot_mask(mask: SliceMask, path: str | Path, batch: int = 0, head: int = 0) -> Path:
    """Draws one head's map, queries downwards and keys to the right, dark where slices are kept.

    Returns:
        The path written; its suffix picks the format (png, svg, pdf).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("pictures need the package matplotlib: pip install matplotlib") from error
    image = mask_image(mask, batch, head)
    figure = Figure(figsize=(7, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(
        image.numpy(),
        cmap="Greys",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, mask.seqlen_k, mask.seqlen_q, 0),
    )
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    shown = mask.select(*([i] if n > 1 else None for i, n in ((batch, mask.batch), (head, mask.heads))))
    axes.set_title(f"head {head}: slices of {mask.slice_m} x {mask.slice_n}, density {shown.density:.1%}")
    figure.colorbar(drawn, label="kept share")
    figure.savefig(path)
    return Path(path)
