# SPDX-License-Identifier: Apache-2.0
"""What must hold of the forward kernel whatever the numbers are: isolation, symmetries, repeatability."""

import math

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute.kernels.spec import FwdSpec
from tests.forward_cases import Case, Heads, emulate, named, same_bits, tiny_spec
from tests.numerics import assert_within_contract

SPECS = {
    "grid": tiny_spec(),
    "persistent": FwdSpec(
        head_dim=64, tile_m=128, tile_n=64, scheduler="persistent", ping_pong=True, q_source="registers"
    ),
    "exact": FwdSpec(head_dim=96, tile_m=64, tile_n=32, softmax="exact"),
    "wide": FwdSpec(head_dim=64, dtype="fp16", tile_m=192, tile_n=64, softmax="exact", ping_pong=True),
}
GROUPED = Heads(2, 4, 2, 2, 4)
NAN, INF = float("nan"), float("inf")

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def case_of(spec, **facts):
    """200 x 333 tokens, two blocks or more of queries, several tiles of keys, unless told otherwise."""
    defaults = {"slice_m": 80 if spec.tile_m == 128 else spec.tile_m, "seqlens": (200, 333), "heads": GROUPED}
    return Case(**{"dtype": spec.dtype, "head_dim": spec.head_dim, "spec": spec, **defaults, **facts})


def contents(case):
    return (*case.tensors(), fg.Plan.from_mask(case.mask()))


def keep_tokens(plan):
    """bool (B, H, Mb, Sk): keys of each query block."""
    return plan.to_mask().to_token_mask()[:, :, :: plan.slice_m]


# ---- isolation -------------------------------------------------------------------------------------------------------
@every_spec
@pytest.mark.parametrize("slice_n", [1, 5])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_rows_in_no_list_change_no_bit(spec, slice_n, poison):
    """Unlisted rows of K and V, rows of the allocation behind Sk, and rows behind Sq hold NaN or infinity."""
    case = case_of(spec, slice_n=slice_n)
    q, k, v = case.tensors()
    keep = case.keep()
    dropped = torch.rand(1, 1, 1, keep.shape[3], generator=case.generator()) < 0.4
    dropped[..., 0], dropped[..., -1] = True, False  # 0 pads lists; the last segment crosses Sk
    keep &= ~dropped
    keep[..., 0, -1] = True
    plan = fg.Plan.from_mask(fg.SliceMask.from_dense(keep, **case.geometry))
    clean = emulate(q, k, v, plan, spec=spec)
    assert_within_contract(clean.out, clean.lse, q, k, v, plan)

    used = keep_tokens(plan).any(2).view(2, 2, 2, -1).any(2)  # (B, Hkv, Sk)
    assert not used.all() and used[..., -1].all()
    room = [torch.full((2, x.shape[1] + 70, *x.shape[2:]), poison, dtype=x.dtype) for x in (q, k, v)]
    views = [storage[:, : x.shape[1]] for storage, x in zip(room, (q, k, v), strict=True)]
    views[0].copy_(q)
    for view, x in zip(views[1:], (k, v), strict=True):
        view.copy_(torch.where(used.transpose(1, 2)[..., None], x, poison))
    poisoned = emulate(*views, plan, spec=spec)
    assert same_bits(poisoned.out, clean.out) and same_bits(poisoned.lse, clean.lse)


@every_spec
def test_a_bad_query_block_stays_alone(spec):
    case = case_of(spec, slice_m=48, fill="100 %", heads=Heads(1, 2, 2, 1, 1))
    q, k, v, plan = contents(case)
    clean = emulate(q, k, v, plan, spec=spec)
    q[:, 48:96] = NAN
    spoiled = emulate(q, k, v, plan, spec=spec)
    for rows in (slice(0, 48), slice(96, None)):
        assert same_bits(spoiled.out[:, rows].contiguous(), clean.out[:, rows].contiguous())
        assert same_bits(spoiled.lse[..., rows].contiguous(), clean.lse[..., rows].contiguous())
    assert spoiled.out[:, 48:96].isnan().all() and spoiled.lse[..., 48:96].isnan().all()


@every_spec
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_bad_key_reaches_the_blocks_that_keep_it_and_no_other(spec, which):
    case = case_of(spec)
    q, k, v, plan = contents(case)
    clean = emulate(q, k, v, plan, spec=spec)
    (k if which == "k" else v)[:, 77] = NAN
    spoiled = emulate(q, k, v, plan, spec=spec)
    hit = keep_tokens(plan)[..., 77].repeat_interleave(plan.slice_m, 2)[..., :200]  # (B, H, Sq)
    assert hit.any() and not hit.all()
    of_out = spoiled.out.transpose(1, 2)
    assert of_out[hit].isnan().all()
    assert torch.equal(of_out[~hit], clean.out.transpose(1, 2)[~hit])
    assert torch.equal(spoiled.lse[~hit], clean.lse[~hit])


