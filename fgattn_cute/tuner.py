# SPDX-License-Identifier: Apache-2.0
"""autotune(): which kernel is fastest for these tensors and this plan, found by measuring.

Candidates come from the presets' ``tune`` ranges. Those that cannot run are dropped with their reasons, the cost model
ranks the rest with the plan's own lists, the best are compiled side by side, each is compared with the fallback spec's
results, and only then timed. The winner is filed under a key (``tuned.py``), where ``select`` finds it.

Nothing tunes by itself: only this function and ``fgattn tune`` do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
import time
from collections.abc import Callable

import torch

from . import cache, launch, roofline, select, tuned, workers
from . import checks as _checks
from . import gpu as _gpu
from .errors import FgAttnError, UnsupportedError
from .gpu import Gpu
from .kernels.spec import FwdSpec
from .mask import SliceMask
from .plan import Plan
from .problem import Problem
from .timing import CudaTimer, Timer

TOP = 12
ROUNDS = 20
TIE = 0.01  # a candidate must be faster by more than this to replace the preset's own kernel
MODEL_TIE = 0.1  # the same where only the model has spoken: its error is 7 % (docs/performance.md)
# Two correct kernels of 16-bit inputs differ by roundings of P and of the result: 2.3e-3 of the norm each.
MAX_RELATIVE_ERROR = 1e-2
MAX_LSE_ERROR = 2e-3


@dataclasses.dataclass
class Candidate:
    """One kernel on its way through the tuner.

    preset_id: whose ``tune`` ranges it comes from. predicted_ms: the cost model's. rejected: why it is out, or None.
    timing: milliseconds as ``timing.Samples.as_dict`` gives them, or None where it was not timed.
    """

    spec: FwdSpec
    preset_id: str
    predicted_ms: float | None = None
    binding: str | None = None
    rejected: str | None = None
    timing: dict | None = None

    def as_dict(self) -> dict:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "kernel": self.spec.name, "spec": dataclasses.asdict(self.spec)}


@dataclasses.dataclass
class Tuning:
    """What autotune found.

    measured: whether the order comes from a clock; False means from the cost model alone.
    winner: fastest correct candidate. baseline: what a call took before.
    candidates: all, the best first, then those that were dropped.
    path: the record's file, None where none was written.
    """

    problem: Problem
    gpu: Gpu
    measured: bool
    winner: Candidate
    baseline: Candidate
    candidates: list[Candidate]
    record: dict
    path: str | None

    def as_dict(self) -> dict:
        """Plain JSON values: the record, with where it lies."""
        return {**self.record, "path": self.path}


def autotune(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan | SliceMask,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    top: int = TOP,
    rounds: int = ROUNDS,
    gpu: Gpu | None = None,
    timer: Timer | None = None,
    processes: int | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Tuning:
    """Measure which kernel is fastest for these inputs, and remember it for calls like this one.

    Args:
        q, k, v, plan, layout, scale: as for ``attention``.
        top: candidates that are compiled and timed, the best of the cost model.
        rounds: measurements of each.
        gpu: whose presets are asked; by default the tensors' GPU, or the generic Hopper for CPU tensors.
        timer: by default CUDA events. CPU tensors are not timed: without a timer the cost model decides and no record
            is written. With one, candidates run on the emulator.
        processes: compiling processes, see ``workers.compile_all``.
        on_step: told what happens next.

    Returns:
        A Tuning. ``measured`` says whether the order was measured.

    Raises:
        InputError, PlanError, UnsupportedError: as ``attention``; also inside graph capture or tracing.
        CompileError: not even the fallback spec compiles.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise UnsupportedError("autotune inside torch.compile or CUDA graph capture: call it once before")
    if isinstance(plan, SliceMask):
        plan = Plan.from_mask(plan)
    problem = _checks.check(q, k, v, plan, scale=scale, layout=layout)
    on_cuda = q.device.type == "cuda"
    gpu = gpu or (_gpu.current(q.device) if on_cuda else _gpu.assumed())
    chosen = select.select(problem, gpu)
    found = candidates(problem, gpu)
    baseline = _baseline(found, chosen)
    work = roofline.Workload.of(problem, plan)
    ranked = rank(found, gpu, work)
    if on_cuda and timer is None:
        timer = CudaTimer(q.device.index)
    if timer is not None:
        fallback = select.fallback(problem, gpu)
        finalists = [baseline, *(c for c in ranked[:top] if c is not baseline)]
        on_step(f"compiling {len(finalists)} kernels")
        _compile(finalists, fallback, processes)
        scale = problem.head_dim**-0.5 if scale is None else scale
        call = _runner(problem, q, k, v, plan, scale, emulated=not on_cuda)
        on_step("comparing results")
        reject_wrong(finalists, call, call(fallback))
        right = [c for c in finalists if c.rejected is None]
        if not right:
            raise UnsupportedError("no candidate is right: " + "; ".join(f"{c.spec.name}: {c.rejected}" for c in found))
        on_step(f"timing {len(right)} kernels")
        for candidate, samples in zip(
            right, timer([functools.partial(call, c.spec) for c in right], rounds), strict=True
        ):
            candidate.timing = samples.as_dict()
        right.sort(key=lambda c: c.timing["median_ms"])
        winner = right[0]
        if baseline.timing and winner.timing["median_ms"] > (1 - TIE) * baseline.timing["median_ms"]:
            winner = baseline
    else:
        return by_model(problem, gpu, work, plan.density)
    ordered = sorted(found, key=_order)
    record = _record(problem, gpu, plan.density, True, winner, baseline, ordered)
    path = tuned.store(record)
    if path is not None:
        from . import api

        api.forget_choices()
    return Tuning(problem, gpu, True, winner, baseline, ordered, record, str(path) if path else None)


