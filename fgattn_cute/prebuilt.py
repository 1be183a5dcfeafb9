# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead, in a folder that travels: FGATTN_PREBUILT_DIR, or an installed package fgattn_cute_kernels.

The folder holds the same files as the cache and is only read. An entry serves if its key is this installation's: same
kernel sources, same DSL, same Python, same architecture. One that is stale, foreign or damaged is refused with the
reason, and the kernel is compiled instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from . import cache, presets, settings, workers
from .errors import CompileError
from .kernels.spec import FwdSpec
from .settings import log


def load(spec) -> cache.Artifact | None:
    """The spec's prebuilt kernel, or None; refused entries of its name are warned about."""
    where = settings.prebuilt_dir()
    if where is None:
        return None
    own = where / cache.stem_of(spec)
    entries = sorted(where.glob(f"{spec.name}-*.json"))
    if not entries or not cache.trusted(where):
        return None
    if own.with_name(f"{own.name}.json") in entries:
        try:
            return cache.read_entry(own, cache.key_of(spec))
        except (OSError, ValueError, KeyError, TypeError) as why:
            log.warning("prebuilt kernel %s is refused: %s", own.name, why)
            return None
    for path in entries:
        log.warning("prebuilt kernel %s is refused: %s", path.stem, refusal(path))
    return None


def refusal(path: Path) -> str | None:
    """Why an entry (its JSON file) does not serve this installation; None if it does."""
    try:
        record = json.loads(path.read_bytes())
        made, here = record["versions"], cache.versions()
        differing = [
            f"made with {name} {made.get(name, '(none)')}, here is {here.get(name, '(none)')}"
            for name in sorted(made.keys() | here.keys())
            if made.get(name) != here.get(name)
        ]
        if differing:
            return "; ".join(differing)
        if record["fingerprint"] != cache.fingerprint():
            return "made from other kernel sources"
        cache.read_entry(path.with_suffix(""), record["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
        return f"damaged: {type(why).__name__}: {why}"
    return None


def specs_of(gpu: str, slice_n: Iterable[int] = (1,), dtypes=None, head_dims=None) -> list[FwdSpec]:
    """Every kernel that the presets of ``configs/<gpu>.yaml`` launch, redo passes included.

    Args:
        slice_n: segments to build for; the kernel is compiled for one.
        dtypes, head_dims: leave out the others.
    """
    found: dict[FwdSpec, None] = {}
    for preset in presets.builtin(gpu).presets:
        for spec in preset.specs():
            if (dtypes and spec.dtype not in dtypes) or (head_dims and spec.head_dim not in head_dims):
                continue
            for n in slice_n:
                own = dataclasses.replace(spec, slice_n=n)
                found[own] = None
                if own.softmax == "fixed_ref":
                    found[own.redo_spec()] = None
    return list(found)


def build(
    where: Path,
    specs: list[FwdSpec],
    processes: int | None = None,
    on_done: Callable[[workers.Outcome], None] | None = None,
) -> list[workers.Outcome]:
    """Compile kernels and copy them into a folder. Needs no GPU.

    Returns:
        An Outcome per kernel; those with an error are not in the folder.

    Raises:
        CompileError: the kernel cache is not written, or the folder cannot be.
    """
    outcomes = workers.compile_all(specs, processes=processes, on_done=on_done)
    try:
        where.mkdir(mode=0o755, parents=True, exist_ok=True)
        for outcome in outcomes:
            if outcome.error is None:
                artifact = cache.load(outcome.spec)
                if artifact is None:
                    raise CompileError(f"kernel {outcome.spec.name} has left the cache while it was copied")
                cache.write_entry(where, outcome.spec, artifact)
    except OSError as why:
        raise CompileError(f"{where} cannot be written: {why}") from why
    return outcomes
