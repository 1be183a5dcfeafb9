# SPDX-License-Identifier: Apache-2.0
"""Each check of the emulator, shown by planting its fault in the PTX of a compiled kernel.

Every case names the text it changes, the change, and the kind of violation that must be reported in one of the
schedules. The unbroken kernel is clean in all of them.
"""

import functools
import re

import cutlass
import pytest
import torch

from fgattn_cute import emulator
from fgattn_cute.emulator.report import describe, kind_of
from tests.cpu.emulator.gemm import compile_gemm

SEEDS = emulator.schedules(6)
STMATRIX = r"(stmatrix\S*\s*\[%\w+)\]"
DESCRIPTOR = r"(or\.b64\s+%\w+, %\w+, )4611686293305360384;"  # start and offsets of a K-major operand, 128-byte swizzle
EXPECT = r"mov\.b32\s+(%\w+), 16384;"

# name: (pattern, replacement, how many times or 0 for all, expected kinds)
FAULTS = {
    # --- accesses
    "shared memory out of range": (STMATRIX, r"\1+262144]", 1, {"bounds"}),
    "shared memory just past the end": (STMATRIX, r"\1+8192]", 1, {"bounds"}),
    "misaligned stmatrix": (STMATRIX, r"\1+4]", 1, {"misaligned"}),
    "misaligned mbarrier": (r"(mbarrier\.init\S*\s*\[%r1)\]", r"\1+4]", 1, {"misaligned"}),
    "TMA tile not on a 128-byte boundary": (r"\[%r9\+1024\]", "[%r9+1040]", 1, {"misaligned"}),
    # --- what nobody wrote
    "register never written": (r"(stmatrix\S*\s*\[%\w+\], )\{%\w+,", r"\1{fresh,", 1, {"uninitialised"}),
    "accumulator never set to zero": (r"mov\.b32\s+%r119, %r118;", "", 0, {"uninitialised"}),
    "shared memory never written, stored by TMA": (r"stmatrix.*", "", 1, {"uninitialised"}),
    "shared memory never written, read by wgmma": (
        r"(?s)(mov\.b32\s+%\w+, )16384(;.*?)@(%p18) bra\s+(\S+);",
        r"\g<1>8192\2bra \4;",
        1,
        {"uninitialised"},
    ),
    "output never written": (r"cp\.async\.bulk\.tensor\S*bulk_group.*", "", 1, {"unwritten"}),
    # --- waits that are missing
    "consumer does not wait for the tile": (
        r"(?s)(setmaxnreg\.inc.*?)mbarrier\.try_wait\S* (\w+), [^;]*;",
        r"\1setp.eq.u32 \2, 0, 0;",
        1,
        {"race", "uninitialised"},
    ),
    "producer does not wait for the slot": (
        r"mbarrier\.try_wait\S* (\w+), [^;]*;",
        r"setp.eq.u32 \1, 0, 0;",
        1,
        {"race", "barrier"},
    ),
    "no wait for the products": (r"wgmma\.wait_group\S*\s+0;", "", 1, {"wgmma"}),
    "no wait for the TMA store": (r"cp\.async\.bulk\.wait_group\S*\s+0;", "", 1, {"exit"}),
    # --- fences
    "no proxy fence before the TMA store": (r"fence\.proxy\.async\S*;", "", 1, {"proxy"}),
    "no wgmma.fence": (r"wgmma\.fence\S*;", "", 1, {"wgmma"}),
    "no wgmma.commit_group": (r"wgmma\.commit_group\S*;", "", 1, {"wgmma"}),
    # --- order between warps
    "no barrier between stmatrix and the TMA store": (r"bar\.sync\s+1, 128;", "", 1, {"race", "uninitialised"}),
    "no barrier behind mbarrier.init": (r"bar\.sync\s+0;", "", 1, {"race", "barrier"}),
    # --- barriers that do not add up
    "slot never released": (r"mbarrier\.arrive\.shared.*", "", 1, {"deadlock"}),
    "one arrival too few for the count": (r"mov\.b32\s+%r21, 4;", "mov.b32 %r21, 5;", 1, {"deadlock"}),
    "one arrival too many for the count": (r"mov\.b32\s+%r21, 4;", "mov.b32 %r21, 3;", 1, {"barrier", "race"}),
    "every lane arrives": (r"elect\.sync\s+\S+\|(%p13), -1;", r"setp.eq.u32 \1, 0, 0;", 1, {"barrier"}),
    "more bytes expected than come": (EXPECT, r"mov.b32 \1, 16400;", 1, {"deadlock"}),
    "fewer bytes expected than come": (EXPECT, r"mov.b32 \1, 8192;", 1, {"barrier", "race", "uninitialised"}),
    "transaction count overflows": (EXPECT, r"mov.b32 \1, 1048600;", 1, {"barrier"}),
    "wait for a phase that never comes": (r"(\[%r94\]), %r95", r"\1, %r99", 1, {"deadlock"}),
    "warp that never comes to the named barrier": (r"bar\.sync\s+1, 128;", "bar.sync 1, 160;", 1, {"deadlock"}),
    # --- descriptors
    "reserved bits in a wgmma descriptor": (DESCRIPTOR, rf"\g<1>{4611686293305360384 | 1 << 52};", 1, {"descriptor"}),
    "stride that leaves shared memory": (DESCRIPTOR, rf"\g<1>{1 << 62 | 1 << 16 | 0x3F00 << 32};", 1, {"bounds"}),
    # --- registers
    "the producer does not give up its registers": (r"setmaxnreg\.dec\S*\s+\d+;", "", 1, {"registers", "deadlock"}),
    "setmaxnreg of an illegal count": (r"(setmaxnreg\.inc\S*\s+)216;", r"\g<1>220;", 1, {"registers"}),
}


