# SPDX-License-Identifier: Apache-2.0
"""From a quality target to a policy: dense runs, the mass of every layer and head, and the thresholds that reach it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from fgattn_cute.errors import InputError
from fgattn_cute.integrations.policy import Site, SparsePolicy
from fgattn_cute.mask import SliceMask, blocks_of
from fgattn_cute.predict.scores import slice_mass

_OCTAVES, _BINS_PER_OCTAVE = 40, 16  # scores below 2^-40 of a block's mass count as one bin
_BINS = _OCTAVES * _BINS_PER_OCTAVE


@dataclasses.dataclass
class Curve:
    """Slices of one head, counted and weighed by score; scores are binned by their logarithm.

    count: fp64 (bins,) slices; mass: fp64 (bins,) their summed shares. Bin 0 holds the smallest scores.
    """

    count: torch.Tensor
    mass: torch.Tensor

    def threshold(self, recall: float) -> tuple[float, float, float]:
        """The largest threshold that keeps this share of the mass: (tau, recall reached, density)."""
        kept = self.mass.flip(0).cumsum(0).flip(0) / self.mass.sum()
        share = self.count.flip(0).cumsum(0).flip(0) / self.count.sum()
        enough = (kept >= recall).nonzero().flatten()
        best = int(enough[-1]) if enough.numel() else 0
        tau = 2.0 ** (best / _BINS_PER_OCTAVE - _OCTAVES) if best else 0.0
        return _rounded_down(tau), float(kept[best]), float(share[best])


class Meter:
    """A rule that keeps everything, and counts what the slices of each head weigh.

    Args:
        slice_m, slice_n: of the slices.
        sample: query blocks looked at per call, evenly spaced.
    """

    def __init__(self, slice_m: int, slice_n: int, sample: int):
        self.slice_m, self.slice_n, self.sample = slice_m, slice_n, sample
        self.curves: dict[tuple[str, int, int], Curve] = {}

    def __call__(self, site: Site) -> SliceMask:
        q, k = site.q, site.k
        blocks = blocks_of(q.shape[1], self.slice_m)
        count = min(blocks, self.sample)
        chosen = torch.arange(count, device=q.device) * blocks // count
        group = q.shape[2] // k.shape[2]
        geometry = {"slice_m": self.slice_m, "slice_n": self.slice_n}
        for index, head in enumerate(site.heads):
            for entry in range(q.shape[0]):
                for _, scores in slice_mass(
                    q[entry, :, index],
                    k[entry, :, index // group],
                    None,
                    scale=site.scale,
                    blocks=chosen,
                    **geometry,
                ):
                    self._add((site.component, site.layer, head), scores.flatten())
        return SliceMask.full(**geometry, seqlen_q=q.shape[1], seqlen_k=k.shape[1], device=q.device)

    def _add(self, key: tuple[str, int, int], scores: torch.Tensor) -> None:
        scores = scores.double()
        bins = ((torch.log2(scores) + _OCTAVES) * _BINS_PER_OCTAVE).clamp(0, _BINS - 1).long()
        if key not in self.curves:
            self.curves[key] = Curve(*scores.new_zeros(2, _BINS).unbind(0))
        self.curves[key].count.index_add_(0, bins, torch.ones_like(scores))
        self.curves[key].mass.index_add_(0, bins, scores)


def calibrate(
    pipe,
    prompts: Iterable,
    target: float,
    *,
    path: str | Path | None = None,
    base: SparsePolicy | None = None,
    choose: str = "tau",
    sample: int = 16,
    **call,
) -> SparsePolicy:
    """Runs a pipeline dense and finds, for each layer and head, what to keep for a share of the softmax mass.

    Args:
        pipe: a diffusers pipeline of a supported model.
        prompts: prompts, or mappings of keyword arguments for the pipeline (``image`` and so on); each is one run.
        target: share of the softmax mass to keep, above 0 and below 1: 0.9 to 0.98 is usual.
        path: write the policy there, with what was measured as a comment.
        base: everything else of the policy: slices, tile order, dense steps and layers, refresh. Only steps that it
            would run sparse are measured, every ``refresh_every``-th of them.
        choose: "tau" (thresholds, which follow the content) or "density" (fixed shares, which fix the time).
        sample: query blocks looked at per head and call.
        call: keyword arguments of every run: num_inference_steps, height, width and so on.

    Returns:
        the policy.

    Raises:
        InputError: a target outside its range, no prompt, or no sparse step to measure.
        UnsupportedError: as for ``enable``.
    """
    from fgattn_cute.integrations.diffusers import enable

    if not 0 < target < 1:
        raise InputError(f"target={target!r} is not a share of the softmax mass between 0 and 1")
    if choose not in ("tau", "density"):
        raise InputError(f"choose={choose!r} is neither 'tau' nor 'density'")
    base = SparsePolicy(tau=0.0) if base is None else base
    if base.rule != "mass":
        raise InputError(f"calibration finds thresholds of softmax mass, the base policy has rule {base.rule_name!r}")
    meter = Meter(base.slice_m, base.slice_n, sample)
    nothing = dict.fromkeys(("tau", "density", "top_p", "top_k"))
    dense = {key: given for key, given in base.layers.items() if given.get("dense")}
    measuring = dataclasses.replace(base, **nothing, rule=meter, layers=dense)
    runs = 0
    with enable(pipe, measuring):
        for prompt in prompts:
            arguments = dict(prompt) if hasattr(prompt, "keys") else {"prompt": prompt}
            pipe(**{**call, **arguments})
            runs += 1
    if not meter.curves:
        raise InputError(
            f"nothing was measured in {runs} runs: no prompt, or dense_steps={base.dense_steps} and dense_layers leave "
            "no sparse call"
        )
    layers, lines = dict(dense), []
    for component, layer in sorted({key[:2] for key in meter.curves}):
        heads = sorted(head for name, index, head in meter.curves if (name, index) == (component, layer))
        found = [meter.curves[(component, layer, head)].threshold(target) for head in heads]
        density = [_rounded_up(share) for _, _, share in found]
        layers[f"{component}.{layer}"] = {choose: [tau for tau, _, _ in found] if choose == "tau" else density}
        mean = sum(density) / len(density)
        lines.append(
            f"{component}.{layer}: recall {min(r for _, r, _ in found):.4f}, density {mean:.3f} "
            f"({min(density):.3f} to {max(density):.3f} per head)"
        )
    # Calls of layers without a curve of their own (none, unless the pipeline skips some) keep everything.
    policy = dataclasses.replace(base, **nothing | {choose: 0.0 if choose == "tau" else 1.0}, layers=layers)
    if path is not None:
        head = f"Calibrated for recall {target} on {runs} runs, {sample} query blocks per head and call. Measured:"
        policy.to_yaml(path, "\n".join([head, *lines]))
    return policy


def _rounded_down(value: float) -> float:
    """Four significant digits, never above ``value``: a smaller threshold keeps more."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.floor(value / unit) * unit:.4g}")


def _rounded_up(share: float) -> float:
    return min(1.0, math.ceil(share * 1e4) / 1e4)
