# SPDX-License-Identifier: Apache-2.0
"""What only a real chip shows: races over many launches, streams side by side, graphs, torch.compile, bad memory."""

import math

import pytest
import torch

import fgattn_cute as fg
from tests.forward_cases import Case, Heads, tiny_spec

KERNELS = {
    "m192-d128": Case(head_dim=128, slice_m=192, seqlens=(4000, 6001), heads=Heads(1, 8, 4, 1, 8)),
    "m128-d128": Case(head_dim=128, slice_m=128, slice_n=3, seqlens=(4000, 6001), heads=Heads(1, 8, 8, 1, 8)),
    "m64-d128": Case(head_dim=128, slice_m=64, seqlens=(4000, 3001), heads=Heads(1, 8, 8, 1, 8)),
    "m192-d64": Case(head_dim=64, slice_m=192, slice_n=16, seqlens=(4000, 6001), heads=Heads(2, 4, 4, 1, 4)),
    "m128-d96": Case(head_dim=96, slice_m=96, seqlens=(2000, 3001), heads=Heads(1, 8, 8, 1, 8)),
    "m128-d256": Case(head_dim=256, slice_m=128, seqlens=(2000, 3001), heads=Heads(1, 4, 4, 1, 4)),
    "fp16": Case(dtype="fp16", head_dim=128, slice_m=128, seqlens=(4000, 6001), heads=Heads(1, 8, 8, 1, 8)),
    "consumer's fence": Case(
        head_dim=64,
        slice_m=128,
        seqlens=(4000, 6001),
        heads=Heads(1, 8, 8, 1, 8),
        spec=tiny_spec(tile_m=128, softmax="exact", proxy_fence="consumer"),
    ),
}

every_kernel = pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)


def contents(case):
    return (*case.tensors("cuda"), fg.Plan.from_mask(case.mask("cuda")))


def attend(case, q, k, v, plan):
    return fg.attention(q, k, v, plan, return_lse=True, backend="cuda", spec=case.spec)


def repeat(case, times):
    """Launches back to back with other work in between; counts the results that differ on the device."""
    q, k, v, plan = contents(case)
    out, lse = attend(case, q, k, v, plan)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = torch.empty(16 << 20, device="cuda")
    for i in range(times):
        if i % 3 == 0:
            noise.normal_()  # another state of the L2
        again, lse_again = attend(case, q, k, v, plan)
        differing += (again != out).sum() + (lse_again != lse).sum()
    assert differing.item() == 0


@every_kernel
def test_repeats_give_the_same_bits(case):
    repeat(case, 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
@every_kernel
def test_300_repeats_give_the_same_bits(case):
    repeat(case, 300)


@every_kernel
def test_two_streams_do_not_disturb_each_other(case):
    """Calls with other inputs run at the same time; nothing is shared between launches but the inputs."""
    sets = [contents(case), contents(case)]
    sets[1][0].mul_(-0.5)
    expected = [attend(case, *inputs) for inputs in sets]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, inputs, kept in zip(streams, sets, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(attend(case, *inputs))
    torch.cuda.synchronize()
    for kept, (out, lse) in zip(results, expected, strict=True):
        assert all(torch.equal(a, out) and torch.equal(b, lse) for a, b in kept)


@every_kernel
def test_a_graph_of_several_calls_replays(case):
    q, k, v, plan = contents(case)
    attend(case, q, k, v, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        middle, _ = attend(case, q, k, v, plan)
        out, lse = attend(case, middle, k, v, plan)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected = attend(case, attend(case, q, k, v, plan)[0], k, v, plan)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_a_compiled_block_with_inductor():
    """Projections around the call, compiled into one graph without breaks."""
    case = KERNELS["m192-d128"]
    q, k, v, plan = contents(case)
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16) / 11

    def block(q, k, v):
        return fg.attention(q @ weight, k, v, plan) @ weight

    compiled = torch.compile(block, fullgraph=True)
    expected = block(q, k, v)
    got = compiled(q, k, v)
    assert (got.float() - expected.float()).abs().max() <= 2.0**-6 * expected.abs().max()


# ---- memory that must not matter -------------------------------------------------------------------------------------
@every_kernel
def test_rows_in_no_list_change_no_bit(case):
    q, k, v = case.tensors("cuda")
    keep = case.keep().cuda()
    keep[..., 0] = False
    keep &= torch.rand(keep.shape[-1], device="cuda") < 0.7
    keep[..., 5] = True
    mask = fg.SliceMask.from_dense(keep, **case.geometry)
    plan = fg.Plan.from_mask(mask)
    out, lse = attend(case, q, k, v, plan)
    columns = torch.arange(case.seqlens[1], device="cuda") // case.slice_n
    used = keep.any(0).any(0).any(0)[columns][None, :, None, None]
    views = []
    for x, rows in ((q, True), (k, used), (v, used)):
        room = torch.full((x.shape[0], x.shape[1] + 200, *x.shape[2:]), float("nan"), device="cuda", dtype=x.dtype)
        views.append(room[:, : x.shape[1]])
        views[-1].copy_(x if rows is True else torch.where(rows, x, float("nan")))
    again, lse_again = attend(case, *views, plan)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@every_kernel
def test_ids_from_outside_never_fault(case):
    q, k, v, plan = contents(case)
    sound = plan.ids.clone()
    plan.ids.copy_(torch.randint(-(2**31), 2**31 - 1, plan.ids.shape, device="cuda", dtype=torch.int32))
    attend(case, q, k, v, plan)
    torch.cuda.synchronize()  # a fault would surface here and end every later test
    with pytest.raises(fg.PlanError, match="id outside"):
        fg.attention(q, k, v, plan, checks="full")
    plan.ids.copy_(sound)
    attend(case, q, k, v, plan)


# ---- softmax on the chip's own exp2 ----------------------------------------------------------------------------------
@pytest.mark.parametrize("octaves", [10, 59, 61, 99, 130, 300])
@pytest.mark.parametrize("name", ["m192-d128", "m128-d128", "m64-d128"])
def test_scores_that_climb_from_tile_to_tile(name, octaves):
    """Rows of other weights climb more or less; those that fixed_ref cannot hold come from the redo pass."""
    case = KERNELS[name]
    q, k, v, plan = contents(case)
    q.zero_(), k.zero_()
    q[..., 0] = torch.tensor([1.0, 0.0, 0.5, -1.0, 0.25], device="cuda").repeat(800)[None, :, None]
    k[..., 0] = (torch.arange(k.shape[1], device="cuda") // 300)[None, :, None] * octaves
    out, lse = fg.attention(q, k, v, plan, return_lse=True, scale=math.log(2), spec=case.spec)
    want, want_lse = fg.reference.attention(q, k, v, plan, scale=math.log(2), return_lse=True)
    kept = want_lse.isfinite()
    assert torch.equal(kept, lse.isfinite())
    band = 20 * octaves * 2.0**-20 + 2.0**-8
    assert (out.float() - want).abs().max() <= band * v.abs().max()
    assert ((lse - want_lse)[kept].abs() <= 1e-4 + 2.0**-20 * want_lse[kept].abs()).all()
    exact = fg.attention(q, k, v, plan, scale=math.log(2), spec=f"{name.split('-')[0]}-exact-d128")
    assert (exact.float() - want).abs().max() <= band * v.abs().max()