@functools.cache
def subject():
    torch.manual_seed(7)
    a, b = (torch.randint(-3, 4, (rows, 512)).to(torch.bfloat16) for rows in (100, 72))
    return compile_gemm(cutlass.BFloat16), a, b


def kinds(seed, edit=None, **options):
    """What one run of the (edited) kernel is reported for, and whether its result is right."""
    kernel, a, b = subject()
    c = torch.zeros(100, 72, dtype=torch.float16)
    options = {"on_violation": "collect", "max_instructions": 2_000_000, **options}
    with emulator.session(seed=seed, edit_ptx=edit, **options) as emu:
        emu.outputs(c)
        kernel(a, b, c)
    return emu.report(), torch.equal(c.float(), a.float() @ b.float().T)


def plant(pattern, replacement, count):
    def edit(name, ptx):
        changed, n = re.subn(pattern, replacement, ptx, count=count)
        assert n == (count or n) and n > 0, f"nothing to change: {pattern}"
        return re.sub(r"(\.reg \.b32 \s*%r<\d+>;)", r"\1 .reg .b32 fresh;", changed, count=1)

    return edit


@pytest.mark.parametrize("seed", emulator.schedules(12))
def test_the_unbroken_kernel_is_clean(seed):
    report, right = kinds(seed)
    assert right and report.kinds == set(), str(report)


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_reported(name):
    *change, expected = FAULTS[name]
    seen = []
    for seed in SEEDS:
        report, _ = kinds(seed, plant(*change))
        seen.append(report.kinds)
        if report.kinds & expected:
            return
    raise AssertionError(f"expected one of {expected}, saw {seen}")


@pytest.mark.parametrize(
    ("check", "kind", "name"),
    [
        ("proxy", "proxy", "no proxy fence before the TMA store"),
        ("wgmma", "wgmma", "no wgmma.fence"),
        ("uninit_register", "uninitialised", "register never written"),
        ("uninit_shared", "uninitialised", "shared memory never written, stored by TMA"),
        ("race", "race", "no barrier between stmatrix and the TMA store"),
        ("exit", "exit", "no wait for the TMA store"),
    ],
)
def test_a_check_that_is_not_asked_for_is_silent(check, kind, name):
    change = FAULTS[name][:3]
    asked = {k for s in SEEDS[:2] for k in kinds(s, plant(*change), checks=[check])[0].kinds}
    assert kind in asked
    others = {"proxy", "wgmma", "uninit_register", "uninit_shared", "race", "exit"} - {check}
    without = {k for s in SEEDS[:2] for k in kinds(s, plant(*change), checks=sorted(others))[0].kinds}
    assert kind not in without


def test_a_deadlock_names_who_waits_on_what_for_which_phase_since_when():
    report, _ = kinds(0, plant(*FAULTS["slot never released"][:3]))
    (finding,) = report.findings
    text = finding.message
    for part in ("warp  4", "try_wait", "mbarrier at smem+16", "parity", "phase", "4 of 4", "pending", "since"):
        assert part in text, f"{part!r} is missing in\n{text}"


def test_a_race_names_the_instruction_and_the_other_side():
    for seed in SEEDS:
        report, _ = kinds(seed, plant(*FAULTS["no barrier between stmatrix and the TMA store"][:3]), checks=["race"])
        races = [f for f in report.findings if kind_of(f) == "race"]
        if races:
            text = describe(races[0])
            assert ("stmatrix" in text and "bulk store of warp 0" in text) or "cp.async.bulk.tensor" in text, text
            return
    raise AssertionError("no race found")


def test_more_shared_memory_than_a_cta_can_have_is_refused():
    with pytest.raises(emulator.LimitError) as caught:
        kernel = compile_gemm(cutlass.BFloat16, stages=15)
        with emulator.session():
            kernel(*subject()[1:], torch.zeros(100, 72, dtype=torch.float16))
    assert caught.value.kind == "limit"
