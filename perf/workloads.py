# SPDX-License-Identifier: Apache-2.0
"""workloads.yaml -> Case: one problem that every provider is given."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
import yaml

from fgattn_cute import Plan, SliceMask

FILE = Path(__file__).parent / "workloads.yaml"


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload at one density and one slice shape."""

    name: str
    seqlen: int
    heads: int
    head_dim: int
    density: float
    slice_m: int
    slice_n: int

    @property
    def effective_flops(self) -> int:
        """What dense attention computes."""
        return 4 * self.head_dim * self.heads * self.seqlen**2

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """The same random tensors and mask for every provider. Each head keeps the density exactly in expectation."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.seqlen, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(3))
        blocks, columns = -(-self.seqlen // self.slice_m), -(-self.seqlen // self.slice_n)
        masks = []  # a head at a time: the dense form of a whole mask would fill the memory
        for _ in range(self.heads):
            keep = torch.rand((1, 1, blocks, columns), generator=generator, device=device) < self.density
            geometry = {"slice_m": self.slice_m, "slice_n": self.slice_n}
            masks.append(SliceMask.from_dense(keep, **geometry, seqlen_q=self.seqlen, seqlen_k=self.seqlen))
        bits = torch.cat([mask.bits for mask in masks], dim=1)
        mask = dataclasses.replace(masks[0], bits=bits)
        return Inputs(q, k, v, mask, Plan.from_mask(mask))


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v (1, S, H, D) bf16, the mask and its plan."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: SliceMask
    plan: Plan


def slice_keys(file: Path = FILE) -> list[int]:
    """slice_n of the file's slice shapes, each once, ascending: what kernels are compiled for."""
    return sorted({n for _, n in yaml.safe_load(file.read_text())["slices"]})


def cases(names=(), densities=(), slices=(), file: Path = FILE) -> list[Case]:
    """All combinations, most valuable first: slices vary slowest, workloads fastest. Empty selections mean all.

    Raises:
        ValueError: a name that the file does not have.
    """
    data = yaml.safe_load(file.read_text())
    known = {entry["name"]: entry for entry in data["workloads"]}
    unknown = set(names) - known.keys()
    if unknown:
        raise ValueError(f"no workload {', '.join(sorted(unknown))} (legal: {', '.join(known)})")
    chosen = [known[name] for name in names] if names else data["workloads"]
    shapes = list(slices) or [tuple(pair) for pair in data["slices"]]
    return [
        Case(**entry, density=density, slice_m=m, slice_n=n)
        for (m, n), density, entry in itertools.product(shapes, list(densities) or data["densities"], chosen)
    ]
