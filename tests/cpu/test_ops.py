# SPDX-License-Identifier: Apache-2.0
"""attention() inside torch.compile, and the operators behind it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fgattn_cute as fg
from fgattn_cute import ops

SQ, SK, HEADS, D = 100, 130, 2, 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inputs():
    q = torch.randn(1, SQ, HEADS, D).bfloat16()
    k, v = (torch.randn(1, SK, HEADS, D).bfloat16() for _ in range(2))
    return q, k, v


def make_plan(density=0.3):
    keep = torch.rand(1, HEADS, 2, SK) < density
    return fg.Plan.from_mask(fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=SQ, seqlen_k=SK))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_full_graph(inputs, backend, layout):
    plan = make_plan()
    tensors = inputs if layout == "bshd" else [x.transpose(1, 2).contiguous() for x in inputs]

    def model(q, k, v):
        out, lse = fg.attention(q * 2, k, v, plan, return_lse=True, layout=layout, scale=0.1)
        return out + 1, lse

    out, lse = torch.compile(model, fullgraph=True, backend=backend)(*tensors)
    expected, expected_lse = model(*tensors)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    single = torch.compile(lambda q, k, v: fg.attention(q, k, v, plan, layout=layout), fullgraph=True, backend=backend)
    assert torch.equal(single(*tensors), fg.attention(*tensors, plan, layout=layout))


def test_a_new_plan_of_the_same_geometry_does_not_compile_again(inputs):
    counter = CompileCounter()
    model = torch.compile(lambda q, k, v, plan: fg.attention(q, k, v, plan), fullgraph=True, backend=counter)
    plans = [make_plan(density) for density in (0.1, 0.5, 0.9)]
    for plan in plans:
        plan.work(1, HEADS)
        assert torch.equal(model(*inputs, plan), fg.attention(*inputs, plan))
    assert counter.frame_count <= 2, "at most once more, for a dynamic number of ids"


def test_a_plan_without_work_descriptors_gets_them_in_the_graph(inputs):
    plan = make_plan()
    out = torch.compile(lambda q, k, v: fg.attention(q, k, v, plan), fullgraph=True, backend="eager")(*inputs)
    assert torch.equal(out, fg.attention(*inputs, plan))


def test_a_spec_crosses_into_the_graph(inputs):
    plan = make_plan()
    for spec in (fg.FwdSpec(head_dim=D, tile_m=64, tile_n=64, slice_n=3), "m64-d64", None):
        assert ops.decode_spec(ops.encode_spec(spec)) == spec
    model = lambda q, k, v: fg.attention(q, k, v, plan, spec=fg.FwdSpec(head_dim=D, tile_m=64))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(*inputs), model(*inputs))


@pytest.mark.parametrize("name, results", [("attention", 1), ("attention_lse", 2)])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_operators_obey_torchs_rules(inputs, name, results, layout):
    plan = make_plan()
    q, k, v = inputs if layout == "bshd" else [x.transpose(1, 2) for x in inputs]
    lists = (plan.ids, plan.offset, plan.keys, plan.work(1, HEADS))
    arguments = (q, k, v, *lists, 64, 1, SQ, SK, False, True, None, layout, "auto", "", "fast", None)
    op = getattr(torch.ops.fgattn_cute, name).default
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    found = op(*arguments)
    found = found if results == 2 else (found,)
    expected = fg.attention(q, k, v, plan, return_lse=True, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:results], strict=True))


def test_the_shape_function_never_runs_the_body(inputs, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr("fgattn_cute.api.run", lambda *args: pytest.fail("the fake ran the kernel"))
    plan = make_plan()
    lists = (plan.ids, plan.offset, plan.keys, plan.work(1, HEADS))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (*inputs, *lists)]
        out, lse = torch.ops.fgattn_cute.attention_lse(
            *fake, 64, 1, SQ, SK, False, True, None, "bshd", "auto", "", "fast", None
        )
    assert out.shape == (1, SQ, HEADS, D) and out.dtype == torch.bfloat16
    assert lse.shape == (1, HEADS, SQ) and lse.dtype == torch.float32


def test_backward_is_refused_in_words(inputs):
    q, k, v = inputs
    plan = make_plan()
    q.requires_grad_()
    with pytest.raises(fg.UnsupportedError, match="no backward pass"):
        fg.attention(q, k, v, plan)
    with torch.no_grad():
        assert not fg.attention(q, k, v, plan).requires_grad
    compiled = torch.compile(lambda q, k, v: fg.attention(q, k, v, plan), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no backward pass"):
        compiled(q, k, v)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), fg.attention(q, k, v, plan))


def test_eager_calls_bypass_the_dispatcher(inputs, monkeypatch):
    monkeypatch.setattr(ops, "call", lambda *args, **kwargs: pytest.fail("went through the operator"))
    fg.attention(*inputs, make_plan())
