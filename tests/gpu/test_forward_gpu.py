# SPDX-License-Identifier: Apache-2.0
"""The forward kernel on a real Hopper: the emulator's grid, real sizes, and what the emulator predicts."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fgattn_cute as fg
from perf.unions import pool_mask
from tests.forward_cases import DTYPES, FILLS, HEAD_DIMS, SLICE_MS, Case, Heads, named, tiny_spec
from tests.numerics import assert_within_contract

GROUPED = Heads(2, 4, 2, 2, 4)
# slice_n that meet a tile in every way that ids expand: whole ids, one id, several.
SLICE_NS = (1, 5, 16, 100, 2, 64, 3)
LENGTHS = ((1, 1), (64, 129), (1000, 2049), (777, 3001), (2048, 4096), (1537, 555))
KERNELS = list(itertools.product(DTYPES, HEAD_DIMS, (64, 128, 192)))


def attend(q, k, v, plan, **arguments):
    return fg.attention(q, k, v, plan, return_lse=True, backend="cuda", **arguments)


def check_on_gpu(case):
    q, k, v = case.tensors("cuda")
    mask = case.mask("cuda")
    with named(case):
        assert_within_contract(*attend(q, k, v, fg.Plan.from_mask(mask), spec=case.spec), q, k, v, mask)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("slice_m", SLICE_MS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_grid(dtype, head_dim, slice_m):
    """All fills and lengths. slice_n takes its turn with dtype, D and tile_m, so that few kernels are compiled."""
    facts = {"dtype": dtype, "head_dim": head_dim, "slice_m": slice_m}
    turn = KERNELS.index((dtype, head_dim, Case(**facts).kernel().tile_m))
    for fill, seqlens in zip(FILLS, LENGTHS, strict=True):
        check_on_gpu(Case(**facts, slice_n=SLICE_NS[turn % 7], fill=fill, seqlens=seqlens, heads=GROUPED))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("slice_m", [64, 128, 192])
def test_exact_softmax_for_bf16(head_dim, slice_m):
    if (head_dim, slice_m) == (256, 192):
        pytest.skip("192 rows do not fit the registers at head dim 256")
    spec = f"m{slice_m}-exact-d{head_dim}"
    for fill in FILLS:
        check_on_gpu(Case(head_dim=head_dim, slice_m=slice_m, seqlens=(1000, 3001), fill=fill, spec=spec))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "slice_m"), [("PartsPlan", 64), ("HalvesPlan", 64), ("HalvesPlan", 16)])
def test_lists_of_which_warpgroups_pass_over_tiles(kind, slice_m, dtype, head_dim):
    """All fills, and blocks that overlap; the plan is the same as on the CPU."""
    kind, masks = getattr(fg, kind), {}
    common = {"dtype": dtype, "head_dim": head_dim, "slice_m": slice_m}
    for fill, seqlens in zip(FILLS, LENGTHS, strict=True):
        case = Case(**common, seqlens=seqlens, fill=fill, heads=GROUPED)
        masks[case] = case.mask("cuda")
    case = Case(**common, seqlens=(4000, 4000), heads=Heads(1, 4, 4, 1, 4))
    masks[case] = pool_mask(slice_m, 1.2, seqlen=4000, heads=4, density=0.3, device="cuda")
    for case, mask in masks.items():
        q, k, v = case.tensors("cuda")
        plan = kind.from_mask(mask)
        with named(case):
            assert plan.validate() == [] and plan.to_mask() == mask
            assert_within_contract(*attend(q, k, v, plan), q, k, v, mask)
    alike = kind.from_mask(dataclasses.replace(mask, bits=mask.bits.cpu()))
    assert torch.equal(alike.ids, plan.ids.cpu()) and torch.equal(alike.members, plan.members.cpu())


SWITCHES = {
    "fence on the consumer's side": tiny_spec(tile_m=128, proxy_fence="consumer", softmax="exact"),
    "three stages": tiny_spec(kv_stages=3),
    "persistent, one warpgroup": tiny_spec(scheduler="persistent"),
    "persistent, two CTAs an SM": tiny_spec(scheduler="persistent", ctas_per_sm=2),
    "persistent, ping-pong, Q in registers": tiny_spec(
        tile_m=128, scheduler="persistent", ping_pong=True, q_source="registers"
    ),
    "zigzag, Q in registers": tiny_spec(tile_m=128, scheduler="zigzag", q_source="registers"),
    "three warpgroups in turn": tiny_spec(tile_m=192, ping_pong=True),
}


@pytest.mark.parametrize("spec", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_of_a_spec(spec):
    for fill in FILLS:
        check_on_gpu(Case(slice_m=spec.tile_m, seqlens=(3000, 2111), fill=fill, heads=GROUPED, spec=spec))


# ---- real sizes: a sample of the query blocks against the oracle -----------------------------------------------------
def check_blocks(out, lse, q, k, v, keep, case, blocks=6):
    """The contract of a few query blocks, as a call of its own: the oracle need not do the others."""
    sq, m = case.seqlens[0], case.slice_m
    picked = torch.linspace(0, keep.shape[2] - 1, blocks).long().unique().tolist()
    for b, h, block in itertools.product(range(q.shape[0]), (0, q.shape[2] - 1), picked):
        rows = slice(block * m, min(block * m + m, sq))
        kv = h // (q.shape[2] // k.shape[2])
        part = keep[b % keep.shape[0], h % keep.shape[1], block][None, None, None]
        facts = {**case.geometry, "seqlen_q": rows.stop - rows.start}
        with named(f"{case}, batch entry {b}, head {h}, block {block}"):
            assert_within_contract(
                out[b : b + 1, rows, h : h + 1],
                lse[b : b + 1, h : h + 1, rows],
                q[b : b + 1, rows, h : h + 1],
                k[b : b + 1, :, kv : kv + 1],
                v[b : b + 1, :, kv : kv + 1],
                fg.SliceMask.from_dense(part, **facts),
            )


REAL = (
    Case(head_dim=128, slice_m=192, seqlens=(16384, 16384), heads=Heads(1, 24, 24, 1, 24)),
    Case(head_dim=128, slice_m=192, seqlens=(75600, 75600), heads=Heads(1, 4, 4, 1, 4)),
    Case(head_dim=128, slice_m=192, slice_n=16, seqlens=(75600, 75600), heads=Heads(1, 2, 2, 1, 1), fill="100 %"),
    Case(head_dim=128, slice_m=192, seqlens=(16384, 50003), heads=Heads(1, 8, 4, 1, 8), fill="octets"),
    Case(head_dim=128, slice_m=128, seqlens=(32760, 32760), heads=Heads(1, 12, 4, 1, 12), fill="octets"),
    Case(head_dim=64, slice_m=192, seqlens=(17776, 17776), heads=Heads(1, 8, 8, 1, 8), fill="octets"),
    Case(head_dim=128, slice_m=128, seqlens=(32760, 32760), heads=Heads(1, 12, 4, 1, 12)),
    Case(head_dim=128, slice_m=64, seqlens=(20000, 20000), heads=Heads(2, 4, 4, 1, 4), fill="1 %"),
    Case(head_dim=128, slice_m=16, slice_n=2, seqlens=(16384, 16384), heads=Heads(1, 4, 4, 1, 4), fill="1 %"),
    Case(head_dim=64, slice_m=192, seqlens=(17776, 17776), heads=Heads(1, 16, 16, 1, 16)),
    Case(head_dim=64, slice_m=128, slice_n=64, seqlens=(17776, 17776), heads=Heads(2, 8, 8, 2, 1)),
    Case(head_dim=96, slice_m=128, slice_n=3, seqlens=(9999, 30001), heads=Heads(1, 8, 2, 1, 8)),
    Case(head_dim=256, slice_m=128, seqlens=(8192, 40000), heads=Heads(1, 8, 4, 1, 8)),
    Case(dtype="fp16", head_dim=128, slice_m=192, seqlens=(30000, 16384), heads=Heads(1, 8, 8, 1, 8)),
    Case(dtype="fp16", head_dim=64, slice_m=64, slice_n=8, seqlens=(16384, 50000), heads=Heads(1, 4, 4, 1, 4)),
)


def real_name(case):
    lengths = "x".join(map(str, case.seqlens))
    return f"{case.dtype}-d{case.head_dim}-m{case.slice_m}-n{case.slice_n}-{lengths}-{case.fill}".replace(" ", "")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", REAL, ids=real_name)
def test_real_sizes(case):
    q, k, v = case.tensors("cuda")
    mask = case.mask("cuda")
    plan = fg.Plan.from_mask(mask)
    assert plan.grouped == (case.fill == "octets")
    out, lse = attend(q, k, v, plan)
    again, lse_again = attend(q, k, v, plan)
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "a repeat differs"
    assert out.isfinite().all()
    check_blocks(out, lse, q, k, v, mask.to_dense(), case)


def test_dense_attention_at_size():
    """Every key kept: torch's own attention in fp32 is the oracle for all rows."""
    case = Case(head_dim=128, slice_m=192, seqlens=(8192, 8192), heads=Heads(1, 4, 2, 1, 1), fill="100 %")
    q, k, v = case.tensors("cuda")
    plan = fg.Plan.from_mask(case.mask("cuda"))
    assert plan.grouped
    out, _ = attend(q, k, v, plan)
    across = [x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in across)).transpose(1, 2)
        rough = torch.nn.functional.scaled_dot_product_attention(*across).transpose(1, 2)
    assert (out.float() - want).abs().max() <= 2 * (rough.float() - want).abs().max() + 2.0**-9


