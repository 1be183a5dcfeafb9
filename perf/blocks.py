# SPDX-License-Identifier: Apache-2.0
"""One transformer block of a video model, dense against sparse: what of the attention's gain a whole model can see.

    python -m perf.blocks --out results.jsonl [--model wan-14b-480p] [--density 0.5 0.3 0.1]

Weights and inputs are random, the shapes are the models' own; diffusers' blocks run as they are, in eager mode, and
sparse attention comes in through ``fgattn_cute.integrations.diffusers``. Each round runs every variant once: dense by
several libraries, then for each density a call that finds its masks ("find") and calls that reuse them ("reuse").
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fgattn_cute.integrations import engine
from fgattn_cute.integrations.diffusers import SparsePolicy, enable
from fgattn_cute.integrations.report import Stopwatch
from perf.run import clocks, environment, write

DENSE_SHARE, REFRESH = 0.2, 5  # of a run: the policy's defaults
REUSES = 2  # calls that reuse a mask, per round


@dataclasses.dataclass(frozen=True)
class Model:
    """build: a transformer with one block of each kind. inputs: arguments of a call. blocks: kind -> (block, how many
    of them the real model has)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    blocks: Callable[[nn.Module], dict[str, tuple[nn.Module, int]]]


def wan(**config) -> nn.Module:
    """Wan 2.1's transformer with one block; 14B by default."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=1, **config).eval()


def hunyuan() -> nn.Module:
    """HunyuanVideo's transformer with one block of two streams and one of one."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1).eval()


def wan_inputs(frames: int, height: int, width: int) -> dict:
    """Arguments of a call for a latent of that size; every text has 512 tokens."""
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }


def hunyuan_inputs(frames: int, height: int, width: int) -> dict:
    """As for Wan, with 256 text tokens, none of them padding."""
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


_WAN_BLOCKS = lambda model: {"block": (model.blocks[0], 40)}
_HUNYUAN_BLOCKS = lambda model: {
    "double": (model.transformer_blocks[0], 20),
    "single": (model.single_transformer_blocks[0], 40),
}
MODELS = {
    "wan-14b-480p": Model(wan, lambda: wan_inputs(21, 60, 104), _WAN_BLOCKS),
    "wan-14b-720p": Model(wan, lambda: wan_inputs(21, 90, 160), _WAN_BLOCKS),
    "hunyuan-720p": Model(hunyuan, lambda: hunyuan_inputs(33, 90, 160), _HUNYUAN_BLOCKS),
}


# ---- dense attention by others ------------------------------------------------------------------------------------
def _sdpa(backend: str):
    def attend(q, k, v):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _torch_sdpa(q, k, v)

    return attend


