# SPDX-License-Identifier: Apache-2.0
"""attention() and explain(): what most users call."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import NamedTuple

import torch

from . import checks as _checks
from . import gpu as _gpu
from . import launch, reference, settings
from .errors import InputError, UnsupportedError, describe_tensor, refusal
from .explanation import Explanation
from .kernels.spec import FwdSpec
from .mask import SliceMask
from .plan import Plan
from .plan_choice import OWN, choose
from .problem import Problem
from .select import Choice, select
from .shared import SharedLists
from .unions import rows_for

BACKENDS = ("auto", "cuda", "emulator", "reference")

_PLAN_OF_MASK = "_plan"  # attribute of a mask that holds its plan: it lives and dies with the mask
_BEST_OF_MASK = "_best_plans"  # the same, of the plans that were chosen for calls


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan | SliceMask | SharedLists,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    backend: str = "auto",
    spec: FwdSpec | str | None = None,
    checks: str = "fast",
    logit_bound: float | None = None,
):
    """Attention of every query block over exactly the keys that its list holds.

    Args:
        q: (batch, seqlen_q, heads, head_dim), bfloat16 or float16, head_dim 64, 96, 128 or 256. Any strides with the
            last dimension contiguous and rows on 16 bytes.
        k, v: (batch, seqlen_k, kv_heads, head_dim), heads a multiple of kv_heads.
        plan: the lists. A SliceMask is turned into a plan once and remembered as long as the mask lives; where its
            blocks could share lists (slice_m 16, 32, 48, 64, 96), a kernel runs and no spec is named, into the one that
            the cost model expects to be fastest, as ``best_plan`` does, if the compiler is installed.
        scale: factor on q.k, at least 0; None means head_dim ** -0.5.
        return_lse: also return the logarithm of the sum of exponentials.
        layout: "bshd", or "bhsd" for (batch, heads, seqlen, head_dim) tensors; no copies either way.
        backend: "auto" runs the kernel for CUDA tensors and the reference for CPU tensors. "cuda", "emulator" (the
            compiled kernel on the CPU) and "reference" insist; none falls back to another.
        spec: the kernel, as a FwdSpec or the id of a preset; None takes the GPU's preset, see ``explain``.
        checks: "fast" judges shapes, types and strides; "full" also reads the plan's values back and judges them, a
            synchronisation; "off" judges nothing.
        logit_bound: upper bound of |scale * q.k| in nats, if one is known. A small one saves the second launch of
            softmax "fixed_ref".

    Returns:
        out, shaped and typed like q, contiguous; with ``return_lse`` also lse, float32 (batch, heads, seqlen_q),
        natural logarithm. A query block that keeps no key gives out 0 and lse -inf.

    Raises:
        InputError, PlanError: tensors, arguments and plan do not fit together.
        UnsupportedError: no kernel or no backend does this; the message says what does.
        DeviceError: the backend's device is not there.
        CompileError: the kernel could not be compiled.
    """
    if isinstance(plan, SliceMask):
        plan = _plan_for(plan, q, k, v, layout, backend, spec, checks)
    if torch.compiler.is_compiling():
        from . import ops

        return ops.call(
            q,
            k,
            v,
            plan,
            return_lse=return_lse,
            scale=scale,
            layout=layout,
            backend=backend,
            spec=spec,
            checks=checks,
            logit_bound=logit_bound,
        )
    out, lse = run(q, k, v, plan, scale, layout, backend, spec, checks, logit_bound)
    return (out, lse) if return_lse else out


class _Ready(NamedTuple):
    """What a call's key decides: who runs the kernel, the kernel, and the scale that None stands for."""

    emulated: bool
    launcher: launch.Launcher
    scale: float


_READY_LIMIT = 4096
_ready: dict[tuple, _Ready] = {}


