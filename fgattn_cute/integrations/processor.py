# SPDX-License-Identifier: Apache-2.0
"""The attention processor that stands in for a model's own: it runs that one, and answers its softmax attention.

Inside the model's processor every road leads to one ``torch.nn.functional.scaled_dot_product_attention`` (diffusers'
"native" back end calls it too, also inside its Ulysses context parallelism). A TorchFunctionMode, in force during that
processor's call only, hands the call to the engine. If it is not met as often as the model's family says, the call
fails: nothing runs dense in silence.
"""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode

from fgattn_cute.errors import FgAttnError, UnsupportedError
from fgattn_cute.integrations.engine import Engine
from fgattn_cute.integrations.report import Record, Stopwatch

_NATIVE = "native"  # diffusers' name for scaled_dot_product_attention


class _Answer(TorchFunctionMode):
    """Sends softmax attention to a function, and everything else where it was going."""

    def __init__(self, answer):
        super().__init__()
        self._answer, self.calls = answer, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._answer(self.calls - 1, *args, **(kwargs or {}))


class SparseProcessor:
    """Attention processor of one self-attention layer.

    Args:
        inner: the model's own processor.
        engine: the transformer's engine.
        layer: index of the layer.
    """

    def __init__(self, inner, engine: Engine, layer: int):
        self.inner, self.engine, self.layer = inner, engine, layer
        # A compiled transformer block calls this part as it is: steps, masks and records are no matter for a graph.
        self._run = torch.compiler.disable(self._attend)

    # diffusers reads and sets these on processors: they belong to the model's own one.
    @property
    def _attention_backend(self):
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.inner._attention_backend = value

    @property
    def _parallel_config(self):
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.inner._parallel_config = value

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb=None,
        image_rotary_emb=None,
    ):
        rotary = rotary_emb if rotary_emb is not None else image_rotary_emb
        return self._run(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)

    def _attend(self, *arguments):
        """Dense or sparse, as the moment demands; ``arguments`` are those of the model's processor."""
        dense = self.engine.is_dense(self.layer)
        self.engine.fresh.clear()
        with Stopwatch(arguments[1].device) as watch:
            out = self.inner(*arguments) if dense else self._sparse(*arguments)
        if dense:
            self.engine.record(self.layer, 0, Record("dense", self.engine.heads))
        for record in self.engine.fresh:
            record.call, record.entries = watch, len(self.engine.fresh)
        return out

    def _sparse(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary):
        """The model's processor with its attention answered, in tile order where the policy asks for it."""
        order, parallel = self.engine.scene.order, _parallel(self.inner)
        if order is not None and parallel is None:
            hidden_states = order.apply(hidden_states, 1)
            rotary = None if rotary is None else self.engine.permuted_rotary(rotary, order)
        expected = hidden_states.shape[0] if self.engine.family.calls_per_entry else 1
        answer = _Answer(self._answer_alone if parallel is None else self._answer_parallel(parallel))
        with _attributes(self.inner, _attention_backend=_NATIVE, **_handed_over(parallel)), answer:
            out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        if answer.calls != expected:
            raise FgAttnError(
                f"{type(self.inner).__name__} of {self.engine.component} layer {self.layer} computed attention "
                f"{answer.calls} times where fgattn_cute can answer, not {expected}: its result would not be the "
                "sparse one. This version of diffusers is unknown here"
            )
        if order is None or parallel is not None:
            return out
        return (order.restore(out[0], 1), *out[1:]) if isinstance(out, tuple) else order.restore(out, 1)

    def _answer_alone(
        self,
        entry: int,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        self._check(dropout_p, is_causal, enable_gqa)
        heads = range(query.shape[1])
        return self.engine.attend(self.layer, query, key, value, attn_mask, scale, entry, heads)

    def _answer_parallel(self, parallel):
        """Answers for ranks that share a sequence: by heads inside diffusers' Ulysses, by keys in a ring of ours."""

        def answer(
            entry,
            query,
            key,
            value,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            scale=None,
            enable_gqa=False,
        ):
            self._check(dropout_p, is_causal, enable_gqa)
            if attn_mask is not None:
                raise UnsupportedError("an attention mask under context parallelism: which tokens it means is unknown")
            if parallel.ring_degree > 1:
                group = parallel._ring_mesh.get_group()
                return self.engine.attend_ring(self.layer, query, key, value, scale, group)
            first = parallel._ulysses_local_rank * query.shape[1]
            heads, order = range(first, first + query.shape[1]), self.engine.scene.order
            if order is not None:
                query, key, value = (order.apply(x, 2) for x in (query, key, value))
            out = self.engine.attend(self.layer, query, key, value, None, scale, entry, heads)
            return out if order is None else order.restore(out, 2)

        return answer

    def _check(self, dropout_p, is_causal, enable_gqa) -> None:
        asked = {"dropout": dropout_p, "causal attention": is_causal, "grouped queries": enable_gqa}
        wrong = [name for name, value in asked.items() if value]
        if wrong:
            raise UnsupportedError(
                f"{type(self.inner).__name__} asks for {', '.join(wrong)}, which sparse attention here does not cover"
            )


def _parallel(inner):
    """diffusers' context-parallel configuration of a processor, or None.

    Raises:
        UnsupportedError: both kinds of sharding at once.
    """
    config = getattr(getattr(inner, "_parallel_config", None), "context_parallel_config", None)
    if config is not None and config.ring_degree > 1 and config.ulysses_degree > 1:
        raise UnsupportedError(
            f"context parallelism with ring_degree={config.ring_degree} and ulysses_degree={config.ulysses_degree}: "
            "sparse attention runs with one of the two above 1"
        )
    return config


def _handed_over(parallel) -> dict:
    """diffusers' own ring needs back ends that return an LSE; ours takes the local q, k and v instead."""
    return {"_parallel_config": None} if parallel is not None and parallel.ring_degree > 1 else {}


@contextlib.contextmanager
def _attributes(target, **values):
    """Sets attributes that the target has, for the time of a ``with``."""
    values = {name: value for name, value in values.items() if hasattr(target, name)}
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(target, name)
        vars(target).update(own)
