# SPDX-License-Identifier: Apache-2.0
"""Masks, plans and predictors on a GPU: results as on the CPU, and no synchronisation where none is promised."""

import pytest
import torch

from fgattn_cute import predict
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan

GEOMETRY = {"slice_m": 128, "slice_n": 3, "seqlen_q": 4000, "seqlen_k": 5001}


@pytest.fixture
def no_sync():
    """Makes every implicit synchronisation an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def random_mask():
    return SliceMask.from_dense(torch.rand(2, 3, 32, 1667) < 0.3, **GEOMETRY)


def test_mask_and_plan_equal_the_cpu_ones():
    mask = random_mask()
    there = mask.to("cuda")
    assert there == mask and there.density == mask.density
    plan, other = Plan.from_mask(mask), Plan.from_mask(there)
    for name in ("ids", "offset", "keys"):
        assert torch.equal(getattr(plan, name), getattr(other, name).cpu())
    assert torch.equal(plan.work(2, 3), other.work(2, 3).cpu())
    assert other.to_mask() == mask and other.validate() == []
    assert (~there | there).density == 1.0
    assert there.refine(64, 1) == mask.refine(64, 1) and there.coarsen(256, 9) == mask.coarsen(256, 9)


def test_a_plan_with_a_capacity_is_built_without_synchronisation(no_sync):
    keep = torch.rand(2, 3, 32, 1667, device="cuda") < 0.3
    mask = SliceMask.from_dense(keep, **GEOMETRY)
    plan = Plan.from_mask((mask | ~mask) & mask, capacity=2 * 3 * 32 * 1672)
    plan.work(2, 3)


@pytest.mark.parametrize(
    "select",
    [
        predict.Threshold([0.001, 0.002, 0.003, 0.004]),
        predict.TopK(20),
        predict.TopP(0.5),
        predict.Budget(0.2),
        predict.Budget([0.1, 0.2, 0.3, 0.4]),
    ],
    ids=repr,
)
def test_masks_are_found_without_synchronisation_and_repeat(select, no_sync):
    q = torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 900, 2, 64, device="cuda", dtype=torch.bfloat16)
    sizes = {"slice_m": 64, "slice_n": 1}
    found = [predict.mass(q, k, **sizes, select=select) for _ in range(2)]
    found += [predict.pooled(q, k, **sizes, select=select) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("default")
    assert found[0] == found[1] and found[2] == found[3]
    assert 0 < found[0].density < 1


def test_recall_equals_the_cpu_one():
    q, k = torch.randn(1, 1000, 2, 64), torch.randn(1, 900, 2, 64)
    mask = predict.mass(q, k, slice_m=64, slice_n=1, select=predict.TopK(200))
    there = predict.recall(mask.to("cuda"), q.cuda(), k.cuda())
    torch.testing.assert_close(there.cpu(), predict.recall(mask, q, k), rtol=1e-4, atol=1e-5)
