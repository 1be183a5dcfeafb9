# SPDX-License-Identifier: Apache-2.0
"""Bad input: each fault gives its sentence, all of them come at once, and the error has the right class."""

import time

import pytest
import torch

from fgattn_cute import checks
from fgattn_cute.errors import InputError, PlanError, UnsupportedError
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from fgattn_cute.problem import Problem

GEOMETRY = {"slice_m": 32, "slice_n": 1, "seqlen_q": 70, "seqlen_k": 90}


def make_plan(**changes):
    return Plan.from_mask(SliceMask.full(**GEOMETRY | changes))


def inputs(batch=1, seqlen_q=70, seqlen_k=90, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16):
    q = torch.zeros(batch, seqlen_q, heads, head_dim, dtype=dtype)
    k = torch.zeros(batch, seqlen_k, kv_heads, head_dim, dtype=dtype)
    return q, k, k.clone()


def test_a_sound_call_returns_its_facts():
    q, k, v = inputs(batch=2)
    problem = checks.check(q, k, v, make_plan(), level="full")
    assert problem == Problem.of(q, k, v, make_plan())
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 70, 90)
    assert (problem.heads, problem.kv_heads, problem.group_size, problem.head_dim) == (4, 2, 2, 64)
    assert problem.dtype_name == "bf16" and problem.blocks_q == 3
    assert problem.effective_flops() == 4 * 64 * 70 * 90 * 4 * 2
    assert "seqlen 70 x 90" in problem.describe() and "heads 4 (kv 2)" in problem.describe()


def test_bhsd_gives_the_same_facts_without_copies():
    q, k, v = inputs()
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    problem = checks.check(*turned, make_plan(), layout="bhsd")
    plain = checks.check(q, k, v, make_plan())
    assert problem.q_strides == plain.q_strides == q.stride()
    assert (problem.seqlen_q, problem.heads) == (70, 4)


def test_a_mask_stands_in_for_a_plan():
    assert checks.check(*inputs(), SliceMask.full(**GEOMETRY)).slice_m == 32


def _fault(change):
    """(q, k, v, plan, keywords) with one fault applied to a sound call."""
    q, k, v = inputs()
    call = {"q": q, "k": k, "v": v, "plan": make_plan(), "scale": None}
    call.update(change(call))
    return call


def _wide(x, extra):
    """The tensor as a view of rows that are ``extra`` elements longer."""
    return torch.cat([x, x[..., :extra]], -1)[..., : x.shape[-1]]


FAULTS = [
    (lambda c: {"q": c["q"][0]}, InputError, "q has rank 3, not 4"),
    (lambda c: {"v": None}, InputError, "v is a NoneType, not a torch tensor"),
    (lambda c: {"plan": torch.ones(3)}, PlanError, "plan is a Tensor, not a Plan or SliceMask"),
    (lambda c: {"k": c["k"].half()}, InputError, "mixed dtypes: q bfloat16, k float16, v bfloat16"),
    (
        lambda c: {n: c[n].float() for n in "qkv"},
        UnsupportedError,
        "dtype float32 is not one of bfloat16, float16",
    ),
    (lambda c: {"v": c["v"].to("meta")}, InputError, "devices differ: q on cpu, k on cpu, v on meta, plan on cpu"),
    (
        lambda c: dict(zip("qkv", inputs(head_dim=80), strict=True)),
        UnsupportedError,
        r"head_dim 80 is not one of 64, 96, 128, 256 (pad q, k and v to 96 and pass scale=80**-0.5)",
    ),
    (lambda c: dict(zip("qkv", inputs(head_dim=320), strict=True)), UnsupportedError, "head_dim 320 is not one of"),
    (lambda c: dict(zip("qkv", inputs(kv_heads=3), strict=True)), InputError, "4 query heads are not a multiple of 3"),
    (lambda c: {"v": c["v"][:, :50]}, InputError, "k (1, 90, 2, 64) and v (1, 50, 2, 64) differ in shape"),
    (lambda c: {n: inputs(head_dim=96)[1] for n in "kv"}, InputError, "head_dim differs: q 64, k 96"),
    (lambda c: {n: inputs(batch=2)[1] for n in "kv"}, InputError, "batch differs: q 1, k 2"),
    (lambda c: {"q": c["q"][:, :0]}, InputError, "q (1, 0, 4, 64) has an empty dimension"),
    (
        lambda c: {"q": c["q"].transpose(2, 3).contiguous().transpose(2, 3)},
        InputError,
        "q.stride(-1) is 4: the last dimension must be contiguous",
    ),
    (
        lambda c: {"k": _wide(c["k"], 4)},
        InputError,
        "k.stride(2) = 68 elements is not a multiple of 8: rows must start on 16 bytes",
    ),
    (
        lambda c: {"q": torch.zeros(q_elems() + 1, dtype=torch.bfloat16)[1:].view(1, 70, 4, 64)},
        InputError,
        "q does not start on 16 bytes",
    ),
    (lambda c: {"plan": make_plan(seqlen_k=91)}, PlanError, "the plan was made for seqlen_k 91, the call has 90"),
    (lambda c: {"plan": make_plan(seqlen_q=64)}, PlanError, "the plan was made for seqlen_q 64, the call has 70"),
    (lambda c: {"plan": Plan.from_mask(SliceMask.full(**GEOMETRY, heads=3))}, PlanError, "heads 3, the call has 4"),
    (lambda c: {"plan": Plan.from_mask(SliceMask.full(**GEOMETRY, batch=2))}, PlanError, "batch 2, the call has 1"),
    (lambda c: {"plan": make_plan(slice_m=24)}, UnsupportedError, "slice_m 24 is not a multiple of 16"),
    (lambda c: {"scale": float("nan")}, InputError, "scale nan is not finite"),
    (lambda c: {"scale": float("inf")}, InputError, "scale inf is not finite"),
    (lambda c: {"scale": -0.5}, InputError, "scale -0.5 is negative (negate q and pass 0.5)"),
    (lambda c: {"scale": torch.tensor(1.0)}, InputError, "scale is a Tensor, not a Python number"),
    (
        lambda c: {"k": c["k"].requires_grad_()},
        UnsupportedError,
        "k requires grad, and fgattn_cute is for inference: it has no backward pass (call it under torch.no_grad()",
    ),
]


