# SPDX-License-Identifier: Apache-2.0
"""`fgattn tune`, `fgattn compile` and `fgattn bench`: what makes, picks and times kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fgattn_cute.cli import AsJson, Bars, app, print_json, print_rows, print_table

Seqlen = Annotated[int, typer.Option(min=1, help="Queries and keys.")]
Heads = Annotated[int, typer.Option(min=1)]
HeadDim = Annotated[int, typer.Option(min=1)]
Dtype = Annotated[str, typer.Option(help="bf16 or fp16.")]
SliceM = Annotated[int, typer.Option(min=1, help="Queries of a slice.")]
SliceN = Annotated[int, typer.Option(min=1, help="Keys of a slice.")]
Density = Annotated[float, typer.Option(min=0, max=1, help="Kept fraction of the pairs.")]
GpuName = Annotated[str, typer.Option("--gpu", help="File of configs/ without .yaml; by default this machine's GPU.")]


@app.command()
def tune(
    seqlen: Seqlen = 32760,
    heads: Heads = 12,
    head_dim: HeadDim = 128,
    dtype: Dtype = "bf16",
    slice_m: SliceM = 128,
    slice_n: SliceN = 1,
    density: Density = 0.3,
    gpu: GpuName = "",
    top: Annotated[int, typer.Option(min=1, help="Candidates that are compiled and timed.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 20,
    write: Annotated[Path | None, typer.Option(help="Preset file whose entry becomes the winner.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest kernel for a shape. On a Hopper by measuring; elsewhere the cost model ranks, and says so."""
    from fgattn_cute import gpu as gpus
    from fgattn_cute import preset_edit, tuner
    from fgattn_cute.roofline import Workload

    measuring = not gpu and _hopper()
    if measuring:
        q, k, v, plan = _inputs(seqlen, heads, head_dim, dtype, slice_m, slice_n, density)
        with Bars(shown=not as_json) as bars, bars.busy("tuning"):
            found = tuner.autotune(q, k, v, plan, top=top, rounds=rounds)
    else:
        problem = _problem(seqlen, heads, head_dim, dtype, slice_m, slice_n, density)
        chosen_for = gpus.from_config(gpu) if gpu else gpus.assumed()
        found = tuner.by_model(problem, chosen_for, Workload.uniform(problem, density), density)
    if write is not None:
        preset_edit.write(write, found.winner.preset_id, found.record)
    if as_json:
        print_json(found.as_dict())
        return
    by = (
        "measured"
        if measuring
        else "ranked by the cost model, NOT measured: there is no Hopper here or --gpu names one"
    )
    rows = [("GPU", str(found.gpu)), ("problem", found.problem.describe()), ("order", by)]
    rows.append(("winner", f"{found.winner.spec.name} (from {found.winner.preset_id})"))
    rows.append(("before", f"{found.baseline.spec.name} (from {found.baseline.preset_id})"))
    rows.append(("recorded", found.path or "no: only measurements are"))
    print_rows(rows)
    table = Table("kernel", "model ms", "bound by", "median ms", "rejected because", box=None, padding=(0, 2, 0, 0))
    for c in found.candidates[: 2 * top]:
        median = f"{c.timing['median_ms']:.4f}" if c.timing else ""
        model = f"{c.predicted_ms:.4f}" if c.predicted_ms is not None else ""
        table.add_row(c.spec.name, model, c.binding or "", median, c.rejected or "")
    print_table(table)


