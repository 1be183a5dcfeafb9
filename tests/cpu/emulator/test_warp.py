# SPDX-License-Identifier: Apache-2.0
"""Warp-wide instructions: shuffles, votes, reductions, match, elect, and what happens under divergence."""

import numpy as np
import pytest
import torch

from tests.cpu.emulator.ptx_lab import bits32, fault, per_thread, run

I32 = torch.int32
LANES = torch.arange(32)


@pytest.fixture
def values():
    return torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int64).to(I32)


def test_shuffles(values):
    # PTX ISA 9.7.9.6: c packs the clamp (bits 0-4) and the segment mask (bits 8-12)
    i = values
    assert torch.equal(per_thread("shfl.sync.bfly.b32 $0, $1, 2, 31, -1", [i], I32), i[LANES ^ 2])
    up = per_thread("shfl.sync.up.b32 $0, $1, 3, 0, -1", [i], I32)
    assert torch.equal(up, i[torch.where(LANES >= 3, LANES - 3, LANES)])
    down = per_thread("shfl.sync.down.b32 $0, $1, 3, 31, -1", [i], I32)
    assert torch.equal(down, i[torch.where(LANES < 29, LANES + 3, LANES)])
    quads = per_thread("shfl.sync.idx.b32 $0, $1, 1, 0x1c03, -1", [i], I32)
    assert torch.equal(quads, i[LANES // 4 * 4 + 1])
    valid = per_thread("shfl.sync.up.b32 %r40|%p1, $1, 3, 0, -1; selp.b32 $0, 1, 0, %p1", [i], I32)
    assert torch.equal(valid, (LANES >= 3).int())


def test_votes(values):
    # PTX ISA 9.7.9.13 (vote.sync)
    negative = "setp.lt.s32 %p1, $1, 0; "
    ballot = sum(int(v < 0) << k for k, v in enumerate(values.tolist()))
    got = bits32(per_thread(negative + "vote.sync.ballot.b32 $0, %p1, -1", [values], I32))
    assert (got == ballot).all()
    for mode, want in (("any", bool(ballot)), ("all", ballot == 2**32 - 1), ("uni", ballot in (0, 2**32 - 1))):
        got = per_thread(negative + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 $0, 1, 0, %p2", [values], I32)
        assert (got == int(want)).all(), mode


def test_reductions(values):
    # PTX ISA 9.7.9.15 (redux.sync)
    u = bits32(values)
    want = {
        "max.s32": values.max().item() & 0xFFFFFFFF,
        "min.s32": values.min().item() & 0xFFFFFFFF,
        "max.u32": int(u.max()),
        "min.u32": int(u.min()),
        "add.s32": int(u.astype(np.uint64).sum() & 0xFFFFFFFF),
        "and.b32": int(np.bitwise_and.reduce(u)),
        "or.b32": int(np.bitwise_or.reduce(u)),
        "xor.b32": int(np.bitwise_xor.reduce(u)),
    }
    for op, value in want.items():
        got = bits32(per_thread(f"redux.sync.{op} $0, $1, -1", [values], I32))
        assert (got == value).all(), op


def test_match_any_gives_the_lanes_with_my_value():
    # PTX ISA 9.7.9.14 (match.sync)
    i = LANES.to(I32) // 3 % 5
    want = [sum(1 << k for k in range(32) if i[k] == x) for x in i]
    assert bits32(per_thread("match.any.sync.b32 $0, $1, -1", [i], I32)).tolist() == want


def test_match_all_says_whether_the_warp_agrees():
    op = "match.all.sync.b32 %r40|%p1, $1, -1; selp.b32 $0, %r40, 77, %p1"
    assert (bits32(per_thread(op, [torch.full((32,), 4, dtype=I32)], I32)) == 2**32 - 1).all()
    assert (per_thread(op, [LANES.to(I32)], I32) == 77).all()


def test_elect_picks_one_lane_and_names_it():
    # PTX ISA 9.7.9.16 (elect.sync)
    op = "elect.sync %r40|%p1, -1; selp.b32 $0, 100, 0, %p1; add.s32 $0, $0, %r40"
    got = per_thread(op, [LANES.to(I32)], I32)
    leader = int((got >= 100).nonzero().item())
    assert torch.equal(got, torch.where(leader == LANES, 100 + leader, leader).int())


def test_activemask_and_lane_masks():
    masks = {"eq": lambda k: 1 << k, "lt": lambda k: (1 << k) - 1, "ge": lambda k: (2**32 - 1) ^ ((1 << k) - 1)}
    for name, f in masks.items():
        got = bits32(per_thread(f"mov.u32 $0, %lanemask_{name}", [LANES.to(I32)], I32))
        assert got.tolist() == [f(k) for k in range(32)], name


def test_sync_with_a_mask_waits_for_lanes_on_another_path(values):
    # lanes 0-15 arrive late: they loop first
    body = """setp.lt.u32 %p3, lane, 16; mov.b32 %r10, 0; @!%p3 bra MEET;
SPIN: add.s32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 9; @%p1 bra SPIN;
MEET: shfl.sync.bfly.b32 $0, $1, 16, 31, -1"""
    assert torch.equal(per_thread(body, [values], I32), values[LANES ^ 16])


def test_a_lane_that_never_arrives_is_a_deadlock():
    body = """setp.eq.u32 %p1, lane, 3; @%p1 bra AROUND; shfl.sync.bfly.b32 %r1, lane, 1, 31, -1; bar.sync 0;
AROUND: bar.sync 1;"""
    fault("deadlock", body, block=32)


def test_thread_and_block_indices():
    out = torch.zeros(3, 64, 4, dtype=I32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %warpid;
mad.lo.s32 %r5, %r1, %r2, tid; mul.wide.u32 %d1, %r5, 16; add.s64 %d1, %d1, a0;
st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};"""
    run(body, [out], block=64, grid=3)
    t = torch.arange(64)
    for c in range(3):
        assert torch.equal(out[c], torch.stack([t * 0 + c, t * 0 + 64, t * 0 + 3, t // 32], 1).int())
