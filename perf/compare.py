# SPDX-License-Identifier: Apache-2.0
"""Two files of results against each other: the regression gate. Exit code 1 if something became slower.

    python -m perf.compare before.jsonl after.jsonl [--tolerance 0.05]

Chips differ and throttle, so a provider's time counts relative to a yardstick of the same run where both runs have it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

YARDSTICKS = ("fa4-dense", "sdpa-cudnn", "sdpa-flash")
CASE = ("name", "density", "slice_m", "slice_n")


def load(path: Path) -> dict[tuple, dict[str, dict]]:
    """{case: {provider: record}} of a file, the last of each. Raises ValueError with the line that is no JSON."""
    found: dict[tuple, dict[str, dict]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as why:
            raise ValueError(f"{path}:{number}: {why}") from None
        if record.get("kind") == "attention":
            found.setdefault(tuple(record[key] for key in CASE), {})[record["provider"]] = record
    return found


def compare(before: dict, after: dict, provider: str, tolerance: float) -> list[dict]:
    """One row per case that both have: the ratio of times (above 1 is slower) and whether it is a regression.

    A case that was timed before and is absent now is a regression too.
    """
    rows = []
    for case, old in before.items():
        new = after.get(case, {})
        if "median_ms" not in old.get(provider, {}) or provider not in new:
            continue
        if "median_ms" not in new[provider]:
            rows.append({"case": case, "ratio": None, "against": None, "worse": True, "why": new[provider]["absent"]})
            continue
        yardstick = next((y for y in YARDSTICKS if all("median_ms" in side.get(y, {}) for side in (old, new))), None)
        scale = new[yardstick]["median_ms"] / old[yardstick]["median_ms"] if yardstick else 1.0
        ratio = new[provider]["median_ms"] / old[provider]["median_ms"] / scale
        rows.append({"case": case, "ratio": ratio, "against": yardstick, "worse": ratio > 1 + tolerance, "why": ""})
    return rows


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--provider", default="ours")
    parser.add_argument("--tolerance", type=float, default=0.05)
    options = parser.parse_args()
    rows = compare(load(options.before), load(options.after), options.provider, options.tolerance)
    print("| case | time after / before | against | |\n|---|---|---|---|")
    for row in rows:
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else "absent"
        verdict = f"SLOWER {row['why']}" if row["worse"] else ""
        print(f"| {' '.join(map(str, row['case']))} | {ratio} | {row['against'] or 'absolute'} | {verdict} |")
    if not rows:
        sys.exit("the files have no case in common")
    sys.exit(int(any(row["worse"] for row in rows)))


if __name__ == "__main__":
    main()
