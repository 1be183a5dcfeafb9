# SPDX-License-Identifier: Apache-2.0
"""What stands against a call: every reason at once, before anything is launched.

Levels: "off" reads the facts and judges nothing; "fast" judges shapes, types, strides and scale on the host (a few
microseconds, remembered per signature); "full" also reads the plan's values back from the device, a synchronisation.
"""

from __future__ import annotations

import math

import torch

from fgattn_cute.errors import FgAttnError, InputError, PlanError, UnsupportedError, describe_tensor, refusal
from fgattn_cute.kernels.spec import HEAD_DIMS
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import MAX_WORK_BATCH, MAX_WORK_HEADS, Plan
from fgattn_cute.problem import LAYOUTS, Problem
from fgattn_cute.shared import SharedLists

LEVELS = ("off", "fast", "full")
DTYPES = (torch.bfloat16, torch.float16)
SLICE_M_STEP = 16
ROW_ALIGN_BYTES = 16
ROW_ALIGN_ELEMS = 8  # of 16-bit elements
ROW_STRIDE_LIMIT = 2**30 - ROW_ALIGN_ELEMS  # elements from key to key: the kernel counts their bytes in int32
INDEX_LIMIT = 2**31 - 1  # tokens and work items are counted in int32

_SOUND_LIMIT = 4096
_sound: dict[tuple, Problem] = {}


class Reason(str):
    """One sentence against a call, and the class of error it stands for."""

    error: type[FgAttnError]

    def __new__(cls, sentence: str, error: type[FgAttnError] = InputError):
        self = super().__new__(cls, sentence)
        self.error = error
        return self


def check(q, k, v, plan, *, scale=None, layout: str = "bshd", level: str = "fast") -> Problem:
    """Reads a call's facts and raises if anything stands against it.

    Args:
        q, k, v: as for ``attention``.
        plan: a Plan or a SliceMask.
        scale: a number or None.
        layout: "bshd" or "bhsd".
        level: "off", "fast" or "full".

    Raises:
        InputError: tensors or arguments do not fit together.
        PlanError: the plan was made for another call, or (level "full") its values are unsound.
        UnsupportedError: every reason is something that no kernel covers.
    """
    if layout not in LAYOUTS or level not in LEVELS:
        name, value, legal = ("layout", layout, LAYOUTS) if layout not in LAYOUTS else ("checks", level, LEVELS)
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, legal))}")
    found = _rank_reasons(q, k, v, plan)
    if found:
        raise _error(found, q, k, v, plan, None)
    if level == "off":
        return Problem.of(q, k, v, plan, layout)
    signature = (
        *(fact for x in (q, k, v) for fact in (x.shape, x.stride(), x.dtype, x.device)),
        plan.signature,
        layout,
    )
    problem = _sound.get(signature)
    if problem is None:
        problem = Problem.of(q, k, v, plan, layout)
        found = _static_reasons(problem, q, k, v, plan)
        if not found:
            if len(_sound) >= _SOUND_LIMIT:
                _sound.clear()
            _sound[signature] = problem
    found = found + call_reasons(q, k, v, scale)
    if level == "full" and not found:
        found = _value_reasons(plan)
    if found:
        raise _error(found, q, k, v, plan, problem)
    return problem


def reasons(problem: Problem, q, k, v, plan, scale=None, level: str = "fast") -> list[str]:
    """Every reason why the call cannot run, without raising; empty when it can. For ``explain``."""
    if level == "off":
        return []
    found = _static_reasons(problem, q, k, v, plan) + call_reasons(q, k, v, scale)
    return found + _value_reasons(plan) if level == "full" and not found else found


def _rank_reasons(q, k, v, plan) -> list[Reason]:
    """What has to hold before any other fact can be read."""
    found = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            found.append(Reason(f"{name} is a {type(x).__name__}, not a torch tensor"))
        elif x.ndim != 4:
            found.append(Reason(f"{name} has rank {x.ndim}, not 4: (batch, seqlen, heads, head_dim)"))
    if not isinstance(plan, (Plan, SliceMask, SharedLists)):
        hint = " (make it with SliceMask.from_dense)" if isinstance(plan, torch.Tensor) else ""
        found.append(Reason(f"plan is a {type(plan).__name__}, not a Plan or SliceMask{hint}", PlanError))
    if found:
        found += _type_reasons([(n, x) for n, x in (("q", q), ("k", k), ("v", v)) if isinstance(x, torch.Tensor)])
    return found


