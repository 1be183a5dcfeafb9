# SPDX-License-Identifier: Apache-2.0
"""Sparse attention in the video transformers of diffusers: one call in, one call out.

    from fgattn_cute.integrations.diffusers import SparsePolicy, disable, enable

    handle = enable(pipe, SparsePolicy(rule="mass", tau=1e-4))
    video = pipe(prompt).frames
    print(handle.report())
    disable(handle)

The self-attention layers get another attention processor, which runs the model's own and answers its softmax attention;
two hooks on the transformer follow steps. Weights, buffers and the pipeline are not touched. Cross-attention stays
dense. docs/wan.md tells the whole story for Wan.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence

import torch
from torch import nn

from fgattn_cute import gpu as _gpu
from fgattn_cute.errors import InputError, UnsupportedError, refusal
from fgattn_cute.integrations.calibrate import calibrate
from fgattn_cute.integrations.engine import Engine
from fgattn_cute.integrations.families import FAMILIES, MIN_DIFFUSERS, Family, family_of
from fgattn_cute.integrations.policy import Site, SparsePolicy
from fgattn_cute.integrations.processor import SparseProcessor
from fgattn_cute.integrations.report import Report
from fgattn_cute.integrations.tracking import Tracker
from fgattn_cute.kernels.spec import HEAD_DIMS

__all__ = ["Handle", "Site", "SparsePolicy", "calibrate", "disable", "enable"]

_SLICE_M_STEP = 16


def enable(target, policy: SparsePolicy) -> Handle:
    """Makes the self-attention of a pipeline's transformers, or of one transformer, sparse.

    Args:
        target: a diffusers pipeline (which also tells steps and runs) or a transformer of a supported class.
        policy: what runs sparse.

    Returns:
        a Handle for ``report`` and ``disable``; also a context manager that disables at its end.

    Raises:
        UnsupportedError: a model, an attention processor, a version of diffusers, a head size or a device that sparse
            attention does not cover; the message lists every reason. Nothing has been changed then.
        InputError: the policy does not fit the model, or sparse attention is enabled already.
    """
    if not isinstance(policy, SparsePolicy):
        raise InputError(f"policy is a {type(policy).__name__}, not a SparsePolicy")
    _check_version()
    models = _models(target)
    pipe = None if isinstance(target, nn.Module) else target
    why = [reason for name, (model, family) in models.items() for reason in _reasons(name, model, family, policy)]
    if why:
        asked = [f"{name} {type(model).__name__}" for name, (model, _) in models.items()]
        raise UnsupportedError(refusal("sparse attention cannot be enabled", asked, why))
    for name, (model, family) in models.items():
        _check_fit(name, model, family, policy)
    return Handle(pipe, models, policy)


def disable(handle: Handle) -> None:
    """Takes everything back that ``enable`` did: the model is exactly as before. A second call does nothing."""
    handle.disable()


class Handle:
    """Sparse attention in force; made by ``enable``.

    policy: the policy in force.
    """

    def __init__(self, pipe, models: dict[str, tuple[nn.Module, Family]], policy: SparsePolicy):
        self.policy = policy
        self._tracker = Tracker(pipe, policy.steps)
        self._hooks, self._processors, self._engines = [], [], []
        for name, (model, family) in models.items():
            layers = family.layers(model)
            engine = Engine(name, model, family, policy, lambda: self._tracker.total, layers[0].heads)
            own = []
            for index, layer in enumerate(layers):
                own.append((layer, layer.processor, SparseProcessor(layer.processor, engine, index)))
                layer.processor = own[-1][2]
            self._processors += own
            self._engines.append(engine)
            before = functools.partial(self._before, engine, own)
            after = functools.partial(self._after, engine)
            self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(after, always_call=True))

    def report(self) -> Report:
        """What has happened since ``enable``: print it, or take ``rows()``."""
        records = {key: record for engine in self._engines for key, record in engine.records.items()}
        records = dict(sorted(records.items(), key=lambda item: (item[0][0], item[0][3], item[0][4])))
        held = [engine.held_bytes for engine in self._engines]
        return Report(records, (sum(masks for masks, _ in held), sum(plans for _, plans in held)))

    def new_run(self) -> None:
        """Says that the next call of a transformer starts a run; only needed without a pipeline, for one-step runs."""
        self._tracker.new_run()

    def disable(self) -> None:
        """As the function ``disable``. The report stays readable."""
        for hook in self._hooks:
            hook.remove()
        for layer, inner, own in self._processors:
            if layer.processor is own:  # whatever somebody else has put there since is not ours to remove
                layer.processor = inner
        for engine in self._engines:
            engine.forget()
        self._hooks, self._processors = [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc) -> None:
        self.disable()

    def _before(self, engine: Engine, processors, model: nn.Module, args: tuple, kwargs: dict) -> None:
        for layer, _, own in processors:
            if layer.processor is not own:
                raise UnsupportedError(
                    f"an attention processor of {engine.component} was replaced by {type(layer.processor).__name__} "
                    "while sparse attention was enabled: that layer would run dense. Disable first, then replace, then "
                    "enable again"
                )
        arguments = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        engine.begin(self._tracker.enter(engine.component, arguments["timestep"]), arguments)

    def _after(self, engine: Engine, model: nn.Module, args: tuple, output) -> None:
        engine.end()
        if output is not None:  # None: the call raised, and the step has not been done
            self._tracker.leave(engine.component)


# ---- guards -----------------------------------------------------------------------------------------------------
def _check_version() -> None:
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError("diffusers is not installed: pip install 'fgattn-cute[diffusers]'") from error
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if version < MIN_DIFFUSERS:
        oldest = ".".join(map(str, MIN_DIFFUSERS))
        raise UnsupportedError(f"diffusers {diffusers.__version__} is older than {oldest}: pip install -U diffusers")


def _models(target) -> dict[str, tuple[nn.Module, Family]]:
    """Supported transformers by name, of a pipeline or alone."""
    if isinstance(target, nn.Module):
        candidates = {"transformer": target}
    elif isinstance(getattr(target, "components", None), dict):
        candidates = {name: part for name, part in target.components.items() if isinstance(part, nn.Module)}
    else:
        raise InputError(f"{type(target).__name__} is neither a diffusers pipeline nor a transformer")
    found = {name: (part, family_of(part)) for name, part in candidates.items()}
    # A pipeline's other networks (text encoders, VAE) are none of our business; an unknown transformer is.
    alone = isinstance(target, nn.Module)
    unknown = [n for n, (_, family) in found.items() if family is None and (alone or n.startswith("transformer"))]
    supported = {name: pair for name, pair in found.items() if pair[1] is not None}
    if unknown or not supported:
        asked = [f"{name} {type(found[name][0]).__name__}" for name in unknown or found]
        compiled = any(hasattr(found[name][0], "_orig_mod") for name in unknown)
        why = "no transformer here is known" if not unknown else "this transformer's attention layers are not known"
        hint = "; a transformer in torch.compile: enable first, then transformer.compile_repeated_blocks()"
        raise UnsupportedError(
            refusal(
                "sparse attention cannot be enabled", asked, [why + (hint if compiled else "")], ", ".join(FAMILIES)
            )
        )
    return supported


def _reasons(name: str, model: nn.Module, family: Family, policy: SparsePolicy) -> list[str]:
    """What stands against a model."""
    layers, why = family.layers(model), []
    if any(isinstance(layer.processor, SparseProcessor) for layer in layers):
        raise InputError(f"sparse attention is enabled for {name} already: disable(handle) first")
    strange = {type(layer.processor) for layer in layers} - {
        type(layer.processor)
        for layer in layers
        if type(layer.processor).__name__ in family.processors
        and type(layer.processor).__module__.startswith("diffusers.")
    }
    for cls in sorted(strange, key=str):
        why.append(f"its attention processor {cls.__module__}.{cls.__name__} is not {' or '.join(family.processors)}")
    if not why:
        why += _kernel_reasons(model, layers[0], policy)
    return [f"{name}: {reason}" for reason in why]


def _kernel_reasons(model: nn.Module, layer: nn.Module, policy: SparsePolicy) -> list[str]:
    """What stands against the kernel, where it is the kernel that will run."""
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    if policy.backend == "reference" or (policy.backend == "auto" and not on_gpu):
        return []
    why, head_dim = [], layer.to_q.out_features // layer.heads
    if head_dim not in HEAD_DIMS:
        why.append(f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if layer.to_q.weight.dtype not in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled():
        why.append(f"its weights are {str(layer.to_q.weight.dtype).removeprefix('torch.')}: bfloat16 or float16 works")
    if policy.slice_m % _SLICE_M_STEP:
        why.append(f"slice_m {policy.slice_m} is not a multiple of {_SLICE_M_STEP}")
    if policy.backend == "emulator" and on_gpu:
        why.append(f"it is on {parameter.device}, and the emulator runs on the CPU")
    if on_gpu and policy.backend != "emulator":
        why += _gpu.from_cuda(parameter.device).reasons()
    return why


def _check_fit(name: str, model: nn.Module, family: Family, policy: SparsePolicy) -> None:
    """Refuses a policy that names layers or heads that the model does not have."""
    layers = family.layers(model)
    heads, why = layers[0].heads, []
    own = {key: given for key, given in policy.layers.items() if isinstance(key, int) or key.startswith(f"{name}.")}
    named = [*policy.dense_layers, *(int(str(key).rpartition(".")[2]) for key in own)]
    outside = sorted({layer for layer in named if layer >= len(layers)})
    if outside:
        why.append(f"it names layers {', '.join(map(str, outside))}, {name} has {len(layers)}")
    fields = {"": {field: getattr(policy, field) for field in ("tau", "density", "top_p", "top_k")}}
    for where, given in (fields | {f"layer {key}: ": given for key, given in own.items()}).items():
        for field, value in given.items():
            if isinstance(value, Sequence) and len(value) != heads:
                why.append(f"{where}{field} holds {len(value)} values, {name} has {heads} heads")
    if why:
        raise InputError(f"the policy does not fit {type(model).__name__}: " + "; ".join(why))
