# SPDX-License-Identifier: Apache-2.0
"""Recall against density for several slice sizes, on attention built from a real picture: the table of docs/masks.md.

Run from the repository: python -m perf.recall_table
"""

from __future__ import annotations

import argparse

import torch

from fgattn_cute import predict
from fgattn_cute.demo_scene import make_scene

SLICE_MS = (16, 64, 128)
SLICE_NS = (1, 8, 64, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.3)


def recall_table(frames: int, rows: int, columns: int, heads: int) -> str:
    """A markdown table: one line per slice size, the kept softmax mass at each density, mean over heads."""
    scene = make_scene(frames=frames, rows=rows, columns=columns, heads=heads, dtype=torch.float32)
    lines = [
        f"| slice | {' | '.join(f'{density:.0%}' for density in DENSITIES)} |",
        f"|---|{'---|' * len(DENSITIES)}",
    ]
    for slice_m in SLICE_MS:
        for slice_n in SLICE_NS:
            kept = []
            for density in DENSITIES:
                select = predict.Budget(density, sample=1 << 20)
                mask = predict.mass(scene.q, scene.k, slice_m=slice_m, slice_n=slice_n, select=select)
                kept.append(f"{float(predict.recall(mask, scene.q, scene.k).mean()):.3f}")
            lines.append(f"| {slice_m} x {slice_n} | {' | '.join(kept)} |")
    tokens = frames * rows * columns
    return f"{scene.photo}: {frames} x {rows} x {columns} = {tokens} tokens, {heads} heads\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 24), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args()
    print(recall_table(*options.grid, options.heads))


if __name__ == "__main__":
    main()