def fa4(q, k, v):
    """flash-attn-4 for (batch, heads, seqlen, head_dim)."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


_torch_sdpa = torch.nn.functional.scaled_dot_product_attention
DENSE = {"fa4-dense": fa4, "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"), "sdpa-flash": _sdpa("FLASH_ATTENTION")}


class Dense(TorchFunctionMode):
    """Answers self-attention, the softmax attention with as many keys as queries, by a library, under a clock.

    A bool mask is left out: nothing is padded here, and with a mask libraries take slower ways.
    """

    def __init__(self, attend, clock):
        super().__init__()
        self._attend, self._clock = attend, clock

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, k, v = (given.get(name) for name in ("query", "key", "value"))
        if func is not _torch_sdpa or q.shape[2] != k.shape[2] or q.shape[2] < MIN_TOKENS:
            return func(*args, **(kwargs or {}))
        with self._clock():
            return self._attend(q, k, v)


MIN_TOKENS = 1024  # a text encoder's own attention is shorter than the video's


# ---- one variant --------------------------------------------------------------------------------------------------
class Clocks:
    """Stopwatches of blocks and of the attention inside them, in the order of the calls."""

    def __init__(self, device: torch.device):
        self._device = device
        self.blocks: dict[str, list[Stopwatch]] = {}
        self.attention: list[Stopwatch] = []

    @contextlib.contextmanager
    def around_attention(self):
        with Stopwatch(self._device) as watch:
            yield
        self.attention.append(watch)

    @contextlib.contextmanager
    def on(self, blocks: dict[str, nn.Module]):
        """Hooks on the blocks for the time of a ``with``."""
        with contextlib.ExitStack() as stack:
            for name, block in blocks.items():
                watch = self.blocks.setdefault(name, [])

                def before(*_, watch=watch):
                    watch.append(Stopwatch(self._device).__enter__())

                def after(*_, watch=watch):
                    watch[-1].__exit__()

                stack.enter_context(_removed(block.register_forward_pre_hook(before)))
                stack.enter_context(_removed(block.register_forward_hook(after)))
            yield

    def milliseconds(self, name: str, call: int) -> tuple[float, float]:
        """(block, its attention) of a call; blocks of a call ran in the order of ``blocks``."""
        place = call * len(self.blocks) + list(self.blocks).index(name)
        return self.blocks[name][call].milliseconds, self.attention[place].milliseconds


@contextlib.contextmanager
def _removed(hook):
    try:
        yield
    finally:
        hook.remove()


def run_dense(model, arguments: dict, blocks: dict[str, nn.Module], attend) -> list[tuple[str, Clocks, int]]:
    """[("dense", clocks, call)] of one call."""
    watched = Clocks(arguments["hidden_states"].device)
    with watched.on(blocks), Dense(attend, watched.around_attention):
        model(**arguments)
    return [("dense", watched, 0)]


def run_sparse(model, arguments: dict, blocks: dict[str, nn.Module], policy) -> list[tuple[str, Clocks, int]]:
    """[("find", clocks, 0), ("reuse", clocks, 1), ...]: one call that finds its masks, then some that reuse them."""
    watched = Clocks(arguments["hidden_states"].device)
    plain = engine.attend_bshd

    def timed(*args, **options):
        with watched.around_attention():
            return plain(*args, **options)

    with mock.patch.object(engine, "attend_bshd", timed), watched.on(blocks), enable(model, policy):
        for step in range(1 + REUSES):
            model(**arguments | {"timestep": arguments["timestep"] - step})
    return [("find" if call == 0 else "reuse", watched, call) for call in range(1 + REUSES)]


# ---- all of a model -----------------------------------------------------------------------------------------------
def policies(slices, densities, backend: str = "auto") -> dict[tuple, SparsePolicy]:
    """{(slice_m, density): policy}: masks by mass, kept for ever, nothing dense."""
    common = {"dense_steps": 0, "refresh_every": 1 << 20, "plan_memory_gb": 64.0, "backend": backend}
    return {
        (m, density): SparsePolicy(slice_m=m, rule="mass", density=density, **common)
        for m, density in itertools.product(slices, densities)
    }


@torch.no_grad()
def measure(name: str, model: Model, device: str, dense: dict, sparse: dict, rounds: int) -> Iterator[dict]:
    """One record per block, variant and action, then one per variant for the whole model; the first round warms up."""
    with torch.device(device):
        torch.manual_seed(0)
        transformer = model.build().to(torch.bfloat16)
        arguments = {k: _cast(v) for k, v in model.inputs().items()}
    kinds = model.blocks(transformer)
    blocks = {kind: block for kind, (block, _) in kinds.items()}
    samples: dict[tuple, list[tuple[float, float]]] = {}
    broken: dict[tuple, str] = {}
    for turn in range(rounds + 1):
        for key, run in _variants(transformer, arguments, blocks, dense, sparse).items():
            if key in broken:
                continue
            try:
                found = run()
                for action, watched, call in found if turn else ():
                    for kind in blocks:
                        samples.setdefault((*key, kind, action), []).append(watched.milliseconds(kind, call))
            except Exception as why:  # a library that is absent or fails: the others go on
                broken[key] = f"{type(why).__name__}: {str(why).strip().splitlines()[0][:300] if str(why) else ''}"
    about = {"kind": "block", "model": name, "clocks": clocks()}
    for (provider, m, density), why in broken.items():
        yield {**about, "provider": provider, "slice_m": m, "density": density, "absent": why}
    median = {key: tuple(map(statistics.median, zip(*pairs, strict=True))) for key, pairs in samples.items()}
    for (provider, m, density, kind, action), (whole, attention) in median.items():
        yield {
            **about,
            "provider": provider,
            "slice_m": m,
            "density": density,
            "block": kind,
            "action": action,
            "block_ms": round(whole, 3),
            "attention_ms": round(attention, 3),
            "attention_share": round(attention / whole, 4),
            "samples": len(samples[provider, m, density, kind, action]),
        }
    yield from bounds(about, {kind: number for kind, (_, number) in kinds.items()}, median)


def _cast(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16) if value.ndim > 1 else value


def _variants(transformer, arguments, blocks, dense, sparse) -> dict[tuple, Callable]:
    common = (transformer, arguments, blocks)
    made = {(name, None, None): lambda a=attend: run_dense(*common, a) for name, attend in dense.items()}
    return made | {("ours", *key): lambda p=policy: run_sparse(*common, p) for key, policy in sparse.items()}


def bounds(about: dict, numbers: dict[str, int], median: dict[tuple, tuple[float, float]]) -> Iterator[dict]:
    """What the blocks' times mean for all blocks of the model and for a run, against the fastest dense attention.

    A run: the first DENSE_SHARE of its steps dense, of the others one in REFRESH finds its masks. Embeddings, text
    encoder and VAE are left out, so a pipeline gains less.
    """

    def total(provider, m, density, action) -> float:
        return sum(number * median[provider, m, density, kind, action][0] for kind, number in numbers.items())

    dense = {key[0]: total(*key[:3], "dense") for key in median if key[4] == "dense"}
    if not dense:
        return
    best = min(dense, key=dense.get)
    for provider, m, density in dict.fromkeys(key[:3] for key in median if key[4] == "reuse"):
        reuse, find = (total(provider, m, density, action) for action in ("reuse", "find"))
        run = DENSE_SHARE * dense[best] + (1 - DENSE_SHARE) * (find + (REFRESH - 1) * reuse) / REFRESH
        yield {
            **about,
            "kind": "bound",
            "provider": provider,
            "slice_m": m,
            "density": density,
            "against": best,
            "dense_blocks_ms": round(dense[best], 1),
            "sparse_blocks_ms": round(reuse, 1),
            "finding_blocks_ms": round(find, 1),
            "speedup_of_a_sparse_step": round(dense[best] / reuse, 3),
            "speedup_of_a_run": round(dense[best] / run, 3),
        }


def main() -> None:
    """Appends JSON records to a file; exit code 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--density", nargs="*", type=float, default=[0.5, 0.3, 0.1])
    parser.add_argument("--slice-m", nargs="*", type=int, default=[128, 192])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing is measured")
    write(options.out, iter([environment()]), lambda said: None)
    for name in options.model:
        sparse = policies(options.slice_m, options.density)
        records = measure(name, MODELS[name], "cuda", DENSE, sparse, options.rounds)
        write(options.out, records, lambda said: print(said, file=sys.stderr))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
