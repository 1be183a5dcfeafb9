# SPDX-License-Identifier: Apache-2.0
"""What a session found: per launch the warnings and the counters per warp role, as data, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from .machine import Finding, LaunchResult

_SHOWN = 12  # findings per launch in the text table; the data has them all


def kind_of(finding: Finding) -> str:
    """The kind of a finding: a key of `errors.KINDS`."""
    return finding.kind if isinstance(finding.kind, str) else finding.kind.name.lower()


def describe(finding: Finding) -> str:
    """One finding as text: kind, message, the PTX line, CTA, warp, lane and address as far as they are known."""
    where = [f"CTA {finding.cta}"]
    if finding.warp is not None:
        where.append(f"warp {finding.warp}")
    if finding.lane is not None:
        where.append(f"lane {finding.lane}")
    if finding.address is not None:
        where.append(f"address {finding.address:#x}")
    if finding.count > 1:
        where.append(f"{finding.count} times")
    at = f"\n  at PTX line {finding.line}: {shortened(finding.text)}" if finding.line is not None else ""
    return f"{kind_of(finding)}: {finding.message}{at}\n  {', '.join(where)}"


def shortened(instruction: str, width: int = 110) -> str:
    """One line of PTX, cut to `width` characters (a WGMMA names up to 128 registers)."""
    text = " ".join(instruction.split())
    return text if len(text) <= width else text[: width - 4] + " ..."


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a session."""

    index: int
    seed: int
    schedule: str
    result: LaunchResult

    @property
    def kernel(self) -> str:
        """Name of the PTX entry."""
        return self.result.kernel

    @property
    def findings(self) -> list[Finding]:
        """Everything that was found, the fault that stopped the launch (if any) first."""
        error = self.result.error
        rest = [f for f in self.result.findings if f is not error and f != error]
        return [error, *rest] if error else rest

    def to_dict(self) -> dict:
        """Plain data: str, int, float, list, dict and None only."""
        r = self.result
        return {
            "kernel": r.kernel,
            "seed": self.seed,
            "schedule": self.schedule,
            "grid": list(r.grid),
            "block": list(r.block),
            "cluster": list(r.cluster),
            "dynamic_smem": r.dynamic_smem,
            "seconds": r.seconds,
            "completed": r.error is None,
            "findings": [
                {
                    "kind": kind_of(f),
                    "message": f.message,
                    "ptx_line": f.line,
                    "instruction": f.text.strip(),
                    "cta": list(f.cta),
                    "warp": f.warp,
                    "lane": f.lane,
                    "address": f.address,
                    "count": f.count,
                }
                for f in self.findings
            ],
            "counters": dict(r.counters),
            "roles": [
                {"name": x.name, "warps": list(x.warps), "registers": x.registers, "counters": dict(x.counters)}
                for x in r.roles
            ],
        }


@dataclass
class Report:
    """Every launch of a session, in order. `print(report)` shows the table."""

    launches: list[Launch] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)  # outputs that the session's end found incomplete

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)

    def __len__(self) -> int:
        return len(self.launches)

    def __getitem__(self, i: int) -> Launch:
        return self.launches[i]

    @property
    def findings(self) -> list[Finding]:
        """The findings of all launches."""
        return [f for x in self.launches for f in x.findings]

    @property
    def kinds(self) -> set[str]:
        """The kinds of all findings, and "unwritten" for incomplete outputs; empty for a clean session."""
        return {kind_of(f) for f in self.findings} | ({"unwritten"} if self.unwritten else set())

    def to_dict(self) -> dict:
        """Plain data for `json.dumps`."""
        return {"launches": [x.to_dict() for x in self.launches], "unwritten": list(self.unwritten)}

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> str:
        """Counters per kernel and warp role in columns, and the findings below."""
        return "\n\n".join([*map(_table, self.launches), *self.unwritten]) or "no launches"

    __str__ = table


def _table(launch: Launch) -> str:
    r = launch.result
    roles = r.roles
    names = [n for n in r.counters if r.counters[n] or any(x.counters.get(n) for x in roles)]
    head = ["", *(x.name for x in roles), "total"]
    rows = [[n, *(f"{x.counters.get(n, 0):,}" for x in roles), f"{r.counters[n]:,}"] for n in names]
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        f"{r.kernel}\n  grid {r.grid} block {r.block} cluster {r.cluster} shared {r.dynamic_smem} B, "
        f"seed {launch.seed} ({launch.schedule}), {r.seconds * 1e3:.1f} ms"
    ]
    for row in [head, *rows]:
        cells = (cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True))
        lines.append("  ".join(["  " + row[0].ljust(width[0]), *cells]))
    lines += ["  " + describe(f).replace("\n", "\n  ") for f in launch.findings[:_SHOWN]]
    if len(launch.findings) > _SHOWN:
        lines.append(f"  and {len(launch.findings) - _SHOWN} findings more")
    return "\n".join(lines)
