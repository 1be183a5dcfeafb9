# SPDX-License-Identifier: Apache-2.0
"""mbarriers over many phases, named barriers, clusters, and the instructions that only shape the schedule."""

import pytest
import torch

from fgattn_cute import emulator
from fgattn_cute.emulator.report import kind_of
from tests.cpu.emulator.ptx_lab import fault, run, tensor_map

I32 = torch.int32
SEEDS = emulator.schedules(6)

# warp 0 produces, warp 1 consumes; one slot, a full and an empty barrier; value 11 * i in phase i
RING = """setp.ne.u32 %p1, tid, 0; @%p1 bra MEET;
mbarrier.init.shared::cta.b64 [smem], 1; mbarrier.init.shared::cta.b64 [smem+8], 1; fence.mbarrier_init.release.cluster;
MEET: bar.sync 0; mov.b32 %r1, 0; setp.eq.u32 %p3, warp, 1; @%p3 bra CONSUME;
setp.ne.u32 %p4, tid, 0; @%p4 bra END;
PLOOP: and.b32 %r2, %r1, 1; xor.b32 %r3, %r2, 1;
PWAIT: mbarrier.try_wait.parity.shared::cta.b64 %p5, [smem+8], %r3; @!%p5 bra PWAIT;
mul.lo.s32 %r4, %r1, 11; st.shared.b32 [smem+16], %r4; mbarrier.arrive.shared::cta.b64 _, [smem];
add.s32 %r1, %r1, 1; setp.lt.u32 %p6, %r1, 5; @%p6 bra PLOOP; bra END;
CONSUME: setp.ne.u32 %p4, lane, 0; @%p4 bra END;
CLOOP: and.b32 %r2, %r1, 1;
CWAIT: mbarrier.try_wait.parity.shared::cta.b64 %p5, [smem], %r2; @!%p5 bra CWAIT;
ld.shared.b32 %r4, [smem+16]; mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, a0; st.global.b32 [%d1], %r4;
mbarrier.arrive.shared::cta.b64 _, [smem+8]; add.s32 %r1, %r1, 1; setp.lt.u32 %p6, %r1, 5; @%p6 bra CLOOP;
END:"""


@pytest.mark.parametrize("seed", SEEDS)
def test_ring_over_phases(seed):
    out = torch.zeros(5, dtype=I32)
    run(RING, [out], block=64, seed=seed)
    assert out.tolist() == [0, 11, 22, 33, 44]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("mbarrier.arrive.shared::cta.b64 _, [smem+8];", "", "deadlock"),
        ("mbarrier.init.shared::cta.b64 [smem], 1;", "mbarrier.init.shared::cta.b64 [smem], 2;", "deadlock"),
        ("@!%p5 bra CWAIT;", "", "uninitialised"),
        ("@!%p5 bra PWAIT;", "", "wrong"),
    ],
    ids=["no release", "count too high", "no wait of the consumer", "no wait of the producer"],
)
def test_faults_in_the_ring(old, new, kind):
    assert old in RING
    kinds = set()
    for seed in emulator.schedules(12):
        out = torch.zeros(5, dtype=I32)
        report = run(RING.replace(old, new), [out], block=64, seed=seed, on_violation="collect")
        kinds |= {kind_of(f) for f in report.findings}
        kinds |= set() if out.tolist() == [0, 11, 22, 33, 44] else {"wrong"}
    assert kind in kinds, kinds


def test_arriving_too_often_is_an_error():
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra MEET; mbarrier.init.shared::cta.b64 [smem], 1;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [smem], 16;
MEET: bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [smem];"""
    fault("barrier", body)


def test_a_barrier_nobody_initialised_is_an_error():
    fault("barrier", "mbarrier.arrive.shared::cta.b64 _, [smem];")


def test_a_barrier_overwritten_by_data_is_an_error():
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra MEET; mbarrier.init.shared::cta.b64 [smem], 1;
st.shared.b32 [smem+4], tid;
mbarrier.arrive.shared::cta.b64 _, [smem]; MEET: bar.sync 0;"""
    fault("barrier", body)


