# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead, in a folder that travels: FGATTN_PREBUILT_DIR, or an installed package fgattn_cute_kernels.

The folder holds the same files as the cache and is only read. An entry serves if its kernel sources are this
installation's and so are the libraries that it is loaded with: TVM-FFI and the DSL's runtime. Python and the compiler
have left no trace in it, so another Python and a missing compiler are no reason to refuse it. One that is stale,
foreign or damaged is refused with the reason, and the kernel is compiled instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from . import cache, presets, settings, workers
from .errors import CompileError
from .kernels import copy_spec
from .kernels.mask_spec import COMPACT_STEPS, SHARED_LIST_STEPS, CompactSpec, HalfListSpec, MemberSpec, PartListSpec
from .kernels.spec import FwdSpec
from .settings import log

COMPILER = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core")


def load(spec) -> cache.Artifact | None:
    """The spec's prebuilt kernel, or None; refused entries of its name are warned about."""
    where = settings.prebuilt_dir()
    if where is None:
        return None
    entries = sorted(where.glob(f"{spec.name}-*.json"))
    if not entries or not cache.trusted(where):
        return None
    refused = []
    for path in entries:
        try:
            record, artifact = _read(path)
        except ValueError as why:
            refused.append((path.stem, why))
            continue
        if record["spec"] == dataclasses.asdict(spec):
            return artifact
        refused.append((path.stem, "it is another kernel's"))
    for stem, why in refused:
        log.warning("prebuilt kernel %s is refused: %s", stem, why)
    return None


def refusal(path: Path) -> str | None:
    """Why an entry (its JSON file) does not serve this installation; None if it does."""
    try:
        _read(path)
    except ValueError as why:
        return str(why)
    return None


def _read(path: Path) -> tuple[dict, cache.Artifact]:
    """The record and the files of an entry that serves. Raises ValueError with the reason if it does not."""
    try:
        record = json.loads(path.read_bytes())
        differing = _differing(record["versions"])
        if differing:
            raise ValueError("; ".join(differing))
        if record["sources"] != cache.sources():
            raise ValueError("made from other kernel sources")
        try:
            return record, cache.read_entry(path.with_suffix(""), record["key"])
        except ValueError as why:
            raise ValueError(f"damaged: {why}") from None
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as why:
        raise ValueError(f"damaged: {type(why).__name__}: {why}") from None


def _differing(made: dict[str, str]) -> list[str]:
    """What an entry was made with and this installation does not have."""
    here = cache.versions()
    free = {"python", *(name for name in COMPILER if name not in here)}
    return [
        f"made with {name} {version}, here is {here.get(name, '(none)')}"
        for name, version in sorted(made.items())
        if name not in free and here.get(name) != version
    ]


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
                facts = {"dtype": spec.dtype, "head_dim": spec.head_dim, "slice_n": n}
                if not preset.takes(**facts):
                    continue
                own = preset.spec(**facts)
                for grouped, even in itertools.product((False, True) if n == 1 else (False,), (False, True)):
                    found[preset.spec(**facts, grouped=grouped, even=even)] = None
                if own.softmax == "fixed_ref":
                    found[own.redo_spec()] = None
    return list(found)


def unions_of(specs: Iterable[FwdSpec]) -> list:
    """The kernels by which blocks of 16 to 96 queries share the lists of these; redo passes, and what makes plans."""
    from .select import for_halves, for_parts, for_union
    from .unions import rows_for

    found: dict = {}
    for spec, slice_m in itertools.product(specs, (16, 32, 48, 64, 96)):
        if not spec.redo and spec.tile_m in rows_for(slice_m):
            union = for_union(spec, spec.tile_m // slice_m)
            if union.reasons():
                continue
            _with_redo(found, union)
            found[MemberSpec(union_blocks=union.union_blocks)] = None
            halves = for_halves(union)
            if not halves.reasons():
                _with_redo(found, halves)
                made_by = (HalfListSpec(step=step, union_blocks=union.union_blocks) for step in SHARED_LIST_STEPS)
                found.update(dict.fromkeys(made_by))
    for spec in specs:
        shared = for_parts(spec)
        if not spec.redo and not shared.reasons():
            _with_redo(found, shared)
            found.update(dict.fromkeys(PartListSpec(step=step) for step in SHARED_LIST_STEPS))
    return list(found)


def _with_redo(found: dict, spec: FwdSpec) -> None:
    found[spec] = None
    if spec.softmax == "fixed_ref":
        found[spec.redo_spec()] = None


def helpers() -> list:
    """Kernels beside attention that take no preset: lists from masks, and the copies of ``python -m perf.copies``."""
    return [*(CompactSpec(step=step) for step in COMPACT_STEPS), *copy_spec.measured_specs()]


def build(
    where: Path,
    specs: list,
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
