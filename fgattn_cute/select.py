# SPDX-License-Identifier: Apache-2.0
"""Problem x Gpu -> Choice: which kernel runs a call, where the choice came from and why.

Order: an explicit spec; the user's preset file (FGATTN_CONFIG); what autotune has measured for such calls; the shipped
file of the GPU; its fallback.

Inside a file the first preset that takes the mask's slice_m wins. Where none does (slice_m 80, 320, ...), every preset
of the problem's dtype and head dim can still run it, because larger slices share their list among several CTAs and
smaller ones leave rows of a CTA idle. Then the cheapest wins: rows computed / speed, with
``rows = ceil(slice_m / tile_m) * tile_m`` and speed the preset's ``relative_to_dense``, or SPEED_OF_TILE_M of it.
"""

from __future__ import annotations

import dataclasses
import functools

from . import presets, settings, tuned
from .errors import InputError, PresetError, UnsupportedError, refusal
from .gpu import Gpu
from .kernels.spec import HALVES_STAGES, HALVES_TILE_N, PARTS_BLOCKS, PARTS_STAGES, PARTS_TILE_N, UNION_TILES_N, FwdSpec
from .presets import Preset, PresetFile
from .problem import Problem

# Packed rate relative to dense FA4 where a preset has not been measured: H200, S = 16384, D = 128, 30 % density
# (perf/results/h200/2026-11-23-third.jsonl). EXACT_SPEED: exact over fixed_ref softmax at tile_m 192 and 128.
SPEED_OF_TILE_M = {192: 1.01, 128: 0.95, 64: 0.87}
EXACT_SPEED = 0.9
# What unions change about a preset's kernel besides its tile. With three consumer warpgroups the producer's 32
# registers do not hold the rows of all blocks without a spill. The others come from measuring unions of slice_m 16 and
# 32 with fixed_ref (one H200, 2026-11-23): where ptxas puts the wait for P V in a masked softmax is worth 20 %, and it
# moves with each of these (docs/kernel.md).
WIDE_UNION_REGISTERS = {"consumer_registers": 152, "producer_registers": 56}
UNION_OF_128 = {"scheduler": "grid", "scale_reference": "per_tile"}
UNION_OF_192 = {"kv_stages": 3, "ping_pong": False, "scale_reference": "once"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel for a problem.

    spec: complete and able to run.
    source: "explicit", "user", "tuned", "preset" or "fallback".
    preset_id: None for an explicit FwdSpec; of a tuned kernel the preset whose ranges it comes from.
    why: one sentence.
    """

    spec: FwdSpec
    source: str
    preset_id: str | None
    why: str


@dataclasses.dataclass(frozen=True)
class RunnerUp:
    """A preset that could have run the problem, and why it was not taken."""

    preset_id: str
    spec: FwdSpec
    why: str


def select(problem: Problem, gpu: Gpu, spec: FwdSpec | str | None = None) -> Choice:
    """The kernel for a problem on a GPU.

    Args:
        problem: as ``checks.check`` returns it.
        gpu: whose presets are asked.
        spec: a FwdSpec or the id of a preset, to be used without a choice. What belongs to the plan (slice_n)
            is set from the problem.

    Raises:
        UnsupportedError: the GPU or the explicit spec cannot run; the message lists every reason.
        InputError: the explicit spec is for another dtype or head dim.
        PresetError: a preset file is wrong, or no preset has that id.
    """
    why_not = gpu.reasons()
    if why_not:
        raise UnsupportedError(refusal("no kernel runs on this GPU", [str(gpu)], why_not, "CPU tensors, or a Hopper"))
    if spec is not None:
        return _explicit(problem, gpu, spec)
    ranked = _ranked(problem, files_for(gpu))
    if not ranked:
        kind = _kind(problem)
        asked = [problem.describe(), f"{problem.union_blocks} blocks to a {kind}"]
        why_not = [f"no preset has a tile of {problem.rows} rows that a {kind} can use"]
        raise UnsupportedError(refusal("no kernel shares these lists", asked, why_not, "Plan.from_mask(mask)"))
    found = None if ranked[0][0].source == "user" else tuned.find(problem, gpu)
    return ranked[0][0] if found is None else _tuned(*found)


def _tuned(spec: FwdSpec, record: dict) -> Choice:
    winner, baseline = record["winner"], record["baseline"]
    times = f"{winner['timing']['median_ms']:.4g} ms"
    if baseline["timing"] and baseline["kernel"] != winner["kernel"]:
        times += f" against {baseline['timing']['median_ms']:.4g} ms of {baseline['kernel']}"
    why = (
        f"fastest of {sum(c['timing'] is not None for c in record['candidates'])} measured on {record['created'][:10]}"
    )
    return Choice(spec, "tuned", winner["preset_id"], f"{why}: {times}")


def fallback(problem: Problem, gpu: Gpu) -> FwdSpec:
    """The shipped file's entry for every problem: what tuning candidates are compared with."""
    preset = _shipped(gpu.name).presets[-1]
    spec = preset.spec(**_facts(problem), grouped=problem.grouped, even=problem.even)
    if problem.union_blocks > 1 and spec.tile_m != problem.rows:
        budgets = {"consumer_registers": None, "producer_registers": None}
        spec = dataclasses.replace(spec, tile_m=problem.rows, **budgets)
    return for_lists(spec, problem)


def for_lists(spec: FwdSpec, problem: Problem) -> FwdSpec:
    """The same kernel for the lists of a problem's plan, shared or not."""
    if problem.union_lists == "parts":
        return for_parts(spec)
    spec = for_union(spec, problem.union_blocks)
    return for_halves(spec) if problem.union_lists == "halves" else spec


def for_parts(spec: FwdSpec) -> FwdSpec:
    """The same kernel for lists in parts, which fix its tile. Of 64 and 80 keys and 3 to 5 stages these were fastest
    (one H200, 2026-11-23, perf/results/h200/2026-11-23-parts.jsonl)."""
    lists = {"union_blocks": PARTS_BLOCKS, "union_lists": "parts", "kv_loads": "gather"}
    return dataclasses.replace(spec, **lists, tile_n=PARTS_TILE_N, kv_stages=PARTS_STAGES)


def for_halves(spec: FwdSpec) -> FwdSpec:
    """The same kernel of a union for lists in halves, which fix its tile."""
    return dataclasses.replace(spec, union_lists="halves", tile_n=HALVES_TILE_N, kv_stages=HALVES_STAGES)


def for_union(spec: FwdSpec, union_blocks: int) -> FwdSpec:
    """The same kernel with one list for ``union_blocks`` blocks, as far as its tile and registers must change for it.

    tile_n: the next one down of which a thread's keep-bits are a word or half of one.
    kv_loads: keep-bits follow the gather's order of keys.
    others: see UNION_OF_128 and UNION_OF_192.
    """
    if union_blocks == 1:
        return spec
    changes = {"union_blocks": union_blocks, "kv_loads": "gather"}
    if spec.tile_m == 192:
        changes |= WIDE_UNION_REGISTERS
    if spec.softmax == "fixed_ref":
        changes |= UNION_OF_192 if spec.tile_m == 192 else UNION_OF_128
    spec = dataclasses.replace(spec, **changes)
    for tile_n in UNION_TILES_N:
        narrowed = dataclasses.replace(spec, tile_n=tile_n)
        if tile_n <= spec.tile_n and not narrowed.reasons():
            return narrowed
    return spec


def misfits(spec: FwdSpec, problem: Problem) -> list[str]:
    """Why a spec cannot serve the lists of a problem: one sentence each, empty where it can."""
    why = []
    if problem.union_blocks > 1 and spec.tile_m != problem.rows:
        why.append(
            f"tile_m {spec.tile_m} is not the {problem.rows} rows of a union "
            f"({problem.union_blocks} blocks of {problem.slice_m})"
        )
    if problem.grouped and spec.kv_loads == "runs":
        why.append("kv_loads runs reads ascending lists, and the plan's are grouped (Plan.from_mask: grouped=False)")
    if spec.kv_loads == "octets" and not problem.grouped:
        why.append("kv_loads octets reads grouped lists, and the plan's are not (Plan.from_mask: grouped=True)")
    return why


def runners_up(problem: Problem, gpu: Gpu, chosen: FwdSpec) -> list[RunnerUp]:
    """Every preset but the chosen kernel's that could run the problem, best first."""
    ranked = _ranked(problem, files_for(gpu))
    whys = ["what a call without a spec takes", *(why_not for _, why_not in ranked[1:])]
    return [
        RunnerUp(choice.preset_id, choice.spec, why)
        for (choice, _), why in zip(ranked, whys, strict=True)
        if choice.spec != chosen
    ]


def files_for(gpu: Gpu) -> list[tuple[str, PresetFile]]:
    """(source, file) in the order in which they are asked."""
    files = []
    path = settings.config_path()
    if path is not None:
        own = presets.for_gpu(gpu.name, path) if path.is_dir() else presets.load(path)
        if own is None:
            raise PresetError(f"has neither a file for {gpu.name} nor {presets.GENERIC}.yaml", file=str(path))
        files.append(("user", own))
        if own.base is not None:
            return [*files, ("preset", own.base)]
    files.append(("preset", _shipped(gpu.name)))
    return files


def facts_for(gpu: Gpu) -> presets.GpuFacts:
    """What is known about the GPU: the file that names it, with the SMs and the L2 that the device reports."""
    naming = (file for source, file in files_for(gpu) if source == "user" and gpu.name in file.gpu.names)
    file = next(naming, _shipped(gpu.name))
    return dataclasses.replace(file.gpu, names=(gpu.name,), sms=gpu.sms, l2_bytes=gpu.l2_bytes)


@functools.cache
def _shipped(name: str) -> PresetFile:
    return presets.for_gpu(name)


def cost(preset: Preset, file: PresetFile, slice_m: int) -> float:
    """Rows that a query block computes, over the preset's relative speed. Lower is better."""
    return rows_computed(preset.fields["tile_m"], slice_m) / speed(preset, file)


def rows_computed(tile_m: int, slice_m: int) -> int:
    """Rows of all CTAs of one query block, idle ones included."""
    return -(-slice_m // tile_m) * tile_m


def speed(preset: Preset, file: PresetFile) -> float:
    """Packed rate relative to dense attention: measured on this GPU, or assumed from the tile. The exact softmax is
    assumed from the file's kernel of the same tile and head dims with a fixed reference, where that is measured."""
    if preset.measured.relative_to_dense:
        return preset.measured.relative_to_dense
    tile_m, exact = preset.fields["tile_m"], preset.fields["softmax"] == "exact"
    twins = (p for p in file.presets if p.fields["tile_m"] == tile_m and p.when.head_dim == preset.when.head_dim)
    measured = next((p.measured.relative_to_dense for p in twins if p.measured.relative_to_dense), None)
    return (measured or SPEED_OF_TILE_M[tile_m]) * (EXACT_SPEED if exact else 1.0)


def _ranked(problem: Problem, files: list[tuple[str, PresetFile]]) -> list[tuple[Choice, str]]:
    """(choice, why it would not be the first) of every preset that can run the problem, best first."""
    facts = _facts(problem)
    m = problem.rows
    meant, able, last = [], [], []
    for source, file in files:
        taking = [p for p in file.presets if p.takes(**facts)]
        meant += [(source, file, p) for p in taking if p.takes_slice_m(m) and not p.is_fallback]
        rest = [p for p in taking if not p.takes_slice_m(m)]
        able += [(source, file, p) for p in sorted(rest, key=lambda p: cost(p, file, m))]
        last += [("fallback", file, p) for p in taking if p.is_fallback]
    ranked = []
    for source, file, preset in meant + able + last:
        lists = {"nearly_full": problem.nearly_full, "grouped": problem.grouped, "even": problem.even}
        spec = preset.spec(**facts, **lists)
        if problem.union_blocks > 1:
            spec = for_lists(spec, problem)
            if misfits(spec, problem) or spec.reasons():
                continue
        rows = rows_computed(spec.tile_m, m)
        rows_text = f"{rows} rows computed for {m}" if rows != m else f"{m} rows, none idle"
        if source == "fallback":
            why = f"{file.name} has no preset for {problem.dtype_name}, head_dim {problem.head_dim}"
            why_not = "the fallback"
        elif preset.takes_slice_m(m):
            why = f"first preset of {file.name} for {_wanted(problem)} ({rows_text}; {preset.provenance})"
            why_not = f"listed later for the same slice_m ({rows_text})"
        else:
            price = cost(preset, file, m)
            why = f"no preset of {file.name} is for slice_m {m}; this one costs least: {rows_text}, cost {price:.0f}"
            why_not = f"made for other slice_m: {rows_text}, cost {price:.0f}"
        ranked.append((Choice(spec, source, preset.id, why), why_not))
    return ranked


def _facts(problem: Problem) -> dict:
    return {"dtype": problem.dtype_name, "head_dim": problem.head_dim, "slice_n": problem.slice_n}


def _wanted(problem: Problem) -> str:
    union = f", {problem.union_blocks} blocks to a {_kind(problem)}" if problem.union_blocks > 1 else ""
    return f"{problem.dtype_name}, head_dim {problem.head_dim}, slice_m {problem.slice_m}{union}"


def _kind(problem: Problem) -> str:
    return {"bits": "union", "halves": "union in halves", "parts": "list in parts"}[problem.union_lists]


def _explicit(problem: Problem, gpu: Gpu, spec: FwdSpec | str) -> Choice:
    preset_id = None
    if isinstance(spec, str):
        preset_id, spec = spec, for_lists(_by_id(problem, gpu, spec), problem)
    elif not isinstance(spec, FwdSpec):
        raise InputError(f"spec is a {type(spec).__name__}, not a FwdSpec or the id of a preset")
    differing = [
        f"the spec is for {name} {own}, the call has {asked}"
        for name, own, asked in (
            ("dtype", spec.dtype, problem.dtype_name),
            ("head_dim", spec.head_dim, problem.head_dim),
        )
        if own != asked
    ]
    if differing:
        raise InputError(refusal("the spec does not fit the call", [spec.name, problem.describe()], differing))
    lists = {"union_blocks": problem.union_blocks, "union_lists": problem.union_lists}
    spec = dataclasses.replace(spec, slice_n=problem.slice_n, **lists)
    why_not = misfits(spec, problem) + spec.reasons()
    if spec.redo:
        why_not.append("redo is the second pass of a fixed_ref launch, which the launch itself makes")
    if spec.softmax == "fixed_ref":
        why_not += [f"redo pass: {reason}" for reason in spec.redo_spec().reasons()]
    if why_not:
        raise UnsupportedError(refusal("the spec cannot run", [spec.name], why_not, "spec=None takes a preset"))
    return Choice(spec, "explicit", preset_id, "the caller named it")


def _by_id(problem: Problem, gpu: Gpu, preset_id: str) -> FwdSpec:
    files = [file for _, file in files_for(gpu)]
    for file in files:
        if any(p.id == preset_id for p in file.presets):
            preset = file.get(preset_id)
            if not preset.takes(problem.dtype_name, problem.head_dim, problem.slice_n):
                raise InputError(
                    f"preset {preset_id} of {file.name} is not for {problem.dtype_name}, head_dim {problem.head_dim}, "
                    f"slice_n {problem.slice_n}"
                )
            lists = {"nearly_full": problem.nearly_full, "grouped": problem.grouped, "even": problem.even}
            return preset.spec(**_facts(problem), **lists)
    legal = ", ".join(dict.fromkeys(p.id for file in files for p in file.presets))
    names = ", ".join(file.name for file in files)
    raise PresetError(f"no preset {preset_id!r} (legal: {legal})", file=names)