def test_transaction_count_overflow_is_an_error():
    # PTX ISA 9.7.13.15.2: the valid range of tx-count is -(2^20 - 1) to 2^20 - 1
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra END; mbarrier.init.shared::cta.b64 [smem], 1;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [smem], 1048575;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [smem], 64; END:"""
    fault("barrier", body)


def test_arrival_count_and_state_and_test_wait():
    # arrive with a count completes the phase; test_wait on the returned state then succeeds (PTX ISA 9.7.13.15.13/.16)
    out = torch.zeros(2, dtype=I32)
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra END; mbarrier.init.shared::cta.b64 [smem], 5;
mbarrier.arrive.shared::cta.b64 %d1, [smem], 2; mbarrier.test_wait.shared::cta.b64 %p2, [smem], %d1;
selp.b32 %r1, 1, 0, %p2;
mbarrier.arrive.shared::cta.b64 _, [smem], 3; mbarrier.test_wait.shared::cta.b64 %p2, [smem], %d1;
selp.b32 %r2, 1, 0, %p2;
st.global.v2.b32 [a0], {%r1, %r2}; mbarrier.inval.shared::cta.b64 [smem]; END:"""
    run(body, [out])
    assert out.tolist() == [0, 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_let_producers_pass(seed):
    # PTX ISA 9.7.13.1: bar.arrive does not wait; the barrier opens when 64 threads have come
    out = torch.zeros(32, dtype=I32)
    body = """setp.ge.u32 %p1, warp, 1; @%p1 bra CONSUME;
shl.b32 %r1, lane, 2; add.s32 %r1, %r1, smem; mad.lo.s32 %r2, lane, 3, 1; st.shared.b32 [%r1], %r2;
bar.arrive 3, 64; bra END;
CONSUME: bar.sync 3, 64; xor.b32 %r3, lane, 5; shl.b32 %r1, %r3, 2; add.s32 %r1, %r1, smem; ld.shared.b32 %r2, [%r1];
mul.wide.u32 %d1, lane, 4; add.s64 %d1, %d1, a0; st.global.b32 [%d1], %r2; END:"""
    run(body, [out], block=64, seed=seed)
    assert torch.equal(out, (torch.arange(32) ^ 5).int() * 3 + 1)


def test_bar_red_combines_a_predicate():
    # PTX ISA 9.7.13.1
    for op, register, want in (("popc.u32", "%r1", 40), ("and.pred", "%p3", 0), ("or.pred", "%p3", 1)):
        out = torch.full((64,), -1, dtype=I32)
        pick = "selp.b32 %r1, 1, 0, %p3;" if op.endswith("pred") else ""
        body = f"""setp.lt.u32 %p1, tid, 40; bar.red.{op} {register}, 0, %p1; {pick}
mul.wide.u32 %d1, tid, 4; add.s64 %d1, %d1, a0; st.global.b32 [%d1], %r1;"""
        run(body, [out], block=64)
        assert (out == want).all(), op


def test_deadlock_report_names_warp_barrier_parity_and_counts():
    body = """setp.ne.u32 %p1, tid, 0; @%p1 bra MEET; mbarrier.init.shared::cta.b64 [smem+64], 2;
mbarrier.arrive.shared::cta.b64 _, [smem+64];
MEET: bar.sync 0; WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+64], 0; @!%p2 bra WAIT;"""
    error = str(fault("deadlock", body))
    for text in ("warp", "smem+64", "parity 0", "1 of 2", "pending", "try_wait"):
        assert text in error, text
    missing = str(fault("deadlock", "setp.lt.u32 %p1, warp, 2; @%p1 bra L1; bar.sync 1, 128; L1:"))
    assert "bar" in missing


# every CTA of a pair writes its rank into the other's shared memory
PAIR = """mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; setp.ne.u32 %p1, tid, 0;
@%p1 bra MEET; mapa.shared::cluster.u32 %r3, smem, %r2; st.shared::cluster.b32 [%r3], %r1;
MEET: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
@%p1 bra END; ld.shared.b32 %r4, [smem]; mov.u32 %r5, %ctaid.x; mul.wide.u32 %d1, %r5, 4; add.s64 %d1, %d1, a0;
st.global.b32 [%d1], %r4; END: barrier.cluster.arrive; barrier.cluster.wait;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_barrier_and_remote_stores(seed):
    out = torch.full((4,), -1, dtype=I32)
    run(PAIR, [out], grid=4, cluster=(2, 1, 1), seed=seed)
    assert out.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_arrival_opens_the_other_ctas_barrier(seed):
    out = torch.zeros(2, dtype=I32)
    body = """mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; setp.ne.u32 %p1, tid, 0; @%p1 bra MEET;
mbarrier.init.shared::cta.b64 [smem], 1; fence.mbarrier_init.release.cluster;
MEET: barrier.cluster.arrive.release; barrier.cluster.wait.acquire; @%p1 bra END;
mapa.shared::cluster.u32 %r3, smem, %r2; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [smem], 0; @!%p2 bra WAIT;
mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, a0; add.s32 %r4, %r1, 5; st.global.b32 [%d1], %r4;
END: barrier.cluster.arrive; barrier.cluster.wait;"""
    run(body, [out], grid=2, cluster=(2, 1, 1), seed=seed)
    assert out.tolist() == [5, 6]


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast_fills_every_cta_of_the_mask(seed):
    # PTX ISA 9.7.9.25.5.2: the tile and its complete_tx go to the same offsets in every CTA of the mask
    src, out = torch.arange(64, dtype=I32), torch.zeros(2, 64, dtype=I32)
    body = """mov.u32 %r1, %cluster_ctarank; setp.ne.u32 %p1, tid, 0; @%p1 bra MEET;
mbarrier.init.shared::cta.b64 [smem+1024], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+1024], 256;
MEET: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
setp.ne.or.u32 %p3, %r1, 0, %p1; @%p3 bra WAIT; mov.b16 %h1, 3; mov.b32 %r2, 0;
cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
  [smem], [a0, {%r2}], [smem+1024], %h1;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+1024], 0; @!%p2 bra WAIT;
