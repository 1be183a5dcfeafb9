# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1, dense and sparse, on a Hopper GPU: python examples/wan_sparse.py --prompt "..."

The first run calibrates a policy and keeps it; later runs read it. docs/wan.md explains every step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

from fgattn_cute import quality, quality_report
from fgattn_cute.integrations.diffusers import SparsePolicy, calibrate, enable

PROMPTS = ["a fox runs through fresh snow", "waves break on a rocky coast at sunset", "a street market at night"]


def generate(pipe: WanPipeline, prompt: str, seed: int, **size):
    """(frames, seconds) of one run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    frames = pipe(prompt, generator=torch.Generator("cuda").manual_seed(seed), **size).frames
    torch.cuda.synchronize()
    return frames, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--prompt", default="a hot air balloon over a valley in the morning")
    parser.add_argument("--recall", type=float, default=0.95, help="share of the softmax mass to keep")
    parser.add_argument("--policy", type=Path, default=Path("wan_policy.yaml"), help="read, or calibrated and written")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("wan_sparse"))
    options = parser.parse_args()
    size = {"height": options.height, "width": options.width, "num_frames": options.num_frames}

    vae = AutoencoderKLWan.from_pretrained(options.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(options.model, vae=vae, torch_dtype=torch.bfloat16).to("cuda")

    if not options.policy.exists():
        base = SparsePolicy(slice_m=128, slice_n=1, tau=0.0, dense_steps=0.2, refresh_every=5)
        calibrate(pipe, PROMPTS, options.recall, base=base, path=options.policy, **size)
    policy = SparsePolicy.from_yaml(options.policy)

    dense, dense_seconds = generate(pipe, options.prompt, options.seed, **size)
    with enable(pipe, policy) as handle:
        generate(pipe, options.prompt, options.seed, num_inference_steps=8, **size)  # compiles the kernel
        sparse, sparse_seconds = generate(pipe, options.prompt, options.seed, **size)
    print(handle.report())
    print(f"dense {dense_seconds:.1f} s, sparse {sparse_seconds:.1f} s: {dense_seconds / sparse_seconds:.2f} x")

    options.out.mkdir(parents=True, exist_ok=True)
    for name, frames in (("dense", dense), ("sparse", sparse)):
        export_to_video(frames[0], str(options.out / f"{name}.mp4"), fps=16)
    print(quality_report.write(quality.compare(dense, sparse), options.out))


if __name__ == "__main__":
    main()
