# SPDX-License-Identifier: Apache-2.0
"""Dense and sparse video side by side, on any CPU: python examples/sparse_video.py

A Wan transformer of toy size learns, in about a minute, to make videos of a ball that crosses a sky. Then the real
WanPipeline of diffusers makes one video dense and sparse, from the same noise, and a report sets them side by side.
"""

from __future__ import annotations

import argparse
import math
import types
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image

from fgattn_cute import quality, quality_report
from fgattn_cute.integrations.diffusers import SparsePolicy, calibrate, disable, enable

FRAMES, SIZE = 5, 16  # of the latents; a token is 1 x 2 x 2 of them: 320 tokens
SHIFT = 3.0  # of the noise schedule, in training and in sampling
BASE = SparsePolicy(slice_m=16, tau=0.0, dense_steps=0.2, dense_layers=[0], refresh_every=2, tile=(1, 4, 4))


class IdentityVae(torch.nn.Module):
    """Shows latents as they are: three channels are red, green and blue, and time is twice as fine."""

    def __init__(self):
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = types.SimpleNamespace(
            scale_factor_temporal=2, scale_factor_spatial=1, z_dim=3, latents_mean=[0.0] * 3, latents_std=[1.0] * 3
        )

    def decode(self, latents: torch.Tensor, return_dict: bool = True):
        frames, height, width = latents.shape[2:]
        size = (2 * frames - 1, height, width)
        return (torch.nn.functional.interpolate(latents, size, mode="trilinear", align_corners=True),)


def balls(count: int, generator: torch.Generator) -> torch.Tensor:
    """Videos (count, 3, frames, size, size), -1 to 1: a ball on its way across a sky, in a random direction."""
    time = torch.linspace(-0.5, 0.5, FRAMES).view(1, -1, 1, 1)
    y, x = torch.linspace(-1, 1, SIZE).view(1, 1, -1, 1), torch.linspace(-1, 1, SIZE).view(1, 1, 1, -1)
    place = torch.rand(3, count, 1, 1, 1, generator=generator)
    angle = 2 * math.pi * place[0]
    distance = torch.hypot(
        x - 0.8 * (place[1] - 0.5) - time * torch.cos(angle), y - 0.8 * (place[2] - 0.5) - time * torch.sin(angle)
    )
    ball = torch.sigmoid(15 * (0.4 - distance))
    colours = ((-0.6, 0.15, 1.5), (-0.4, -0.15, 0.9), (0.5, -0.4, -1.0))
    return torch.stack([sky + slope * y + light * ball for sky, slope, light in colours], 1).clamp(-1, 1)


def trained_transformer(steps: int) -> WanTransformer3DModel:
    """Flow matching: the transformer learns the velocity from a video to noise, at random noise levels."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=64,
        ffn_dim=192,
        num_layers=3,
        rope_max_seq_len=64,
    )
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for step in range(steps):
        videos = balls(4, generator)
        noise = torch.randn(videos.shape, generator=generator)
        level = torch.rand(4, generator=generator)
        level = SHIFT * level / (1 + (SHIFT - 1) * level)
        mixed = torch.lerp(videos, noise, level.view(-1, 1, 1, 1, 1))
        velocity = model(mixed, 1000 * level, torch.zeros(4, 1, 8)).sample
        loss = torch.nn.functional.mse_loss(velocity, noise - videos)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if (step + 1) % 50 == 0:
            print(f"trained {step + 1} of {steps} steps, loss {loss.item():.3f}", flush=True)
    return model.eval()


def toy_pipeline(train_steps: int) -> WanPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = WanPipeline(None, None, IdentityVae(), scheduler, trained_transformer(train_steps))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments_of(seed: int, steps: int) -> dict:
    """Of one run of the pipeline; its only prompt is an empty one."""
    size = {"height": SIZE, "width": SIZE, "num_frames": 2 * FRAMES - 1}
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.zeros(1, 1, 8)
    return {"generator": generator, "prompt_embeds": embeds, "guidance_scale": 1.0, "num_inference_steps": steps} | size


def save_gif(frames: np.ndarray, path: Path) -> None:
    pictures = [Image.fromarray(frame).resize((12 * SIZE, 12 * SIZE), Image.Resampling.BICUBIC) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=400, help="training steps of the toy transformer")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--recall", type=float, default=0.9, help="share of the softmax mass to keep")
    parser.add_argument("--out", type=Path, default=Path(".sparse_video"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe = toy_pipeline(options.train)
    dense = quality.as_frames(pipe(**arguments_of(5, options.steps)).frames)

    runs = [arguments_of(seed, options.steps) for seed in (1, 2)]
    policy = calibrate(pipe, runs, options.recall, base=BASE, path=options.out / "policy.yaml")

    handle = enable(pipe, policy)
    sparse = quality.as_frames(pipe(**arguments_of(5, options.steps)).frames)
    print(handle.report())
    disable(handle)

    for name, frames in (("dense", dense), ("sparse", sparse)):
        save_gif(frames, options.out / f"{name}.gif")
    comparison = quality.compare(dense, sparse)
    facts = comparison.as_dict()
    print(f"PSNR {quality_report.decibels(facts['psnr'])}, SSIM {facts['ssim']:.4f}")
    print(quality_report.write(comparison, options.out))


if __name__ == "__main__":
    main()
