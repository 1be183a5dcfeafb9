# SPDX-License-Identifier: Apache-2.0
"""The command `fgattn`. Every command speaks text by default and JSON with --json.

Exit codes: 0 done; 1 the answer is no (a check failed, a preset is wrong, nothing can run); 2 the call was wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fgattn_cute.errors import FgAttnError

app = typer.Typer(
    name="fgattn",
    help="FG-Attn: fine-grained sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PIPE_COLUMNS = 240
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """Entry point of the console script."""
    from fgattn_cute import cli_kernels  # noqa: F401 - adds its commands

    try:
        app()
    except FgAttnError as refused:
        print(f"{type(refused).__name__}: {refused}", file=sys.stderr)
        sys.exit(1)


def print_json(value) -> None:
    print(json.dumps(value, indent=2, sort_keys=False, default=str))


def print_table(table: Table) -> None:
    """As wide as the terminal; as wide as it needs to be in a file or a pipe."""
    Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Two columns, the first one bold."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(str(value)))
    print_table(table)


class Bars:
    """Progress bars on standard error, drawn only where a person can see them."""

    def __init__(self, shown: bool):
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def track(self, title: str, items: list) -> Iterable:
        return self._progress.track(items, description=title, total=len(items))

    @contextlib.contextmanager
    def busy(self, title: str):
        task = self._progress.add_task(title, total=None)
        yield
        self._progress.update(task, total=1, completed=1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, which backends work, and why the others do not. Exit code 1 if no kernel can run."""
    from fgattn_cute.doctor import examine

    found = examine()
    runs = found["backends"]["cuda"] is None or found["backends"]["emulator"] is None
    if as_json:
        print_json(found)
    else:
        rows = [("python", f"{found['python']} on {found['platform']}, {found['cpus']} CPUs")]
        rows += [(name, version or "not installed") for name, version in found["packages"].items()]
        gpu = found["gpu"]
        rows.append(("GPU", f"{gpu['name']} ({gpu['cc'][0]}.{gpu['cc'][1]}, {gpu['sms']} SMs)" if gpu else "none"))
        rows.append(("kernel cache", found["cache"]["problem"] or found["cache"]["folder"]))
        rows += list(found["environment"].items())
        rows += [(f"backend {name}", f"no: {why}" if why else "works") for name, why in found["backends"].items()]
        print_rows(rows)
    if not runs:
        raise typer.Exit(1)


presets_app = typer.Typer(help="The kernels' presets, one YAML file per GPU.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")
GpuFile = Annotated[str, typer.Option("--gpu", help="File of configs/ without .yaml: h200, h100_sxm, sm90, ...")]


