# SPDX-License-Identifier: Apache-2.0
"""Where the forward kernel reads and writes: strides, far addresses, ids from outside, and calls that are refused."""

import mmap

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import compile as compiler
from fgattn_cute import emulator
from fgattn_cute.kernels.spec import FwdSpec
from tests.forward_cases import Case, Heads, emulate, same_bits, tiny_spec
from tests.numerics import assert_within_contract

SPEC = tiny_spec()
PERSISTENT = FwdSpec(head_dim=64, tile_m=128, tile_n=64, scheduler="persistent", ping_pong=True, q_source="registers")
MAP_NORESERVE = 0x4000  # Linux; mmap names it from Python 3.13 on


# ---- strides ---------------------------------------------------------------------------------------------------------
def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded_rows(x):
    return torch.nn.functional.pad(x, (8, 24))[..., 8:-24]


def every_second_head(x):
    return x.repeat_interleave(2, 2)[:, :, ::2]


def batch_innermost(x):
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


@pytest.mark.parametrize("spec", [SPEC, PERSISTENT], ids=["grid", "persistent"])
@pytest.mark.parametrize("view", [heads_first, padded_rows, every_second_head, batch_innermost])
def test_strides_change_no_bit(view, spec):
    case = Case(heads=Heads(2, 4, 2, 2, 4), spec=spec, slice_m=96)
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    expected = emulate(q, k, v, plan, spec=spec)
    views = [view(x) for x in (q, k, v)]
    assert all(x.stride() != y.stride() and torch.equal(x, y) for x, y in zip(views, (q, k, v), strict=True))
    for arguments in (views, (views[0], k, v), (q, views[1], v), (q, k, views[2])):
        result = emulate(*arguments, plan, spec=spec)
        assert same_bits(result.out, expected.out) and same_bits(result.lse, expected.lse)
        assert result.out.is_contiguous()


def test_one_packed_tensor_of_q_k_and_v():
    packed = torch.randn(2, 150, 3, 2, 64).bfloat16()
    plan = fg.Plan.from_mask(Case(seqlens=(150, 150), heads=Heads(2, 2, 2, 1, 2)).mask())
    result = emulate(*packed.unbind(2), plan, spec=SPEC)
    expected = emulate(*(x.contiguous() for x in packed.unbind(2)), plan, spec=SPEC)
    assert same_bits(result.out, expected.out)


def test_heads_and_batch_entries_that_share_memory():
    """Dimensions expanded with stride 0."""
    case = Case(heads=Heads(2, 4, 4, 2, 4))
    plan = fg.Plan.from_mask(case.mask())
    q, k, v = (x[:1, :, :1].expand(2, -1, 4, -1) for x in case.tensors())
    assert q.stride(0) == q.stride(2) == 0
    result = emulate(q, k, v, plan, spec=SPEC)
    assert_within_contract(result.out, result.lse, q, k, v, plan)
    expected = emulate(*(x.contiguous() for x in (q, k, v)), plan, spec=SPEC)
    assert same_bits(result.out, expected.out)


def test_head_first_layout():
    case = Case(heads=Heads(2, 4, 2, 1, 4))
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    expected = emulate(q, k, v, plan, spec=SPEC)
    result = emulate(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), plan, spec=SPEC, layout="bhsd")
    assert result.out.shape == (2, 4, 200, 64) and result.out.is_contiguous()
    assert same_bits(result.out.transpose(1, 2).contiguous(), expected.out) and same_bits(result.lse, expected.lse)


# ---- addresses beyond 2^31 elements ----------------------------------------------------------------------------------
def reserve(elements, dtype=torch.bfloat16):
    """Address space without memory behind it: only pages that are touched cost any. Reads as zeros."""
    region = mmap.mmap(-1, elements * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(region, dtype=dtype)


def far(x, strides):
    """The elements of x with huge strides."""
    span = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    return reserve(span, x.dtype).as_strided(x.shape, strides).copy_(x)


FAR = {  # strides of batch, sequence and head in elements
    "rows": lambda n: (n * (1 << 26), 1 << 26, 64),
    "heads": lambda n: (64 * n, 64, (1 << 31) + 64),
    "batch": lambda n: ((1 << 32) + 8, 128, 64),
}


@pytest.mark.parametrize("spec", [SPEC, PERSISTENT], ids=["grid", "persistent"])
@pytest.mark.parametrize("dimension", FAR)
def test_offsets_beyond_two_to_the_31_elements(dimension, spec):
    case = Case(seqlens=(40, 70), heads=Heads(2, 2, 2, 1, 2), slice_m=32)
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    expected = emulate(q, k, v, plan, spec=spec)
    views = [far(x, (*FAR[dimension](x.shape[1]), 1)) for x in (q, k, v)]
    assert all(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) > 2**31 for x in views)
    result = emulate(*views, plan, spec=spec)
    assert same_bits(result.out, expected.out) and same_bits(result.lse, expected.lse)


def test_the_widest_rows_and_the_refusal_of_wider_ones():
    """Bytes from key to key are an int32 in the kernel, so a stride from 2^30 elements on is refused."""
    case = Case(seqlens=(40, 3), fill="100 %")
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    expected = emulate(q, k, v, plan, spec=SPEC)
    widest = far(k, (0, 2**30 - 8, 64, 1))
    assert same_bits(emulate(q, widest, v, plan, spec=SPEC).out, expected.out)
    with emulator.session(threads=1) as emu, pytest.raises(fg.UnsupportedError, match=r"v\.stride\(1\) = 1073741824"):
        fg.attention(q, k, far(v, (0, 2**30, 64, 1)), plan, backend="emulator", spec=SPEC)
    assert len(emu.report()) == 0