def run(q, k, v, plan, scale, layout, backend, spec, checks, logit_bound):
    """``attention`` without tracing: checks, chooses, launches. Returns (out, lse).

    A call whose static facts have all been judged before goes straight to the launch. What can differ between two such
    calls is judged again: alignment, grad, scale, bound.
    """
    key = ready = None
    if checks != "full":
        try:
            key = (
                *(q.shape, q.stride(), q.dtype, q.device),
                *(k.shape, k.stride(), k.dtype, k.device),
                *(v.shape, v.stride(), v.dtype, v.device),
                *(plan.signature_number, layout, backend, spec, checks, *settings.choosing()),
            )
            ready = _ready.get(key)
        except (AttributeError, TypeError):  # not tensors, not a plan, not a spec: the checks will say so
            key = None
    if ready is None or (checks == "fast" and _checks.call_reasons(q, k, v, scale)):
        problem = _checks.check(q, k, v, plan, scale=scale, layout=layout, level=checks)
        _check_bound(logit_bound)
        where = pick_backend(q, k, v, plan, backend)
        if where == "reference":
            lists = plan.to_mask() if isinstance(plan, SharedLists) else plan
            scale = problem.head_dim**-0.5 if scale is None else scale
            out, lse = reference.attention(q, k, v, lists, scale=scale, return_lse=True, layout=layout)
            return out.to(q.dtype), lse
        ready = _prepare(problem, q.device, spec, where == "emulator")
        if key is not None:
            if len(_ready) >= _READY_LIMIT:
                _ready.clear()
            _ready[key] = ready
    else:
        _check_bound(logit_bound)
    on_device = launch.on_emulator if ready.emulated else launch.on_cuda
    return on_device(ready.launcher, q, k, v, plan, ready.scale if scale is None else scale, logit_bound)


def _prepare(problem: Problem, device: torch.device, spec, emulated: bool) -> _Ready:
    gpu = _gpu.assumed() if emulated else _gpu.current(device)
    launcher = _launcher(problem, gpu, spec, settings.config_text(), emulated)
    return _Ready(emulated, launcher, problem.head_dim**-0.5)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan | SliceMask | SharedLists,
    *,
    layout: str = "bshd",
    spec: FwdSpec | str | None = None,
    scale: float | None = None,
    gpu: _gpu.Gpu | None = None,
) -> Explanation:
    """Which kernel ``attention`` would run on these inputs, and why. Compiles and launches nothing.

    Args:
        q, k, v, plan, layout, spec, scale: as for ``attention``. Reads the plan's density back from the device. Of a
            SliceMask whose blocks could share lists, also what every kind of plan is expected to take.
        gpu: by default the GPU of the tensors, or the one that FGATTN_GPU names; a generic Hopper on a CPU.

    Returns:
        An Explanation: ``print`` it, or take ``as_dict()``. A call that would be refused is explained by its reasons.

    Raises:
        InputError, PlanError: the inputs are not rank-4 tensors and a plan, or the spec does not fit them.
        UnsupportedError: no kernel runs on the GPU.
    """
    plans = None
    if gpu is None and isinstance(q, torch.Tensor):
        gpu = _gpu.current(q.device) if q.device.type == "cuda" else _gpu.assumed()
    if isinstance(plan, SliceMask):
        mask = plan
        problem = _checks.check(q, k, v, mask, layout=layout, level="off")
        if spec is None and rows_for(mask.slice_m) and not _checks.reasons(problem, q, k, v, mask, scale):
            plans = choose(mask, problem, gpu, coarser=True)
        plan = _plan_of(mask) if plans is None else plans.plan(mask)
    problem = _checks.check(q, k, v, plan, layout=layout, level="off")
    refused = _checks.reasons(problem, q, k, v, plan, scale)
    choice = None if refused else select(problem, gpu, spec)
    return Explanation.of(problem, gpu, choice, plan.density, refused, plan, plans)


