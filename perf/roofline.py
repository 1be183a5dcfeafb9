# SPDX-License-Identifier: Apache-2.0
"""The cost model on the command line: a prediction, the tables of model against measurement, the fit behind it.

python -m perf.roofline --gpu h200 --seqlen 75600 --heads 40 --slice-m 192 --density 0.3
python -m perf.roofline --table            # Markdown: model against every measured figure, docs/cost-model.md
python -m perf.roofline --summary          # Markdown: the errors by source, docs/performance.md
python -m perf.roofline --fit              # the three fitted constants, from the first file of perf/results/h200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from fgattn_cute import gpu as gpus
from fgattn_cute import presets, roofline
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.problem import Problem
from fgattn_cute.select import facts_for, for_union, select

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "h200"
OWN = {  # file: what its records are to the model
    "2026-11-23-forward.jsonl": "own, fitted",  # the constants of configs/h200.yaml are fitted to these
    "2026-11-23-second.jsonl": "own, held out",
    "2026-11-23-peers.jsonl": "own, bursts",
}
PUBLISHED = ROOT / "published.json"
# What a record's provider may say of a preset's kernel, and still be of one that the model prices.
FIELDS = {
    "scale_reference=once": {"scale_reference": "once"},
    "scale_reference=per_tile": {"scale_reference": "per_tile"},
    "producer_registers=56": {"producer_registers": 56},
}
ANOTHER = "another kernel"  # how the label of a figure starts that is not of this design


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure that the model can be held against.

    tflops: packed; or None and ``ratio``: time over that of full lists.
    seqlen_q, slice_m: where they are not seqlen and the kernel's rows.
    union_blocks, union_factor: blocks that share a list, and pairs in the lists over pairs kept.
    """

    source: str
    label: str
    spec: FwdSpec
    gpu: str
    seqlen: int
    heads: int
    density: float
    tflops: float | None = None
    ratio: float | None = None
    seqlen_q: int = 0
    slice_m: int = 0
    union_blocks: int = 1
    union_factor: float = 1.0

    @property
    def group(self) -> str:
        """Whose figure it is: "own" (fitted or held out), "prototype", "lab", or "others"."""
        if self.label.startswith(ANOTHER):
            return "others"
        return self.source if self.source.startswith("own") else self.source.split(",")[0]


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
    """The repository's own interleaved records, and the figures in published.json."""
    return [*own_measurements(), *published("figures")]


def own_measurements() -> Iterator[Measured]:
    """Records of perf/results/h200: interleaved ones whose provider is a preset, and ours among perf.run's."""
    known = {preset.id: preset for preset in presets.builtin("h200").presets}
    for name, source in OWN.items():
        for record in map(json.loads, (RESULTS / name).read_text().splitlines()):
            preset_id, *said = record.get("provider", "").split() or [""]
            if record["kind"] == "attention" and preset_id == "ours" and "packed_tflops" in record:
                facts = {"dtype": "bf16", "head_dim": record["head_dim"], "slice_n": record["slice_n"]}
                preset_id, spec = _kernel_named(record["note"].removeprefix("preset: "), known.values(), facts)
                label = f"{preset_id}, slices of {record['slice_m']} x {record['slice_n']}"
                more = {"slice_m": record["slice_m"]}
            elif record["kind"] == "interleaved" and preset_id in known and FIELDS.keys() >= set(said):
                label, more = record["provider"], {}
                spec = known[preset_id].spec(dtype="bf16", head_dim=record["head_dim"])
                for word in said:
                    spec = dataclasses.replace(spec, **FIELDS[word])
            else:
                continue
            facts = (record["seqlen"], record["heads"], record["density"], record["packed_tflops"])
            yield Measured(source, label, spec, "h200", *facts, **more)


def _kernel_named(name: str, known, facts: dict) -> tuple[str, FwdSpec]:
    """(preset's id, kernel) of a record, which may be older than the preset: without boxes, with other registers."""
    for preset in known:
        if preset.takes(**facts):
            own = preset.spec(**facts)
            for older in ({}, {"kv_loads": "gather"}, {"kv_loads": "gather", "producer_registers": 56}):
                spec = dataclasses.replace(own, **older)
                if spec.name == name:
                    return preset.id, spec
    raise ValueError(f"no preset has had the kernel {name}")


