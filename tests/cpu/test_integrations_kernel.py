# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel inside a real transformer of diffusers, on the emulator with every check on."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")

from fgattn_cute import emulator
from fgattn_cute.integrations.diffusers import SparsePolicy, enable
from tests import video_models


@pytest.mark.parametrize("tile", [None, (1, 4, 4)], ids=["raster", "tiles"])
def test_wan_runs_the_compiled_kernel(tile):
    """One layer of head size 128 in bfloat16, 160 tokens: two query blocks, the second cut, lists that end in a tail.

    It is the kernel of the demo, so that a run of all tests compiles it once.
    """
    model = video_models.wan(heads=1, head_dim=128, layers=1).to(torch.bfloat16)
    model.blocks[0].attn1.norm_q.weight.data *= 3  # sharper than random weights are: the mask shall matter
    inputs = video_models.wan_inputs(batch=1, grid=(2, 8, 10))
    inputs = {name: x.to(torch.bfloat16) for name, x in inputs.items()}
    outputs, densities = {}, {}
    with torch.no_grad():
        dense = model(**inputs).sample.float()
        for backend in ("reference", "emulator"):
            policy = SparsePolicy(slice_m=128, top_k=20, dense_steps=0, tile=tile, backend=backend)
            with emulator.session(checks="all") as session, enable(model, policy) as handle:
                outputs[backend] = model(**inputs).sample.float()
            (row,) = handle.report().rows()
            densities[backend] = row["density"]
            assert (len(session.report()) > 0) == (backend == "emulator")
    kernel_error = (outputs["emulator"] - outputs["reference"]).norm() / dense.norm()
    mask_effect = (outputs["reference"] - dense).norm() / dense.norm()
    assert kernel_error < 2**-8, "both round to bfloat16, whose unit roundoff is 2^-9, a few times"
    assert mask_effect > 8 * kernel_error, "a mask that changes no more than rounding does would prove nothing"
    assert densities["emulator"] == densities["reference"] == [20 / 160]
