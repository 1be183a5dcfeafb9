# SPDX-License-Identifier: Apache-2.0
"""Selection rules: which slices to keep, given a score per slice.

Scores are shares of softmax mass: over the slices of one query block they add up to 1 (statistic "mean"). Every value
may be one number for all heads or one per head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fgattn_cute.errors import InputError


def _per_head(name: str, values, low: float, high: float, kind: type = float) -> tuple:
    """Values as a tuple of one or one per head; refuses anything outside low..high."""
    given = tuple(values) if isinstance(values, Sequence) else (values,)
    legal = all(isinstance(v, (int, kind)) and not isinstance(v, bool) and low <= v <= high for v in given)
    if not given or not legal:
        what = "a whole number" if kind is int else "a number"
        span = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise InputError(f"{name}={values!r} is not {what} {span} (or one per head)")
    return given


class _Rule:
    """What the rules share: values per head as a tensor."""

    values: tuple

    def of_heads(self, heads: int, device) -> torch.Tensor:
        """fp32 (heads,) on the device."""
        if len(self.values) not in (1, heads):
            raise InputError(f"{type(self).__name__} holds {len(self.values)} values, q has {heads} heads")
        # Filled on the device: a tensor made from a Python list is copied to it with a synchronisation.
        own = [torch.full((1,), value, dtype=torch.float32, device=device) for value in self.values]
        return torch.cat(own).expand(heads)

    def of_head(self, head: int):
        return self.values[0] if len(self.values) == 1 else self.values[head]


@dataclasses.dataclass(frozen=True)
class Threshold(_Rule):
    """Keep slices whose score is at least ``tau``, 0 to 1."""

    tau: float | Sequence[float]

    def __post_init__(self):
        object.__setattr__(self, "values", _per_head("tau", self.tau, 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class TopK(_Rule):
    """Keep the ``n`` slices of each query block with the largest scores (all of them where there are fewer)."""

    n: int | Sequence[int]

    def __post_init__(self):
        object.__setattr__(self, "values", _per_head("n", self.n, 0, float("inf"), int))

    def choose(self, scores: torch.Tensor, head: int) -> torch.Tensor:
        """bool like scores (blocks, slices)."""
        best = scores.topk(min(self.of_head(head), scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@dataclasses.dataclass(frozen=True)
class TopP(_Rule):
    """Keep the fewest slices of each query block whose scores reach the share ``p``, 0 to 1, of their sum."""

    p: float | Sequence[float]

    def __post_init__(self):
        object.__setattr__(self, "values", _per_head("p", self.p, 0.0, 1.0))

    def choose(self, scores: torch.Tensor, head: int) -> torch.Tensor:
        """bool like scores (blocks, slices)."""
        ordered, order = scores.sort(dim=-1, descending=True)
        reached = ordered.cumsum(-1)
        wanted = self.of_head(head) * reached[:, -1:]
        # A slice is needed as long as those before it fall short; one without any mass is never needed.
        needed = (reached - ordered < wanted) & (ordered > 0)
        return torch.zeros_like(needed).scatter_(-1, order, needed)


@dataclasses.dataclass(frozen=True)
class Budget(_Rule):
    """Keep about the share ``density``, 0 to 1, of all slices: those above a quantile of a sample of query blocks.

    density: one share; heads compete for it, which keeps the most mass in all. One value per head gives every head
        its own.
    sample: query blocks of each head that the quantile is taken from, evenly spaced.
    """

    density: float | Sequence[float]
    sample: int = 16

    def __post_init__(self):
        object.__setattr__(self, "values", _per_head("density", self.density, 0.0, 1.0))
        _per_head("sample", self.sample, 1, float("inf"), int)

    def threshold(self, scores: torch.Tensor) -> torch.Tensor:
        """fp32 (heads,) thresholds from sampled scores (heads, sampled slices); nothing is read back."""
        heads = scores.shape[0]
        if len(self.values) == 1:
            return _quantile(scores.flatten(), self.values[0]).expand(heads)
        self.of_heads(heads, scores.device)
        return torch.stack([_quantile(row, share) for row, share in zip(scores, self.values, strict=True)])


def _quantile(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The value that ``share`` of the scores reach."""
    kept = round(share * scores.numel())
    if kept == 0:
        return scores.new_full((), float("inf"))
    value = scores.kthvalue(scores.numel() - kept + 1).values
    # Scores that underflowed to 0 are many and equal: a threshold of 0 would keep them all.
    return value.clamp(min=torch.finfo(torch.float32).tiny)
