# SPDX-License-Identifier: Apache-2.0
"""One shape against torch's dense attention, for `fgattn bench`. The full harness with every competitor is perf/."""

from __future__ import annotations

import dataclasses

import torch

from . import api, roofline, select
from .gpu import Gpu
from .plan import Plan
from .problem import Problem
from .timing import CudaTimer, Timer

MAX_RELATIVE_ERROR = 2e-2


@dataclasses.dataclass(frozen=True)
class Result:
    """measured: False means that every figure is the cost model's. Times in milliseconds."""

    measured: bool
    gpu: str
    problem: str
    kernel: str
    source: str
    density: float
    milliseconds: float
    packed_tflops: float
    effective_tflops: float
    dense: str
    dense_milliseconds: float
    speed_up: float
    spread: str = ""


def measure(q, k, v, plan: Plan, *, rounds: int, timer: Timer | None = None, gpu: Gpu | None = None) -> Result:
    """Times ``attention`` and scaled_dot_product_attention against each other, after checking a full list's result.

    Raises:
        AssertionError: attention with every key listed is not dense attention.
    """
    explained = api.explain(q, k, v, plan, gpu=gpu)
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    whole = torch.full_like(plan.keys, plan.seqlen_k)
    segments = -(-plan.seqlen_k // plan.slice_n)
    ids = torch.arange(segments, dtype=torch.int32, device=q.device).expand(*whole.shape, segments)
    everything = Plan.from_lists(ids, torch.full_like(whole, segments), **plan.geometry)
    out, expected = api.attention(q, k, v, everything), dense().transpose(1, 2)
    error = float((out.float() - expected.float()).norm() / expected.float().norm())
    assert error <= MAX_RELATIVE_ERROR, f"attention over all keys differs from dense attention by {error:.2e}"
    del out, expected, everything, ids
    timer = timer or CudaTimer(q.device.index)
    ours, theirs = timer([lambda: api.attention(q, k, v, plan), dense], rounds)
    problem, density = explained.problem, explained.density
    flops = problem.effective_flops() / ours.median / 1e12
    return Result(
        measured=True,
        gpu=str(explained.gpu),
        problem=problem.describe(),
        kernel=explained.choice.spec.name,
        source=explained.choice.source,
        density=density,
        milliseconds=1e3 * ours.median,
        packed_tflops=flops * density,
        effective_tflops=flops,
        dense="torch scaled_dot_product_attention",
        dense_milliseconds=1e3 * theirs.median,
        speed_up=theirs.median / ours.median,
        spread=f"p20 {1e3 * ours.quantile(0.2):.4f}, p80 {1e3 * ours.quantile(0.8):.4f} of {rounds}",
    )


def expect(problem: Problem, gpu: Gpu, density: float) -> Result:
    """The cost model's figures in the same shape."""
    choice = select.select(problem, gpu)
    facts = select.facts_for(gpu)
    found = roofline.predict(choice.spec, facts, roofline.Workload.uniform(problem, density))
    tflops = roofline.Machine.of(facts).dense_tflops
    dense = problem.effective_flops() / tflops / 1e12
    return Result(
        measured=False,
        gpu=str(gpu),
        problem=problem.describe(),
        kernel=choice.spec.name,
        source=choice.source,
        density=density,
        milliseconds=1e3 * found.seconds,
        packed_tflops=found.packed_tflops,
        effective_tflops=problem.effective_flops() / found.seconds / 1e12,
        dense=f"assumed {tflops:.0f} TFLOPS of configs/",
        dense_milliseconds=1e3 * dense,
        speed_up=dense / found.seconds,
    )
