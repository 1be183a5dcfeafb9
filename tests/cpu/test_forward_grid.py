# SPDX-License-Identifier: Apache-2.0
"""The forward kernel on the emulator over the grid of problems, every check on, against the fp32 oracle.

The grid is dtype x D x slice_m x slice_n x lengths x density x heads, 142 560 calls, and a kernel is compiled per
(preset, slice_n). ``GROUPS`` names the kernels that the quick run compiles, each for eight cases. They cover every
value of every axis, and every pair of

* dtype, D and the family of slice_m (``FAMILIES``), which decide the preset;
* a preset's rows per producer thread and the ways to expand ids, in which slice_n enters the kernel;
* density with lengths, with heads and with the family of slice_m.

Left to the slow run is slice_n against dtype, D and slice_m beyond that: it meets them nowhere but in the address of a
row, which depends on rows per thread and slice_n alone. ``test_the_groups_reach_every_branch`` holds the table to it.
"""

import itertools
import random

import pytest

from fgattn_cute import compile as compiler
from fgattn_cute.kernels.spec import FwdSpec
from tests.forward_cases import DTYPES, FILLS, HEAD_DIMS, HEADS, SEQLENS, SLICE_MS, SLICE_NS, Case, check, named

SAMPLE = 40  # calls that each slow test draws from its part of the grid

FAMILIES = {
    64: (16, 32, 48, 64),  # below 64 a CTA has idle rows
    128: (80, 96, 128, 256),  # 256: two CTAs share a list
    192: (192, 320, 384),  # 320: the last CTA of a block has an idle warpgroup
}

# (dtype, D, family, slice_n, preset); None takes the preset that a call gets, which is fixed_ref for bf16.
GROUPS = (
    ("bf16", 128, 192, 1, None),
    ("bf16", 128, 192, 8, "m192-exact-d128"),
    ("bf16", 128, 192, 5, "m192-exact-d128"),
    ("bf16", 128, 192, 3, "m192-exact-d128"),
    ("bf16", 128, 192, 64, "m192-exact-d128"),
    ("bf16", 128, 128, 64, None),
    ("bf16", 128, 128, 100, "m128-exact-d128"),
    ("bf16", 128, 64, 3, "m64-exact-d128"),
    ("bf16", 128, 64, 2, None),
    ("fp16", 128, 192, 100, None),
    ("fp16", 128, 128, 2, None),
    ("fp16", 128, 64, 128, None),
    ("bf16", 64, 192, 3, None),
    ("bf16", 64, 128, 3, None),
    ("bf16", 64, 128, 1, "m128-exact-d64"),
    ("bf16", 64, 64, 5, "m64-exact-d64"),
    ("fp16", 64, 192, 2, None),
    ("fp16", 64, 128, 8, None),
    ("fp16", 64, 64, 1, None),
    ("bf16", 96, 192, 3, "m192-exact-d96"),
    ("bf16", 96, 128, 8, None),
    ("bf16", 96, 64, 2, "m64-exact-d96"),
    ("fp16", 96, 192, 5, None),
    ("fp16", 96, 128, 64, None),
    ("fp16", 96, 64, 100, None),
    ("bf16", 256, 128, 1, "m128-exact-d256"),
    ("bf16", 256, 192, 16, None),
    ("bf16", 256, 64, 8, None),
    ("fp16", 256, 64, 2, None),
    ("fp16", 256, 128, 5, None),
)

# What no preset has: the gather where boxes could serve, the consumer's fence, and combinations of the switches.
VARIANTS = (
    ("bf16", 64, 64, 64, FwdSpec(head_dim=64, tile_m=64, tile_n=128, slice_n=64)),
    ("bf16", 64, 64, 100, FwdSpec(head_dim=64, tile_m=64, tile_n=64, slice_n=100)),
    ("bf16", 64, 64, 1, FwdSpec(head_dim=64, tile_m=64, tile_n=64, kv_stages=3, scheduler="persistent")),
    (
        "bf16",
        128,
        128,
        2,
        FwdSpec(head_dim=128, tile_n=80, softmax="exact", ping_pong=True, q_source="registers", proxy_fence="consumer"),
    ),
    (
        "fp16",
        64,
        192,
        1,
        FwdSpec(
            head_dim=64,
            dtype="fp16",
            tile_m=192,
            tile_n=64,
            softmax="exact",
            ping_pong=True,
            scheduler="persistent",
            proxy_fence="consumer",
        ),
    ),
    (
        "fp16",
        96,
        64,
        1,
        FwdSpec(
            head_dim=96,
            dtype="fp16",
            tile_m=64,
            tile_n=32,
            kv_stages=4,
            softmax="exact",
            scheduler="persistent",
            ctas_per_sm=2,
        ),
    ),
    ("bf16", 128, 176, 1, FwdSpec(head_dim=128, tile_m=192, tile_n=48, ping_pong=True, kv_stages=3)),
)
EXTRA_FAMILIES = {176: (144, 176)}  # rows of the last warpgroup idle by the warp


