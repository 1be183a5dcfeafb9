# SPDX-License-Identifier: Apache-2.0
"""How far one video is from another: PSNR and SSIM, frame by frame.

Meant for the same prompt and seed, dense and sparse. Both numbers judge pixels; whether a video is good is another
question, and for that look at the pictures of ``fgattn_cute.quality_report``.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from fgattn_cute.errors import InputError, UnsupportedError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MIN_SSIM_PIXELS = 7  # the window of structural similarity


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Frame by frame: ``reference`` and ``other`` are uint8 (frames, height, width, 3).

    psnr: decibels per frame, inf where equal. ssim: -1 to 1 per frame, 1 where equal.
    """

    reference: np.ndarray
    other: np.ndarray
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def worst_frame(self) -> int:
        """Index of the frame with the lowest PSNR."""
        return int(np.argmin(self.psnr))

    def as_dict(self) -> dict:
        """Numbers only, None for the PSNR of equal pictures. That of the video is that of its mean squared error."""
        return {
            "frames": len(self.psnr),
            "height": self.reference.shape[1],
            "width": self.reference.shape[2],
            "psnr": _finite(psnr(self.reference, self.other)),
            "psnr_worst": _finite(min(self.psnr)),
            "worst_frame": self.worst_frame,
            "ssim": sum(self.ssim) / len(self.ssim),
            "ssim_worst": min(self.ssim),
            "psnr_per_frame": [_finite(level) for level in self.psnr],
            "ssim_per_frame": list(self.ssim),
        }


def compare(reference, other) -> Comparison:
    """Compares two videos of one shape.

    Args:
        reference, other: what ``as_frames`` takes.

    Raises:
        InputError: shapes that differ or are no video.
        UnsupportedError: scikit-image, which computes SSIM, is not installed.
    """
    reference, other = as_frames(reference), as_frames(other)
    if reference.shape != other.shape:
        raise InputError(
            f"the videos differ in shape: {_shape(reference)} against {_shape(other)}; compare runs of one prompt, "
            "seed and size"
        )
    frames = list(zip(reference, other, strict=True))
    return Comparison(reference, other, tuple(psnr(*pair) for pair in frames), tuple(ssim(*pair) for pair in frames))


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio in decibels of uint8 arrays of one shape; inf where they are equal."""
    error = np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(reference: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two uint8 frames (height, width, 3), by scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UnsupportedError("SSIM needs scikit-image: pip install 'fgattn-cute[quality]'") from error
    if min(reference.shape[:2]) < MIN_SSIM_PIXELS:
        raise InputError(f"frames of {reference.shape[1]} x {reference.shape[0]} are smaller than the window of SSIM")
    return float(structural_similarity(reference, other, channel_axis=-1, data_range=255))


# ---- reading ----------------------------------------------------------------------------------------------------
def as_frames(video) -> np.ndarray:
    """uint8 (frames, height, width, 3) from what pipelines and files give.

    Args:
        video: an array or tensor (frames, height, width, 3), uint8 or float 0 to 1, also with a leading batch of one;
            a list of PIL images or arrays; or a path for ``read``.

    Raises:
        InputError: none of these.
    """
    if isinstance(video, (str, Path)):
        return read(video)
    if isinstance(video, (list, tuple)):
        sizes = {np.asarray(frame).shape for frame in video}
        if len(sizes) != 1:
            raise InputError(f"{len(video)} frames of {len(sizes)} different shapes are no video")
        video = np.stack([np.asarray(frame) for frame in video])
    array = np.asarray(
        video.detach().cpu().float() if hasattr(video, "detach") and video.is_floating_point() else video
    )
    if array.ndim == 5 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 4 and array.shape[-1] == 4:
        array = array[..., :3]
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"an array {tuple(array.shape)} is no video (frames, height, width, 3)")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"a video of {array.dtype} is neither uint8 nor float from 0 to 1")
    if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise InputError(f"a float video has values from 0 to 1, this one from {array.min():g} to {array.max():g}")
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)


def read(path: str | Path) -> np.ndarray:
    """uint8 (frames, height, width, 3) from a file: .npy, .gif, .webp, a video, or a folder of images.

    Raises:
        InputError: no such file, or one that holds no video.
        UnsupportedError: a package that reads this format is missing.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGES)
        if not files:
            raise InputError(f"{path} holds no image ({', '.join(IMAGES)})")
        return as_frames([_image(file) for file in files])
    if path.suffix == ".npy":
        return as_frames(np.load(path, allow_pickle=False))
    if path.suffix.lower() in (".gif", *IMAGES):
        return as_frames(_sequence(path))
    return as_frames(_decoded(path))


def pillow():
    """PIL's Image module, imported when a picture is read or drawn."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("pictures need Pillow: pip install 'fgattn-cute[quality]'") from error
    return Image


def _image(path: Path) -> np.ndarray:
    with pillow().open(path) as image:
        return np.asarray(image.convert("RGB"))


def _sequence(path: Path) -> list[np.ndarray]:
    with pillow().open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
        return frames


def _decoded(path: Path) -> np.ndarray:
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise UnsupportedError(f"{path.suffix} files need imageio: pip install 'imageio[ffmpeg]'") from error
    try:
        return imageio.imread(path)
    except (OSError, ImportError, ValueError) as error:
        raise UnsupportedError(
            f"{path} could not be read: {error}\n  nearest thing that works: pip install 'imageio[ffmpeg]', or a .gif, "
            "a .npy or a folder of images"
        ) from error


def _finite(level: float) -> float | None:
    return None if math.isinf(level) else level


def _shape(video: np.ndarray) -> str:
    frames, height, width, _ = video.shape
    return f"{frames} frames of {width} x {height}"
