# SPDX-License-Identifier: Apache-2.0
"""Video comparison: numbers known by hand, every way in, pictures that show what they claim, the command."""

import contextlib
import io
import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from fgattn_cute import quality, quality_report
from fgattn_cute.errors import InputError, UnsupportedError

pytest.importorskip("skimage", reason="needs scikit-image (pip install 'fgattn-cute[quality]')")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow (pip install 'fgattn-cute[quality]')")


def video(frames=4, height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(40, 200, (frames, height, width, 3), dtype=np.uint8)


# ---- numbers ----------------------------------------------------------------------------------------------------
def test_psnr_of_a_constant_difference():
    """An error of d everywhere has mean square d^2: 20 log10(255 / d) decibels."""
    reference = video()
    assert quality.psnr(reference, reference + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert quality.psnr(reference, reference) == math.inf


def test_psnr_of_the_video_is_not_the_mean_over_frames():
    """One of four frames is off by 10: the mean square is 25, not the mean of decibels with an infinity."""
    reference = video()
    other = reference.copy()
    other[2] += 10
    facts = quality.compare(reference, other).as_dict()
    assert facts["psnr"] == pytest.approx(20 * math.log10(255 / 5))
    assert facts["psnr_per_frame"] == [None, None, pytest.approx(20 * math.log10(25.5)), None]
    assert facts["worst_frame"] == 2 and facts["psnr_worst"] == facts["psnr_per_frame"][2]
    assert facts["ssim_per_frame"][0] == 1 and facts["ssim_worst"] == facts["ssim_per_frame"][2] < 1


def test_ssim_falls_with_structure_not_with_brightness():
    """The same squared error: a shift in brightness keeps the structure, noise does not."""
    random = np.random.default_rng(1)
    reference = video(frames=1)
    shifted = reference + 12
    noisy = (reference + 12 * random.choice([-1, 1], reference.shape)).astype(np.uint8)
    assert quality.psnr(reference, shifted) == pytest.approx(quality.psnr(reference, noisy))
    assert quality.ssim(reference[0], noisy[0]) < quality.ssim(reference[0], shifted[0]) < 1


# ---- what it takes ----------------------------------------------------------------------------------------------
def test_every_form_of_a_video_is_the_same_video(tmp_path):
    frames = video()
    pillow = [Image.fromarray(frame) for frame in frames]
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, picture in enumerate(pillow):
        picture.save(folder / f"{index:03}.png")
    np.save(tmp_path / "video.npy", frames / np.float32(255))
    pillow[0].save(tmp_path / "video.webp", save_all=True, append_images=pillow[1:], lossless=True)
    forms = {
        "array": frames,
        "batch": frames[None],
        "float": frames / 255,
        "tensor": torch.from_numpy(frames / 255),
        "bytes": torch.from_numpy(frames),
        "half": torch.from_numpy(frames / 255).half(),
        "alpha": np.concatenate([frames, frames[..., :1]], -1),
        "pillow": pillow,
        "list": list(frames),
        "folder": folder,
        "npy": tmp_path / "video.npy",
        "webp": str(tmp_path / "video.webp"),
    }
    for name, form in forms.items():
        assert np.array_equal(quality.as_frames(form), frames), name


def test_a_gif_is_read_frame_by_frame(tmp_path):
    """Frames of one colour each survive the palette."""
    frames = np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))])
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "video.gif", save_all=True, append_images=pictures[1:])
    assert np.array_equal(quality.read(tmp_path / "video.gif"), frames)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 8, 8)), "is no video"),
        (np.zeros((4, 8, 8, 3), np.int32), "int32"),
        (np.full((4, 8, 8, 3), 2.0), "from 2 to 2"),
        (np.full((4, 8, 8, 3), np.nan), "from nan"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "2 different shapes"),
        ("nowhere.mp4", "does not exist"),
    ],
)
def test_what_is_no_video_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        quality.as_frames(given)


def test_videos_of_different_shape_are_refused():
    with pytest.raises(InputError, match="4 frames of 32 x 24 against 4 frames of 24 x 32"):
        quality.compare(video(), video(height=32, width=24))
    with pytest.raises(InputError, match="smaller than the window"):
        quality.compare(video(height=6), video(height=6))


def test_a_file_that_holds_no_video_says_what_would_help(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"nothing")
    with pytest.raises(UnsupportedError, match=r"imageio\[ffmpeg\]"):
        quality.read(path)
    with pytest.raises(InputError, match="holds no image"):
        quality.read(tmp_path)


# ---- pictures and the command -----------------------------------------------------------------------------------
def test_the_sheet_shows_reference_other_and_difference():
    """One grey frame that turns brighter by 16: the third row shows 16 x gain, which comes near white."""
    reference = np.full((1, 96, 96, 3), 100, np.uint8)
    comparison = quality.compare(reference, reference + 16)
    sheet = quality_report.contact_sheet(comparison, [0], 8, ("dense", "sparse"))
    step = 96 + quality_report.GAP_PX + quality_report.LABEL_PX
    middle = quality_report.GAP_PX + quality_report.LABEL_PX + 48
    colours = [sheet.getpixel((quality_report.GAP_PX + 48, middle + row * step)) for row in range(3)]
    assert colours == [(100,) * 3, (116,) * 3, (128,) * 3]


def test_the_command_writes_a_report_and_speaks_json(tmp_path):
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from fgattn_cute.cli import main

    reference = video(frames=12)
    other = reference.copy()
    other[7] += 3
    for name, frames in (("dense", reference), ("sparse", other)):
        np.save(tmp_path / f"{name}.npy", frames)
    arguments = ["compare-videos", tmp_path / "dense.npy", tmp_path / "sparse.npy", "--out", tmp_path / "report"]
    outputs = []
    for extra in ([], ["--json"]):
        printed = io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["fgattn", *map(str, arguments), *extra]),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            main()
        outputs.append(printed.getvalue())
    worst = 20 * math.log10(255 / 3)
    assert f"worst {worst:.2f} dB in frame 7" in outputs[0]
    facts = json.loads(outputs[1])
    assert facts["psnr_worst"] == pytest.approx(worst) and facts["psnr_per_frame"][0] is None
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"| 7 | {worst:.2f} dB |" in page and "| 0 | equal | 1.0000 | yes |" in page
    shown = [line for line in page.splitlines() if line.endswith("| yes |")]
    with Image.open(tmp_path / "report" / "frames.png") as sheet:
        assert sheet.size[0] == len(shown) * (96 + quality_report.GAP_PX) + quality_report.GAP_PX
    assert any(line.startswith("| 7 |") for line in shown), "the worst frame is always in the picture"