def by_model(problem: Problem, gpu: Gpu, work: roofline.Workload, density: float) -> Tuning:
    """The cost model's opinion alone: needs no tensors and no GPU, compiles nothing, records nothing."""
    found = candidates(problem, gpu)
    baseline = _baseline(found, select.select(problem, gpu))
    winner = rank(found, gpu, work)[0]
    if winner.predicted_ms > (1 - MODEL_TIE) * baseline.predicted_ms:
        winner = baseline
    ordered = sorted(found, key=_order)
    record = _record(problem, gpu, density, False, winner, baseline, ordered)
    return Tuning(problem, gpu, False, winner, baseline, ordered, record, None)


def candidates(problem: Problem, gpu: Gpu) -> list[Candidate]:
    """Every kernel in the tune ranges of the presets that take the problem's dtype and head dim, once.

    Those that cannot run carry their reasons. The order is that of the files.
    """
    found: dict[FwdSpec, Candidate] = {}
    facts = {"dtype": problem.dtype_name, "head_dim": problem.head_dim, "slice_n": problem.slice_n}
    for _, file in select.files_for(gpu):
        for preset in file.presets:
            if not preset.takes(**facts):
                continue
            own = preset.spec(**facts, grouped=problem.grouped, even=problem.even)
            # Segments that boxes bring, and grouped lists, have no choice of loads.
            fixed = own.kv_loads == "boxes" or problem.grouped
            tried = {name: values for name, values in preset.tune.items() if not (fixed and name == "kv_loads")}
            if own.scheduler == "zigzag" and "scheduler" in tried:
                tried["scheduler"] = (*tried["scheduler"], "zigzag")
            ranges = [[(name, value) for value in values] for name, values in tried.items()]
            for choice in itertools.chain([()], itertools.product(*ranges)):
                changed = dict(choice)
                if changed.get("ctas_per_sm", own.ctas_per_sm) != own.ctas_per_sm or "tile_m" in changed:
                    changed |= {"consumer_registers": None, "producer_registers": None}
                spec = select.for_lists(dataclasses.replace(own, **changed), problem)
                if spec not in found:
                    found[spec] = Candidate(spec, preset.id, rejected=_cannot_run(spec, problem))
    return list(found.values())


