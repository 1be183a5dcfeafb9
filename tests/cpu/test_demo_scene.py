# SPDX-License-Identifier: Apache-2.0
"""The demo's input: frames are windows of the photograph, features and rotary embedding do what they claim."""

import pytest
import torch

pytest.importorskip("skimage", reason="the demo's photograph comes with scikit-image")

import itertools

from fgattn_cute.demo_scene import PATCH_PX, load_photo, make_scene, pan, patches, rotary, whiten


def test_frames_are_windows_that_move_by_whole_pixels():
    photo = load_photo()
    video = pan(photo, frames=3, height=64, width=96)
    tops = []
    for frame in video:
        places = [
            (y, x)
            for y in range(photo.shape[0] - 63)
            for x in range(photo.shape[1] - 95)
            if torch.equal(photo[y, x], frame[0, 0]) and torch.equal(photo[y : y + 64, x : x + 96], frame)
        ]
        assert len(places) == 1
        tops.append(places[0])
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(tops)}
    assert steps == {(6, 6)}


def test_a_frame_larger_than_the_photograph_is_refused():
    with pytest.raises(ValueError, match="larger than the photograph"):
        pan(load_photo(), frames=1, height=2000, width=96)


def test_patches_are_row_major_tiles():
    video = torch.randint(0, 256, (2, 2 * PATCH_PX, 3 * PATCH_PX, 3), dtype=torch.uint8)
    tokens = patches(video)
    assert tokens.shape == (2 * 2 * 3, 3 * PATCH_PX**2)
    second_frame_row_1_column_2 = video[1, PATCH_PX:, 2 * PATCH_PX :].reshape(-1).float() / 127.5 - 1
    assert torch.equal(tokens[6 + 3 + 2], second_frame_row_1_column_2)


def test_features_do_not_depend_on_brightness_and_have_unit_length():
    tokens = torch.randn(200, 30) * torch.linspace(0.1, 4, 30)
    features = whiten(tokens, 8)
    assert torch.allclose(features.norm(dim=-1), torch.ones(200), atol=1e-5)
    assert torch.allclose(features, whiten(tokens + 3.0, 8), atol=1e-3)


def test_rotary_products_depend_on_the_offset_alone():
    grid, dim = (3, 4, 5), 64
    q, k = torch.randn(2, dim, dtype=torch.float64)
    one_q = rotary(q.expand(60, 1, dim), grid).view(*grid, dim)
    one_k = rotary(k.expand(60, 1, dim), grid).view(*grid, dim)
    first = one_q[0, 1, 2] @ one_k[1, 2, 4]
    moved = one_q[1, 2, 0] @ one_k[2, 3, 2]
    other = one_q[0, 1, 2] @ one_k[2, 2, 4]
    assert abs(first - moved) < 1e-5 * q.norm() * k.norm()
    assert abs(first - other) > 1e-3
    assert torch.allclose(one_q.norm(dim=-1), q.norm().expand(grid), rtol=1e-5)


def test_a_scene_is_repeatable_and_its_attention_is_peaked():
    size = {"frames": 2, "rows": 6, "columns": 8, "heads": 2, "head_dim": 64}
    scene, again, other = make_scene(**size), make_scene(**size), make_scene(**size, seed=1)
    assert scene.q.shape == scene.k.shape == scene.v.shape == (1, 96, 2, 64)
    assert scene.q.dtype == torch.bfloat16
    assert torch.equal(scene.q, again.q) and torch.equal(scene.v, again.v)
    assert not torch.equal(scene.q, other.q)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", scene.q[0].float(), scene.k[0].float()) / 8, dim=-1)
    top_quarter = weights.sort(dim=-1, descending=True).values[..., :24].sum(-1)
    assert top_quarter.mean() > 0.8, (
        "random attention would give the heaviest quarter of the keys little more than 0.25"
    )
