# SPDX-License-Identifier: Apache-2.0
"""A whole pipeline of diffusers, end to end: the example as a user runs it, and real VAE, scheduler and transformer."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")
pytest.importorskip("transformers", reason="pipelines of diffusers need transformers (pip install transformers)")
pytest.importorskip("skimage", reason="needs scikit-image (pip install 'fgattn-cute[quality]')")

from fgattn_cute import quality
from fgattn_cute.integrations.diffusers import SparsePolicy, disable, enable
from tests import video_models

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/sparse_video.py"


def test_the_example_writes_dense_and_sparse_side_by_side(tmp_path, capsys):
    """Six steps of a transformer that has hardly been trained: what counts here is every file and the way there."""
    spec = importlib.util.spec_from_file_location("sparse_video", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with mock.patch.object(sys, "argv", ["sparse_video.py", "--train", "3", "--steps", "6", "--out", str(tmp_path)]):
        example.main()
    printed = capsys.readouterr().out
    # Six steps of three layers; the share 0.2 of six steps is two dense ones, layer 0 is dense throughout.
    assert "18 self-attention calls, 10 dense, 8 sparse (4 masks found, 4 reused)" in printed
    assert "PSNR" in printed and str(tmp_path / "report.md") in printed
    dense, sparse = (quality.read(tmp_path / f"{name}.gif") for name in ("dense", "sparse"))
    assert dense.shape == sparse.shape == (9, 192, 192, 3) and dense.std() > 5
    assert not np.array_equal(dense, sparse)
    policy = SparsePolicy.from_yaml(tmp_path / "policy.yaml")
    assert set(policy.layers) == {"transformer.1", "transformer.2"} and policy.tile == (1, 4, 4)
    assert (tmp_path / "frames.png").stat().st_size > 1000


def test_wan_with_its_real_vae_and_scheduler():
    """Tiny random weights down to pixels: density 1 gives the same video, a mask another one, disable the first."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = video_models.wan(layers=2, in_channels=16, out_channels=16)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = video_models.wan_pipeline(vae=vae.eval(), transformer=transformer, scheduler=scheduler)

    def run():
        return torch.from_numpy(video_models.run_wan(pipe, guidance=3.0, output_type="np"))

    dense = run()
    assert dense.shape == (1, 5, 64, 64, 3)
    with enable(pipe, SparsePolicy(slice_m=16, density=1.0, tile=(1, 2, 4))) as handle:
        same = run()
    torch.testing.assert_close(same, dense, atol=1e-4, rtol=0)
    assert {row["action"] for row in handle.report().rows()} == {"dense", "find", "reuse"}
    handle = enable(pipe, SparsePolicy(slice_m=16, density=0.2, dense_steps=1))
    other = run()
    disable(handle)
    assert (other - dense).abs().max() > 1e-3
    assert torch.equal(run(), dense)


def test_ltx_with_guidance_in_one_batch():
    """Both passes of guidance come as one batch, with masks per batch entry; the grid comes from the pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    random = torch.Generator().manual_seed(0)
    case = next(case for case in video_models.CASES if case.name == "ltx")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = LTXPipeline(scheduler, None, None, None, case.build())
    pipe.set_progress_bar_config(disable=True)
    embeds = {f"{kind}prompt_embeds": torch.randn(1, 7, 16, generator=random) for kind in ("", "negative_")}
    masks = {f"{kind}prompt_attention_mask": torch.ones(1, 7) for kind in ("", "negative_")}
    size = {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 4}

    def run():
        generator = torch.Generator().manual_seed(1)
        return pipe(**embeds, **masks, **size, guidance_scale=3.0, generator=generator, output_type="latent").frames

    dense = run()
    with enable(pipe, SparsePolicy(slice_m=16, top_k=10, dense_steps=1, refresh_every=3, tile=(1, 2, 3))) as handle:
        sparse = run()
    rows = handle.report().rows()
    assert [row["action"] for row in rows if row["layer"] == 0] == ["dense", "find", "reuse", "reuse"]
    assert {row["branch"] for row in rows} == {0} and torch.isfinite(sparse).all()
    # 3 x 4 x 6 latents of one token each, of which every block keeps ten.
    assert all(row["density"] == [pytest.approx(10 / 72)] * 2 for row in rows if row["action"] != "dense")
    assert not torch.allclose(sparse, dense) and torch.equal(run(), dense)