def rank(found: list[Candidate], gpu: Gpu, work: roofline.Workload) -> list[Candidate]:
    """The candidates that can run, by the cost model's time for the workload."""
    facts = select.facts_for(gpu)
    for candidate in found:
        if candidate.rejected is None:
            priced = roofline.predict(candidate.spec, facts, work)
            candidate.predicted_ms, candidate.binding = round(1e3 * priced.seconds, 5), priced.binding
    return sorted((c for c in found if c.rejected is None), key=lambda c: c.predicted_ms)


def reject_wrong(found: list[Candidate], call, expected) -> None:
    """Run each candidate and reject those that fail or whose results are not the fallback spec's.

    Args:
        call: spec -> (out, lse).
        expected: (out, lse) of the fallback spec.
    """
    for candidate in found:
        if candidate.rejected is None:
            try:
                candidate.rejected = _difference(call(candidate.spec), expected)
            except (FgAttnError, RuntimeError) as why:
                candidate.rejected = f"does not run: {type(why).__name__}: {str(why).splitlines()[0]}"


def _difference(got, expected) -> str | None:
    (out, lse), (out_expected, lse_expected) = got, expected
    error = float((out.float() - out_expected.float()).norm() / out_expected.float().norm().clamp_min(1e-30))
    empty = lse_expected == -torch.inf
    if not torch.equal(lse == -torch.inf, empty):
        return "wrong: other rows are empty than in the fallback's result"
    lse_error = float((lse - lse_expected)[~empty].abs().max()) if not bool(empty.all()) else 0.0
    if not (error <= MAX_RELATIVE_ERROR and lse_error <= MAX_LSE_ERROR):  # NaN fails too
        return f"wrong: differs from the fallback by {error:.2e} in out and {lse_error:.2e} in lse"
    return None


def _cannot_run(spec: FwdSpec, problem: Problem) -> str | None:
    why_not = select.misfits(spec, problem) + spec.reasons()
    if not why_not and spec.softmax == "fixed_ref":
        why_not = [f"redo pass: {reason}" for reason in spec.redo_spec().reasons()]
    return "cannot run: " + "; ".join(why_not) if why_not else None


def _baseline(found: list[Candidate], chosen: select.Choice) -> Candidate:
    for candidate in found:
        if candidate.spec == chosen.spec:
            return candidate
    found.append(Candidate(chosen.spec, chosen.preset_id or chosen.source))
    return found[-1]


def _compile(finalists: list[Candidate], fallback: FwdSpec, processes: int | None) -> None:
    specs = [c.spec for c in finalists] + [fallback]
    redo = [spec.redo_spec() for spec in specs if spec.softmax == "fixed_ref"]
    failed = {o.spec: o.error for o in workers.compile_all(specs + redo, processes=processes) if o.error}
    for candidate in finalists:
        error = failed.get(candidate.spec) or failed.get(candidate.spec.redo_spec())
        if error:
            candidate.rejected = f"does not compile: {error}"


def _runner(problem: Problem, q, k, v, plan, scale: float, emulated: bool):
    run = launch.on_emulator if emulated else launch.on_cuda
    return lambda spec: run(launch.prepare(problem, spec, emulated), q, k, v, plan, scale, None)


def _order(candidate: Candidate):
    """Timed ones first, then those that the model has priced, then the rest."""
    if candidate.timing is not None:
        return (0, candidate.timing["median_ms"])
    if candidate.rejected is None:
        return (1, candidate.predicted_ms)
    return (2, 0.0)


def _record(problem, gpu, density, measured, winner, baseline, ordered) -> dict:
    def said(candidate):
        data = candidate.as_dict()
        if candidate.timing is not None:
            flops = problem.effective_flops() * density
            data["packed_tflops"] = round(flops / candidate.timing["median_ms"] / 1e9, 1)
        return data

    return {
        "format": tuned.FORMAT,
        "key": tuned.key_of(problem, gpu),
        "measured": measured,
        "problem": problem.describe(),
        "density": density,
        "gpu": {**dataclasses.asdict(gpu), "cc": list(gpu.cc)},
        "winner": said(winner),
        "baseline": said(baseline),
        "candidates": [said(candidate) for candidate in ordered],
        "environment": {"torch": torch.__version__, "platform": platform.platform(terse=True), **cache.versions()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
