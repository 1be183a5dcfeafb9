# SPDX-License-Identifier: Apache-2.0
"""MaskSchedule: when to run dense, when to find a mask and when to reuse one, over the steps and layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fgattn_cute.errors import InputError
from fgattn_cute.mask import SliceMask

DENSE, FIND, REUSE = "dense", "find", "reuse"


class MaskSchedule:
    """Decides per step and layer and keeps one mask per layer between refreshes.

    It holds masks, not plans: bits are about a tenth of the memory of id lists.

    Args:
        steps: denoising steps of a run.
        layers: attention layers of the model.
        dense_steps: first steps that run dense.
        dense_layers: first layers that run dense, as a number, or their indices.
        refresh: find a mask anew every this many sparse steps; reuse it in between.
        density: share of pairs to keep, a number or a function of the step; passed on to ``find``.
    """

    def __init__(
        self,
        steps: int,
        layers: int,
        *,
        dense_steps: int = 0,
        dense_layers: int | Collection[int] = 0,
        refresh: int = 1,
        density: float | Callable[[int], float] | None = None,
    ):
        self.steps, self.layers, self.dense_steps, self.refresh = steps, layers, dense_steps, refresh
        chosen = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
        self.dense_layers = frozenset(chosen)
        self._density = density
        why = []
        if min(steps, layers, refresh) < 1:
            why.append(f"steps={steps}, layers={layers} and refresh={refresh} must be at least 1")
        if not 0 <= dense_steps <= steps:
            why.append(f"dense_steps={dense_steps} is not from 0 to {steps}")
        if not self.dense_layers <= set(range(layers)):
            why.append(f"dense_layers={dense_layers!r} names layers outside 0..{layers - 1}")
        if not callable(density) and density is not None and not 0 <= density <= 1:
            why.append(f"density={density!r} is not from 0 to 1")
        if why:
            raise InputError("not a schedule: " + "; ".join(why))
        self._masks: dict[int, tuple[int, SliceMask]] = {}

    def density(self, step: int) -> float | None:
        """Share of pairs to keep at a step; None where the schedule does not say."""
        value = self._density(step) if callable(self._density) else self._density
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"the density function returned {value!r} at step {step}, not a share from 0 to 1")
        return value

    def action(self, step: int, layer: int) -> str:
        """ "dense", "find" or "reuse"."""
        if not (0 <= step < self.steps and 0 <= layer < self.layers):
            raise InputError(f"step {step}, layer {layer} lies outside {self.steps} steps and {self.layers} layers")
        if step < self.dense_steps or layer in self.dense_layers:
            return DENSE
        # A refresh falls on every refresh-th sparse step. A step earlier than the held mask's belongs to a new run.
        held = self._masks.get(layer)
        due = step - (step - self.dense_steps) % self.refresh
        return REUSE if held is not None and due <= held[0] <= step else FIND

    def mask(self, step: int, layer: int, find: Callable[[float | None], SliceMask]) -> SliceMask | None:
        """The mask to use, or None for dense.

        Args:
            step, layer: where the model is.
            find: called with ``density(step)`` when a mask has to be found; its result is kept for reuse.
        """
        action = self.action(step, layer)
        if action == DENSE:
            return None
        if action == FIND:
            self._masks[layer] = (step, find(self.density(step)))
        return self._masks[layer][1]

    def clear(self) -> None:
        """Forgets all masks."""
        self._masks.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the masks held now."""
        return sum(mask.nbytes for _, mask in self._masks.values())

    def describe(self) -> str:
        """The schedule in words, with the memory that it holds."""
        sparse = (self.steps - self.dense_steps) * (self.layers - len(self.dense_layers))
        finds = -(-(self.steps - self.dense_steps) // self.refresh) * (self.layers - len(self.dense_layers))
        calls = self.steps * self.layers
        return (
            f"{self.steps} steps x {self.layers} layers: {calls - sparse} calls dense, {sparse} sparse, of which "
            f"{finds} find a mask and {sparse - finds} reuse one; {len(self._masks)} masks held, {self.nbytes} bytes"
        )
