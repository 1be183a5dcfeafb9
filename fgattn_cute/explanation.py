# SPDX-License-Identifier: Apache-2.0
"""Explanation: what ``explain`` returns, as text and as data."""

from __future__ import annotations

import dataclasses

from . import roofline
from .gpu import Gpu
from .launch import ctas_per_block, grid_size
from .plan_choice import PlanChoice
from .problem import Problem
from .select import Choice, RunnerUp, facts_for, rows_computed, runners_up


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a call runs the kernel that it runs.

    choice: None where the call would be refused, for the ``refused`` reasons.
    density: kept fraction of the (query, key) pairs.
    packed_flops: 4 * D * kept pairs; effective_flops: 4 * D * Sq * Sk, what dense attention computes.
    row_efficiency: rows of a query block over the rows that its CTAs compute.
    grid: CTAs of the launch.
    prediction: what the cost model expects of the kernel; ``runners_up_tflops`` the same of each runner-up, packed.
    union_factor: pairs that unions compute over pairs kept; 1 without unions.
    loads_per_key: keys loaded over keys that blocks keep where lists come in parts or halves; None elsewhere.
    plans: the kinds of plan that the mask could have, which was taken and why; None where a plan was given.
    """

    problem: Problem
    gpu: Gpu
    choice: Choice | None
    refused: tuple[str, ...]
    runners_up: tuple[RunnerUp, ...]
    density: float
    packed_flops: int
    effective_flops: int
    row_efficiency: float | None
    grid: int | None
    prediction: roofline.Prediction | None
    runners_up_tflops: tuple[float, ...]
    union_factor: float = 1.0
    loads_per_key: float | None = None
    plans: PlanChoice | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        gpu: Gpu,
        choice: Choice | None,
        density: float,
        refused,
        plan=None,
        plans: PlanChoice | None = None,
        union_factor: float = 1.0,
        loads: float | None = None,
    ) -> Explanation:
        """Explains a choice.

        Args:
            plan: whose lists are priced; without one every block keeps ``density`` of the keys and unions have a
                factor of ``union_factor``, lists in parts or halves load ``loads`` keys per kept key.
            plans: how the plan was chosen, where it was.
        """
        effective = problem.effective_flops()
        spec = choice.spec if choice else None
        others = () if choice is None else tuple(runners_up(problem, gpu, spec))
        predict = _predictor(problem, gpu, density, plan, union_factor, loads)
        items = problem.batch * problem.heads * -(-problem.blocks_q // problem.union_blocks)
        rows = problem.rows
        return cls(
            problem=problem,
            gpu=gpu,
            choice=choice,
            refused=tuple(refused),
            runners_up=others,
            density=density,
            packed_flops=round(effective * density),
            effective_flops=effective,
            row_efficiency=rows / rows_computed(spec.tile_m, rows) if spec else None,
            grid=grid_size(spec, items, problem.slice_m, gpu.sms) if spec else None,
            prediction=predict(spec) if spec else None,
            runners_up_tflops=tuple(predict(other.spec).packed_tflops for other in others),
            union_factor=getattr(plan, "union_factor", union_factor),
            loads_per_key=getattr(plan, "loads_per_key", loads),
            plans=plans,
        )

    def as_dict(self) -> dict:
        """Plain JSON values."""
        found = {
            "problem": self.problem.describe(),
            "gpu": {**dataclasses.asdict(self.gpu), "cc": list(self.gpu.cc)},
            "refused": list(self.refused),
            "density": self.density,
            "packed_flops": self.packed_flops,
            "effective_flops": self.effective_flops,
            "union_factor": self.union_factor,
            "loads_per_key": self.loads_per_key,
        }
        if self.plans is not None:
            found["plans"] = dataclasses.asdict(self.plans)
        if self.choice is not None:
            spec = self.choice.spec
            found["choice"] = {
                "preset": self.choice.preset_id,
                "source": self.choice.source,
                "why": self.choice.why,
                "kernel": spec.name,
                "spec": dataclasses.asdict(spec),
                "smem_bytes": spec.smem_bytes(),
                "launch_registers": spec.launch_registers,
                "consumer_registers_estimate": spec.register_estimate(),
                "ctas_per_block": ctas_per_block(spec, self.problem.slice_m),
                "row_efficiency": self.row_efficiency,
                "grid": self.grid,
            }
            found["prediction"] = self.prediction.as_dict()
            found["runners_up"] = [
                {"preset": r.preset_id, "kernel": r.spec.name, "why": r.why, "predicted_packed_tflops": tflops}
                for r, tflops in zip(self.runners_up, self.runners_up_tflops, strict=True)
            ]
        return found

    def __str__(self) -> str:
        lines = [f"problem   {self.problem.describe()}", f"GPU       {self.gpu}"]
        if self.choice is None:
            lines += ["refused", *(f"  - {reason}" for reason in self.refused)]
        else:
            lines += self._kernel_lines()
        lines.append(
            f"work      density {self.density:.4g}: {_flops(self.packed_flops)} packed, "
            f"{_flops(self.effective_flops)} effective (dense)"
        )
        if self.loads_per_key is not None:
            lines.append(f"loads     {self.loads_per_key:.2f} keys loaded for each that a block keeps")
        elif self.problem.union_blocks > 1:
            lines.append(f"unions    factor {self.union_factor:.2f}: pairs computed over pairs kept")
        if self.plans is not None:
            texts = [f"{self.plans.chosen}: {self.plans.why}", *map(str, self.plans.options)]
            lines.append("plan      " + "\n          ".join(texts))
        if self.runners_up:
            others = zip(self.runners_up, self.runners_up_tflops, strict=True)
            texts = [f"{r.preset_id}: {r.why}; model {tflops:.0f} TFLOPS" for r, tflops in others]
            lines.append("others    " + "\n          ".join(texts))
        return "\n".join(lines)

    def _kernel_lines(self) -> list[str]:
        spec, choice = self.choice.spec, self.choice
        held = "registers" if spec.q_source == "registers" else "shared memory"
        loads = {
            "gather": "K and V gathered",
            "boxes": "K and V by TMA boxes",
            "runs": "K and V gathered, tiles of consecutive keys by TMA",
            "octets": "K and V gathered, aligned runs of 8 keys by TMA",
        }
        handed_out = {
            "grid": "grid",
            "persistent": "persistent CTAs in waves",
            "zigzag": "persistent CTAs in zigzag",
        }[spec.scheduler]
        if spec.takes_several:
            handed_out += f" (lists {'are' if self.problem.even else 'not known to be'} even)"
        per_block = ctas_per_block(spec, self.problem.slice_m)
        sharing = f", {per_block} CTAs share a list" if per_block > 1 else ""
        return [
            f"kernel    {spec.name}",
            f"chosen    {choice.preset_id or 'FwdSpec'} ({choice.source}): {choice.why}",
            f"tile      {spec.tile_m} x {spec.tile_n}, {spec.kv_stages} stages, softmax {spec.softmax}, Q in {held}, "
            f"{loads[spec.kv_loads]}, {handed_out}{', ping-pong' if spec.ping_pong else ''}",
            f"resources {spec.smem_bytes():,} bytes of shared memory, {spec.ctas_per_sm} CTAs per SM, "
            f"{spec.num_threads} threads, registers {spec.launch_registers} at launch, "
            f"{spec.consumer_registers} consumer (about {spec.register_estimate()} needed), "
            f"{spec.producer_registers} producer",
            f"launch    {self.grid:,} CTAs, {self.row_efficiency:.0%} of their rows in use{sharing}",
            f"model     {self._model_line()}",
        ]

    def _model_line(self) -> str:
        p = self.prediction
        shares = ", ".join(f"{name} {cycles / p.tile:.0%}" for name, cycles in p.cycles.items())
        even = p.break_even_density
        dense = f"dense attention is as fast at density {even:.2f}" if even < 1 else "faster than dense at any density"
        return (
            f"{1e3 * p.seconds:.3g} ms, {p.packed_tflops:.0f} packed TFLOPS, bound by {p.binding} "
            f"({p.tile:.0f} cycles a tile: {shares}); {dense}"
        )


def _predictor(problem: Problem, gpu: Gpu, density: float, plan, union_factor: float, loads: float | None):
    """spec -> Prediction for the problem's lists, which are read once."""
    facts = facts_for(gpu)
    if plan is None:
        work = roofline.Workload.uniform(problem, density, union_factor=union_factor)
        if loads is not None:
            work = dataclasses.replace(work, loads=problem.union_blocks * loads / union_factor)
    else:
        work = roofline.Workload.of(problem, plan)
    return lambda spec: roofline.predict(spec, facts, work)


def _flops(number: int) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MFLOP"