@presets_app.command("list")
def presets_list(
    gpu: Annotated[str, typer.Option(help="One file of configs/ without .yaml; all by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Every preset: what it is for and what it multiplies."""
    from fgattn_cute import presets

    files = [presets.builtin(stem) for stem in ([gpu] if gpu else presets.builtin_names())]
    if as_json:
        print_json([_preset_data(preset) for file in files for preset in file.presets])
        return
    table = Table("file", "preset", "for", "tile", "softmax", "provenance", box=None, padding=(0, 2, 0, 0))
    for file in files:
        for preset in file.presets:
            fields = preset.fields
            tile = f"{fields['tile_m']} x {fields['tile_n']}"
            table.add_row(file.name, preset.id, _conditions(preset), tile, fields["softmax"], preset.provenance)
    print_table(table)


@presets_app.command("show")
def presets_show(
    preset_id: Annotated[str, typer.Argument(metavar="PRESET")], gpu: GpuFile = "sm90", as_json: AsJson = False
) -> None:
    """One preset in full, with the budgets of each kernel that it stands for."""
    from fgattn_cute import presets

    preset = presets.builtin(gpu).get(preset_id)
    data = _preset_data(preset)
    data["kernels"] = [
        {
            "name": spec.name,
            "smem_bytes": spec.smem_bytes(),
            "register_estimate": spec.register_estimate(),
            "consumer_registers": spec.consumer_registers,
            "reasons": spec.reasons(),
        }
        for spec in preset.specs()
    ]
    if as_json:
        print_json(data)
        return
    print_rows([(key, _inline(value)) for key, value in data.items() if key != "kernels"])
    table = Table("kernel", "shared memory", "registers", "cannot run because", box=None, padding=(0, 2, 0, 0))
    for kernel in data["kernels"]:
        registers = f"{kernel['register_estimate']} of {kernel['consumer_registers']}"
        table.add_row(kernel["name"], f"{kernel['smem_bytes']:,} B", registers, "; ".join(kernel["reasons"]))
    print_table(table)


@presets_app.command("validate")
def presets_validate(
    files: Annotated[list[Path] | None, typer.Argument(help="YAML files; by default the shipped ones.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check preset files: syntax, keys, and that every kernel they name can run. Exit code 1 if one is wrong."""
    from fgattn_cute import presets
    from fgattn_cute.errors import PresetError

    paths = files or [presets.CONFIG_DIR / f"{stem}.yaml" for stem in presets.builtin_names()]
    verdicts = []
    for path in paths:
        try:
            loaded = presets.load(path)
            base = loaded.base and loaded.base.name
            verdicts.append({"file": path.name, "presets": len(loaded.presets), "extends": base, "error": None})
        except PresetError as wrong:
            verdicts.append({"file": path.name, "presets": None, "extends": None, "error": str(wrong)})
    if as_json:
        print_json(verdicts)
    else:
        over = lambda v: f", over {v['extends']}" if v["extends"] else ""
        print_rows([(v["file"], v["error"] or f"{v['presets']} presets, all can run{over(v)}") for v in verdicts])
    if any(v["error"] for v in verdicts):
        raise typer.Exit(1)


def _preset_data(preset) -> dict:
    return {
        "file": preset.file,
        "id": preset.id,
        "when": preset.when.model_dump(exclude_none=True),
        **preset.fields,
        "provenance": preset.provenance,
        "measured": preset.measured.model_dump(mode="json", exclude_none=True),
        "tune": {key: list(values) for key, values in preset.tune.items()},
    }


def _conditions(preset) -> str:
    when = preset.when.model_dump(exclude_none=True)
    return ", ".join(f"{key} {_inline(value)}" for key, value in when.items()) or "everything else"


def _inline(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(inner)}" for key, inner in value.items()) or "nothing"
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value))
    return str(value)


cache_app = typer.Typer(help="The compiled kernels on disk.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command("info")
def cache_info(as_json: AsJson = False) -> None:
    """Where the cache lies, how much it holds, and each kernel in it."""
    from fgattn_cute import cache

    info = cache.info()
    kernels = [
        {key: record[key] for key in ("name", "stem", "bytes", "stale", "created")} for record in cache.records()
    ]
    if as_json:
        print_json({**dataclasses.asdict(info), "kernels": kernels})
        return
    held = f"{info.entries} kernels, {info.bytes / 2**20:.1f} MiB, {info.stale} of them of other sources or versions"
    print_rows([("folder", info.folder), ("mode", info.mode), ("holds", held)])
    if kernels:
        table = Table("kernel", "KiB", "compiled", "", box=None, padding=(0, 2, 0, 0))
        for kernel in kernels:
            stale = "stale" if kernel["stale"] else ""
            table.add_row(kernel["stem"], f"{kernel['bytes'] / 2**10:.0f}", kernel["created"], stale)
        print_table(table)


@cache_app.command("clear")
def cache_clear(as_json: AsJson = False) -> None:
    """Remove every compiled kernel."""
    from fgattn_cute import cache

    _report_removed(cache.prune(max_bytes=0), as_json)


@cache_app.command("prune")
def cache_prune(
    max_mib: Annotated[int, typer.Option(min=0, help="MiB that may stay; the kernels used last stay.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Remove kernels of other sources or versions, then those not used for longest."""
    from fgattn_cute import cache

    _report_removed(cache.prune(max_bytes=max_mib * 2**20), as_json)


def _report_removed(removed: int, as_json: bool) -> None:
    print_json({"removed": removed}) if as_json else print(f"removed {removed} kernels")


mask_app = typer.Typer(help="Saved masks and plans (safetensors files).", no_args_is_help=True)
app.add_typer(mask_app, name="mask")
MaskFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What SliceMask.save or Plan.save wrote.")]


@mask_app.command("stats")
def mask_stats(file: MaskFile, as_json: AsJson = False) -> None:
    """What a mask keeps, how regular it is, what it weighs and what speed to expect."""
    facts = _load_mask(file).describe()
    print_json(facts) if as_json else print(facts)


@mask_app.command("plot")
def mask_plot(
    file: MaskFile,
    out: Annotated[Path | None, typer.Option(help="Picture to write; by default FILE with the suffix .png.")] = None,
    batch: Annotated[int, typer.Option(min=0)] = 0,
    head: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """A picture of one head's map."""
    from fgattn_cute.pictures import plot_mask

    written = plot_mask(_load_mask(file), out or file.with_suffix(".png"), batch, head)
    print_json({"picture": written}) if as_json else print(written)


def _load_mask(file: Path):
    from fgattn_cute import storage
    from fgattn_cute.mask import SliceMask
    from fgattn_cute.plan import Plan

    return Plan.load(file).to_mask() if storage.kind_of(file) == "plan" else SliceMask.load(file)


@app.command("compare-videos")
def compare_videos(
    reference: Annotated[Path, typer.Argument(exists=True, help="Dense: a video, .gif, .npy or folder of images.")],
    other: Annotated[Path, typer.Argument(exists=True, help="Sparse, of the same prompt, seed and size.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and its pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """How far one video is from another: PSNR and SSIM per frame, and a report with pictures."""
    from fgattn_cute import quality, quality_report

    comparison = quality.compare(reference, other)
    facts = comparison.as_dict()
    if out is not None:
        names = (reference.stem, other.stem)
        facts["report"] = quality_report.write(comparison, out, names if names[0] != names[1] else ("dense", "sparse"))
    if as_json:
        print_json(facts)
        return
    level, worst = (quality_report.decibels(facts[name]) for name in ("psnr", "psnr_worst"))
    rows = [
        ("frames", f"{facts['frames']} of {facts['width']} x {facts['height']}"),
        ("PSNR", f"{level}, worst {worst} in frame {facts['worst_frame']}"),
        ("SSIM", f"{facts['ssim']:.4f}, worst {facts['ssim_worst']:.4f}"),
    ]
    print_rows([*rows, ("report", str(facts["report"]))] if out is not None else rows)


@app.command()
def explain(
    seqlen: Annotated[int, typer.Option(min=1, help="Queries.")] = 32760,
    seqlen_k: Annotated[int, typer.Option(help="Keys; 0 means as many as queries.")] = 0,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    kv_heads: Annotated[int, typer.Option(help="Heads of K and V; 0 means as many as of Q.")] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    slice_m: Annotated[int, typer.Option(min=1, help="Queries of a slice.")] = 128,
    slice_n: Annotated[int, typer.Option(min=1, help="Keys of a slice.")] = 1,
    density: Annotated[float, typer.Option(min=0, max=1, help="Kept fraction of the pairs.")] = 0.3,
    union_factor: Annotated[
        float, typer.Option(help="Of blocks that share a list (slice_m 16 to 96): weigh shared lists; 0: none.")
    ] = 0.0,
    gpu: Annotated[str, typer.Option(help="File of configs/ without .yaml; by default this machine's GPU.")] = "",
    as_json: AsJson = False,
) -> None:
    """Which kernel a call would get, where it comes from, why, and what else could have run."""
    import torch

    from fgattn_cute import gpu as gpus
    from fgattn_cute.checks import check
    from fgattn_cute.explanation import Explanation
    from fgattn_cute.mask import SliceMask
    from fgattn_cute.plan_choice import expected, price, ways
    from fgattn_cute.select import select

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(dtypes)}", param_hint="--dtype")
    seqlen_k, kv_heads = seqlen_k or seqlen, kv_heads or heads
    q = torch.empty(batch, seqlen, heads, head_dim, dtype=dtypes[dtype], device="meta")
    k = torch.empty(batch, seqlen_k, kv_heads, head_dim, dtype=dtypes[dtype], device="meta")
    mask = SliceMask.empty(slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen_k, device="meta")
    problem = check(q, k, k, mask)
    chosen_for = gpus.from_config(gpu) if gpu else gpus.current() if torch.cuda.is_available() else gpus.assumed()
    plans = None
    if union_factor:
        if union_factor < 1:
            raise typer.BadParameter("pairs computed over pairs kept are at least 1", param_hint="--union-factor")
        kinds = ways(slice_m, slice_n, coarser=False)
        plans = price(problem, chosen_for, density, *expected(kinds, union_factor, density * seqlen_k))
        problem = next(way.asked(problem) for way in kinds if way.name == plans.chosen)
    problem = dataclasses.replace(problem, even=problem.union_blocks == 1)  # every block keeps this density
    choice = select(problem, chosen_for)
    sharing = {} if plans is None else {"union_factor": plans.option.union_factor, "loads": plans.option.loads_per_key}
    explained = Explanation.of(problem, chosen_for, choice, density, refused=(), plans=plans, **sharing)
    if as_json:
        print_json(explained.as_dict())
    else:
        print(explained)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path(".demo"),
    backend: Annotated[str, typer.Option(help="auto, cuda or emulator.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Sparse attention over a small video made from a photograph: what it keeps, costs and loses."""
    if backend not in ("auto", "cuda", "emulator"):
        raise typer.BadParameter(f"{backend!r} is not one of auto, cuda, emulator", param_hint="--backend")
    with Bars(shown=not as_json) as bars:
        with bars.busy("loading torch"):
            from fgattn_cute.demo import run
        result = run(out, backend=backend, progress=bars)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _print_demo(result)
    if result.error > result.error_limit:
        raise typer.Exit(1)


def _print_demo(result) -> None:
    runs_on = "GPU" if result.backend == "cuda" else "emulator"
    within = "within" if result.error <= result.error_limit else "OVER"
    if result.dense_seconds is None:
        taken = (
            f"{result.seconds:.2f} s for {result.emulated_instructions:,} warp instructions, every check on; "
            f"{result.setup_seconds:.1f} s to compile before. A GPU's time cannot be read from this"
        )
    else:
        sparse_ms, dense_ms = 1e3 * result.seconds, 1e3 * result.dense_seconds
        taken = f"{sparse_ms:.3f} ms, torch's dense attention {dense_ms:.3f} ms: {dense_ms / sparse_ms:.2f} x; "
        taken += f"{result.setup_seconds:.1f} s to compile before"
    print_rows(
        [
            ("runs on", f"{runs_on}: {result.machine}"),
            ("input", f"{result.photo}: {result.tokens:,} tokens, {result.heads} heads of {result.head_dim}"),
            ("preset", f"{result.preset}: {result.why}"),
            ("kernel", result.kernel),
            ("density", f"{result.density:.1%} of the (query, key) pairs are computed"),
            ("kept softmax mass", f"{result.kept_mass:.2%}"),
            (
                "error",
                f"out {result.error:.2e}, lse {result.lse_error:.2e} against fp32 on the same keys, {within} the "
                f"limit of {result.error_limit:.2e}",
            ),
            ("against dense", f"out changes by {result.dense_change:.2%}, the price of the skipped pairs"),
            ("time", taken),
            ("picture", result.picture),
        ]
    )


if __name__ == "__main__":  # under its own name, so that the commands of cli_kernels join the same app
    from fgattn_cute.cli import main as run

    run()
