# SPDX-License-Identifier: Apache-2.0
"""Masks from rules that know positions only: windows in space and time, strides, tokens that are always kept.

A rule judges pairs of tokens; a slice is kept if any of its pairs is. All masks here are shared by batch and heads;
``stack_heads`` gives each head its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from fgattn_cute.errors import InputError, MaskError
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict.dynamic import recall
from fgattn_cute.tokens import slices_from_tokens


@dataclasses.dataclass(frozen=True)
class Video:
    """Where each token of a sequence sits: frames x height x width video tokens and some text tokens.

    frames, height, width: the latent grid; video tokens run over width first, then height, then frames.
    text: text or register tokens.
    text_first: the text stands before the video (it stands behind it by default).
    tile: reorder the video tokens tile by tile, (frames, height, width) of one tile, as Sliding Tile Attention does.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False
    tile: tuple[int, int, int] | None = None

    def __post_init__(self):
        if min(self.frames, self.height, self.width) < 1 or self.text < 0:
            raise InputError(f"a video of {self.frames} x {self.height} x {self.width} with {self.text} text tokens")
        if self.tile is not None and (len(self.tile) != 3 or min(self.tile) < 1):
            raise InputError(f"tile={self.tile!r} is not three sizes of at least 1")

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def seqlen(self) -> int:
        return self.video_tokens + self.text

    def order(self) -> torch.Tensor:
        """int64 (seqlen,): the token in plain order that stands at each position. The identity without ``tile``."""
        grid = self._plain()
        index = torch.arange(self.video_tokens)
        if self.tile is not None:
            key = torch.zeros(self.video_tokens, dtype=torch.int64)
            for axis, size, tile in zip(grid, (self.frames, self.height, self.width), self.tile, strict=True):
                key = key * -(-size // tile) + axis // tile
            index = torch.sort(key, stable=True).indices
        text = torch.arange(self.text)
        return torch.cat([text, index + self.text] if self.text_first else [index, text + self.video_tokens])

    def coordinates(self) -> torch.Tensor:
        """int64 (3, seqlen): frame, row and column of each position; -1 for text."""
        plain = torch.full((3, self.seqlen), -1)
        start = self.text if self.text_first else 0
        plain[:, start : start + self.video_tokens] = torch.stack(self._plain())
        return plain[:, self.order()]

    def _plain(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = torch.arange(self.video_tokens)
        area = self.height * self.width
        return index // area, index % area // self.width, index % self.width


# ---- from any rule ----------------------------------------------------------------------------------------------
def from_rule(
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    slice_m: int,
    slice_n: int,
    seqlen_q: int,
    seqlen_k: int,
    device="cpu",
) -> SliceMask:
    """Keeps the slices that hold a pair the rule keeps.

    Args:
        rule: function of query positions int64 (rows, 1) and key positions int64 (1, seqlen_k) returning bool that
            broadcasts to (rows, seqlen_k). It is called for some query blocks at a time.
        slice_m, slice_n, seqlen_q, seqlen_k, device: of the mask.
    """
    keys = torch.arange(seqlen_k, device=device).unsqueeze(0)

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        rows = torch.arange(start, stop, device=device).unsqueeze(1)
        return rule(rows, keys).expand(stop - start, seqlen_k)[None, None]

    return slices_from_tokens(
        tokens_of,
        batch=1,
        heads=1,
        slice_m=slice_m,
        slice_n=slice_n,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        exact=False,
    )


def _video_rule(video: Video, judge, slice_m: int, slice_n: int, device) -> SliceMask:
    """A rule over (frame, row, column) of queries and keys; pairs with text are left to ``keep_tokens``."""
    place = video.coordinates().to(device)

    def rule(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        both = (place[0, q] >= 0) & (place[0, k] >= 0)
        return both & judge(place[:, q], place[:, k])

    return from_rule(
        rule, slice_m=slice_m, slice_n=slice_n, seqlen_q=video.seqlen, seqlen_k=video.seqlen, device=device
    )


# ---- windows over a video ---------------------------------------------------------------------------------------
def tile_window(
    video: Video,
    *,
    tile: Sequence[int] = (6, 8, 8),
    window: Sequence[int] = (3, 3, 3),
    slice_m: int,
    slice_n: int,
    device="cpu",
) -> SliceMask:
    """Sliding 3-D tile window (Sliding Tile Attention, arXiv 2502.04507): a tile sees the tiles around it.

    Args:
        video: the grid; with ``Video(tile=tile)`` tokens stand tile by tile and slices fit the window best.
        tile: frames, rows and columns of a tile.
        window: tiles seen along each axis. At the border the window moves inwards and keeps its size.
        slice_m, slice_n, device: of the mask.
    """
    if len(tile) != 3 or len(window) != 3 or min(*tile, *window) < 1:
        raise InputError(f"tile={tile!r} and window={window!r} are three sizes of at least 1 each")
    counts = [-(-size // t) for size, t in zip((video.frames, video.height, video.width), tile, strict=True)]

    def judge(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        near = torch.ones((), dtype=torch.bool, device=q.device)
        for axis in range(3):
            size = min(window[axis], counts[axis])
            first = (q[axis] // tile[axis] - size // 2).clamp(0, counts[axis] - size)
            other = k[axis] // tile[axis]
            near = near & (other >= first) & (other < first + size)
        return near

    return _video_rule(video, judge, slice_m, slice_n, device)


def spatial(video: Video, *, frames: int = 0, slice_m: int, slice_n: int, device="cpu") -> SliceMask:
    """A spatial head (Sparse VideoGen, arXiv 2502.01776): tokens of the same frame and of ``frames`` on either side."""
    return _video_rule(video, lambda q, k: (q[0] - k[0]).abs() <= frames, slice_m, slice_n, device)


def temporal(video: Video, *, radius: int = 0, slice_m: int, slice_n: int, device="cpu") -> SliceMask:
    """A temporal head (Sparse VideoGen): the same place, give or take ``radius`` rows and columns, in every frame."""
    return _video_rule(
        video,
        lambda q, k: ((q[1] - k[1]).abs() <= radius) & ((q[2] - k[2]).abs() <= radius),
        slice_m,
        slice_n,
        device,
    )


def radial(video: Video, *, decay: float = 1.0, slice_m: int, slice_n: int, device="cpu") -> SliceMask:
    """Radial attention (arXiv 2506.19852): a band around the diagonal that halves as the temporal distance doubles.

    Frames up to one apart see each other whole. At a temporal distance of d >= 2 frames a token sees those whose
    position inside the frame differs by less than ``decay * height * width / 2 ** floor(log2 d)``.
    """
    if decay <= 0:
        raise InputError(f"decay={decay!r} is not above 0")
    area = video.height * video.width

    def judge(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = (q[0] - k[0]).abs()
        octave = torch.log2(distance.clamp(min=1).float()).floor()
        apart = ((q[1] - k[1]) * video.width + q[2] - k[2]).abs()
        return (distance <= 1) | (apart < decay * area / 2**octave)

    return _video_rule(video, judge, slice_m, slice_n, device)


# ---- rules over plain sequences ---------------------------------------------------------------------------------
def local_stride(
    *, local: int, stride: int, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int, device="cpu"
) -> SliceMask:
    """Keys less than ``local`` positions away, and every ``stride``-th key."""
    if local < 0 or stride < 1:
        raise InputError(f"local={local!r} and stride={stride!r} are whole numbers of at least 0 and 1")
    geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    return from_rule(lambda q, k: ((q - k).abs() < local) | (k % stride == 0), device=device, **geometry)


def keep_tokens(
    first: int,
    count: int,
    *,
    rows: bool = True,
    slice_m: int,
    slice_n: int,
    seqlen_q: int,
    seqlen_k: int,
    device="cpu",
) -> SliceMask:
    """Tokens that always take part, such as text or registers.

    Args:
        first, count: positions first to first + count - 1. Every query sees them as keys.
        rows: they also see everything as queries (self-attention over one sequence).
        slice_m, slice_n, seqlen_q, seqlen_k, device: of the mask.
    """
    if first < 0 or count < 0 or first + count > seqlen_k:
        raise InputError(f"tokens {first} to {first + count} lie outside a sequence of {seqlen_k}")

    def rule(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kept = (k >= first) & (k < first + count)
        return kept | ((q >= first) & (q < first + count)) if rows else kept

    geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    return from_rule(rule, device=device, **geometry)


def sinks(count: int, *, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int, device="cpu") -> SliceMask:
    """The first ``count`` keys, for every query."""
    geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    return keep_tokens(0, count, rows=False, device=device, **geometry)


def first_frame(video: Video, *, slice_m: int, slice_n: int, device="cpu") -> SliceMask:
    """The keys of the first frame, for every video query."""
    return _video_rule(video, lambda q, k: k[0] == 0, slice_m, slice_n, device)


# ---- heads ------------------------------------------------------------------------------------------------------
def stack_heads(masks: Sequence[SliceMask]) -> SliceMask:
    """One mask per head, each with heads = 1, as one mask."""
    if not masks:
        raise MaskError("stack_heads needs at least one mask")
    first = masks[0]
    for mask in masks:
        if mask.heads != 1 or mask.geometry != first.geometry or mask.batch != first.batch:
            raise MaskError(f"masks of heads must have one head and one geometry each: {first!r} and {mask!r}")
    return SliceMask(torch.cat([mask.bits for mask in masks], 1), **first.geometry)


def best_per_head(candidates: Sequence[SliceMask], q: torch.Tensor, k: torch.Tensor, lse=None, **options) -> SliceMask:
    """For each batch entry and head the candidate that keeps the most softmax mass; nothing is read back.

    Args:
        candidates: masks of one geometry and about one density, such as ``spatial`` and ``temporal``.
        q, k, lse, options: as for ``recall``.
    """
    if not candidates:
        raise MaskError("best_per_head needs at least one candidate")
    if any(mask.geometry != candidates[0].geometry for mask in candidates):
        raise MaskError("candidates must have one geometry")
    kept = torch.stack([recall(mask, q, k, lse, **options) for mask in candidates])
    best = kept.argmax(0)
    bits = torch.stack([mask.bits.expand(*best.shape, -1, -1) for mask in candidates])
    chosen = bits.gather(0, best[None, :, :, None, None].expand(1, *bits.shape[1:]))[0]
    return SliceMask(chosen, **candidates[0].geometry)