@app.command("compile")
def compile_kernels(
    gpu: Annotated[str, typer.Option("--gpu", help="File of configs/ without .yaml.")] = "sm90",
    out: Annotated[
        Path | None, typer.Option(help="Folder to fill, for FGATTN_PREBUILT_DIR; default: the cache.")
    ] = None,
    slice_n: Annotated[list[int] | None, typer.Option(min=1, help="Keys of a slice; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 or fp16; may be repeated; default both.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="May be repeated; default all.")] = None,
    unions: Annotated[bool, typer.Option("--unions", help="Also for blocks of 16 to 96 queries that share.")] = False,
    processes: Annotated[int, typer.Option(min=0, help="Side by side; 0: FGATTN_COMPILE_WORKERS.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Compile nothing: say which files of --out would serve.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a GPU's presets ahead; works without a GPU. Exit code 1 if a kernel does not compile or serve."""
    from fgattn_cute import prebuilt, workers

    if check:
        if out is None:
            raise typer.BadParameter("--check needs the folder", param_hint="--out")
        verdicts = [{"entry": path.stem, "refused": prebuilt.refusal(path)} for path in sorted(out.glob("*.json"))]
        if as_json:
            print_json(verdicts)
        else:
            print_rows([(v["entry"], v["refused"] or "serves") for v in verdicts])
        raise typer.Exit(int(not verdicts or any(v["refused"] for v in verdicts)))
    specs = prebuilt.specs_of(gpu, slice_n or (1,), dtype, head_dim)
    specs += prebuilt.unions_of(specs) if unions else []
    if not specs:
        raise typer.BadParameter(f"no preset of {gpu} is for that", param_hint="--dtype, --head-dim")
    if not (dtype or head_dim):
        specs += prebuilt.helpers()
    with Bars(shown=not as_json) as bars, bars.busy(f"compiling {len(specs)} kernels"):
        outcomes = (
            prebuilt.build(out, specs, processes or None)
            if out is not None
            else workers.compile_all(specs, processes=processes or None)
        )
    failed = [outcome for outcome in outcomes if outcome.error]
    counts = {"compiled": len(outcomes) - len(failed), "failed": len(failed)}
    if out is not None:
        counts["loaded_without_the_dsl"] = len(list(out.glob("*.so")))
    if as_json:
        kernels = [{"kernel": o.spec.name, "error": o.error, "seconds": round(o.seconds, 3)} for o in outcomes]
        print_json({"folder": out, **counts, "kernels": kernels})
    else:
        print_rows([(name.replace("_", " "), number) for name, number in counts.items()])
        print_rows([(o.spec.name, o.error) for o in failed])
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    seqlen: Seqlen = 16384,
    heads: Heads = 12,
    head_dim: HeadDim = 128,
    dtype: Dtype = "bf16",
    slice_m: SliceM = 192,
    slice_n: SliceN = 1,
    density: Density = 0.3,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 30,
    gpu: GpuName = "",
    as_json: AsJson = False,
) -> None:
    """Time one shape against torch's dense attention. Without a Hopper: what the cost model expects, and it says so."""
    from fgattn_cute import bench as benchmark
    from fgattn_cute import gpu as gpus

    measuring = not gpu and _hopper()
    if measuring:
        result = benchmark.measure(*_inputs(seqlen, heads, head_dim, dtype, slice_m, slice_n, density), rounds=rounds)
    else:
        problem = _problem(seqlen, heads, head_dim, dtype, slice_m, slice_n, density)
        result = benchmark.expect(problem, gpus.from_config(gpu) if gpu else gpus.assumed(), density)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print_rows([(name.replace("_", " "), str(value)) for name, value in dataclasses.asdict(result).items()])


def _hopper() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _dtype(name: str):
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in types:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(types)}", param_hint="--dtype")
    return types[name]


def _problem(seqlen, heads, head_dim, dtype, slice_m, slice_n, density):
    """The static facts of a call on tensors that are never made."""
    import math

    import torch

    from fgattn_cute.checks import check
    from fgattn_cute.mask import SliceMask

    q = torch.empty(1, seqlen, heads, head_dim, dtype=_dtype(dtype), device="meta")
    mask = SliceMask.empty(slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen, device="meta")
    bucket = int(-math.log2(max(density, 1e-9)))
    # The cost model is asked about lists that all keep this density.
    return dataclasses.replace(check(q, q, q, mask), plan_heads=heads, density_bucket=bucket, even=True)


def _inputs(seqlen, heads, head_dim, dtype, slice_m, slice_n, density):
    """Random tensors and a random plan on the GPU."""
    import torch

    from fgattn_cute import Plan, SliceMask

    q, k, v = (torch.randn(1, seqlen, heads, head_dim, device="cuda").to(_dtype(dtype)) for _ in range(3))
    blocks, columns = -(-seqlen // slice_m), -(-seqlen // slice_n)
    keep = torch.rand(1, heads, blocks, columns, device="cuda") < density
    mask = SliceMask.from_dense(keep, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen)
    return q, k, v, Plan.from_mask(mask)
