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

    Zigzag over waves on an H200, 2026-11-23: 1.01 to 1.06 on even lists with fixed_ref from the gather, because ptxas
    keeps the loop counters of waves in uniform registers, and 0.88 to 0.95 on skewed ones. With the exact softmax and
    with boxes 0.98 to 1.00 on even lists, so those keep waves. Octets compile like the gather. The kernel that asks
    lists for runs has uniform counters either way; single keys that are neither grouped nor nearly full have few runs
    to find, so they take the gather instead.
    """
    if spec.scheduler != "persistent" or spec.softmax != "fixed_ref":
        return spec
    loads = "gather" if spec.kv_loads == "runs" and spec.slice_n == 1 and not nearly_full else spec.kv_loads
    return dataclasses.replace(spec, scheduler="zigzag", kv_loads=loads) if loads in ("gather", "octets") else spec