setp.ge.u32 %p4, tid, 64; @%p4 bra END; shl.b32 %r3, tid, 2; add.s32 %r3, %r3, smem; ld.shared.b32 %r4, [%r3];
mad.lo.s32 %r5, %r1, 64, tid; mul.wide.u32 %d1, %r5, 4; add.s64 %d1, %d1, a1; st.global.b32 [%d1], %r4;
END: barrier.cluster.arrive; barrier.cluster.wait;"""
    args = [tensor_map(src.view(torch.float32), [64]), out]
    run(body, args, grid=2, cluster=(2, 1, 1), memory=[src], seed=seed)
    assert torch.equal(out, src.expand(2, 64))


def test_instructions_that_only_shape_the_schedule():
    body = """griddepcontrol.wait; griddepcontrol.launch_dependents; nanosleep.u32 20; membar.gl; fence.acq_rel.gpu;
fence.proxy.async; setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.inc.sync.aligned.u32 232; st.global.b32 [a0], tid;"""
    out = torch.full((1,), -1, dtype=I32)
    run(body, [out], directives=".reqntid 128, 1, 1")
    assert out.item() in range(128)


def test_register_demands_beyond_the_pool_are_refused():
    # 65536 registers; two CTAs of 384 threads and minnctapersm 2 give each 168 * 384 / 2; 240 + 56 cannot be had
    body = """setp.ge.u32 %p1, tid, 128; @%p1 bra CONSUMER; setmaxnreg.dec.sync.aligned.u32 56; bra END;
CONSUMER: setmaxnreg.inc.sync.aligned.u32 240; END:"""
    fault("registers", body, block=256, directives=".maxntid 256, 1, 1\n.minnctapersm 2", ctas_per_sm=2)
    run(body.replace("240", "200"), [], block=256, directives=".maxntid 256, 1, 1\n.minnctapersm 2", ctas_per_sm=2)


def test_shared_memory_of_a_cta_that_has_exited_is_gone():
    body = """mov.u32 %r1, %cluster_ctarank; setp.eq.u32 %p1, %r1, 1; @%p1 bra END; mov.b32 %r2, 0;
SPIN: add.s32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 3000; @%p2 bra SPIN;
mov.b32 %r3, 1; mapa.shared::cluster.u32 %r4, smem, %r3; st.shared::cluster.b32 [%r4], tid; END:"""
    error = fault("bounds", body, grid=2, cluster=(2, 1, 1), seed=4)
    assert "exited" in str(error)
