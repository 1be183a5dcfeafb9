# SPDX-License-Identifier: Apache-2.0
"""What surrounds the kernel on a real GPU: streams, graphs, allocations, layouts, torch.compile, far addresses."""

import pytest
import torch

import fgattn_cute as fg
from tests.numerics import assert_within_contract

SLEEP_CYCLES = 200_000_000  # about a tenth of a second


def case(batch=1, heads=4, kv_heads=2, seqlen_q=1000, seqlen_k=1500, head_dim=128, slice_m=192, density=0.3):
    q = torch.randn(batch, seqlen_q, heads, head_dim, device="cuda").bfloat16()
    k, v = (torch.randn(batch, seqlen_k, kv_heads, head_dim, device="cuda").bfloat16() for _ in range(2))
    keep = torch.rand(batch, heads, -(-seqlen_q // slice_m), seqlen_k, device="cuda") < density
    mask = fg.SliceMask.from_dense(keep, slice_m=slice_m, slice_n=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return q, k, v, fg.Plan.from_mask(mask)


@pytest.mark.parametrize("slice_m", [16, 64, 128, 192, 320])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_cuda_tensors_run_on_the_kernel(slice_m, head_dim):
    q, k, v, plan = case(slice_m=slice_m, head_dim=head_dim)
    out, lse = fg.attention(q, k, v, plan, return_lse=True)
    assert out.is_cuda and out.dtype == torch.bfloat16
    assert_within_contract(out, lse, q, k, v, plan.to_mask())


def test_the_gpus_own_preset_is_taken():
    q, k, v, plan = case()
    told = fg.explain(q, k, v, plan)
    assert told.gpu.name == torch.cuda.get_device_name() and told.gpu.sms > 0
    assert told.choice.preset_id == "m192-d128"


def test_current_stream():
    """Inputs that are written late on a side stream: only a launch on that stream, after the write, sees them."""
    q, k, v, plan = case()
    expected = fg.attention(q, k, v, plan)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.copy_(q)
        out = fg.attention(late, k, v, plan)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_no_synchronisation_and_no_allocation_but_the_results():
    q, k, v, plan = case()
    fg.attention(q, k, v, plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        out, lse = fg.attention(q, k, v, plan, return_lse=True)
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made == 2 and out.shape == q.shape and lse.is_cuda


def test_cuda_graph_replays_with_new_contents():
    q, k, v, plan = case()
    fg.attention(q, k, v, plan)  # loads the kernel and makes the work descriptors
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fg.attention(q, k, v, plan, return_lse=True)
    for _ in range(2):
        q.normal_()
        v.normal_()
        graph.replay()
        expected, expected_lse = fg.attention(q, k, v, plan, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_head_first_layout_is_the_same_bits():
    q, k, v, plan = case(batch=2)
    across = [x.transpose(1, 2) for x in (q, k, v)]
    out = fg.attention(*across, plan, layout="bhsd")
    assert out.is_contiguous() and torch.equal(out.transpose(1, 2), fg.attention(q, k, v, plan))


def test_inside_torch_compile():
    q, k, v, plan = case()
    model = torch.compile(lambda q, k, v: fg.attention(q + 1, k, v, plan) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(model(q, k, v), fg.attention(q + 1, k, v, plan) * 2)


def test_a_known_bound_gives_the_same_bits_without_the_redo_pass():
    q, k, v, plan = case()
    assert torch.equal(fg.attention(q, k, v, plan, logit_bound=20.0), fg.attention(q, k, v, plan))


def test_addresses_past_two_to_the_31_elements():
    """Rows of K and V four million elements apart: the last row lies 2.5 thousand million elements in."""
    q, k, v, plan = case(heads=1, kv_heads=1, seqlen_k=600)
    apart = 1 << 22
    far = []
    for x in (k, v):
        storage = torch.empty(600 * apart, device="cuda", dtype=torch.bfloat16)
        far.append(storage.as_strided(x.shape, (600 * apart, apart, 128, 1)).copy_(x))
    assert far[0].stride(1) * 599 > 2**31
    assert torch.equal(fg.attention(q, *far, plan), fg.attention(q, k, v, plan))


def test_other_backends_with_cuda_tensors():
    q, k, v, plan = case(seqlen_q=200, seqlen_k=300)
    out = fg.attention(q, k, v, plan, backend="reference")
    assert out.is_cuda
    assert (out.float() - fg.attention(q, k, v, plan, backend="cuda").float()).abs().max() < 0.05
    with pytest.raises(fg.InputError, match="emulator runs on the CPU"):
        fg.attention(q, k, v, plan, backend="emulator")