def _type_reasons(tensors) -> list[Reason]:
    found = []
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in tensors}
    if len(set(dtypes.values())) > 1:
        mixed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        found.append(Reason(f"mixed dtypes: {mixed} (convert them to one, bfloat16 or float16)"))
    for dtype in dict.fromkeys(x.dtype for _, x in tensors if x.dtype not in DTYPES):
        short = str(dtype).removeprefix("torch.")
        found.append(Reason(f"dtype {short} is not one of bfloat16, float16 (call .bfloat16())", UnsupportedError))
    return found


def _static_reasons(p: Problem, q, k, v, plan) -> list[Reason]:
    """Reasons that depend on shapes, strides, types, devices and the plan's geometry only."""
    tensors = (("q", q), ("k", k), ("v", v))
    found = _type_reasons(tensors)

    def need(ok: bool, sentence: str, error: type[FgAttnError] = InputError) -> None:
        if not ok:
            found.append(Reason(sentence, error))

    devices = {name: str(x.device) for name, x in (*tensors, ("plan", plan))}
    need(
        len(set(devices.values())) == 1,
        f"devices differ: {', '.join(f'{name} on {device}' for name, device in devices.items())} (move them to one)",
    )
    for name, x in tensors:
        need(0 not in x.shape, f"{name} {tuple(x.shape)} has an empty dimension: every size is at least 1")
    if p.head_dim not in HEAD_DIMS:
        wider = next((d for d in HEAD_DIMS if d > p.head_dim), None)
        fix = f" (pad q, k and v to {wider} and pass scale={p.head_dim}**-0.5)" if wider and p.head_dim else ""
        legal = ", ".join(map(str, HEAD_DIMS))
        need(False, f"head_dim {p.head_dim} is not one of {legal}{fix}", UnsupportedError)
    need(k.shape == v.shape, f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in shape")
    need(k.shape[3] == p.head_dim, f"head_dim differs: q {p.head_dim}, k {k.shape[3]}")
    need(k.shape[0] == p.batch, f"batch differs: q {p.batch}, k {k.shape[0]}")
    need(
        p.kv_heads > 0 and p.heads % p.kv_heads == 0,
        f"{p.heads} query heads are not a multiple of {p.kv_heads} key/value heads",
    )
    need(p.heads <= MAX_WORK_HEADS, f"{p.heads} heads exceed {MAX_WORK_HEADS}", UnsupportedError)
    need(p.batch <= MAX_WORK_BATCH, f"batch {p.batch} exceeds {MAX_WORK_BATCH} (split it)", UnsupportedError)
    items = p.batch * p.heads * -(-p.seqlen_q // SLICE_M_STEP)
    need(
        max(items, p.seqlen_k) <= INDEX_LIMIT,
        f"seqlen {p.seqlen_q} x {p.seqlen_k} exceeds what int32 counts",
        UnsupportedError,
    )
    found += _stride_reasons(p)
    found += _plan_reasons(p, plan)
    return found


def _stride_reasons(p: Problem) -> list[Reason]:
    found = []
    sizes_q = (p.batch, p.seqlen_q, p.heads, p.head_dim)
    sizes_k = (p.batch, p.seqlen_k, p.kv_heads, p.head_dim)
    order = (0, 1, 2, 3) if p.layout == "bshd" else (0, 2, 1, 3)  # where a stride stands in the caller's layout
    for name, sizes, strides in (
        ("q", sizes_q, p.q_strides),
        ("k", sizes_k, p.k_strides),
        ("v", sizes_k, p.v_strides),
    ):
        if sizes[3] > 1 and strides[3] != 1:
            found.append(
                Reason(f"{name}.stride(-1) is {strides[3]}: the last dimension must be contiguous (call .contiguous())")
            )
        for dim, size, stride in zip(order[:3], sizes[:3], strides[:3], strict=True):
            if size > 1 and stride % ROW_ALIGN_ELEMS:
                found.append(
                    Reason(
                        f"{name}.stride({dim}) = {stride} elements is not a multiple of {ROW_ALIGN_ELEMS}: rows must "
                        f"start on {ROW_ALIGN_BYTES} bytes (call .contiguous())"
                    )
                )
        if name != "q" and sizes[1] > 1 and strides[1] > ROW_STRIDE_LIMIT:
            found.append(
                Reason(
                    f"{name}.stride({order[1]}) = {strides[1]} elements is more than {ROW_STRIDE_LIMIT} "
                    "(call .contiguous())",
                    UnsupportedError,
                )
            )
    return found


def _plan_reasons(p: Problem, plan) -> list[Reason]:
    found = []
    for name, asked, own in (("seqlen_q", p.seqlen_q, plan.seqlen_q), ("seqlen_k", p.seqlen_k, plan.seqlen_k)):
        if asked != own:
            swap = " (layout may be wrong: see the layout argument)" if own == p.heads or asked == p.heads else ""
            found.append(Reason(f"the plan was made for {name} {own}, the call has {asked}{swap}", PlanError))
    for name, asked, own in (("batch", p.batch, plan.batch), ("heads", p.heads, plan.heads)):
        if own not in (1, asked):
            found.append(
                Reason(f"the plan holds lists for {name} {own}, the call has {asked} (1 means shared)", PlanError)
            )
    if plan.slice_m % SLICE_M_STEP:
        found.append(
            Reason(
                f"slice_m {plan.slice_m} is not a multiple of {SLICE_M_STEP} (coarsen the mask to one)",
                UnsupportedError,
            )
        )
    return found


def call_reasons(q, k, v, scale) -> list[Reason]:
    """Reasons that can change from call to call with equal signatures."""
    found = []
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ROW_ALIGN_BYTES:
        names = ", ".join(n for n, x in (("q", q), ("k", k), ("v", v)) if x.data_ptr() % ROW_ALIGN_BYTES)
        found.append(Reason(f"{names} does not start on {ROW_ALIGN_BYTES} bytes (call .clone())"))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        names = ", ".join(n for n, x in (("q", q), ("k", k), ("v", v)) if x.requires_grad)
        found.append(
            Reason(
                f"{names} requires grad, and fgattn_cute is for inference: it has no backward pass "
                "(call it under torch.no_grad() or pass .detach() tensors)",
                UnsupportedError,
            )
        )
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            found.append(Reason(f"scale is a {type(scale).__name__}, not a Python number"))
        elif not math.isfinite(scale):
            found.append(Reason(f"scale {scale} is not finite"))
        elif scale < 0:
            found.append(Reason(f"scale {scale} is negative (negate q and pass {-scale})"))
    return found


def _value_reasons(plan) -> list[Reason]:
    return [] if isinstance(plan, SliceMask) else [Reason(sentence, PlanError) for sentence in plan.validate()]


def _error(found: list[Reason], q, k, v, plan, problem: Problem | None) -> FgAttnError:
    """The error to raise: the class that all reasons share, InputError where they differ."""
    kinds = {reason.error for reason in found}
    kind = kinds.pop() if len(kinds) == 1 else InputError
    asked = [describe_tensor(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    asked.append(repr(plan) if isinstance(plan, (Plan, SliceMask, SharedLists)) else f"plan {type(plan).__name__}")
    headline = "fgattn_cute attention cannot run these inputs"
    return kind(refusal(headline, asked, found, _nearest(q, problem, plan)))


def _nearest(q, problem: Problem | None, plan) -> str:
    """A call close to the one made that would run."""
    if problem is None:
        return (
            "q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim), bfloat16, and a Plan"
        )
    p = problem
    dim = next((d for d in HEAD_DIMS if d >= p.head_dim), HEAD_DIMS[-1])
    dtype = p.dtype if p.dtype in DTYPES else torch.bfloat16
    kv_heads = p.kv_heads if p.kv_heads and p.heads % p.kv_heads == 0 else p.heads
    batch, heads = max(1, p.batch), max(1, p.heads)

    def shape(seqlen: int, count: int) -> str:
        sizes = (batch, seqlen, count, dim) if p.layout == "bshd" else (batch, count, seqlen, dim)
        return str(sizes)

    return (
        f"q {shape(plan.seqlen_q, heads)}, k and v {shape(plan.seqlen_k, max(1, kv_heads))}, "
        f"{str(dtype).removeprefix('torch.')}, contiguous, on {plan.device}, without grad"
    )
