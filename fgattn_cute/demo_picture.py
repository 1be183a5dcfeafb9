# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: a frame, the mask and the attention map side by side, and what one query block reads."""

from __future__ import annotations

from pathlib import Path

import torch

from fgattn_cute.demo_scene import PATCH_PX, Scene

MAP_COLUMNS = 432  # keys are averaged into this many columns, about one per pixel of the picture
SHOWN_FRAMES = 4
DIMMED = 0.22
INK, QUERY = "#1c2733", "#ff9f1c"


def draw(scene: Scene, keep: torch.Tensor, mass: torch.Tensor, slice_m: int, path: Path) -> Path:
    """Write the PNG ``path``.

    keep: bool (blocks, S), one head's mask with a column per key; mass: fp32 (blocks, S), the share of a query's
    softmax that falls on each key, averaged over the block. Both on the CPU.
    """
    from matplotlib.figure import Figure

    block = _interesting_block(keep, scene, slice_m)
    figure = Figure(figsize=(12, 5.6), dpi=100, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    frame_axes, mask_axes, map_axes = top.subplots(1, 3, width_ratios=(1, 1, 1))
    _draw_frame(frame_axes, scene, block, slice_m)
    _draw_map(mask_axes, keep.float(), block, "Greys", f"the mask: {keep.float().mean():.0%} of the slices are kept")
    held = (mass * keep).sum() / mass.sum()
    _draw_map(map_axes, (mass + 1e-7).log10(), block, "magma", f"softmax, log scale: kept slices hold {held:.1%}")
    mask_axes.set_ylabel(f"query blocks of {slice_m}", color=INK)

    shown = torch.linspace(0, scene.grid[0] - 1, min(SHOWN_FRAMES, scene.grid[0])).round().int().tolist()
    for axes, frame in zip(bottom.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(_lit(scene, keep[block], frame))
        axes.set_title(f"frame {frame}", fontsize=9, color=INK)
        _outline(axes, scene, block, slice_m, frame)
        axes.axis("off")
    kept = int(keep[block].sum())
    bottom.suptitle(
        f"lit: the {kept:,} of {keep.shape[1]:,} patches that the outlined query block reads", fontsize=11, color=INK
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})
    return path


def _interesting_block(keep: torch.Tensor, scene: Scene, slice_m: int) -> int:
    """A block in the middle of the video whose list is about as long as the average."""
    per_frame = scene.grid[1] * scene.grid[2] / slice_m
    middle = scene.grid[0] // 2
    first, last = round(middle * per_frame), max(round(middle * per_frame) + 1, round((middle + 1) * per_frame))
    counts = keep[first:last].float().sum(1)
    return first + int((counts - keep.float().sum(1).mean()).abs().argmin())


def _draw_frame(axes, scene: Scene, block: int, slice_m: int) -> None:
    middle = scene.grid[0] // 2
    axes.imshow(scene.frames[middle].numpy())
    _outline(axes, scene, block, slice_m, middle)
    frames, rows, columns = scene.grid
    axes.set_title(f"{frames} frames of {rows} x {columns} patches", fontsize=11, color=INK)
    axes.axis("off")


def _draw_map(axes, values: torch.Tensor, block: int, colours: str, title: str) -> None:
    blocks, keys = values.shape
    shrunk = torch.nn.functional.adaptive_avg_pool1d(values, min(MAP_COLUMNS, keys))
    axes.imshow(shrunk.numpy(), aspect="auto", cmap=colours, interpolation="nearest", extent=(0, keys, blocks, 0))
    axes.axhline(block + 0.5, color=QUERY, linewidth=0.8)
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel("keys", color=INK)
    axes.tick_params(labelsize=8, colors=INK)


def _token_grid(scene: Scene, values: torch.Tensor, frame: int) -> torch.Tensor:
    """The values of one frame's tokens as (rows, columns), from values of all tokens (S,)."""
    return values.view(scene.grid)[frame]


def _lit(scene: Scene, kept: torch.Tensor, frame: int):
    weight = torch.where(_token_grid(scene, kept, frame), 1.0, DIMMED)
    weight = weight.repeat_interleave(PATCH_PX, 0).repeat_interleave(PATCH_PX, 1)[..., None]
    picture = scene.frames[frame].float()
    return (255 - (255 - picture) * weight).byte().numpy()


def _outline(axes, scene: Scene, block: int, slice_m: int, frame: int) -> None:
    """A line around the patches of the query block that lie in this frame."""
    tokens = torch.arange(scene.q.shape[1])
    inside = _token_grid(scene, (tokens // slice_m == block).float(), frame)
    if inside.any():
        large = inside.repeat_interleave(PATCH_PX, 0).repeat_interleave(PATCH_PX, 1)
        axes.contour(large.numpy(), levels=[0.5], colors=QUERY, linewidths=1.6)
