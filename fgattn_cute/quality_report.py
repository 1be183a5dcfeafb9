# SPDX-License-Identifier: Apache-2.0
"""A page that sets one video against another: numbers per frame, and pictures of both and of their difference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fgattn_cute.quality import Comparison, pillow

GAP_PX = 4
LABEL_PX = 14
MAX_FRAMES = 8
MAX_FRAME_WIDTH_PX = 240
MIN_FRAME_WIDTH_PX = 96


def write(comparison: Comparison, folder: str | Path, names: tuple[str, str] = ("dense", "sparse")) -> Path:
    """Writes ``report.md`` and ``frames.png`` into a folder, which is made if needed.

    Returns:
        the path of report.md.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = _shown_frames(comparison)
    gain = _gain(comparison)
    contact_sheet(comparison, shown, gain, names).save(folder / "frames.png")
    page = folder / "report.md"
    page.write_text(_page(comparison, shown, gain, names))
    return page


def contact_sheet(comparison: Comparison, shown: list[int], gain: int, names: tuple[str, str]):
    """A PIL image: a column per frame; reference, other, and their difference, ``gain`` times as bright."""
    image_class = pillow()
    from PIL import ImageDraw

    height, width = comparison.reference.shape[1:3]
    scale = min(MAX_FRAME_WIDTH_PX, max(MIN_FRAME_WIDTH_PX, width)) / width
    size = (round(width * scale), max(1, round(height * scale)))
    difference = np.abs(comparison.reference.astype(np.int16) - comparison.other).astype(np.int32) * gain
    rows = (comparison.reference, comparison.other, difference.clip(0, 255).astype(np.uint8))
    titles = (*names, f"difference x {gain}")
    step_x, step_y = size[0] + GAP_PX, size[1] + GAP_PX + LABEL_PX
    sheet = image_class.new("RGB", (step_x * len(shown) + GAP_PX, step_y * 3 + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (frames, title) in enumerate(zip(rows, titles, strict=True)):
        for x, index in enumerate(shown):
            corner = (GAP_PX + x * step_x, GAP_PX + y * step_y)
            label = title if x == 0 else f"frame {index}" if y == 0 else ""
            pen.text(corner, label, fill="black")
            picture = image_class.fromarray(frames[index]).resize(size, image_class.Resampling.NEAREST)
            sheet.paste(picture, (corner[0], corner[1] + LABEL_PX))
    return sheet


def _shown_frames(comparison: Comparison) -> list[int]:
    """Evenly spaced frames, and the worst one."""
    total = len(comparison.psnr)
    spaced = {round(i * (total - 1) / max(1, MAX_FRAMES - 2)) for i in range(MAX_FRAMES - 1)}
    return sorted(spaced | {comparison.worst_frame})


def _gain(comparison: Comparison) -> int:
    """A power of two that brings the largest difference near white."""
    largest = int(np.abs(comparison.reference.astype(np.int16) - comparison.other).max())
    return 2 ** int(math.log2(255 / largest)) if largest else 1


def _page(comparison: Comparison, shown: list[int], gain: int, names: tuple[str, str]) -> str:
    facts = comparison.as_dict()
    lines = [
        f"# {names[1]} against {names[0]}",
        "",
        f"{facts['frames']} frames of {facts['width']} x {facts['height']}. PSNR {decibels(facts['psnr'])} over the "
        f"video, {decibels(facts['psnr_worst'])} in the worst frame ({facts['worst_frame']}). SSIM "
        f"{facts['ssim']:.4f} on average, {facts['ssim_worst']:.4f} at worst.",
        "",
        f"![{names[0]}, {names[1]} and difference, {gain} times as bright](frames.png)",
        "",
        "| frame | PSNR | SSIM | in the picture |",
        "|---:|---:|---:|---|",
    ]
    lines += [
        f"| {index} | {decibels(level)} | {similarity:.4f} | {'yes' if index in shown else ''} |"
        for index, (level, similarity) in enumerate(zip(facts["psnr_per_frame"], facts["ssim_per_frame"], strict=True))
    ]
    return "\n".join(lines) + "\n"


def decibels(level: float | None) -> str:
    """A PSNR as text; None means equal pictures."""
    return "equal" if level is None else f"{level:.2f} dB"
