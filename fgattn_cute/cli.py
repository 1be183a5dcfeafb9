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

from fgattn_cute.errors import FgAttnError

app = typer.Typer(
    name="fgattn",
    help="FG-Attn: fine-grained sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except FgAttnError as refused:
        print(f"{type(refused).__name__}: {refused}", file=sys.stderr)
        sys.exit(1)


def print_json(value) -> None:
    print(json.dumps(value, indent=2, sort_keys=False, default=str))


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
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path(".demo"),
    backend: Annotated[str, typer.Option(help="auto, cuda or emulator.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Sparse attention over a small video made from a photograph: what it keeps, costs and loses."""
    from fgattn_cute.demo import run

    if backend not in ("auto", "cuda", "emulator"):
        raise typer.BadParameter(f"{backend!r} is not one of auto, cuda, emulator", param_hint="--backend")
    with Bars(shown=not as_json) as bars:
        result = run(out, backend=backend, progress=bars)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _print_demo(result)
    if result.error > result.error_limit:
        raise typer.Exit(1)


def _print_demo(result) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    runs_on = "GPU" if result.backend == "cuda" else "emulator"
    table.add_row("runs on", f"{runs_on}: {result.machine}")
    table.add_row("input", f"{result.photo}: {result.tokens:,} tokens, {result.heads} heads of {result.head_dim}")
    table.add_row("kernel", result.choice)
    table.add_row("density", f"{result.density:.1%} of the (query, key) pairs are computed")
    table.add_row("kept softmax mass", f"{result.kept_mass:.2%}")
    within = "within" if result.error <= result.error_limit else "OVER"
    table.add_row(
        "error",
        f"out {result.error:.2e}, lse {result.lse_error:.2e} against fp32 on the same keys, {within} the "
        f"limit of {result.error_limit:.2e}",
    )
    table.add_row("against dense", f"{result.dense_change:.2%} relative change of out, the price of the skipped pairs")
    if result.dense_seconds is None:
        table.add_row("time", f"{result.seconds:.1f} s to compile and to emulate; says nothing about a GPU's time")
    else:
        faster = result.dense_seconds / result.seconds
        table.add_row(
            "time", f"{1e3 * result.seconds:.3f} ms, torch dense {1e3 * result.dense_seconds:.3f} ms: {faster:.2f} x"
        )
    table.add_row("picture", result.picture)
    Console(soft_wrap=True).print(table)
