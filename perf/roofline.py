# SPDX-License-Identifier: Apache-2.0
"""The cost model on the command line: a prediction, the table of model against measurement, the fit behind it.

python -m perf.roofline --gpu h200 --seqlen 75600 --heads 40 --slice-m 192 --density 0.3
python -m perf.roofline --table            # Markdown: model against every measured figure
python -m perf.roofline --fit              # the three fitted constants, from perf/results/h200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from fgattn_cute import gpu as gpus
from fgattn_cute import presets, roofline
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.problem import Problem
from fgattn_cute.select import facts_for, select

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "h200" / "2026-11-23-forward.jsonl"
PUBLISHED = ROOT / "published.json"
SAME_KERNEL = {"", "scale_reference=once", "scale_reference=per_tile"}  # what a record's provider may add to the preset


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure that the model can be held against. tflops: packed."""

    source: str
    label: str
    spec: FwdSpec
    gpu: str
    seqlen: int
    heads: int
    density: float
    tflops: float
    seqlen_q: int = 0  # where it is not seqlen


def problem(seqlen: int, heads: int, head_dim: int, slice_m: int, slice_n: int = 1, seqlen_q: int = 0) -> Problem:
    """Attention over `seqlen` keys and as many queries unless told, bf16, batch 1."""
    strides = (seqlen * heads * head_dim, heads * head_dim, head_dim, 1)
    return Problem(
        batch=1,
        seqlen_q=seqlen_q or seqlen,
        seqlen_k=seqlen,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        layout="bshd",
        device=torch.device("meta"),
        q_strides=strides,
        k_strides=strides,
        v_strides=strides,
        slice_m=slice_m,
        slice_n=slice_n,
        plan_batch=1,
        plan_heads=heads,
    )


def measurements() -> list[Measured]:
    """The repository's own interleaved records, and the figures of others in published.json."""
    file = presets.builtin("h200")
    known = {preset.id: preset for preset in file.presets}
    found = []
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        preset_id, _, rest = record["provider"].partition(" ")
        if record["kind"] != "interleaved" or preset_id not in known or rest not in SAME_KERNEL:
            continue
        spec = known[preset_id].spec(dtype="bf16", head_dim=record["head_dim"])
        if rest:
            spec = dataclasses.replace(spec, scale_reference=rest.partition("=")[2])
        sizes = (record["seqlen"], record["heads"], record["density"])
        found.append(Measured("own", record["provider"], spec, "h200", *sizes, record["packed_tflops"]))
    for entry in json.loads(PUBLISHED.read_text()):
        spec = FwdSpec(**entry["spec"])
        sizes = (entry["seqlen"], entry["heads"], entry["density"])
        found.append(
            Measured(
                entry["source"], entry["label"], spec, entry["gpu"], *sizes, entry["tflops"], entry.get("seqlen_q", 0)
            )
        )
    return found


def model(point: Measured, **constants: float) -> roofline.Prediction:
    """The model's word on a measured point, with some of the GPU's constants replaced."""
    facts = presets.builtin(point.gpu).gpu
    facts = dataclasses.replace(facts, constants={**facts.constants, **constants})
    asked = problem(point.seqlen, point.heads, point.spec.head_dim, point.spec.tile_m, seqlen_q=point.seqlen_q)
    work = roofline.Workload.uniform(asked, point.density)
    return roofline.predict(point.spec, facts, work)


def errors(points: list[Measured], **constants: float) -> list[float]:
    """Relative error of the predicted rate, per point."""
    return [model(point, **constants).packed_tflops / point.tflops - 1 for point in points]


def table() -> str:
    """Markdown: every measured figure, the model's, the error and the binding resource."""
    head = ["source", "kernel", "S", "H", "D", "density", "measured", "model", "error", "binding"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point in measurements():
        found = model(point)
        row = [point.source, point.label, f"{point.seqlen:,}", point.heads, point.spec.head_dim, f"{point.density:.0%}"]
        row += [f"{point.tflops:.0f}", f"{found.packed_tflops:.0f}", f"{found.packed_tflops / point.tflops - 1:+.0%}"]
        lines.append("| " + " | ".join(map(str, [*row, found.binding])) + " |")
    return "\n".join(lines)


def fit() -> dict[str, float]:
    """Least squares over the own records, by coordinate descent on a shrinking grid."""
    points = [point for point in measurements() if point.source == "own"]
    values = {"overlap_exponent": 4.0, "cycles_per_instruction": 1.5, "list_cycles": 4000.0}
    step = 0.5

    def loss(candidate):
        return sum(math.log1p(error) ** 2 for error in errors(points, **candidate))

    best = loss(values)
    while step > 0.01:
        before = best
        for name in values:
            for factor in (1 + step, 1 / (1 + step)):
                candidate = {**values, name: values[name] * factor}
                if (lost := loss(candidate)) < best:
                    values, best = candidate, lost
        if best == before:
            step /= 2
    return {**values, "rms_error": math.sqrt(best / len(points))}


def main() -> None:
    """Prints a prediction as JSON, the table, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h200", choices=presets.builtin_names())
    parser.add_argument("--preset", help="preset to price; by default the one that a call would take")
    parser.add_argument("--seqlen", type=int, default=32760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--slice-m", type=int, default=128)
    parser.add_argument("--slice-n", type=int, default=1)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--table", action="store_true", help="model against measurement, as Markdown")
    parser.add_argument("--fit", action="store_true", help="fit the constants to the measurements again")
    options = parser.parse_args()
    if options.table:
        print(table())
    elif options.fit:
        print(json.dumps({name: round(value, 4) for name, value in fit().items()}))
    else:
        asked = problem(options.seqlen, options.heads, options.head_dim, options.slice_m, options.slice_n)
        gpu = gpus.from_config(options.gpu)
        spec = select(asked, gpu, options.preset).spec
        work = roofline.Workload.uniform(asked, options.density)
        print(json.dumps(roofline.predict(spec, facts_for(gpu), work).as_dict(), indent=2))


if __name__ == "__main__":
    main()
