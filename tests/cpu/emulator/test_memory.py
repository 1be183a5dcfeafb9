# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics, cp.async and bulk copies against torch."""

import pytest
import torch

from fgattn_cute import emulator
from tests.cpu.emulator.ptx_lab import drain_shared, fault, fill_shared, per_thread, run

I32, F32 = torch.int32, torch.float32
SEEDS = emulator.schedules(5)


def test_vector_loads_and_stores_with_cache_hints():
    src, dst = torch.arange(128 * 8, dtype=I32), torch.zeros(128 * 8, dtype=I32)
    body = """mul.wide.u32 %d1, tid, 32; add.s64 %d2, %d1, a0; add.s64 %d3, %d1, a1;
createpolicy.fractional.L2::evict_last.b64 %d4, 1.0;
ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {%r1,%r2,%r3,%r4}, [%d2];
ld.global.L2::cache_hint.v4.b32 {%r5,%r6,%r7,%r8}, [%d2+16], %d4;
st.global.v2.b32 [%d3], {%r1,%r2}; st.global.v2.b32 [%d3+8], {%r3,%r4}; st.global.cs.v4.b32 [%d3+16], {%r5,%r6,%r7,%r8};
prefetch.global.L2 [%d2];"""
    run(body, [src, dst])
    assert torch.equal(src, dst)


def test_narrow_and_wide_types_extend_as_named():
    # PTX ISA 9.7.9.8 (ld): the value is extended according to the type in the instruction
    bytes_ = torch.arange(-16, 16, dtype=torch.int8)
    for kind, want in (("s8", bytes_.int()), ("u8", bytes_.int() & 255)):
        out = torch.zeros(32, dtype=I32)
        body = f"cvt.u64.u32 %d1, tid; add.s64 %d1, %d1, a0; ld.global.{kind} %r1, [%d1]; mul.wide.u32 %d2, tid, 4;"
        run(body + "add.s64 %d2, %d2, a1; st.global.b32 [%d2], %r1;", [bytes_, out], block=32)
        assert torch.equal(out, want), kind
    wide, out = torch.arange(32, dtype=torch.int64) << 33, torch.zeros(32, dtype=torch.int64)
    body = """mul.wide.u32 %d1, tid, 8; add.s64 %d2, %d1, a0; add.s64 %d3, %d1, a1;
ld.global.b64 %d4, [%d2]; st.global.b64 [%d3], %d4;"""
    run(body, [wide, out], block=32)
    assert torch.equal(wide, out)


def test_generic_addresses_reach_shared_and_global():
    src, out = torch.arange(128, dtype=I32), torch.zeros(128, dtype=I32)
    body = """cvt.u64.u32 %d1, smem; cvta.shared.u64 %d1, %d1; mul.wide.u32 %d2, tid, 4;
add.s64 %d3, %d2, a0; ld.b32 %r1, [%d3]; add.s64 %d4, %d1, %d2; st.b32 [%d4], %r1; bar.sync 0;
xor.b64 %d5, %d2, 4; add.s64 %d5, %d5, %d1; ld.b32 %r2, [%d5]; add.s64 %d6, %d2, a1; st.b32 [%d6], %r2;"""
    run(body, [src, out])
    assert torch.equal(out, torch.arange(128, dtype=I32) ^ 1)


def test_atomics_on_global_memory():
    # PTX ISA 9.7.13.5 (atom): the old value is returned, the update is atomic over all threads
    old = torch.zeros(256, dtype=I32)
    counter = torch.zeros(1, dtype=I32)
    body = """mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 128, tid;
atom.global.add.u32 %r1, [a0], 1; mul.wide.u32 %d1, %r3, 4; add.s64 %d1, %d1, a1; st.global.b32 [%d1], %r1;"""
    run(body, [counter, old], grid=2)
    assert counter.item() == 256 and sorted(old.tolist()) == list(range(256))
    for op, start, want in (("max.s32", -5, 127), ("min.s32", 500, 0), ("or.b32", 0, 127), ("exch.b32", 0, None)):
        cell = torch.tensor([start], dtype=I32)
        run(f"atom.global.{op} %r1, [a0], tid;", [cell])
        assert cell.item() in range(128) if want is None else cell.item() == want, op
    cell = torch.tensor([7], dtype=I32)
    run("atom.global.cas.b32 %r1, [a0], 7, 9;", [cell])
    assert cell.item() == 9
    total = torch.zeros(1)
    run("cvt.rn.f32.u32 %r1, tid; red.global.add.f32 [a0], %r1;", [total])
    assert total.item() == 127 * 64


