# SPDX-License-Identifier: Apache-2.0
"""SparsePolicy: which layers and steps of a model run sparse, and how their masks are found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fgattn_cute.errors import InputError
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict import Budget, Threshold, TopK, TopP

DYNAMIC_RULES = ("mass", "pooled")
GRID_RULES = ("window", "radial", "spatial", "temporal", "spatial_or_temporal")
SELECTORS = {"tau": Threshold, "density": Budget, "top_p": TopP, "top_k": TopK}
BACKENDS = ("auto", "cuda", "emulator", "reference")

PerHead = float | int | Sequence[float] | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePolicy:
    """What runs sparse, and which slices are kept.

    slice_m, slice_n: queries and keys of a slice.
    rule: "mass" (exact softmax mass of each slice) or "pooled" (mean-pooled stand-ins), both with one of ``tau``,
        ``density``, ``top_p`` and ``top_k``; "window", "radial", "spatial", "temporal" or "spatial_or_temporal" (the
        better of both per head), which know positions only; or a function of a ``Site`` that returns a SliceMask in
        the order of the tokens that it is shown.
    rule_options: keyword arguments of the rule, for example {"window": (3, 3, 3)} or {"decay": 0.5}.
    tau: keep slices with at least this share of their query block's softmax mass, 0 to 1.
    density: keep about this share of all slices, 0 to 1; 1.0 keeps everything.
    top_p: keep the fewest slices of a query block that reach this share of its mass.
    top_k: keep this many slices of a query block.
        Each of the four is one number, or one per head.
    dense_steps: first steps that run dense: a share of the run (float) or a number of steps (int).
    dense_layers: layers that run dense, by index.
    refresh_every: find masks anew every this many sparse steps, reuse them in between.
    layers: exceptions: layer index, or "transformer_2.7" for one of several transformers, to a mapping with one of
        tau, density, top_p, top_k, or {"dense": True}.
    tile: (frames, rows, columns) of a tile: video tokens are visited tile by tile, so that a query block holds
        neighbours. None leaves them in raster order.
    backend: as for ``fgattn_cute.attention``.
    steps: denoising steps of a run, where there is no pipeline to ask.
    measure_recall: also measure the softmax mass that each new mask keeps (costs as much as finding a mask).
    plan_memory_gb: memory for key lists kept between steps; lists that do not fit are rebuilt from their masks.
    """

    slice_m: int = 128
    slice_n: int = 1
    rule: str | Callable[[Site], SliceMask] = "mass"
    rule_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tau: PerHead | None = None
    density: PerHead | None = None
    top_p: PerHead | None = None
    top_k: PerHead | None = None
    dense_steps: float | int = 0.2
    dense_layers: Sequence[int] = ()
    refresh_every: int = 5
    layers: Mapping[int | str, Mapping] = dataclasses.field(default_factory=dict)
    tile: tuple[int, int, int] | None = None
    backend: str = "auto"
    steps: int | None = None
    measure_recall: bool = False
    plan_memory_gb: float = 4.0

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))
        why = [*self._why_sizes(), *self._why_rule(), *self._why_layers()]
        if why:
            raise InputError("not a policy: " + "; ".join(why))

    # ---- what holds where -----------------------------------------------------------------------------------------
    def selector(self, component: str, layer: int, heads: range) -> tuple[str, object] | None:
        """("tau", Threshold(...)) and the like for some heads of a layer; None where the rule needs none."""
        given = self._exception(component, layer)
        chosen = {name: given[name] for name in SELECTORS if name in given} or self._chosen()
        for name, value in chosen.items():
            if isinstance(value, Sequence):
                if len(value) < heads.stop:
                    raise InputError(f"{name} of layer {layer} holds {len(value)} values, the model has more heads")
                value = tuple(value[heads.start : heads.stop])
            return name, SELECTORS[name](value)
        return None

    def is_dense(self, component: str, layer: int) -> bool:
        """Whether a layer runs dense at every step."""
        return layer in self.dense_layers or bool(self._exception(component, layer).get("dense"))

    def dense_steps_of(self, steps: int | None) -> int:
        """Dense steps of a run with so many steps (None where nobody knows them)."""
        if isinstance(self.dense_steps, int):
            return self.dense_steps if steps is None else min(self.dense_steps, steps)
        if self.dense_steps == 0:
            return 0
        if steps is None:
            raise InputError(
                f"dense_steps={self.dense_steps} is a share of a run, and without a pipeline nobody knows how many "
                "steps a run has: enable(pipe, ...), SparsePolicy(steps=...), or dense_steps as a whole number"
            )
        return math.ceil(self.dense_steps * steps)

    @property
    def needs_grid(self) -> bool:
        """Whether the policy asks where in the video a token sits."""
        return self.tile is not None or self.rule in GRID_RULES

    @property
    def rule_name(self) -> str:
        return self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", type(self.rule).__name__)

    # ---- files ----------------------------------------------------------------------------------------------------
    @classmethod
    def from_yaml(cls, path: str | Path) -> SparsePolicy:
        """Reads a policy file, for example one that ``calibrate`` wrote."""
        from fgattn_cute.integrations import policy_file

        return policy_file.read(path, cls)

    def to_yaml(self, path: str | Path, comment: str = "") -> None:
        """Writes the policy as a file that ``from_yaml`` reads; a function as rule cannot be written."""
        from fgattn_cute.integrations import policy_file

        policy_file.write(path, self, comment)

    # ---- what is wrong --------------------------------------------------------------------------------------------
    def _chosen(self) -> dict:
        return {name: getattr(self, name) for name in SELECTORS if getattr(self, name) is not None}

    def _exception(self, component: str, layer: int) -> Mapping:
        own = self.layers.get(f"{component}.{layer}")
        return own if own is not None else self.layers.get(layer, {})

    def _why_sizes(self) -> list[str]:
        why = []
        for name in ("slice_m", "slice_n", "refresh_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                why.append(f"{name}={value!r} is not a whole number of at least 1")
        steps = self.dense_steps
        if isinstance(steps, bool) or not isinstance(steps, (int, float)) or steps < 0:
            why.append(f"dense_steps={steps!r} is neither a share from 0 to 1 nor a number of steps")
        elif isinstance(steps, float) and steps > 1:
            why.append(f"dense_steps={steps!r} as a share lies above 1 (whole numbers count steps)")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            why.append(f"steps={self.steps!r} is not a whole number of at least 1")
        if self.tile is not None and (len(self.tile) != 3 or min(self.tile) < 1):
            why.append(f"tile={self.tile!r} is not three sizes of at least 1: frames, rows, columns")
        if self.backend not in BACKENDS:
            why.append(f"backend={self.backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
        if self.plan_memory_gb < 0:
            why.append(f"plan_memory_gb={self.plan_memory_gb!r} is negative")
        return why

    def _why_rule(self) -> list[str]:
        chosen = self._chosen()
        if callable(self.rule) or self.rule in GRID_RULES:
            if chosen:
                return [f"{', '.join(chosen)} goes with the rules mass and pooled, not with {self.rule_name!r}"]
            return []
        if self.rule not in DYNAMIC_RULES:
            return [f"rule={self.rule!r} is not one of {', '.join((*DYNAMIC_RULES, *GRID_RULES))} or a function"]
        if len(chosen) != 1:
            given = f" ({', '.join(chosen)} are given)" if chosen else ""
            return [f"rule {self.rule!r} takes exactly one of {', '.join(SELECTORS)}{given}"]
        return self._why_values("", chosen)

    def _why_layers(self) -> list[str]:
        why = [
            f"dense_layers holds {layer!r}, not an index"
            for layer in self.dense_layers
            if not isinstance(layer, int) or layer < 0
        ]
        for layer, given in self.layers.items():
            named = isinstance(layer, str) and layer.rpartition(".")[0] and layer.rpartition(".")[2].isdigit()
            if not named and (not isinstance(layer, int) or layer < 0):
                why.append(f"layers has the key {layer!r}: an index, or a transformer and an index as in transformer.3")
            unknown = set(given) - {*SELECTORS, "dense"}
            if unknown:
                why.append(f"layer {layer}: unknown {', '.join(sorted(map(str, unknown)))}")
            values = {name: value for name, value in given.items() if name in SELECTORS}
            if len(values) > 1:
                why.append(f"layer {layer}: {', '.join(values)} exclude each other")
            elif values and self.rule not in DYNAMIC_RULES:
                why.append(f"layer {layer}: rule {self.rule_name!r} takes no {', '.join(values)}")
            why += self._why_values(f"layer {layer}: ", values)
        return why

    @staticmethod
    def _why_values(where: str, values: Mapping) -> list[str]:
        why = []
        for name, value in values.items():
            try:
                SELECTORS[name](tuple(value) if isinstance(value, list) else value)
            except InputError as error:
                why.append(f"{where}{error}")
        return why


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a mask is found; what a function given as ``rule`` is called with.

    q, k: (batch, seqlen, heads, head_dim), in the order in which attention sees them (tile order, if there is one).
    component, layer: the transformer's name in its pipeline, and the self-attention layer in it.
    step, branch: denoising step, and forward pass in it (0 conditional, 1 unconditional, unless both are one batch).
    video: the token grid, its text tokens and its tile order; None where the model does not tell its grid.
    scale: factor on q.k.
    policy: the policy.
    heads: which of the model's heads q and k hold (all of them, but for head-parallel runs).
    """

    q: object
    k: object
    component: str
    layer: int
    step: int
    branch: int
    video: object
    scale: float
    policy: SparsePolicy
    heads: range
