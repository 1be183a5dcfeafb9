# SPDX-License-Identifier: Apache-2.0
"""Explanation: what ``explain`` returns, as text and as data."""

from __future__ import annotations

import dataclasses

from .gpu import Gpu
from .launch import ctas_per_block, grid_size
from .problem import Problem
from .select import Choice, RunnerUp, rows_computed, runners_up


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a call runs the kernel that it runs.

    choice: None where the call would be refused, for the ``refused`` reasons.
    density: kept fraction of the (query, key) pairs.
    packed_flops: 4 * D * kept pairs; effective_flops: 4 * D * Sq * Sk, what dense attention computes.
    row_efficiency: rows of a query block over the rows that its CTAs compute.
    grid: CTAs of the launch.
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

    @classmethod
    def of(cls, problem: Problem, gpu: Gpu, choice: Choice | None, density: float, refused) -> Explanation:
        effective = problem.effective_flops()
        spec = choice.spec if choice else None
        others = () if choice is None else tuple(runners_up(problem, gpu, spec))
        items = problem.batch * problem.heads * problem.blocks_q
        return cls(
            problem=problem,
            gpu=gpu,
            choice=choice,
            refused=tuple(refused),
            runners_up=others,
            density=density,
            packed_flops=round(effective * density),
            effective_flops=effective,
            row_efficiency=problem.slice_m / rows_computed(spec.tile_m, problem.slice_m) if spec else None,
            grid=grid_size(spec, items, problem.slice_m, gpu.sms) if spec else None,
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
        }
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
            found["runners_up"] = [
                {"preset": r.preset_id, "kernel": r.spec.name, "why": r.why} for r in self.runners_up
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
        if self.runners_up:
            lines.append("others    " + "\n          ".join(f"{r.preset_id}: {r.why}" for r in self.runners_up))
        return "\n".join(lines)

    def _kernel_lines(self) -> list[str]:
        spec, choice = self.choice.spec, self.choice
        held = "registers" if spec.q_source == "registers" else "shared memory"
        per_block = ctas_per_block(spec, self.problem.slice_m)
        sharing = f", {per_block} CTAs share a list" if per_block > 1 else ""
        return [
            f"kernel    {spec.name}",
            f"chosen    {choice.preset_id or 'FwdSpec'} ({choice.source}): {choice.why}",
            f"tile      {spec.tile_m} x {spec.tile_n}, {spec.kv_stages} stages, softmax {spec.softmax}, Q in {held}, "
            f"{spec.scheduler}{', ping-pong' if spec.ping_pong else ''}",
            f"resources {spec.smem_bytes():,} bytes of shared memory, {spec.ctas_per_sm} CTAs per SM, "
            f"{spec.num_threads} threads, registers {spec.launch_registers} at launch, "
            f"{spec.consumer_registers} consumer (about {spec.register_estimate()} needed), "
            f"{spec.producer_registers} producer",
            f"launch    {self.grid:,} CTAs, {self.row_efficiency:.0%} of their rows in use{sharing}",
        ]


def _flops(number: int) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MFLOP"