def q_elems():
    return 70 * 4 * 64


@pytest.mark.parametrize(("change", "kind", "message"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_each_fault_has_its_sentence(change, kind, message):
    call = _fault(change)
    scale = call.pop("scale")
    with pytest.raises(kind) as caught:
        checks.check(**call, scale=scale)
    assert message in str(caught.value).split("  - ", 1)[1]
    assert type(caught.value) is kind
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  q ") and "  nearest thing that works: " in lines[-1]


def test_all_reasons_come_at_once():
    q, k, v = inputs(head_dim=80, kv_heads=3, dtype=torch.float32)
    with pytest.raises(InputError) as caught:
        checks.check(q, k, v, make_plan(seqlen_k=91, slice_m=24), scale=float("nan"))
    bullets = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(bullets) == 6
    problem = Problem.of(q, k, v, make_plan(seqlen_k=91, slice_m=24))
    listed = checks.reasons(problem, q, k, v, make_plan(seqlen_k=91, slice_m=24), float("nan"))
    assert bullets == [f"  - {reason}" for reason in listed]


def test_the_nearest_call_runs():
    q, k, v = inputs(head_dim=80, kv_heads=3, dtype=torch.float32)
    with pytest.raises(InputError, match=r"nearest thing that works: q \(1, 70, 4, 96\), k and v \(1, 90, 4, 96\), bf"):
        checks.check(q, k, v, make_plan(), scale=-1)
    checks.check(*inputs(head_dim=96, kv_heads=4), make_plan())


def test_grad_is_fine_where_it_is_off():
    q, k, v = (x.requires_grad_() for x in inputs())
    with torch.no_grad():
        checks.check(q, k, v, make_plan())


def test_a_stride_of_a_size_one_dimension_does_not_matter():
    q, k, v = inputs()
    odd = q.as_strided(q.shape, (3, *q.stride()[1:]))
    checks.check(odd, k, v, make_plan())


def test_full_reads_the_lists_and_fast_does_not():
    plan = make_plan()
    ids = plan.ids.clone()
    ids[3] = 4
    twice = Plan(ids, plan.offset, plan.keys, **GEOMETRY)
    checks.check(*inputs(), twice, level="fast")
    with pytest.raises(PlanError, match="duplicate ids: 1 lists, the first is batch 0, head 0, query block 0"):
        checks.check(*inputs(), twice, level="full")
    ids[3] = 90
    with pytest.raises(PlanError, match=r"id outside 0\.\.89"):
        checks.check(*inputs(), twice, level="full")
    ids[3], ids[4] = 4, 3
    with pytest.raises(PlanError, match="ids not ascending"):
        checks.check(*inputs(), twice, level="full")
    small = Plan.from_mask(SliceMask.full(**GEOMETRY), capacity=96)
    with pytest.raises(PlanError, match="capacity 96 ids was too small"):
        checks.check(*inputs(), small, level="full")


def test_off_judges_nothing_beyond_rank():
    assert checks.check(*inputs(head_dim=80), make_plan(), scale=float("nan"), level="off").head_dim == 80
    with pytest.raises(InputError, match="has rank 2"):
        checks.check(torch.zeros(2, 2), *inputs()[1:], make_plan(), level="off")


def test_unknown_words_are_refused():
    with pytest.raises(InputError, match="checks='quick' is not one of 'off', 'fast', 'full'"):
        checks.check(*inputs(), make_plan(), level="quick")
    with pytest.raises(InputError, match="layout='sbhd' is not one of"):
        checks.check(*inputs(), make_plan(), layout="sbhd")


def test_a_fault_is_found_again_after_a_sound_call():
    q, k, v = inputs()
    checks.check(q, k, v, make_plan())
    with pytest.raises(InputError):
        checks.check(q, k, v, make_plan(), scale=float("nan"))
    with pytest.raises(PlanError):
        checks.check(q, k, v, make_plan(seqlen_q=71))


def test_the_good_case_is_cheap():
    q, k, v = inputs()
    plan = make_plan()
    checks.check(q, k, v, plan)
    best = min(_seconds(lambda: checks.check(q, k, v, plan)) for _ in range(200))
    assert best < 100e-6  # about 10 us on an idle core; the bound only tells a cached check from an uncached one


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