def published(section: str) -> list[Measured]:
    """ "figures" or "ratios" of published.json."""
    data = json.loads(PUBLISHED.read_text())
    kernels = {name: FwdSpec(**fields) for name, fields in data["kernels"].items()}
    found = []
    for entry in data[section]:
        spec = for_union(kernels[entry["kernel"]], entry.get("union_blocks", 1))
        found.append(Measured(spec=spec, **{key: value for key, value in entry.items() if key != "kernel"}))
    return found


def model(point: Measured, **constants: float) -> roofline.Prediction:
    """The model's word on a measured point, with some of the GPU's constants replaced."""
    facts = presets.builtin(point.gpu).gpu
    facts = dataclasses.replace(facts, constants={**facts.constants, **constants})
    slice_m = point.slice_m or point.spec.tile_m
    asked = problem(point.seqlen, point.heads, point.spec.head_dim, slice_m, seqlen_q=point.seqlen_q)
    asked = dataclasses.replace(asked, union_blocks=point.union_blocks)
    work = roofline.Workload.uniform(asked, point.density, union_factor=point.union_factor)
    return roofline.predict(point.spec, facts, work, roofline.known_instructions(point.spec))


def predicted_ratio(point: Measured) -> float:
    """Time over that of full lists."""
    return model(point).seconds / model(dataclasses.replace(point, density=1.0)).seconds


def errors(points: list[Measured], **constants: float) -> list[float]:
    """Relative error of the predicted rate, per point."""
    return [model(point, **constants).packed_tflops / point.tflops - 1 for point in points]


def markdown(head: list[str], rows: Iterator[list]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table() -> str:
    """Every measured figure, the model's, the error and the binding resource; ratios; what cannot be compared."""

    def rates():
        for point in measurements():
            found = model(point)
            sizes = [f"{point.seqlen:,}", point.heads, point.spec.head_dim, f"{point.density:.1%}".replace(".0%", "%")]
            rates = [f"{point.tflops:.0f}", f"{found.packed_tflops:.0f}"]
            error = f"{found.packed_tflops / point.tflops - 1:+.0%}"
            yield [point.source, point.label, *sizes, *rates, error, found.binding]

    def ratios():
        for point in published("ratios"):
            found = predicted_ratio(point)
            yield [point.source, point.label, f"{point.ratio:.2f}", f"{found:.2f}", f"{found / point.ratio - 1:+.0%}"]

    rest = json.loads(PUBLISHED.read_text())["not comparable"]
    parts = [
        markdown(["source", "kernel", "S", "H", "D", "density", "measured", "model", "error", "binding"], rates()),
        markdown(["source", "what", "measured", "model", "error"], ratios()),
        markdown(["not comparable", "why"], ([entry["figure"], entry["why"]] for entry in rest)),
    ]
    return "\n\n".join(parts)


def summary() -> str:
    """The errors by source."""

    def rows():
        points = measurements()
        for group in dict.fromkeys(point.group for point in points):
            found = errors([point for point in points if point.group == group])
            size = [abs(error) for error in found]
            within = sum(error <= 0.15 for error in size)
            mean = f"{statistics.fmean(size):.0%}"
            yield [group, len(found), mean, f"{min(found):+.0%} to {max(found):+.0%}", f"{within} of {len(found)}"]

    return markdown(["source", "figures", "mean absolute error", "range", "within 15 %"], rows())


def fit() -> dict[str, float]:
    """Least squares over the fitted records, by coordinate descent on a shrinking grid."""
    points = [point for point in own_measurements() if point.source == "own, fitted"]
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
    parser.add_argument("--summary", action="store_true", help="the errors by source, as Markdown")
    parser.add_argument("--fit", action="store_true", help="fit the constants to the measurements again")
    options = parser.parse_args()
    if options.table:
        print(table())
    elif options.summary:
        print(summary())
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
