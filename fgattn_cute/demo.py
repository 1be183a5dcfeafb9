# SPDX-License-Identifier: Apache-2.0
"""The main job on real input: a video's tokens, a mask found from q and k, sparse attention, and what it cost and lost.

``fgattn demo`` prints what :func:`run` returns. On a Hopper GPU the scene has the size of a 480p Wan 2.1 video;
elsewhere the same compiled kernel runs on the emulator, at a size that ends within about a minute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fgattn_cute import predict, reference
from fgattn_cute.api import attention, explain
from fgattn_cute.demo_scene import Scene, make_scene
from fgattn_cute.errors import DeviceError, refusal
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from fgattn_cute.predict.scores import slice_mass

SLICE_M = 128
SLICE_N = 1
KEPT_MASS = 0.95  # of each query block's softmax mass
ROWS_AT_ONCE = 2048  # queries whose probabilities are held in memory at a time
WARM_RUNS, TIMED_RUNS = 3, 10


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a scene is: frames of rows x columns patches, and attention heads."""

    frames: int
    rows: int
    columns: int
    heads: int


GPU_SIZE = Size(frames=21, rows=30, columns=52, heads=12)  # 32,760 tokens: Wan 2.1 1.3B at 480p
EMULATOR_SIZE = Size(frames=4, rows=24, columns=36, heads=2)


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demo found. Errors are largest absolute differences of out, except ``dense_change``.

    backend: "cuda" or "emulator"; machine: the GPU's name, or why the emulator runs.
    preset, why, kernel: what was chosen, the reason, and the compiled kernel's name.
    density: kept fraction of the (query, key) pairs; kept_mass: softmax mass that the kept pairs hold.
    error, lse_error: against the fp32 reference on the same keys; error_limit: what the contract allows.
    dense_change: |out - dense| / |dense| over all elements, the price of skipping.
    seconds: one call with everything compiled; setup_seconds: what the first call took besides.
    dense_seconds: torch's dense attention on the same GPU, None on the emulator.
    emulated_instructions: warp instructions that the emulator executed with all its checks on, None on a GPU.
    """

    backend: str
    machine: str
    photo: str
    tokens: int
    heads: int
    head_dim: int
    preset: str
    why: str
    kernel: str
    density: float
    kept_mass: float
    error: float
    error_limit: float
    lse_error: float
    dense_change: float
    seconds: float
    setup_seconds: float
    dense_seconds: float | None
    emulated_instructions: int | None
    picture: str


class Quiet:
    """Progress that nobody watches. A command line passes an object with the same two methods."""

    def track(self, title: str, items: list) -> Iterable:
        """Iterate over ``items`` while a bar advances."""
        return items

    def busy(self, title: str) -> contextlib.AbstractContextManager:
        """Cover one step whose share of the work cannot be seen."""
        return contextlib.nullcontext()


def run(out_dir: Path, *, backend: str = "auto", size: Size | None = None, progress: Quiet | None = None) -> Result:
    """Run the demo and write its picture into ``out_dir``.

    backend: "auto" takes the GPU if it is a Hopper and the emulator otherwise; "cuda" and "emulator" insist.
    size: the scene's size; by default what suits the backend.
    Raises what :func:`fgattn_cute.attention` raises, and DeviceError where a package of the extra `demo` is missing.
    """
    progress = progress or Quiet()
    missing = [name for name in ("skimage", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(f"the demo needs {' and '.join(missing)}: pip install 'fgattn-cute[demo]'")
    backend, machine = pick_backend(backend)
    size = size or (GPU_SIZE if backend == "cuda" else EMULATOR_SIZE)
    device = "cuda" if backend == "cuda" else "cpu"
    scene = make_scene(**dataclasses.asdict(size), device=device)
    q, k, v = scene.q, scene.k, scene.v

    with progress.busy("softmax mass of every slice"):
        mask = predict.mass(q, k, slice_m=SLICE_M, slice_n=SLICE_N, select=predict.TopP(KEPT_MASS))
        kept_mass = float(predict.recall(mask, q, k).mean())
    plan = Plan.from_mask(mask)
    choice = explain(q, k, v, plan).choice

    launched = _on_gpu(scene, plan, progress) if backend == "cuda" else _on_emulator(scene, plan, progress)
    out, lse = launched.pop("out"), launched.pop("lse")
    checked = _compare(scene, mask, out, lse, plan, progress)
    with progress.busy("drawing"):
        picture = _picture(scene, mask, Path(out_dir))
    return Result(
        backend=backend,
        machine=machine,
        photo=scene.photo,
        tokens=q.shape[1],
        heads=size.heads,
        head_dim=q.shape[-1],
        preset=choice.preset_id,
        why=choice.why,
        kernel=choice.spec.name,
        density=float(plan.density),
        kept_mass=kept_mass,
        picture=str(picture),
        **launched,
        **checked,
    )


def pick_backend(asked: str) -> tuple[str, str]:
    """(backend, the machine in words) for "auto", "cuda" or "emulator"; DeviceError for "cuda" without a Hopper."""
    if not torch.cuda.is_available():
        seen = "torch sees no CUDA device"
    elif torch.cuda.get_device_capability() != (9, 0):
        seen = f"{torch.cuda.get_device_name()} is no Hopper GPU"
    else:
        seen = None
    if asked == "emulator" or (asked == "auto" and seen):
        return "emulator", f"this CPU, because {seen or 'the emulator was asked for'}"
    if seen:
        raise DeviceError(
            refusal(
                "the demo cannot run on this machine's GPU", ["backend cuda"], [seen], "backend emulator, on any CPU"
            )
        )
    return "cuda", torch.cuda.get_device_name()


def _on_emulator(scene: Scene, plan: Plan, progress: Quiet) -> dict:
    """Two calls: the first compiles the kernel and, on a fresh machine, the emulator. A fault of the kernel raises."""
    from fgattn_cute import emulator

    started = time.perf_counter()
    with progress.busy("compiling the kernel and the emulator"), emulator.session(checks="all"):
        attention(scene.q, scene.k, scene.v, plan, backend="emulator")
    warm = time.perf_counter()
    with progress.busy("compiled kernel on the emulator"), emulator.session(checks="all") as emu:
        out, lse = attention(scene.q, scene.k, scene.v, plan, return_lse=True, backend="emulator")
    seconds = time.perf_counter() - warm
    instructions = sum(launch.result.counters["instructions"] for launch in emu.report())
    return {
        "out": out,
        "lse": lse,
        "seconds": seconds,
        "setup_seconds": warm - started - seconds,
        "dense_seconds": None,
        "emulated_instructions": instructions,
    }


def _on_gpu(scene: Scene, plan: Plan, progress: Quiet) -> dict:
    """Median times of a launch and of torch's dense attention on the same tensors."""
    q, k, v = scene.q, scene.k, scene.v
    across = [x.transpose(1, 2) for x in (q, k, v)]

    def median(call):
        taken = []
        for _ in range(WARM_RUNS + TIMED_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return statistics.median(taken[WARM_RUNS:])

    started = time.perf_counter()
    with progress.busy("compiling the kernel"):
        out, lse = attention(q, k, v, plan, return_lse=True, backend="cuda")
        torch.cuda.synchronize()
    setup_seconds = time.perf_counter() - started
    with progress.busy("compiled kernel on the GPU"):
        seconds = median(lambda: attention(q, k, v, plan, backend="cuda"))
        dense_seconds = median(lambda: torch.nn.functional.scaled_dot_product_attention(*across))
    return {
        "out": out,
        "lse": lse,
        "seconds": seconds,
        "setup_seconds": setup_seconds,
        "dense_seconds": dense_seconds,
        "emulated_instructions": None,
    }


def _compare(scene: Scene, mask: SliceMask, out, lse, plan: Plan, progress: Quiet) -> dict:
    """Errors against the fp32 reference on the same keys, the limit of the contract, and the change against dense."""
    q, k, v = scene.q, scene.k, scene.v
    with progress.busy("fp32 reference"):
        expected, expected_lse = reference.attention(q, k, v, plan, return_lse=True)
    keep = mask.to_dense()
    eager_error = changed = whole = 0.0
    for head in progress.track("dense attention, and torch in bf16", list(range(q.shape[2]))):
        for first in range(0, q.shape[1], ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            queries, keys, values = q[0, rows, head], k[0, :, head], v[0, :, head]
            dense = torch.softmax(queries.float() @ keys.float().T / math.sqrt(q.shape[-1]), -1) @ values.float()
            changed += float((out[0, rows, head].float() - dense).square().sum())
            whole += float(dense.square().sum())
            kept = keep[0, head].repeat_interleave(SLICE_M, 0)[: q.shape[1]][rows]
            scores = (queries @ keys.T / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
            eager = torch.softmax(scores.float(), -1).to(q.dtype) @ values
            eager_error = max(eager_error, float((eager.float() - expected[0, rows, head].float()).abs().max()))
    rounding = float((expected.to(q.dtype).float() - expected.float()).abs().max())
    return {
        "error": float((out.float() - expected.float()).abs().max()),
        "error_limit": 2 * eager_error + rounding,
        "lse_error": float((lse - expected_lse).abs().max()),
        "dense_change": math.sqrt(changed / whole),
    }


def _picture(scene: Scene, mask: SliceMask, out_dir: Path, head: int = 0) -> Path:
    from fgattn_cute.demo_picture import draw

    q, k = scene.q[0, :, head], scene.k[0, :, head]
    chunks = slice_mass(q, k, None, slice_m=SLICE_M, slice_n=SLICE_N, scale=q.shape[-1] ** -0.5)
    mass = torch.cat([scores for _, scores in chunks])
    return draw(scene, mask.to_dense()[0, head].cpu(), mass.cpu(), SLICE_M, out_dir / "attention.png")
