# SPDX-License-Identifier: Apache-2.0
"""What a sparse run did, per layer, head and step: density, recall where measured, time, memory of masks."""

from __future__ import annotations

import dataclasses
import time

import torch

from fgattn_cute.mask import SliceMask, block_rows


class Stopwatch:
    """Time between ``__enter__`` and ``__exit__``: by events on a GPU, read only when somebody asks."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self):
        self._start = self._now()
        return self

    def __exit__(self, *exc):
        self._stop = self._now()

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def milliseconds(self) -> float:
        if not self._cuda:
            return (self._stop - self._start) * 1e3
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop)


@dataclasses.dataclass
class Record:
    """One attention call of one layer.

    action: "dense", "find" (a new mask) or "reuse".
    heads: heads attended here: all of the model's, but for processes that share them.
    density: (heads,) kept share of the (query, key) pairs, on the device; None where dense.
    recall: (heads,) share of the softmax mass that a new mask keeps, where measured.
    call: time of the attention processor, shared by ``entries`` records; find: time to find the mask.
    mask_bytes: bytes of the mask; plan_bytes: bytes of key lists that are kept for the next steps.
    """

    action: str
    heads: int
    density: torch.Tensor | None = None
    recall: torch.Tensor | None = None
    call: Stopwatch | None = None  # set when the processor returns
    entries: int = 1
    find: Stopwatch | None = None
    mask_bytes: int = 0
    plan_bytes: int = 0


def head_density(mask: SliceMask) -> torch.Tensor:
    """(heads,) fp64 kept share of the pairs, averaged over the batch; stays on the device."""
    rows = block_rows(mask.seqlen_q, mask.slice_m, mask.device)
    pairs = (mask.kept_keys() * rows).sum(-1, dtype=torch.float64)
    return (pairs / (mask.seqlen_q * mask.seqlen_k)).mean(0)


class Report:
    """Rows of what happened; ``print`` it, or take ``rows()``.

    Args:
        records: (run, component, layer, step, branch, entry) -> Record. ``entry`` counts batch entries of models that
            attend entry by entry, and is 0 elsewhere.
        held_bytes: bytes of masks and of key lists held at this moment.
    """

    def __init__(self, records: dict[tuple, Record], held_bytes: tuple[int, int]):
        self._records = dict(records)
        self.mask_bytes, self.plan_bytes = held_bytes

    def rows(self) -> list[dict]:
        """One dictionary per attention call, in the order of the calls; reads the device."""
        rows = []
        for (run, component, layer, step, branch, entry), record in self._records.items():
            heads = record.heads
            density = [1.0] * heads if record.density is None else _per_head(record.density, heads)
            rows.append(
                {
                    "run": run,
                    "transformer": component,
                    "layer": layer,
                    "step": step,
                    "branch": branch,
                    "entry": entry,
                    "action": record.action,
                    "density": density,
                    "recall": None if record.recall is None else _per_head(record.recall, heads),
                    "ms": record.call.milliseconds / record.entries,
                    "find_ms": record.find.milliseconds if record.find else 0.0,
                    "mask_bytes": record.mask_bytes,
                    "plan_bytes": record.plan_bytes,
                }
            )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        if not rows:
            return "no attention call yet"
        last = max(row["run"] for row in rows)
        rows = [row for row in rows if row["run"] == last]
        sparse = [row for row in rows if row["action"] != "dense"]
        found = sum(row["action"] == "find" for row in rows)
        lines = [
            f"run {last}: {len(rows)} self-attention calls, {len(rows) - len(sparse)} dense, {len(sparse)} sparse "
            f"({found} masks found, {len(sparse) - found} reused)",
            f"masks held {self.mask_bytes / 2**20:.1f} MiB, key lists held {self.plan_bytes / 2**20:.1f} MiB",
        ]
        if sparse:
            lines.append(f"density of sparse calls {_mean(_flat(sparse, 'density')):.3f}")
            lines.append("layer                 density  min head  max head  recall   dense ms  sparse ms  find ms")
        for component, layer in dict.fromkeys((row["transformer"], row["layer"]) for row in sparse):
            own = [row for row in rows if (row["transformer"], row["layer"]) == (component, layer)]
            lines.append(_layer_line(component, layer, own))
        return "\n".join(lines)


def _layer_line(component: str, layer: int, rows: list[dict]) -> str:
    sparse = [row for row in rows if row["action"] != "dense"]
    dense = [row["ms"] for row in rows if row["action"] == "dense"]
    density, recall = _flat(sparse, "density"), _flat([row for row in sparse if row["recall"]], "recall")
    cells = [
        f"{component + '.' + str(layer):<21}",
        f"{_mean(density):>7.3f}",
        f"{min(density):>9.3f}",
        f"{max(density):>9.3f}",
        f"{_mean(recall):>7.3f}" if recall else f"{'-':>7}",
        f"{_mean(dense):>10.2f}" if dense else f"{'-':>10}",
        f"{_mean([row['ms'] - row['find_ms'] for row in sparse]):>10.2f}",
        f"{_mean([row['find_ms'] for row in sparse]):>8.2f}",
    ]
    return " ".join(cells)


def _flat(rows: list[dict], name: str) -> list[float]:
    return [value for row in rows for value in row[name]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _per_head(values: torch.Tensor, heads: int) -> list[float]:
    """One number per head; a mask shared by all heads has one."""
    return values.expand(heads).tolist()
