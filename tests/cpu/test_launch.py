# SPDX-License-Identifier: Apache-2.0
"""What a launch hands to the kernel, with the kernel replaced by a recorder."""

import dataclasses
import math

import pytest
import torch

from fgattn_cute import launch
from fgattn_cute.kernels.spec import MAX_REDO_ITEMS, FwdSpec
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan

B, HEADS, KV_HEADS, SQ, SK, D = 2, 4, 2, 300, 200, 64
SLICE_M = 128
BLOCKS = 3  # ceil(300 / 128)


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append(args)
        args[3].fill_(1.0)


@pytest.fixture
def plan():
    keep = torch.rand(B, HEADS, BLOCKS, SK) < 0.5
    return Plan.from_mask(SliceMask.from_dense(keep, slice_m=SLICE_M, slice_n=1, seqlen_q=SQ, seqlen_k=SK))


def tensors(layout="bshd"):
    sizes = ((SQ, HEADS), (SK, KV_HEADS), (SK, KV_HEADS))
    shapes = [(B, s, h, D) if layout == "bshd" else (B, h, s, D) for s, h in sizes]
    return [torch.randn(shape).bfloat16() for shape in shapes]


def launcher(plan, spec, layout="bshd", redo=None):
    return launch.Launcher(
        spec=spec,
        kernel=Recorder(),
        redo=redo,
        slice_m=plan.slice_m,
        ctas_per_block=launch.ctas_per_block(spec, plan.slice_m),
        layout=layout,
    )


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_arguments_of_the_kernel(plan, layout):
    q, k, v = tensors(layout)
    l = launcher(plan, FwdSpec(head_dim=D, tile_m=64, tile_n=64), layout)
    out, lse = launch._launch(l, q, k, v, plan, 0.5, None, 132)
    [(mq, mk, mv, mo, mlse, ids, work, scale, slice_m, ctas_per_block, num_ctas, wave, *unions)] = l.kernel.calls
    for given, seen, heads, length in ((q, mq, HEADS, SQ), (k, mk, KV_HEADS, SK), (v, mv, KV_HEADS, SK)):
        assert seen.shape == (B, length, heads, D)
        assert seen.data_ptr() == given.data_ptr(), "no copy"
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert mo.data_ptr() == out.data_ptr() and mo.shape == (B, SQ, HEADS, D)
    assert torch.all(out == 1)
    assert lse is mlse and lse.shape == (B, HEADS, SQ) and lse.dtype == torch.float32
    assert ids is plan.ids and work is plan.work(B, HEADS) and work.shape == (B * HEADS * BLOCKS, 4)
    assert (scale, slice_m, ctas_per_block) == (0.5, 128, 2)
    assert num_ctas == B * HEADS * BLOCKS * 2 and wave == 132
    assert unions == [None, None]


def test_a_grid_has_a_cta_for_every_tile_and_a_persistent_one_those_of_its_phases():
    grid = FwdSpec(head_dim=64, tile_m=64, tile_n=64)
    persistent = FwdSpec(head_dim=64, tile_m=64, tile_n=64, scheduler="persistent", ctas_per_sm=2)
    assert launch.grid_size(grid, 1000, 128, 132) == 2000
    assert launch.grid_size(persistent, 1000, 128, 132) == 3 * 264 + 152, "8 rounds of 264: 4, 2, 1, and one of 152"
    assert launch.grid_size(persistent, 10, 128, 132) == 20
    zigzag = dataclasses.replace(persistent, scheduler="zigzag")
    assert launch.grid_size(zigzag, 1000, 128, 132) == 264 and launch.grid_size(zigzag, 10, 128, 132) == 20
    assert launch.grid_size(FwdSpec(head_dim=64, tile_m=192), 7, 200, 132) == 14, "a partial tile is a CTA"


def test_the_redo_pass_has_a_flag_for_every_item():
    spec = FwdSpec(head_dim=64, tile_m=64, ctas_per_sm=2)
    assert launch.redo_grid_size(spec, 10, 64, 132) == 10
    assert launch.redo_grid_size(spec, 1000, 128, 132) == 264
    assert launch.redo_grid_size(spec, 264 * MAX_REDO_ITEMS + 1, 64, 132) == 265


def test_redo_runs_after_the_kernel_unless_a_bound_rules_it_out(plan):
    q, k, v = tensors()
    spec = FwdSpec(head_dim=D, tile_m=128, tile_n=64, scheduler="persistent")
    l = launcher(plan, spec, redo=Recorder())
    launch._launch(l, q, k, v, plan, 1.0, None, 1)
    (first,), (second,) = l.kernel.calls, l.redo.calls
    assert all(a is b for a, b in zip(first[:7], second[:7], strict=True)), "the same tensors"
    assert first[10:12] == (5, 1), "24 items for one CTA at a time: 12, 6, 3, 2 and 1"
    assert second[10:12] == (1, 1)
    launch._launch(l, q, k, v, plan, 1.0, 2.0, 1)
    assert len(l.kernel.calls) == 2 and len(l.redo.calls) == 1


@pytest.mark.parametrize("seqlen_k", [1, 200, 118800])
def test_the_bound_that_rules_poisoned_rows_out(seqlen_k):
    """Scores within +-b nats: e^(2b) * Sk < 2^99 can never pass the 2^100 that poisons a row."""
    largest = (99 * math.log(2) - math.log(seqlen_k)) / 2
    assert launch.needs_redo(seqlen_k, None)
    assert launch.needs_redo(seqlen_k, largest * 1.001)
    assert not launch.needs_redo(seqlen_k, largest * 0.999)


def test_unions_underflow_before_they_overflow():
    """A union's reference may lie 2 b above every key that a row keeps, and sums below 2^-60 are poisoned."""
    bound = 59 * math.log(2) / 2
    assert launch.needs_redo(1, bound * 1.001, union_blocks=8)
    assert not launch.needs_redo(1, bound * 0.999, union_blocks=8)
