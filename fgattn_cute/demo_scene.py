# SPDX-License-Identifier: Apache-2.0
"""The demo's input: a photograph becomes a short video, the video patch tokens, the tokens queries, keys and values.

No weights are needed. Attention in a video model is peaked because similar patches that lie near each other in space
and time score high; the fixed projections here keep exactly that: random directions keep the similarity of features
(Johnson and Lindenstrauss), and a vector common to q and k turns the rotary embedding into a preference for the near.
"""

from __future__ import annotations

import dataclasses
import math

import torch

PATCH_PX = 8
FEATURES = 48  # principal components that are kept of a patch's 192 colour values
PIXELS_PER_FRAME = 6  # camera pan
ROTARY_BASE = 10_000.0
CONTENT_LOGIT = 11.0  # logit of a patch with itself that its content gives, in nats before the rotary embedding
POSITION_LOGIT = 9.0  # the same for position alone


@dataclasses.dataclass(frozen=True)
class Scene:
    """A video and its attention inputs.

    frames: uint8 (T, height, width, 3), a window that pans over the photograph.
    grid: patches as (T, rows, columns); token t * rows * columns + row * columns + column.
    q, k, v: (1, S, H, D) of the dtype asked for.
    """

    photo: str
    frames: torch.Tensor
    grid: tuple[int, int, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_scene(
    *,
    frames: int,
    rows: int,
    columns: int,
    heads: int,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Scene:
    """Build the scene of ``frames * rows * columns`` tokens; the same arguments give the same tensors."""
    photo = load_photo()
    video = pan(photo, frames=frames, height=rows * PATCH_PX, width=columns * PATCH_PX)
    grid = (frames, rows, columns)
    features = whiten(patches(video), FEATURES)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = project(features, grid, heads, head_dim, generator)
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k, v))
    return Scene(photo="chelsea, scikit-image's cat", frames=video, grid=grid, q=q, k=k, v=v)


def load_photo() -> torch.Tensor:
    """uint8 (300, 451, 3): a photograph that lies inside scikit-image's wheel, so nothing is downloaded."""
    from skimage import data

    return torch.from_numpy(data.chelsea().copy())


def pan(photo: torch.Tensor, *, frames: int, height: int, width: int) -> torch.Tensor:
    """(T, height, width, 3): a window that moves by whole pixels from frame to frame, as a camera pan."""
    room_y, room_x = photo.shape[0] - height, photo.shape[1] - width
    if room_y < 0 or room_x < 0:
        raise ValueError(f"a frame of {height} x {width} pixels is larger than the photograph {tuple(photo.shape[:2])}")
    steps = max(1, frames - 1)
    step_y, step_x = (min(PIXELS_PER_FRAME, room // steps) for room in (room_y, room_x))
    top, left = (room_y - steps * step_y) // 2, (room_x - steps * step_x) // 2
    windows = [photo[top + t * step_y :, left + t * step_x :][:height, :width] for t in range(frames)]
    return torch.stack(windows)


def patches(video: torch.Tensor) -> torch.Tensor:
    """uint8 (T, height, width, 3) -> fp32 (tokens, 3 * PATCH_PX**2) in [-1, 1]."""
    frames, height, width, colours = video.shape
    tiles = video.reshape(frames, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX, colours)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, PATCH_PX * PATCH_PX * colours).float() / 127.5 - 1


def whiten(tokens: torch.Tensor, components: int) -> torch.Tensor:
    """Principal components of unit variance, then unit length: (tokens, components), without the mean brightness.

    Full whitening would make noise as loud as content, so each component keeps the fourth root of its variance.
    """
    centred = (tokens - tokens.mean(0)).double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    variance, axes = variance[-components:], axes[:, -components:]
    features = centred @ axes * variance.clamp_min(1e-12).pow(-0.25)
    return torch.nn.functional.normalize(features, dim=-1).float()


def project(
    features: torch.Tensor, grid: tuple[int, int, int], heads: int, head_dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (S, F) -> q, k, v fp32 (1, S, H, D) by random directions of each head and a 3-D rotary embedding.

    q and k share their directions, so q . k estimates the similarity of two patches; heads differ in how they weigh
    content against position, as heads of trained models do.
    """
    tokens = len(features)
    size = features.shape[1], heads * head_dim
    directions = torch.randn(size, generator=generator) / math.sqrt(head_dim)
    content = (features @ directions).view(tokens, heads, head_dim)
    values = (features @ torch.randn(size, generator=generator)).view(tokens, heads, head_dim)
    share = torch.linspace(0.9, 1.1, heads).view(1, heads, 1) if heads > 1 else torch.ones(1, 1, 1)
    # scale = D**-0.5 is applied by attention, so |q| |k| must be sqrt(D) times the logit wanted.
    amplitude = head_dim**0.25
    common = torch.full((1, 1, head_dim), 1 / math.sqrt(head_dim))
    mixed = content * (CONTENT_LOGIT * share).sqrt() + common * (POSITION_LOGIT * (2 - share)).sqrt()
    rotated = rotary(amplitude * mixed, grid)
    return rotated[None], rotated[None].clone(), values[None]


def rotary(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """3-D rotary embedding of x (S, H, D): channels split among time, rows and columns as Wan 2.1 splits them."""
    half = x.shape[-1] // 2
    spatial = half // 3
    widths = (half - 2 * spatial, spatial, spatial)
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = torch.cat(
        [
            position.reshape(-1, 1) * ROTARY_BASE ** (-torch.arange(width, dtype=torch.float32) / width)
            for position, width in zip(positions, widths, strict=True)
        ],
        dim=-1,
    )[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
