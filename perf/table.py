# SPDX-License-Identifier: Apache-2.0
"""Everyone side by side: one row per case, one column per provider, as Markdown.

    python -m perf.table results.jsonl [more.jsonl ...] [--ours ours]

Each cell holds milliseconds without and with the provider's own planning, and how many times faster ours is on the same
mask, without and with ours planning. A case that one run measured several times counts with the last.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from perf.compare import load

OURS = ("ours", "ours-best", "ours-union")


def rows(found: dict[tuple, dict[str, dict]], names: list[str], ours: str | None = None) -> list[list[str]]:
    """Cells of the table, case first.

    Args:
        found: {(workload, density, slice_m, slice_n): {provider: record}}, as ``perf.compare.load`` gives it.
        names: providers, in the order of the columns.
        ours: which of ours the others are held against; None takes the faster in each case.
    """
    made = []
    for (workload, density, m, n), records in sorted(found.items(), key=lambda item: _order(item[0])):
        best = _best(records, (ours,) if ours else OURS)
        made.append([f"{workload}, {m} x {n}, {density:.0%}", *(_cell(records.get(name), best) for name in names)])
    return made


def absences(found: dict[tuple, dict[str, dict]]) -> list[str]:
    """One line for each provider and reason for which it has no time, with its cases."""
    why: dict[tuple[str, str], list[str]] = {}
    for (workload, density, m, n), records in sorted(found.items(), key=lambda item: _order(item[0])):
        for name, record in records.items():
            if "absent" in record:
                why.setdefault((name, record["absent"]), []).append(f"{workload} {m} x {n} {density:.0%}")
    return [f"{name}: {reason} ({', '.join(cases)})" for (name, reason), cases in why.items()]


def _order(case: tuple) -> tuple:
    workload, density, m, n = case
    return workload, -density, n, m


def _best(records: dict[str, dict], ours: tuple[str, ...]) -> dict | None:
    timed = [records[name] for name in ours if "median_ms" in records.get(name, {})]
    return min(timed, key=lambda record: record["median_ms"], default=None)


def _cell(record: dict | None, best: dict | None) -> str:
    """ "1.23 / 4.56 (2.0 x / 3.1 x)": times without and with planning, and ours over them in brackets."""
    if record is None or "median_ms" not in record:
        return "-"
    plain, planned = record["median_ms"], record["with_plan_ms"]
    times = f"{plain:.3g}" if record["plan_ms"] is None else f"{plain:.3g} / {planned:.3g}"
    if best is None or record["provider"] in OURS:
        return times
    return f"{times} ({plain / best['median_ms']:.2f} x / {planned / best['with_plan_ms']:.2f} x)"


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    lines.insert(1, "|---|" + "---:|" * (len(header) - 1))
    return "\n".join(lines)


def main() -> None:
    """Prints the table and, below it, who is absent where and why."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--ours", help="hold the others against this provider; the faster of ours by default")
    options = parser.parse_args()
    found: dict = {}
    for path in options.results:
        for case, records in load(path).items():
            found.setdefault(case, {}).update(records)
    seen = dict.fromkeys(name for records in found.values() for name, r in records.items() if "median_ms" in r)
    names = [*(name for name in OURS if name in seen), *(name for name in seen if name not in OURS)]
    print(markdown(["case", *names], rows(found, names, options.ours)))
    print("\n".join(["", *absences(found)]))


if __name__ == "__main__":
    main()
