# SPDX-License-Identifier: Apache-2.0
"""Pictures of a results file: speed against density per workload and slice shape, as SVG.

python -m perf.plot results.jsonl --out folder
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from perf.compare import load


def series(found: dict) -> dict[tuple, dict[str, list[tuple[float, float]]]]:
    """{(workload, slice_m, slice_n): {provider: [(density, milliseconds), ...] ascending}}."""
    grouped: dict = defaultdict(lambda: defaultdict(list))
    for (name, density, m, n), providers in found.items():
        for provider, record in providers.items():
            if "median_ms" in record:
                grouped[name, m, n][provider].append((density, record["median_ms"]))
    return {key: {p: sorted(points) for p, points in lines.items()} for key, lines in grouped.items()}


def draw(key: tuple, lines: dict, out: Path) -> Path:
    """One picture: milliseconds over density, both logarithmic; fgattn_cute drawn last and thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for provider, points in sorted(lines.items(), key=lambda item: item[0] == "ours"):
        axes.plot(*zip(*points, strict=True), marker="o", label=provider, linewidth=3 if provider == "ours" else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="ms", title=f"{key[0]}, slices {key[1]} x {key[2]}")
    axes.legend(fontsize=8)
    path = out / f"{key[0]}-m{key[1]}n{key[2]}.svg"
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def main() -> None:
    """Writes one SVG per workload and slice shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for key, lines in series(load(options.results)).items():
        print(draw(key, lines, options.out))


if __name__ == "__main__":
    main()