# ---- the emulator and the chip ---------------------------------------------------------------------------------------
TWINS = {
    "m192-d128": Case(head_dim=128, slice_m=192, seqlens=(400, 700), heads=GROUPED, spec="m192-d128"),
    "m128-d64": Case(head_dim=64, slice_m=128, slice_n=5, seqlens=(400, 700), heads=GROUPED, spec="m128-d64"),
    "fp16": Case(dtype="fp16", head_dim=96, slice_m=64, seqlens=(200, 500), spec="m64-exact-d96"),
}
PREDICT = """
import sys, torch, fgattn_cute as fg
from tests.forward_cases import Case, Heads, emulate
case = {case!r}
result = emulate(*case.tensors(), fg.Plan.from_mask(case.mask()), spec=case.kernel())
torch.save((result.out, result.lse), sys.argv[1])
"""


@pytest.mark.parametrize("case", TWINS.values(), ids=TWINS)
def test_the_emulator_predicts_the_chip(case, tmp_path):
    """The same kernel on the same numbers: they differ by the hardware's exp2 and its fused multiply-adds only.

    The emulator runs in a process that sees no GPU.
    """
    file = tmp_path / "predicted.pt"
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-c", PREDICT.format(case=case), str(file)],
        check=True,
        cwd=Path(__file__).parents[2],
        env=blind,
    )
    predicted_out, predicted_lse = torch.load(file)
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    out, lse = attend(*(x.cuda() for x in (q, k, v)), plan.to("cuda"), spec=case.kernel())
    kept = predicted_lse.isfinite()
    assert torch.equal(kept, lse.cpu().isfinite())
    assert (predicted_lse - lse.cpu())[kept].abs().max() < 2e-5
    rounding = 2.0**-8 if case.dtype == "bf16" else 2.0**-11
    difference = (predicted_out.float() - out.cpu().float()).abs()
    assert (difference <= rounding * (2 * predicted_out.float().abs() + 0.25)).all()


def test_the_switches_can_run():
    """A switch that no spec accepts would leave its test without meaning."""
    assert not [reason for spec in SWITCHES.values() for reason in spec.reasons()]
