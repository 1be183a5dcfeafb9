# SPDX-License-Identifier: Apache-2.0
"""Reordering of video tokens, tile by tile, and back: exact, because attention does not care about order."""

from __future__ import annotations

import torch

from fgattn_cute.predict import Video


class TokenOrder:
    """A permutation of the video tokens.

    Args:
        video: the grid with its ``tile``. Its text tokens are not counted here: they stay where they are.
        device: of the tensors to be permuted.
    """

    def __init__(self, video: Video, device):
        plain = Video(video.frames, video.height, video.width, tile=video.tile)
        self.forward = plain.order().to(device)
        self.backward = torch.empty_like(self.forward)
        self.backward[self.forward] = torch.arange(self.forward.numel(), device=device)

    def apply(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``x`` with its video tokens, all of dimension ``dim``, in tile order."""
        return x.index_select(dim, self.forward)

    def restore(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Back to raster order."""
        return x.index_select(dim, self.backward)
