# SPDX-License-Identifier: Apache-2.0
"""Sparse attention inside a Wan transformer on a real GPU: the compiled kernel, no synchronisation, times by events."""

import types

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")

from fgattn_cute.integrations.diffusers import SparsePolicy, enable
from tests import video_models

GRID = (5, 15, 26)  # 1,950 tokens


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def wan(layers=2):
    model = video_models.wan(heads=4, head_dim=128, layers=layers).to("cuda", torch.bfloat16)
    for block in model.blocks:
        block.attn1.norm_q.weight.data *= 3  # sharper than random weights are: the mask shall matter
    return model


def inputs(batch=1):
    return {name: x.to("cuda", torch.bfloat16) for name, x in video_models.wan_inputs(batch=batch, grid=GRID).items()}


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("slice_m", [64, 128, 192])
@pytest.mark.parametrize("tile", [None, (1, 8, 16)], ids=["raster", "tiles"])
def test_keeping_everything_is_the_dense_model(slice_m, tile):
    model, arguments = wan(), inputs(batch=2)
    dense = model(**arguments).sample
    with enable(model, SparsePolicy(slice_m=slice_m, density=1.0, dense_steps=0, tile=tile)):
        out = model(**arguments).sample
    assert distance(out, dense) < 2**-7, "both round to bfloat16, whose unit roundoff is 2^-9, a few times per layer"


@pytest.mark.parametrize("options", [{"density": 0.05}, {"tau": 1e-3}, {"top_p": 0.3}], ids=lambda o: next(iter(o)))
def test_the_kernel_agrees_with_the_reference(options):
    """One layer, whose masks are found from the same queries and keys."""
    model, arguments, results = wan(layers=1), inputs(), {}
    dense = model(**arguments).sample
    for backend in ("cuda", "reference"):
        with enable(model, SparsePolicy(slice_m=128, dense_steps=0, backend=backend, **options)) as handle:
            results[backend] = model(**arguments).sample
        (row,) = handle.report().rows()
        assert row["ms"] > row["find_ms"] > 0 and all(0 < share < 1 for share in row["density"])
    error = distance(results["cuda"], results["reference"])
    assert error < 2**-8
    assert distance(results["reference"], dense) > 4 * error, "a mask that changes nothing proves nothing"


@pytest.mark.parametrize("memory", [0.0, 4.0], ids=["lists made again", "lists kept"])
def test_steps_that_reuse_masks_do_not_synchronise(memory):
    """What a pipeline tells its transformer, without a pipeline: one object per step, one schedule per run."""
    model, arguments = wan(), inputs()
    timesteps = torch.linspace(1000, 250, 4, device="cuda")
    scheduler = types.SimpleNamespace(timesteps=timesteps)
    pipe = types.SimpleNamespace(components={"transformer": model}, scheduler=scheduler, _current_timestep=None)
    policy = SparsePolicy(slice_m=128, density=0.3, dense_steps=1, refresh_every=3, plan_memory_gb=memory)
    with enable(pipe, policy) as handle:
        for step, timestep in enumerate(timesteps):
            pipe._current_timestep = timestep
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
            try:
                model(**arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    rows = [row["action"] for row in handle.report().rows() if row["layer"] == 1]
    assert rows == ["dense", "find", "reuse", "reuse"]
