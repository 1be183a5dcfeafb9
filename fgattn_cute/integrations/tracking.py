# SPDX-License-Identifier: Apache-2.0
"""Which step of which run a transformer call belongs to, read off the pipeline and the calls themselves."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Moment:
    """run: runs before this one. step: denoising step. branch: completed calls of this transformer in the step."""

    run: int
    step: int
    branch: int


class Tracker:
    """Follows runs and steps.

    With a pipeline nothing is read back from the device: the pipeline makes one timestep object per step
    (``_current_timestep``) and its scheduler one ``timesteps`` tensor per run, and their identity is all that counts.
    So runs that end in an exception, equal timesteps and rounded ones need no guessing. Without a pipeline the values
    of the ``timestep`` argument count: an equal one is another branch of the step, a change is the next step, and a
    turn of direction (or ``new_run``) starts the next run.

    Args:
        pipe: a diffusers pipeline, or None.
        steps: steps of a run where there is no pipeline.
    """

    def __init__(self, pipe=None, steps: int | None = None):
        self._pipe, self._steps = pipe, steps
        self._run = -1
        self._schedule: object = None
        self._forget()

    def _forget(self) -> None:
        self._step, self._signal, self._direction = -1, None, 0
        self._done: dict[str, int] = {}

    def new_run(self) -> None:
        """The next call starts a run."""
        self._forget()

    @property
    def total(self) -> int | None:
        """Steps of the run; None if nobody knows."""
        timesteps = self._timesteps()
        return self._steps if timesteps is None else len(timesteps)

    def enter(self, component: str, timestep: torch.Tensor | float) -> Moment:
        """A transformer is called with this timestep."""
        schedule = self._timesteps()
        if schedule is not self._schedule:
            self._schedule = schedule
            self._forget()
        signal = getattr(self._pipe, "_current_timestep", None)
        if signal is not None:
            changed = signal is not self._signal
        else:
            if self._signal is not None and not isinstance(self._signal, float):
                self._forget()  # the pipeline is through; somebody calls its transformer directly
            changed = self._changed(timestep)
            signal = _value(timestep)
        if self._step < 0 or changed:
            if self._step < 0:
                self._run += 1
            self._step += 1
            self._done.clear()
        self._signal = signal
        return Moment(self._run, self._step, self._done.get(component, 0))

    def leave(self, component: str) -> None:
        """The call came back without an exception."""
        self._done[component] = self._done.get(component, 0) + 1

    def _timesteps(self):
        return getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)

    def _changed(self, timestep) -> bool:
        """By value: whether this is another step; forgets the run where time turns round."""
        if self._step < 0:
            return True
        difference = _value(timestep) - self._signal
        if difference == 0:
            return False
        direction = 1 if difference > 0 else -1
        if self._direction and direction != self._direction:
            self._forget()
        else:
            self._direction = direction
        return True


def _value(timestep) -> float:
    """The noise level of a call. Tokens that are given (first frames) have timestep 0 beside the others."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
