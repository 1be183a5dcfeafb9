# SPDX-License-Identifier: Apache-2.0
"""Single faults in the PTX of real kernels: nearly all are noticed, and each that is not has a reason.

`docs/emulator.md` holds the table that `python -m tests.cpu.emulator.mutation` prints.
"""

import collections

import pytest
import torch

from fgattn_cute import emulator
from tests.cpu.emulator import mutation
from tests.cpu.emulator.subjects import SUBJECTS

EXAMPLE = """
	mbarrier.init.shared.b64 	[%r1], 4;
	@%p1 mbarrier.arrive.shared.b64 _, [%r1];
	mbarrier.try_wait.parity.shared.b64 P1, [%r9], %r95, 1000;
	bra.uni DONE;
	mbarrier.try_wait.parity.shared.b64 P1, [%r9], %r95, 1000;
	cp.async.cg.shared.global [%r3], [%rd4+32], 16, %r7;
	// bar.sync 0;
	cp.async.wait_group 	0;
"""


def test_mutations_change_what_they_say():
    found = {}
    for m in mutation.mutations(EXAMPLE):
        changed = [b for a, b in zip(EXAMPLE.split("\n"), m.text.split("\n"), strict=True) if a != b]
        found.setdefault(m.kind, []).append(" ".join(" ".join(changed).split()))
    assert found == {
        "drop mbarrier arrive": [""],
        "mbarrier count + 1": ["mbarrier.init.shared.b64 [%r1], 5;"],
        "mbarrier count - 1": ["mbarrier.init.shared.b64 [%r1], 3;"],
        "drop cp.async": [""],
        "cp.async 16 bytes early": ["cp.async.cg.shared.global [%r3], [%rd4-16], 16, %r7;"],
        "cp.async without zero fill": ["cp.async.cg.shared.global [%r3], [%rd4+32], 16;"],
        "drop cp.async.wait_group": [""],
        "drop mbarrier wait": ["setp.eq.u32 P1, 0, 0; setp.eq.u32 P1, 0, 0;"],
        "mbarrier wait for the other parity": [
            " ".join(
                [
                    "{.reg .b32 flipped; xor.b32 flipped, %r95, 1; "
                    "mbarrier.try_wait.parity.shared.b64 P1, [%r9], flipped, 1000;}"
                ]
                * 2
            )
        ],
    }


def undetected(name, seeds):
    """Faults of a subject that nothing notices, as (kind, line of PTX)."""
    torch.manual_seed(0)
    subject = mutation.prepare(SUBJECTS[name](), seeds)
    outcomes = [mutation.try_mutation(subject, m, seeds) for m in mutation.mutations(subject.ptx)]
    lines = subject.ptx.split("\n")
    return len(outcomes), [
        (o.mutation.kind, lines[o.mutation.lines[0]].strip()) for o in outcomes if o.how == "undetected"
    ]


# What stays unnoticed, at most, per subject and kind of fault. Each was traced in the PTX and changes nothing that a
# run could show; docs/emulator.md says why. A count above these is a hole in the emulator, or a changed kernel.
GATHER = {
    "drop fence.proxy.async": 2,
    "drop wgmma.fence": 3,
    "drop mbarrier arrive": 3,
    "drop mbarrier wait": 6,
    "mbarrier count + 1": 1,
    "mbarrier count - 1": 1,
    "elect.sync always true": 4,
    "cp.async without zero fill": 8,
    "drop cp.async.wait_group": 2,
    "drop cp.async.commit_group": 1,
    "cp.async arrival at once": 1,
    "setmaxnreg.inc of 256 registers more": 1,
}
UNDETECTED = {
    "GEMM, A from shared memory": {"elect.sync always true": 1},
    "GEMM, A from registers": {"elect.sync always true": 1},
    "GEMM, cluster of two with multicast": {"elect.sync always true": 1},
    "forward, exact softmax, one warpgroup": GATHER,
    "forward, consumer's fence, blocks of 48 queries": GATHER,
    "forward, fixed reference, persistent, ping-pong": {
        **GATHER,
        "drop mbarrier arrive": 0,
        "drop mbarrier wait": 3,
        "elect.sync always true": 1,
        "drop bar.sync": 2,
        "operand in 64-byte swizzle": 3,
    },
    "forward, union in halves": {
        "drop fence.proxy.async": 2,
        "drop wgmma.fence": 3,
        "drop mbarrier wait": 5,
        "mbarrier count + 1": 1,
        "mbarrier count - 1": 1,
        "elect.sync always true": 1,
        "cp.async without zero fill": 32,
        "operand in 64-byte swizzle": 1,
    },
}


def test_faults_in_the_gemm():
    planted, missed = undetected("GEMM, A from shared memory", emulator.schedules(8))
    assert planted >= 40
    assert collections.Counter(k for k, _ in missed) <= collections.Counter({"elect.sync always true": 1}), missed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", [n for n in SUBJECTS if n != "GEMM, A from shared memory"])
def test_every_undetected_fault_is_accounted_for(name):
    _, missed = undetected(name, emulator.schedules(6))
    assert collections.Counter(kind for kind, _ in missed) <= collections.Counter(UNDETECTED[name]), missed
