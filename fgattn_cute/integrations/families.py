# SPDX-License-Identifier: Apache-2.0
"""What has to be known about each supported transformer: its self-attention layers, its token grid, its arguments.

Nothing of a model's arithmetic is repeated here. Its own attention processor runs; only the one call of softmax
attention inside it is answered by fgattn_cute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import nn

MIN_DIFFUSERS = (0, 36)


@dataclasses.dataclass(frozen=True)
class Family:
    """One transformer class of diffusers.

    model: its class name.
    processors: names of the attention processors whose arithmetic ends in one softmax attention over the sequence.
    layers: self-attention modules in the order in which they run.
    grid: (frames, rows, columns) of its tokens for the arguments of a forward call; None where they do not say.
    text: "none", "first" or "last": where text tokens stand in the attended sequence.
    rotary_dim: dimension of the rotary tables that counts video tokens.
    calls_per_entry: attention is called once per batch entry (with its own text length), not once per batch.
    """

    model: str
    processors: tuple[str, ...]
    layers: Callable[[nn.Module], list[nn.Module]]
    grid: Callable[[nn.Module, Mapping], tuple[int, int, int] | None]
    text: str = "none"
    rotary_dim: int = 0
    calls_per_entry: bool = False


def _attn1(list_name: str) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [block.attn1 for block in getattr(model, list_name)]


def _wan_grid(model: nn.Module, arguments: Mapping) -> tuple[int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    t, h, w = model.config.patch_size
    return frames // t, height // h, width // w


def _hunyuan_grid(model: nn.Module, arguments: Mapping) -> tuple[int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    config = model.config
    return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size


def _cogvideox_grid(model: nn.Module, arguments: Mapping) -> tuple[int, int, int]:
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return -(-frames // patch_t), height // patch, width // patch


def _mochi_grid(model: nn.Module, arguments: Mapping) -> tuple[int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    return frames, height // model.config.patch_size, width // model.config.patch_size


def _ltx_grid(model: nn.Module, arguments: Mapping) -> tuple[int, int, int] | None:
    grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if None in grid else grid


FAMILIES = {
    family.model: family
    for family in (
        Family("WanTransformer3DModel", ("WanAttnProcessor",), _attn1("blocks"), _wan_grid, rotary_dim=1),
        Family(
            "HunyuanVideoTransformer3DModel",
            ("HunyuanVideoAttnProcessor2_0",),
            lambda model: [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)],
            _hunyuan_grid,
            text="last",
        ),
        Family(
            "HunyuanVideo15Transformer3DModel",
            ("HunyuanVideo15AttnProcessor2_0",),
            lambda model: [block.attn for block in model.transformer_blocks],
            _hunyuan_grid,
            text="last",
        ),
        Family(
            "CogVideoXTransformer3DModel",
            ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
            _attn1("transformer_blocks"),
            _cogvideox_grid,
            text="first",
        ),
        Family(
            "MochiTransformer3DModel",
            ("MochiAttnProcessor2_0",),
            _attn1("transformer_blocks"),
            _mochi_grid,
            text="last",
            calls_per_entry=True,
        ),
        Family(
            "LTXVideoTransformer3DModel",
            ("LTXVideoAttnProcessor",),
            _attn1("transformer_blocks"),
            _ltx_grid,
            rotary_dim=1,
        ),
    )
}


def family_of(model: object) -> Family | None:
    """The family of a transformer, or None."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("diffusers."):
            return FAMILIES[cls.__name__]
    return None