@pytest.mark.parametrize("dimension", FAR)
def test_results_beyond_two_to_the_31_elements(dimension):
    """attention() makes compact results, so the compiled kernel is called with an ``out`` of huge strides."""
    case = Case(seqlens=(40, 70), heads=Heads(2, 2, 2, 1, 2), slice_m=32)
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    expected = emulate(q, k, v, plan, spec=SPEC)
    out = far(torch.full_like(q, float("nan")), (*FAR[dimension](40), 1))
    lse = torch.empty(2, 2, 40)
    work = plan.work(2, 2)
    with emulator.session(threads=1):
        compiler.get(SPEC, emulated=True).call(
            q, k, v, out, lse, plan.ids, work, 64**-0.5, plan.slice_m, 1, work.shape[0], 132, None, None
        )
    assert same_bits(out.contiguous(), expected.out) and same_bits(lse, expected.lse)


# ---- ids from outside ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["off", "fast"])
@pytest.mark.parametrize("slice_n", [1, 2, 5, 64])
def test_ids_from_outside_never_fault(slice_n, level):
    """Every address is clamped into K and V: the emulator, which checks each to the byte, finds nothing."""
    case = Case(slice_n=slice_n, seqlens=(100, 333), heads=Heads(2, 2, 2, 2, 2))
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    sound = emulate(q, k, v, plan, spec=SPEC)
    garbage = torch.tensor([-(2**31), -1, 333, 2**31 - 1, 334, -65, 2**31 // slice_n], dtype=torch.int64)
    first, keys = plan.offset[0, 1, 0], plan.keys[0, 1, 0]
    places = slice(int(first), int(first) - int(-keys // slice_n))
    assert places.stop > places.start
    plan.ids[places] = garbage.clamp(max=2**31 - 1).to(torch.int32).repeat(64)[: places.stop - places.start]
    result = emulate(q, k, v, plan, spec=SPEC, checks=level)
    untouched = torch.ones(2, 100, 2, dtype=torch.bool)
    untouched[0, :64, 1] = False
    assert torch.equal(result.out[untouched], sound.out[untouched]), "lists without garbage are right"
    slack = plan.ids.clone()
    plan.ids[-200:] = -(2**31)  # behind every list: read ahead, never used
    assert same_bits(emulate(q, k, v, plan, spec=SPEC, checks=level).out, result.out)
    plan.ids.copy_(slack)


@pytest.mark.parametrize("bad", [-(2**31), -1, 333, 2**31 - 1])
def test_full_checks_refuse_ids_from_outside_before_any_launch(bad):
    case = Case(seqlens=(100, 333))
    plan = fg.Plan.from_mask(case.mask())
    plan.ids[int(plan.offset[0, 0, 1])] = bad
    with emulator.session(threads=1) as emu:
        with pytest.raises(fg.PlanError, match=r"id outside 0\.\.332.*query block 1"):
            fg.attention(*case.tensors(), plan, backend="emulator", spec=SPEC, checks="full")
        assert len(emu.report()) == 0
        plan.ids[int(plan.offset[0, 0, 1])] = 0
        fg.attention(*Case(seqlens=(100, 333)).tensors(), fg.Plan.from_mask(case.mask()), backend="emulator", spec=SPEC)
        assert len(emu.report()) == 2, "the count would see a launch"


REFUSED = {
    "scale": {"scale": float("nan")},
    "negative scale": {"scale": -1.0},
    "bound": {"logit_bound": -1.0},
    "layout": {"layout": "sbhd"},
    "layout of another call": {"layout": "bhsd"},
    "level of checks": {"checks": "some"},
    "spec for another head dim": {"spec": tiny_spec(head_dim=128)},
    "spec that cannot run": {"spec": tiny_spec(tile_n=72)},
    "unknown preset": {"spec": "m999"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_launched_after_a_refused_argument(name):
    case = Case(heads=Heads(1, 2, 2, 1, 2))
    with emulator.session(threads=1) as emu:
        with pytest.raises(fg.FgAttnError):
            fg.attention(*case.tensors(), case.mask(), backend="emulator", **{"spec": SPEC, **REFUSED[name]})
        assert len(emu.report()) == 0


def spoiled(name, q, k, v):
    return {
        "dtype": lambda: (q.float(), k.float(), v.float()),
        "head dim": lambda: (q[..., :40], k[..., :40], v[..., :40]),
        "lengths": lambda: (q, k[:, 1:], v[:, 1:]),
        "rows off 16 bytes": lambda: (q, *(torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in (k, v))),
        "start off 16 bytes": lambda: (torch.nn.functional.pad(q, (4, 4))[..., 4:-4], k, v),
        "last dimension not contiguous": lambda: (q, k, v.transpose(1, 3).contiguous().transpose(1, 3)),
        "k and v differ": lambda: (q, k, v[:, :, :1]),
        "devices": lambda: (q, k.to("meta"), v),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "dtype",
        "head dim",
        "lengths",
        "rows off 16 bytes",
        "start off 16 bytes",
        "last dimension not contiguous",
        "k and v differ",
        "devices",
    ],
)
def test_nothing_is_launched_after_refused_tensors(name):
    case = Case(heads=Heads(1, 2, 2, 1, 2))
    with emulator.session(threads=1) as emu:
        with pytest.raises(fg.FgAttnError):
            fg.attention(*spoiled(name, *case.tensors()), case.mask(), backend="emulator", spec=SPEC)
        assert len(emu.report()) == 0