def cases(number, dtype, head_dim, family, slice_n, spec):
    """The cases of one kernel: two ladders, and six other fills over lengths and heads, shifted by ``number``."""
    slice_ms = (FAMILIES | EXTRA_FAMILIES)[family]
    plain = FILLS[:-1]
    for i in range(8):
        j = i + number
        is_ladder = i < 2
        yield Case(
            dtype=dtype,
            head_dim=head_dim,
            slice_m=slice_ms[i % len(slice_ms)],
            slice_n=slice_n,
            seqlens=SEQLENS[3 + i] if is_ladder else SEQLENS[j % 5],
            fill="ladder" if is_ladder else plain[(i + j // 5) % 5],
            heads=HEADS[(1, 2)[i]] if is_ladder else HEADS[(j + i // 3) % 6],
            spec=spec,
            num_sms=1 + i % 3,
            seed=j % 7,
        )


ALL_GROUPS = [*GROUPS, *VARIANTS]


def group_name(group):
    dtype, head_dim, family, slice_n, spec = group
    return f"{dtype}-d{head_dim}-m{family}-n{slice_n}-" + (getattr(spec, "name", spec) or "preset")


@pytest.mark.parametrize("number", range(len(ALL_GROUPS)), ids=[group_name(g) for g in ALL_GROUPS])
def test_every_case_of_a_kernel_is_within_the_contract(number):
    for case in cases(number, *ALL_GROUPS[number]):
        check(case)


def expansion_of(spec):
    """The kernel's own name for the way in which it turns ids into rows."""
    compiler._import_dsl()  # tells the DSL its architecture, before the kernel's file imports it
    from fgattn_cute.kernels.gather import Positions

    return Positions(spec).expansion


def facts_of(case):
    """What a case makes the kernel do, as (name, value, ...) tuples."""
    spec, keep = case.kernel(), case.keep()
    how, shares = expansion_of(spec), -(-case.slice_m // spec.tile_m)
    last = case.seqlens[1] - (case.blocks[1] - 1) * case.slice_n  # keys of the last segment
    lists = keep.flatten(0, 2)
    keys = lists.sum(-1) * case.slice_n - lists[:, -1] * (case.slice_n - last)
    items = keys.numel() * shares * case.heads.batch * case.heads.heads
    items //= case.heads.mask_batch * case.heads.mask_heads
    yield from (("expansion", how, spec.rows_per_thread), ("softmax", spec.softmax, spec.scheduler, spec.q_source))
    yield from (("ping_pong", spec.ping_pong, spec.softmax), ("fence", spec.proxy_fence), ("stages", spec.kv_stages))
    yield from (("ctas_per_sm", spec.ctas_per_sm), ("tile_m", spec.tile_m, case.slice_m % 64 > 0, spec.scheduler))
    yield ("shares", min(shares, 2), case.slice_m % spec.tile_m > 0)
    if last < case.slice_n and lists[:, -1].any():
        yield ("short segment", how)
    if spec.scheduler == "persistent" and items > 2 * case.num_sms * spec.ctas_per_sm:
        yield ("items per CTA", "several", "with empty ones" if (keys == 0).any() else "all full")
    for count in keys.tolist():
        tiles = -(-count // spec.tile_n)
        tail = count - (tiles - 1) * spec.tile_n
        yield from (("tiles", min(tiles, 3), how), ("tiles", min(tiles, 3), spec.scheduler, spec.softmax))
        yield ("tail", {1: "1", spec.tile_n - 1: "tile - 1", spec.tile_n: "tile"}.get(tail, "other"), spec.softmax)


def test_the_groups_reach_every_branch():
    seen = set()
    table = [case for number, group in enumerate(ALL_GROUPS) for case in cases(number, *group)]
    for case in table:
        seen.update(facts_of(case))
    ways = ("ids", "one", "each", "few", "spread", "box")
    want = {("tiles", n, how) for n in range(4) for how in ways}
    want |= set(itertools.product(("tiles",), range(4), ("grid", "persistent"), ("fixed_ref", "exact")))
    want |= set(itertools.product(("tail",), ("1", "tile - 1", "tile", "other"), ("fixed_ref", "exact")))
    want |= {("short segment", how) for how in ways}
    want |= set(itertools.product(("softmax",), ("fixed_ref", "exact"), ("grid", "persistent"), ("smem",)))
    want |= {("softmax", "fixed_ref", "persistent", "registers"), ("softmax", "exact", "grid", "registers")}
    want |= set(itertools.product(("ping_pong",), (False, True), ("fixed_ref", "exact")))
    want |= {("fence", "producer"), ("fence", "consumer"), ("stages", 2), ("stages", 3), ("stages", 4)}
    want |= {("ctas_per_sm", 1), ("ctas_per_sm", 2)}
    want |= set(itertools.product(("tile_m",), (64, 128, 192), (False, True), ("grid",)))
    want |= {("tile_m", 64, False, "persistent"), ("tile_m", 64, True, "persistent")}
    want |= {("tile_m", 128, False, "persistent"), ("tile_m", 128, True, "persistent")}
    want |= {("tile_m", 192, False, "persistent")}
    want |= set(itertools.product(("shares",), (1, 2), (False, True)))
    want |= {("items per CTA", "several", "with empty ones"), ("items per CTA", "several", "all full")}
    # Rows per thread of the presets' tiles (80, 128, 96, 64; at D = 96 96 and 128; at D = 64 192): what slice_n meets.
    want |= {("expansion", "ids", r) for r in (3, 4, 5, 6, 8, 12)} | {("expansion", "each", r) for r in (3, 4, 5, 8)}
    want |= {("expansion", "one", r) for r in (4, 5, 8)} | {("expansion", "spread", r) for r in (3, 5)}
    want |= {("expansion", "box", r) for r in (4, 5, 6, 8)}
    assert not want - seen, f"no case reaches {sorted(want - seen, key=str)}"


def test_the_groups_cover_the_axes_and_their_pairs():
    table = [(group[2], case) for number, group in enumerate(GROUPS) for case in cases(number, *group)]

    def missing(pick, *axes):
        return set(itertools.product(*axes)) - {pick(family, case) for family, case in table}

    assert not missing(lambda f, c: (c.dtype, c.head_dim), DTYPES, HEAD_DIMS)
    assert not missing(lambda f, c: (c.head_dim, f), HEAD_DIMS, FAMILIES)
    assert not missing(lambda f, c: (c.dtype, f), DTYPES, FAMILIES)
    assert not missing(lambda f, c: (c.slice_m,), SLICE_MS)
    assert not missing(lambda f, c: (c.slice_n,), SLICE_NS)
    assert not missing(lambda f, c: (c.fill, c.seqlens), FILLS[:-1], SEQLENS)
    assert not missing(lambda f, c: (c.fill, c.heads), FILLS[:-1], HEADS)
    assert not missing(lambda f, c: (c.fill, f), FILLS, FAMILIES)
    assert not missing(lambda f, c: (c.seqlens, f), SEQLENS, FAMILIES)
    assert not missing(lambda f, c: (c.heads, f), HEADS, FAMILIES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("slice_m", SLICE_MS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_of_the_whole_grid(dtype, head_dim, slice_m):
    """slice_n x lengths x density x heads, both modes of softmax where the type has both: 1,620 or 3,240 calls a test.

    All of them together are 9 hours of a core, so each test draws its share.
    """
    modes = (None, f"m{64 if slice_m <= 64 else 128}-exact-d{head_dim}") if dtype == "bf16" else (None,)
    product = list(itertools.product(modes, SLICE_NS, SEQLENS, FILLS, HEADS))
    drawn = random.Random(f"{dtype} {head_dim} {slice_m}").sample(product, SAMPLE)
    for number, (spec, slice_n, seqlens, fill, heads) in enumerate(drawn):
        facts = {"dtype": dtype, "head_dim": head_dim, "slice_m": slice_m, "slice_n": slice_n}
        check(Case(**facts, seqlens=seqlens, fill=fill, heads=heads, spec=spec, seed=number % 7))


def test_a_failure_names_its_case():
    with pytest.raises(AssertionError, match=r"slice_n=1.*: wrong"), named(Case()):
        raise AssertionError("wrong")