def test_atomics_on_shared_memory():
    out = torch.zeros(32, dtype=I32)
    body = """mov.b32 %r1, 0; setp.eq.u32 %p1, tid, 0; @%p1 st.shared.b32 [smem], %r1; bar.sync 0;
atom.shared.add.u32 %r2, [smem], 3; red.shared.add.u32 [smem], 1; bar.sync 0; ld.shared.b32 %r3, [smem];
and.b32 %r4, tid, 31; mul.wide.u32 %d1, %r4, 4; add.s64 %d1, %d1, a0; setp.lt.u32 %p2, tid, 32;
@%p2 st.global.b32 [%d1], %r3;"""
    run(body, [out])
    assert (out == 128 * 4).all()


CP = """shl.b32 %r1, tid, 2; add.s32 %r2, smem, %r1; cvt.u64.u32 %d1, %r1; add.s64 %d2, %d1, a0; add.s64 %d3, %d1, a1;
and.b32 %r3, tid, 3; setp.ne.u32 %p1, %r3, 0; selp.b32 %r5, 4, 0, %p1;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_fills_with_zeros_past_its_source_size(seed):
    # PTX ISA 9.7.9.25.3.1 (cp.async): bytes past src-size are zero, the source is then not read
    src, out = torch.arange(256, dtype=I32), torch.zeros(128, dtype=I32)
    body = (
        CP
        + "cp.async.ca.shared.global [%r2], [%d2+64], 4, %r5; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    )
    run(body + "ld.shared.b32 %r9, [%r2]; st.global.b32 [%d3], %r9;", [src, out], seed=seed)
    assert out.tolist() == [t + 16 if t & 3 else 0 for t in range(128)]


def test_cp_async_of_sixteen_bytes_with_partial_source():
    src, out = torch.arange(1, 17, dtype=torch.uint8), torch.full((4, 16), 9, dtype=torch.uint8)
    for i, n in enumerate((0, 4, 12, 16)):
        body = f"""setp.ne.u32 %p1, tid, 0; @%p1 bra END; mov.b32 %r1, {n};
cp.async.cg.shared.global [smem], [a0], 16, %r1; cp.async.wait_all; ld.shared.v4.b32 {{%r2,%r3,%r4,%r5}}, [smem];
st.global.v4.b32 [a1+{16 * i}], {{%r2,%r3,%r4,%r5}}; END:"""
        run(body, [src, out])
        assert out[i].tolist() == [k + 1 if k < n else 0 for k in range(16)]


def test_cp_async_with_size_zero_touches_no_global_memory():
    out = torch.zeros(4, dtype=I32)
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra END; mov.b64 %d1, 64; mov.b32 %r1, 0;
cp.async.cg.shared.global [smem], [%d1], 16, %r1;
cp.async.wait_all; ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [smem]; st.global.v4.b32 [a0], {%r2,%r3,%r4,%r5}; END:"""
    run(body, [out])
    assert out.tolist() == [0] * 4
    fault("bounds", body.replace("mov.b32 %r1, 0", "mov.b32 %r1, 16"), [out])


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_arrives_on_an_mbarrier_with_and_without_noinc(seed):
    # PTX ISA 9.7.13.15.17: without .noinc the pending count is first incremented, so the two cancel out
    src = torch.arange(128, dtype=I32)
    wait = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p5, [smem+1024], 0; @!%p5 bra WAIT;"
    read = "xor.b32 %r6, %r2, 256; ld.shared.b32 %r9, [%r6]; st.global.b32 [%d3], %r9;"
    init = "setp.ne.u32 %p2, tid, 0; @%p2 bra READY; mbarrier.init.shared::cta.b64 [smem+1024], 128; READY: bar.sync 0;"
    copy = "cp.async.ca.shared.global [%r2], [%d2], 4;"
    for arrive in (
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [smem+1024];",
        "cp.async.mbarrier.arrive.shared::cta.b64 [smem+1024]; mbarrier.arrive.shared::cta.b64 _, [smem+1024];",
    ):
        out = torch.zeros(128, dtype=I32)
        run(CP + init + copy + arrive + wait + read, [src, out], seed=seed)
        assert out.tolist() == [t ^ 64 for t in range(128)]


