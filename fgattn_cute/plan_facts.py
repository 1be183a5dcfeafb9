# SPDX-License-Identifier: Apache-2.0
"""What facts of a plan change about a preset's kernel: how K and V come in, and how CTAs share the work out."""

from __future__ import annotations

import dataclasses

from .kernels.spec import BOX_ROWS, FwdSpec


def loads_for(slice_n: int, scattered: str, nearly_full: bool = False, grouped: bool = False) -> str:
    """FwdSpec.kv_loads of a preset for a plan; docs/kernel.md has what each is worth.

    Args:
        slice_n: of the plan.
        scattered: the preset's own, for segments that boxes cannot bring.
        nearly_full: whether most tiles of the plan's lists are consecutive keys.
        grouped: whether lists have their aligned runs of 8 keys first.
    """
    if slice_n % BOX_ROWS == 0:
        return "boxes"
    return "octets" if grouped else "runs" if nearly_full else scattered


def in_zigzag(spec: FwdSpec, nearly_full: bool) -> FwdSpec:
    """The kernel of a persistent preset for a plan of even lists, which leave waves nothing to balance.

    On an H200 (docs/kernel.md), even lists, zigzag over waves: 1.01 to 1.06 with fixed_ref from the gather at head dim
    128, because ptxas keeps the loop counters of waves in uniform registers there; 0.98 to 1.00 with the exact softmax,
    boxes and octets, 0.97 and 0.99 at head dims 64 and 96, so those keep waves. The kernel that asks lists for runs has
    uniform counters either way; single keys that are neither grouped nor nearly full have few runs to find, so they
    take the gather instead.
    """
    if (spec.scheduler, spec.softmax, spec.head_dim) != ("persistent", "fixed_ref", 128):
        return spec
    loads = "gather" if spec.kv_loads == "runs" and spec.slice_n == 1 and not nearly_full else spec.kv_loads
    return dataclasses.replace(spec, scheduler="zigzag", kv_loads=loads) if loads == "gather" else spec