def pick_backend(q, k, v, plan, backend: str) -> str:
    """ "cuda", "emulator" or "reference" for what the caller asked for.

    Raises:
        InputError: no such backend, or tensors on the wrong device for it.
        DeviceError, UnsupportedError: this machine's GPU cannot run the kernel.
    """
    kind = q.device.type
    if backend == "auto":
        if kind == "cpu":
            return "reference"
        backend = "cuda"
    elif backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if backend == "emulator" and kind != "cpu":
        raise InputError(
            refusal("backend emulator runs on the CPU", _asked(q, k, v), [f"q is on {q.device}"], "q.cpu() and so on")
        )
    if backend == "cuda":
        why = _why_no_kernel(q.device)
        if why:
            error = InputError if kind == "cpu" else UnsupportedError
            raise error(
                refusal(
                    "the kernel cannot run on these tensors' device",
                    _asked(q, k, v),
                    why,
                    'backend="reference" runs on any device, backend="emulator" runs the kernel on CPU tensors',
                )
            )
    return backend


def _asked(q, k, v) -> list[str]:
    return [describe_tensor(name, x) for name, x in (("q", q), ("k", k), ("v", v))]


def _why_no_kernel(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"the tensors are on {device}, the kernel reads the memory of an NVIDIA GPU"]
    return _gpu.from_cuda(device).reasons()


def _check_bound(logit_bound) -> None:
    if logit_bound is None:
        return
    if isinstance(logit_bound, bool) or not isinstance(logit_bound, (int, float)):
        raise InputError(f"logit_bound is a {type(logit_bound).__name__}, not a Python number")
    if not (math.isfinite(logit_bound) and logit_bound >= 0):
        raise InputError(f"logit_bound {logit_bound} is not a finite number of at least 0 (nats)")


def _plan_for(mask: SliceMask, q, k, v, layout: str, backend: str, spec, checks: str) -> Plan | SharedLists:
    """The mask's plan for a call: the best where a kernel runs and blocks could share lists, else lists of its own.

    Without the compiler, too, lists of its own: kernels for unions need not be among those that were brought along.
    """
    on_kernel = backend == "emulator" or (isinstance(q, torch.Tensor) and q.is_cuda and backend != "reference")
    could_share = spec is None and on_kernel and rows_for(mask.slice_m)
    if not could_share or torch.compiler.is_compiling() or not _compiler_installed():
        return _plan_of(mask)
    problem = _checks.check(q, k, v, mask, layout=layout, level=checks)
    gpu = _gpu.assumed() if backend == "emulator" else _gpu.current(q.device)
    best = vars(mask).setdefault(_BEST_OF_MASK, {})
    key = (problem.batch, problem.heads, problem.head_dim, problem.dtype, gpu, *settings.choosing())
    if key not in best:
        plans = choose(mask, problem, gpu)
        best[key] = _plan_of(mask) if plans.chosen == OWN else plans.plan(mask)
    return best[key]


@functools.cache
def _compiler_installed() -> bool:
    return importlib.util.find_spec("cutlass") is not None


def _plan_of(mask: SliceMask) -> Plan:
    """The lists of the mask's blocks, made on first use and kept as long as the mask."""
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "a SliceMask inside torch.compile: making its plan reads a number back from the device\n"
            "  nearest thing that works: plan = Plan.from_mask(mask) outside, and pass the plan"
        )
    plan = vars(mask).get(_PLAN_OF_MASK)
    if plan is None:
        plan = vars(mask)[_PLAN_OF_MASK] = Plan.from_mask(mask)
    return plan


@functools.lru_cache(maxsize=4096)
def _launcher(problem: Problem, gpu: _gpu.Gpu, spec, config: str | None, emulated: bool = False) -> launch.Launcher:
    choice: Choice = select(problem, gpu, spec)
    return launch.prepare(problem, choice.spec, emulated)


def forget_choices() -> None:
    """Ask again which kernel a problem takes: after autotune, or a change of a preset file."""
    _launcher.cache_clear()
    _ready.clear()