@every_spec
def test_what_runs_beside_a_block_changes_no_bit(spec):
    """One batch entry, one head and one K/V head at a time give the bits of the call that holds them all."""
    case = case_of(spec)
    q, k, v, plan = contents(case)
    together = emulate(q, k, v, plan, spec=spec)
    for b, h in ((0, 0), (0, 3), (1, 1), (1, 2)):
        rows = fg.Plan.from_mask(plan.to_mask().select(batch=[b], heads=[h]))
        k_of_head, v_of_head = (x[b : b + 1, :, h // 2 : h // 2 + 1] for x in (k, v))
        alone = emulate(q[b : b + 1, :, h : h + 1], k_of_head, v_of_head, rows, spec=spec)
        with named(f"batch entry {b}, head {h}"):
            assert same_bits(alone.out[0, :, 0], together.out[b, :, h].contiguous())
            assert same_bits(alone.lse[0, 0], together.lse[b, h])


# ---- symmetries ------------------------------------------------------------------------------------------------------
@every_spec
def test_permuting_keys_with_their_lists(spec):
    case = case_of(spec)
    q, k, v, plan = contents(case)
    plain = emulate(q, k, v, plan, spec=spec)
    order = torch.randperm(333)
    moved = fg.SliceMask.from_dense(plan.to_mask().to_dense()[..., order], **case.geometry)
    k, v = k[:, order], v[:, order]
    permuted = emulate(q, k, v, fg.Plan.from_mask(moved), spec=spec)
    assert_within_contract(permuted.out, permuted.lse, q, k, v, moved)
    empty = permuted.lse == -INF
    assert torch.equal(empty, plain.lse == -INF)
    assert (permuted.lse - plain.lse)[~empty].abs().max() < 2e-4
    band = 2.0**-6 if spec.dtype == "bf16" else 2.0**-9
    assert (permuted.out.float() - plain.out.float()).abs().max() <= band * v.abs().max().item()


@every_spec
def test_lists_split_over_two_calls_merge_by_lse(spec):
    case = case_of(spec, fill="30 %")
    q, k, v, plan = contents(case)
    keep = plan.to_mask().to_dense()
    first = torch.rand(keep.shape) < 0.5
    first[0, 0] = True  # a second part that is empty
    parts = []
    for part in (keep & first, keep & ~first):
        mask = fg.SliceMask.from_dense(part, **case.geometry)
        parts.append(emulate(q, k, v, fg.Plan.from_mask(mask), spec=spec))
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    out = sum(p.out.float() * (p.lse - lse).exp().transpose(1, 2)[..., None] for p in parts).to(q.dtype)
    assert_within_contract(out, lse, q, k, v, plan)


@every_spec
def test_full_lists_are_dense_attention(spec):
    case = case_of(spec, fill="100 %", heads=Heads(2, 4, 2, 1, 1))
    q, k, v, plan = contents(case)
    out, lse, _ = emulate(q, k, v, plan, spec=spec)
    across = [x.float().transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    dense = torch.nn.functional.scaled_dot_product_attention(*across).transpose(1, 2)
    rough = torch.nn.functional.scaled_dot_product_attention(*(x.to(q.dtype) for x in across)).transpose(1, 2)
    allowed = 2 * (rough.float() - dense).abs().max() + 2.0**-9
    assert (out.float() - dense).abs().max() <= allowed
    scores = across[0] @ across[1].transpose(2, 3) / math.sqrt(spec.head_dim)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4


# ---- repeatability ---------------------------------------------------------------------------------------------------
@every_spec
def test_schedules_give_the_same_bits(spec):
    """Late, eager, newest first, and two random interleavings; persistent CTAs also by other numbers of items each."""
    case = case_of(spec, fill="ladder")
    q, k, v, plan = contents(case)
    first = emulate(q, k, v, plan, spec=spec, seed=0, num_sms=2)
    assert_within_contract(first.out, first.lse, q, k, v, plan)
    for seed, num_sms in ((1, 1), (2, 2), (3, 3), (4, 100)):
        again = emulate(q, k, v, plan, spec=spec, seed=seed, num_sms=num_sms)
        with named(f"schedule {seed} on {num_sms} SMs"):
            assert same_bits(again.out, first.out) and same_bits(again.lse, first.lse)


def test_logits_that_need_the_redo_pass_repeat_too():
    """Poisoned rows in some blocks, other schedules: the second pass depends on nothing but the first one's LSE."""
    spec = SPECS["persistent"]
    q, k, v, plan = contents(case_of(spec))
    q[:, 5], k[:, 300] = q[:, 5] * 40, k[:, 300] * 40
    runs = [emulate(q, k, v, plan, spec=spec, seed=seed, num_sms=1 + seed) for seed in range(5)]
    assert runs[0].report[1].result.counters["instructions.wgmma"] > 0, "no block was redone"
    assert_within_contract(runs[0].out, runs[0].lse, q, k, v, plan)
    for run in runs[1:]:
        assert same_bits(run.out, runs[0].out) and same_bits(run.lse, runs[0].lse)
