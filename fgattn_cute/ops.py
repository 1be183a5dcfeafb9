# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.fgattn_cute``: the call as torch sees it inside ``torch.compile``.

Two functional operators of fixed arity, ``attention`` (-> out) and ``attention_lse`` (-> out, lse). A plan crosses as
its tensors and numbers, a spec as a string. Eager calls do not pass through here: the dispatcher would cost more than
the launch. Registered on import with ``define`` and ``impl``, which is half the cost of ``custom_op``; no DSL import.
"""

from __future__ import annotations

import ast
import dataclasses
import functools

import torch

from .errors import UnsupportedError
from .kernels.spec import FwdSpec
from .plan import Plan

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor ids, Tensor offset, Tensor keys, Tensor work, SymInt slice_m, "
    "SymInt slice_n, SymInt seqlen_q, SymInt seqlen_k, bool grouped, bool even, float? scale, str layout, "
    "str backend, str spec, str checks, float? logit_bound"
)
_SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(FwdSpec))

_library = torch.library.Library("fgattn_cute", "DEF")
_library.define(f"attention({_ARGUMENTS}) -> Tensor")
_library.define(f"attention_lse({_ARGUMENTS}) -> (Tensor, Tensor)")


def call(q, k, v, plan: Plan, *, return_lse, scale, layout, backend, spec, checks, logit_bound):
    """The traced form of ``fgattn_cute.attention``."""
    if not isinstance(plan, Plan):
        raise UnsupportedError(f"a {type(plan).__name__} inside torch.compile: only a Plan can be traced")
    op = torch.ops.fgattn_cute.attention_lse if return_lse else torch.ops.fgattn_cute.attention
    batch, heads = q.shape[0], q.shape[2 if layout == "bshd" else 1]
    lists = (plan.ids, plan.offset, plan.keys, plan.work(batch, heads))
    geometry = (plan.slice_m, plan.slice_n, plan.seqlen_q, plan.seqlen_k, plan.grouped, plan.even)
    return op(q, k, v, *lists, *geometry, scale, layout, backend, encode_spec(spec), checks, logit_bound)


def encode_spec(spec: FwdSpec | str | None) -> str:
    """A spec as a string: "" for None, a preset id as it is, a dict display for a FwdSpec. Dynamo can trace this."""
    if spec is None or isinstance(spec, str):
        return spec or ""
    return "{" + ", ".join([f"'{name}': {getattr(spec, name)!r}" for name in _SPEC_FIELDS]) + "}"


@functools.lru_cache(maxsize=256)
def decode_spec(text: str) -> FwdSpec | str | None:
    """The inverse of ``encode_spec``."""
    return FwdSpec(**ast.literal_eval(text)) if text.startswith("{") else text or None


def _plan(ids, offset, keys, work, slice_m, slice_n, seqlen_q, seqlen_k, grouped, even, batch, heads) -> Plan:
    plan = Plan(ids, offset, keys, slice_m, slice_n, seqlen_q, seqlen_k, grouped=grouped, even=even)
    plan._work[batch, heads] = work  # made when the graph was traced
    return plan


def _attention_lse(q, k, v, ids, offset, keys, work, m, n, sq, sk, grouped, even, scale, layout, backend, spec, *rest):
    from .api import run

    checks, bound = rest
    batch, heads = q.shape[0], q.shape[2 if layout == "bshd" else 1]
    plan = _plan(ids, offset, keys, work, m, n, sq, sk, grouped, even, batch, heads)
    return run(q, k, v, plan, scale, layout, backend, decode_spec(spec), checks, bound)


def _attention(*args):
    return _attention_lse(*args)[0]


def _fake_lse(q, k, v, ids, offset, keys, work, m, n, sq, sk, grouped, even, scale, layout, *rest):
    batch, heads = q.shape[0], q.shape[2 if layout == "bshd" else 1]
    seqlen_q = q.shape[1 if layout == "bshd" else 2]
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _fake(q, *args):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _no_backward(ctx, *grads):
    raise UnsupportedError(
        "fgattn_cute is for inference: it has no backward pass\n"
        "  nearest thing that works: call it under torch.no_grad(), or with .detach() tensors"
    )


for _name, _body, _meta in (("attention", _attention, _fake), ("attention_lse", _attention_lse, _fake_lse)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _body, _key)
    torch.library.register_fake(f"fgattn_cute::{_name}", _meta, lib=_library)
    torch.library.register_autograd(f"fgattn_cute::{_name}", _no_backward, lib=_library)