def test_cp_async_wait_group_counts_the_newest_groups():
    src, out = torch.arange(256, dtype=I32), torch.zeros(128, dtype=I32)
    body = (
        CP
        + """cp.async.ca.shared.global [%r2], [%d2], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r2+512], [%d2+512], 4; cp.async.commit_group; cp.async.wait_group 1;
ld.shared.b32 %r9, [%r2]; st.global.b32 [%d3], %r9; cp.async.wait_group 0;"""
    )
    run(body, [src, out])
    assert torch.equal(out, src[:128])


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copies_both_ways(seed):
    # PTX ISA 9.7.9.25.4.1 (cp.async.bulk)
    src, out = torch.randint(0, 255, (4096,), dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra MEET; mbarrier.init.shared::cta.b64 [smem+8192], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], 4096;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem], [a0], 4096, [smem+8192];
MEET: bar.sync 0;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8192], 0; @!%p2 bra WAIT;
@%p1 bra END; cp.async.bulk.global.shared::cta.bulk_group [a1], [smem], 4096; cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0; END:"""
    run(body, [src, out], seed=seed)
    assert torch.equal(src, out)


def test_bulk_reduction_adds_to_global_memory():
    # PTX ISA 9.7.9.25.4.2 (cp.reduce.async.bulk)
    src, out = torch.arange(1024, dtype=F32), torch.full((1024,), 3.0)
    body = (
        fill_shared(4096)
        + """setp.ne.u32 %p1, tid, 0; @%p1 bra END;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [a1], [smem], 4096; cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0; END:"""
    )
    run(body, [src, out])
    assert torch.equal(out, src + 3)


def test_shared_memory_round_trip_helper():
    src, out = torch.arange(512, dtype=I32), torch.zeros(512, dtype=I32)
    run(fill_shared(2048) + drain_shared(2048, "a1"), [src, out])
    assert torch.equal(src, out)


def test_local_memory_and_indexed_parameters():
    got = per_thread(
        "st.local.b32 [scratch+4], $1; mov.b32 $0, 0; ld.local.b32 $0, [scratch+4]",
        [torch.arange(32, dtype=I32)],
        I32,
        setup=".local .align 8 .b8 scratch[16];\n",
    )
    assert got.tolist() == list(range(32))


LEAVE = """setp.eq.u32 %p1, warp, 1; mbarrier.init.shared::cta.b64 [smem+1024], 32; bar.sync 0; @%p1 bra CONSUME;
shl.b32 %r1, lane, 2; add.s32 %r2, smem, %r1; cvt.u64.u32 %d1, %r1; add.s64 %d2, %d1, a0;
cp.async.ca.shared.global [%r2], [%d2], 4; ARRIVE bra END;
CONSUME: mbarrier.try_wait.parity.shared::cta.b64 %p5, [smem+1024], 0; @!%p5 bra CONSUME;
shl.b32 %r1, lane, 2; add.s32 %r2, smem, %r1; ld.shared.b32 %r9, [%r2];
cvt.u64.u32 %d1, %r1; add.s64 %d3, %d1, a1; st.global.b32 [%d3], %r9; END:"""


def test_copies_land_after_their_warp_has_exited():
    src = torch.arange(1, 33, dtype=I32)
    init = "setp.ne.u32 %p7, tid, 0; @!%p7 mbarrier.init"
    body = LEAVE.replace("mbarrier.init", init, 1)
    for seed in SEEDS:
        out = torch.zeros(32, dtype=I32)
        arrive = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [smem+1024];"
        run(body.replace("ARRIVE", arrive), [src, out], block=64, seed=seed)
        assert torch.equal(out, src)
    # an arrival that does not wait for the copy: with late completion the consumer comes too early
    out = torch.zeros(32, dtype=I32)
    early = body.replace("ARRIVE", "mbarrier.arrive.shared::cta.b64 _, [smem+1024];")
    report = run(early, [src, out], block=64, seed=0, on_violation="collect", checks=["race"])
    assert {f.kind for f in report.findings} == {"race"} and not torch.equal(out, src)
