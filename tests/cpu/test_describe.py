# SPDX-License-Identifier: Apache-2.0
"""Descriptions and pictures of masks, against counts made by hand."""

import json

import pytest
import torch

from fgattn_cute import describe, pictures
from fgattn_cute.errors import InputError, UnsupportedError
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan

GEOMETRY = {"slice_m": 16, "slice_n": 4, "seqlen_q": 40, "seqlen_k": 38}


def small_mask():
    """Rows keep: nothing; everything; columns 0, 1, 2 and 9 (the last one, of two keys)."""
    keep = torch.zeros(1, 1, 3, 10, dtype=torch.bool)
    keep[0, 0, 1] = True
    keep[0, 0, 2, [0, 1, 2, 9]] = True
    return SliceMask.from_dense(keep, **GEOMETRY)


def test_facts():
    facts = small_mask().describe()
    assert facts["density"] == (16 * 38 + 8 * 14) / (40 * 38)
    assert facts["density_of_heads"] == [facts["density"]] * 2
    assert facts["keys_per_block"] == {"min": 0, "p10": 0, "median": 14, "p90": 38, "max": 38}
    assert (facts["empty_blocks"], facts["full_blocks"]) == (1, 1)
    assert facts["imbalance"] == 38 / (52 / 3)
    assert facts["runs_per_block"] == 1.0  # 0 + 1 + 2 runs in three blocks, of lengths 10, 3 and 1
    assert facts["run_length_share"] == {">=2": 13 / 14, ">=4": 10 / 14, ">=8": 10 / 14, ">=16": 0.0, ">=64": 0.0}
    assert facts["bytes_as_bits"] == 3 * 4
    plan = Plan.from_mask(small_mask())
    assert facts["bytes_as_lists"] == plan.nbytes == 4 * (16 + 8 + 256) + 12 * 3
    assert "kept_mass" not in facts
    json.dumps(facts)


def test_kept_mass_needs_q_and_k():
    q, k = torch.zeros(1, 40, 1, 16), torch.zeros(1, 38, 1, 16)  # even attention: the kept mass is the density
    facts = small_mask().describe(q, k)
    assert facts["kept_mass"] == pytest.approx(facts["density"], rel=1e-5)


def test_speed_estimates_follow_the_measurements():
    """Ratios to dense attention measured on an H200: 30 % at 16384 and 75600 keys, 10 % at 75600, tiles of 192 rows."""

    def estimate(seqlen_k, density, slice_m):
        keep = torch.arange(seqlen_k // 80) < round(density * (seqlen_k // 80))
        geometry = {"slice_m": slice_m, "slice_n": 80, "seqlen_q": slice_m, "seqlen_k": seqlen_k // 80 * 80}
        return SliceMask.from_dense(keep[None, None, None], **geometry).describe()["estimated_speedup"]

    assert estimate(16384, 0.3, 192) == pytest.approx(3.37, rel=0.03)
    assert estimate(75600, 0.3, 192) == pytest.approx(3.49, rel=0.03)
    assert estimate(75600, 0.1, 192) == pytest.approx(10.2, rel=0.03)
    assert estimate(16384, 0.3, 128) == pytest.approx(3.10, rel=0.03)
    assert estimate(16384, 0.3, 384) == estimate(16384, 0.3, 192)
    assert describe.tile_rate(16) == describe.tile_rate(64) / 4
    assert describe.tile_rate(80) == describe.tile_rate(64) * 80 / 128


def test_break_even():
    facts = SliceMask.full(slice_m=192, slice_n=1, seqlen_q=192, seqlen_k=16384).describe()
    assert facts["break_even_density"] == 1.0
    facts = SliceMask.full(slice_m=64, slice_n=1, seqlen_q=64, seqlen_k=1000).describe()
    assert facts["break_even_density"] == pytest.approx(0.88 - 0.33)
    assert facts["estimated_speedup"] < 1


def test_plan_description_says_whether_lists_were_cut():
    mask = small_mask()
    exact = Plan.from_mask(mask).describe()
    assert exact["overflow"] is False and exact["density"] == mask.density and exact["capacity_ids"] == 24
    cut = Plan.from_mask(mask, capacity=8).describe()
    assert cut["overflow"] is True and cut["density"] < mask.density


def test_printing():
    lines = str(small_mask().describe()).splitlines()
    assert "density             0.4737" in lines and "bytes as lists      1,156" in lines
    assert "keys per block      min 0, p10 0, median 14, p90 38, max 38" in lines
    empty = str(SliceMask.empty(**GEOMETRY).describe()).splitlines()
    assert "imbalance           1" in empty and "estimated speedup   inf" in empty


def test_image_averages_whole_slices():
    image = pictures.mask_image(small_mask(), max_pixels=4)
    assert image.shape == (3, 4)
    assert image[0].tolist() == [0, 0, 0, 0] and image[1].tolist() == [1, 1, 1, 1]
    assert image[2].tolist() == [1, 0, 0, 1]  # columns 0-2, 3-5, 6-8 and the lone column 9
    assert torch.equal(pictures.mask_image(small_mask()), small_mask().to_dense()[0, 0].float())


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    keep = torch.rand(2, 3, 3, 10) < 0.5
    written = pictures.plot_mask(SliceMask.from_dense(keep, **GEOMETRY), tmp_path / "mask.png", batch=1, head=2)
    assert written.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(InputError, match=r"head 3 lies outside 0\.\.2"):
        pictures.plot_mask(SliceMask.from_dense(keep, **GEOMETRY), tmp_path / "mask.png", head=3)


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        pictures.plot_mask(small_mask(), tmp_path / "mask.png")
