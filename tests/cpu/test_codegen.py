# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of every preset: no GPU needed, a spill or a serialised WGMMA never gets through.

A tile of keys is handled at three places of the code: the first tile, the steady loop and the list's partial tile.
"""

import functools
import itertools
import re

import pytest

from fgattn_cute import compile as compiler
from fgattn_cute import cubin, presets
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.select import for_halves, for_parts, for_union
from fgattn_cute.unions import rows_for

pytestmark = pytest.mark.skipif(cubin.nvdisasm() is None, reason="needs nvdisasm (pip install nvidia-cuda-nvdisasm)")

SITES = 3
WGMMA_K = 16  # elements of the reduction of one WGMMA on 16-bit types
# wait_group of the first Q K^T, two in the steady loop, two in the partial tile, the last P V.
WGMMA_WAITS = 1 + 2 + 2 + 1


def preset_specs():
    """Every kernel that a shipped preset asks for, and the redo pass of each, once."""
    found = {}
    for stem in presets.builtin_names():
        for preset in presets.builtin(stem).presets:
            for spec in preset.specs():
                found.setdefault(spec, preset.id)
                if spec.softmax == "fixed_ref":
                    found.setdefault(spec.redo_spec(), f"{preset.id}-redo")
    return found


def quick(spec, label):
    """One type per kernel, bf16 where it may be; of the redo passes the flagship head dim."""
    if label.endswith("-redo"):
        return spec.head_dim == 128
    return spec.dtype == ("bf16" if spec.softmax == "fixed_ref" else "fp16")


def parameters():
    for spec, label in preset_specs().items():
        marks = () if quick(spec, label) else (pytest.mark.slow,)
        yield pytest.param(spec, id=f"{label}-{spec.dtype}-d{spec.head_dim}", marks=marks)


def variants():
    """Every preset of the H200 with other segments that it takes, and for nearly full plans, and the redo passes.
    Quick those whose producer spilled."""
    for preset in presets.builtin("h200").presets:
        spec = next(iter(preset.specs()))
        problem = {"dtype": spec.dtype, "head_dim": spec.head_dim}
        for slice_n, nearly_full in [(n, False) for n in (2, 3, 5, 8, 100, 128)] + [(n, True) for n in (1, 3)]:
            if not preset.takes(**problem, slice_n=slice_n):
                continue
            found = preset.spec(**problem, slice_n=slice_n, nearly_full=nearly_full)
            marks = () if (preset.id, slice_n) in (("m192-d64", 1), ("m192-d64", 3)) else (pytest.mark.slow,)
            label = f"{preset.id}-n{slice_n}" + "-full" * nearly_full
            yield pytest.param(found, id=label, marks=marks)
            if found.softmax == "fixed_ref":
                yield pytest.param(found.redo_spec(), id=f"{label}-redo", marks=pytest.mark.slow)


@functools.cache
def inspected(spec):
    """(facts, opcodes, PTX) of a kernel, compiled once per test run."""
    artifact = compiler.artifact(spec)
    image = cubin.from_object(artifact.object_file)
    return artifact.facts, cubin.opcodes(image), artifact.ptx


def expected_instructions(spec):
    """How often each instruction must stand in the code, from the spec alone."""
    d_steps, n_steps = spec.head_dim // WGMMA_K, spec.tile_n // WGMMA_K
    boxes = spec.head_dim * 2 // spec.swizzle_bytes  # a TMA box is one swizzle atom wide
    lanes = spec.swizzle_bytes // 16
    copies = spec.tile_n * lanes // 128 * boxes  # 16-byte pieces of a tile over 128 producer threads
    by_tma = 0  # boxes of K and V
    if spec.kv_loads == "boxes":
        copies, by_tma = 0, 2 * spec.boxes_per_tile // spec.box_warps * boxes // spec.box_atoms
    elif spec.kv_loads == "runs":  # one loop for scattered lists, and one for nearly full ones
        copies, by_tma = 2 * copies, SITES * 2
    elif spec.kv_loads == "octets":  # either half of the warps issues every other box of its side
        by_tma = spec.boxes_per_tile
    return {
        "HGMMA": SITES * (d_steps + n_steps),
        "WARPGROUP.ARRIVE": 2 * SITES,
        "WARPGROUP.DEPBAR": WGMMA_WAITS,
        "LDGSTS": SITES * 2 * copies,
        # Either of two loops loads Q for itself.
        "UTMALDG": spec.tile_m // spec.q_box_rows * boxes * (2 if spec.kv_loads == "runs" else 1) + by_tma,
        "USETMAXREG": 2,
        "STL": 0,
        "LDL": 0,
    }


def check(spec):
    facts, instructions, ptx = inspected(spec)
    expected = expected_instructions(spec)
    assert {name: cubin.count(instructions, name) for name in expected} == expected
    assert facts["stack_bytes"] == 0

    # The producer may sleep while it waits; its code ends where the consumers take registers. They must not. In the
    # redo pass, which hardly ever runs, ptxas may put the producer last.
    consumers = instructions[instructions.index("USETMAXREG.TRY_ALLOC.CTAPOOL") :]
    sleeps = cubin.count(consumers, "NANOSLEEP")
    if spec.kv_loads == "boxes" and sleeps:  # the producer's only three waits (Q, K, V) may stand behind the last EXIT
        assert sleeps == cubin.count(instructions, "NANOSLEEP") == 3
        sleeps = cubin.count(consumers[: len(consumers) - consumers[::-1].index("EXIT")], "NANOSLEEP")
    assert spec.redo or sleeps == 0
    assert cubin.count(consumers, "HGMMA") == expected["HGMMA"]

    # Q K^T multiplies 64 x tile_n x 16, P V 64 x D x 16.
    shapes = re.findall(r"HGMMA\.64x(\d+)x16", " ".join(instructions))
    products = [spec.tile_n] * (SITES * spec.head_dim // WGMMA_K) + [spec.head_dim] * (SITES * spec.tile_n // WGMMA_K)
    assert sorted(map(int, shapes)) == sorted(products)

    # One exponential per score, and a handful per row: rescaling, the sum's reciprocal and logarithm.
    scores = SITES * spec.tile_n // 2
    assert scores <= cubin.count(instructions, "MUFU") <= scores + 16

    # Registers: ptxas kept to what the block size allows, and the pool it leaves satisfies setmaxnreg.
    assert facts["registers"] <= spec.launch_registers
    pool = facts["registers"] * spec.num_threads
    assert 128 * (spec.consumer_warpgroups * spec.consumer_registers + spec.producer_registers) <= pool
    assert pool * spec.ctas_per_sm <= 65536
    assert re.findall(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+);", ptx) == [
        ("dec", str(spec.producer_registers)),
        ("inc", str(spec.consumer_registers)),
    ]

    # Shared memory and block size as the spec says.
    assert facts["smem_bytes"] == spec.smem_bytes()
    assert re.search(rf"\.reqntid {spec.num_threads}\b", ptx)
    resident = re.search(r"\.minnctapersm (\d+)", ptx)
    assert int(resident[1] if resident else 1) == spec.ctas_per_sm


@pytest.mark.parametrize("spec", list(parameters()))
def test_presets(spec):
    check(spec)


@pytest.mark.parametrize("spec", list(variants()))
def test_other_segments(spec):
    check(spec)


def unions():
    """Unions of the presets' kernels of 128 and 192 rows: bf16 at the flagship head dim quick, the rest slow."""
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            for slice_m in (16, 32, 48, 64, 96):
                if spec.tile_m not in rows_for(slice_m):
                    continue
                union = for_union(spec, spec.tile_m // slice_m)
                if union.reasons():
                    continue
                fast = slice_m == (16 if spec.tile_m == 128 else 48) and (spec.head_dim, spec.dtype) == (128, "bf16")
                marks = () if fast else (pytest.mark.slow,)
                yield pytest.param(union, id=f"{preset.id}-{spec.dtype}-u{union.union_blocks}", marks=marks)
                if spec.softmax == "fixed_ref":
                    yield pytest.param(
                        union.redo_spec(), id=f"{preset.id}-redo-u{union.union_blocks}", marks=pytest.mark.slow
                    )


@pytest.mark.parametrize("spec", list(unions()))
def test_unions(spec):
    check(spec)


def lists_in_parts():
    """Of every preset's kernel of 192 rows, quick at the flagship head dim."""
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            shared = for_parts(spec)
            if preset.takes(spec.dtype, spec.head_dim, slice_n=1) and not shared.reasons():
                marks = () if (spec.head_dim, spec.dtype) == (128, "bf16") else (pytest.mark.slow,)
                for found in (shared, shared.redo_spec())[: 2 if spec.softmax == "fixed_ref" else 1]:
                    yield pytest.param(found, id=found.name, marks=marks)


@pytest.mark.parametrize("spec", list(lists_in_parts()))
def test_lists_in_parts(spec):
    check(spec)


def halves():
    """Of every preset's kernel of 128 rows, quick at the flagship head dim for eight blocks."""
    for preset in presets.builtin("h200").presets:
        for spec, blocks in itertools.product(preset.specs(), (2, 4, 8)):
            if spec.tile_m != 128 or not preset.takes(spec.dtype, spec.head_dim, slice_n=1):
                continue
            shared = for_halves(for_union(spec, blocks))
            if not shared.reasons():
                fast = (spec.head_dim, spec.dtype, blocks) == (128, "bf16", 8)
                for found in (shared, shared.redo_spec())[: 2 if spec.softmax == "fixed_ref" else 1]:
                    yield pytest.param(found, id=found.name, marks=() if fast else (pytest.mark.slow,))


@pytest.mark.parametrize("spec", list({param.id: param for param in halves()}.values()))
def test_unions_in_halves(spec):
    check(spec)


def octets():
    """Every preset's kernel for grouped lists: quick those of three warpgroups, whose producer has 32 registers."""
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            grouped = preset.spec(dtype=spec.dtype, head_dim=spec.head_dim, grouped=True)
            if grouped.kv_loads == "octets" and preset.takes(spec.dtype, spec.head_dim, slice_n=1):
                fast = grouped.tile_m == 192 and grouped.softmax == "fixed_ref" and grouped.head_dim in (64, 128)
                marks = () if fast else (pytest.mark.slow,)
                yield pytest.param(grouped, id=f"{preset.id}-{spec.dtype}-d{spec.head_dim}", marks=marks)


@pytest.mark.parametrize("spec", list(octets()))
def test_octets(spec):
    check(spec)


def zigzag():
    """Every preset's kernels for even lists."""
    for preset in presets.builtin("h200").presets:
        for spec in preset.specs():
            if not preset.takes(spec.dtype, spec.head_dim, slice_n=1):
                continue
            even = preset.spec(dtype=spec.dtype, head_dim=spec.head_dim, even=True)
            if even.scheduler == "zigzag":
                yield pytest.param(even, id=even.name)


@pytest.mark.parametrize("spec", list(zigzag()))
def test_zigzag(spec):
    check(spec)


def test_out_leaves_through_tma():
    spec = FwdSpec(head_dim=128, tile_m=64, tile_n=96, ctas_per_sm=2)
    assert cubin.count(inspected(spec)[1], "UTMASTG") == 2, "two 64-column boxes"


def test_a_spill_is_seen(monkeypatch):
    """192 rows with tile_n 96 at D = 128 do not fit the registers: what the gates are there to catch."""
    spec = FwdSpec(head_dim=128, tile_m=192, tile_n=96, ping_pong=True)
    assert spec.reasons() != []
    monkeypatch.setattr(FwdSpec, "reasons", lambda self: [])
    facts, instructions, _ = inspected(spec)
    assert facts["stack_bytes"] > 0
    assert cubin.count(instructions, "STL") > 0 and cubin.count(instructions, "LDL") > 0
    assert cubin.count(instructions, "WARPGROUP.DEPBAR") > WGMMA_WAITS, "ptxas waits after every product"
    with pytest.raises(AssertionError):
        check(spec)


def test_the_symbol_is_readable():
    spec = FwdSpec(head_dim=128, tile_m=64, tile_n=96, ctas_per_sm=2)
    facts, _, ptx = inspected(spec)
    assert facts["kernel"].startswith(f"fgattn_{spec.name}")
    assert f".entry {facts['kernel']}(" in ptx and ".target sm_90a" in ptx
