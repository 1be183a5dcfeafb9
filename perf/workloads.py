# SPDX-License-Identifier: Apache-2.0
"""workloads.yaml -> Case: one problem that every provider is given."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
import yaml

from fgattn_cute import Plan, SliceMask
from fgattn_cute.plan_choice import share_of_pool
from fgattn_cute.unions import rows_for

FILE = Path(__file__).parent / "workloads.yaml"
POOL_ROWS = 384


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload at one density and one slice shape.

    factor: union factor of the masks, see ``pool_mask``; None where every block keeps keys at random.
    """

    name: str
    seqlen: int
    heads: int
    head_dim: int
    density: float
    slice_m: int
    slice_n: int
    factor: float | None = None

    @property
    def effective_flops(self) -> int:
        """What dense attention computes."""
        return 4 * self.head_dim * self.heads * self.seqlen**2

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """The same random tensors and mask for every provider. Each head keeps the density exactly in expectation."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.seqlen, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(3))
        if self.factor is not None:
            sizes = {"seqlen": self.seqlen, "heads": self.heads, "density": self.density}
            mask = pool_mask(self.slice_m, self.factor, **sizes, device=device, seed=seed)
            return Inputs(q, k, v, mask, Plan.from_mask(mask))
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


def pool_mask(
    slice_m: int, factor: float, *, seqlen: int, heads: int, density: float, device="cpu", seed: int = 0
) -> SliceMask:
    """A mask of slice_n = 1 whose unions of ``rows_for(slice_m)[0]`` rows have a union factor.

    Raises:
        ValueError: the pool would be larger than the sequence, or see ``share_of_pool``.
    """
    share = share_of_pool(factor, rows_for(slice_m)[0] // slice_m)
    if density > share:
        raise ValueError(f"at density {density} random blocks already have a smaller factor than {factor}")
    generator = torch.Generator(device).manual_seed(seed)
    blocks, group = -(-seqlen // slice_m), POOL_ROWS // slice_m
    masks = []  # a head at a time: the dense form of a whole mask would fill the memory
    for _ in range(heads):
        pool = torch.rand(-(-blocks // group), seqlen, generator=generator, device=device) < density / share
        keep = torch.rand(blocks, seqlen, generator=generator, device=device) < share
        keep &= pool.repeat_interleave(group, 0)[:blocks]
        geometry = {"slice_m": slice_m, "slice_n": 1, "seqlen_q": seqlen, "seqlen_k": seqlen}
        masks.append(SliceMask.from_dense(keep[None, None], **geometry))
    return dataclasses.replace(masks[0], bits=torch.cat([mask.bits for mask in masks], dim=1))


def slice_keys(file: Path = FILE) -> list[int]:
    """slice_n of the file's slice shapes, each once, ascending: what kernels are compiled for."""
    return sorted({n for _, n in yaml.safe_load(file.read_text())["slices"]})


def cases(names=(), densities=(), slices=(), factors=(None,), file: Path = FILE) -> list[Case]:
    """All combinations, most valuable first: slices vary slowest, workloads fastest. Empty selections mean all.

    factors: union factors of the masks.

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
        Case(**entry | {"name": _named(entry["name"], factor)}, density=density, slice_m=m, slice_n=n, factor=factor)
        for (m, n), factor, density, entry in itertools.product(
            shapes, factors, list(densities) or data["densities"], chosen
        )
    ]


def _named(name: str, factor: float | None) -> str:
    """A workload with other masks is another one."""
    return name if factor is None else f"{name} (union factor {factor:g})"
