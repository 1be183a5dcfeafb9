# SPDX-License-Identifier: Apache-2.0
"""Which plan a mask gets: what has been measured faster, always exact, and with a reason."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import api, emulator, plan_choice
from fgattn_cute.gpu import from_config
from fgattn_cute.plan_choice import IN_HALVES, OWN, PARTS, choose, expected, price, ways
from perf.roofline import problem
from perf.unions import pool_mask

H200 = from_config("h200")
SIZES = {"seqlen": 3072, "heads": 11}  # 264 unions of 128 rows: two for each SM
RESULTS = Path(__file__).parents[2] / "perf" / "results" / "h200"
PEERS = RESULTS / "2026-11-23-peers.jsonl"


def measured():
    """(slice_m, slice_n, density) -> milliseconds with own lists and with unions, of random masks on an H200."""
    found = {}
    for line in PEERS.read_text().splitlines():
        record = json.loads(line)
        if record.get("provider") in ("ours", "ours-union") and "median_ms" in record:
            case = (record["slice_m"], record["slice_n"], record["density"])
            found.setdefault(case, {})[record["provider"]] = record["median_ms"]
    return {case: (times["ours"], times["ours-union"]) for case, times in found.items() if len(times) == 2}


@pytest.mark.parametrize(("case", "times"), measured().items(), ids=str)
def test_the_choice_is_what_was_measured_faster(case, times):
    """A union of n random blocks holds 1 - (1 - d)^n of the keys, and so does a list of parts."""
    (slice_m, slice_n, density), (own, union) = case, times
    factors = {w: (1 - (1 - density) ** w.blocks) / density for w in ways(slice_m, slice_n, coarser=False)}
    asked = problem(16384, 24, 128, slice_m, slice_n)
    if slice_m == 64:
        loads = {way: (1 - (1 - density) ** 3) / (3 * density) for way in factors if way.name == PARTS}
        found = price(asked, H200, density, dict.fromkeys(factors, 1.0), loads)
        assert found.chosen == OWN and own < union
        return
    found = price(asked, H200, density, {w: f for w, f in factors.items() if w.rows != 192 and w.lists == "bits"}, {})
    assert (found.chosen != OWN) == (union < own)
    priced = {option.name: 1e3 * option.seconds for option in found.options}
    assert priced[OWN] == pytest.approx(own, rel=0.2)
    assert priced["unions of 128 rows"] == pytest.approx(union, rel=0.15)


def test_halves_are_taken_where_they_were_measured_faster():
    """Of masks like those of perf.unions; where the two are within 3 % of each other, either will do."""
    times = {}
    for line in (RESULTS / "2026-11-24-halves.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["run"] == "lease 30" and record["provider"].startswith("unions") and record["slice_m"] < 64:
            times.setdefault((record["slice_m"], record["asked_factor"]), {})[record["provider"]] = record["median_ms"]
    assert len(times) == 9
    for (slice_m, factor), ms in times.items():
        blocks = 128 // slice_m
        factor = (1 - 0.7**blocks) / 0.3 if factor == "random" else factor
        found = price(problem(16128, 24, 128, slice_m), H200, 0.3, *expected(ways(slice_m, 1, False), factor, 4838))
        priced = {option.name: 1e3 * option.seconds for option in found.options}
        assert priced[IN_HALVES] == pytest.approx(ms["unions in halves"], rel=0.12)
        share = ms["unions in halves"] / ms["unions of 128 rows"]
        if abs(share - 1) > 0.03:
            assert found.chosen == (IN_HALVES if share < 1 else "unions of 128 rows")


def test_there_is_something_to_hold_the_choice_against():
    assert {(16, 1, 0.3), (16, 1, 0.1), (32, 1, 0.3), (64, 1, 0.3)} <= measured().keys()


@pytest.mark.parametrize(
    ("slice_m", "factor", "kind"),
    [(16, 1.2, fg.UnionPlan), (32, 2.3, fg.HalvesPlan), (64, 1.5, fg.Plan), (64, 1.1, fg.PartsPlan)],
)
def test_best_plan_follows_the_masks_own_factor(slice_m, factor, kind):
    mask = pool_mask(slice_m, factor, **SIZES | {"seqlen": 4096 if slice_m == 64 else 3072}, density=0.25)
    plan = fg.best_plan(mask, gpu=H200)
    assert type(plan) is kind and plan.to_mask() == mask


# Useful TFLOPS of own lists and of lists in parts by the union factor of two blocks (30 %, head_dim 128, one H200,
# 2026-11-23, perf/results/h200/2026-11-23-parts.jsonl).
PARTS_MEASURED = {
    (16384, 24): {
        1.02: (560, 658),
        1.05: (559, 646),
        1.1: (559, 641),
        1.25: (557, 617),
        1.5: (557, 578),
        1.68: (559, 529),
    },
    (75600, 12): {1.1: (585, 713), 1.5: (584, 632)},
}


@pytest.mark.parametrize(("sizes", "measured"), PARTS_MEASURED.items(), ids=str)
def test_lists_in_parts_are_taken_where_they_were_measured_faster(sizes, measured):
    seqlen, heads = sizes
    asked = problem(seqlen, heads, 128, 64)
    for factor, (own, in_parts) in measured.items():
        # Of a pool, a share p: p^2 of a block's keys are all three's, p (1 - p) are each other's alone.
        keys, p = round(0.3 * seqlen), 2 - factor
        three, two = keys * p * p, keys * p * (1 - p)
        loads = (three + 3 * two + 3 * (keys - three - 2 * two)) / (3 * keys)
        kinds = ways(64, 1, coarser=False)
        found = price(asked, H200, 0.3, dict.fromkeys(kinds, 1.0), {w: loads for w in kinds if w.name == PARTS})
        assert (found.chosen == PARTS) == (in_parts > own)
        tflops = 4 * 128 * heads * seqlen**2 * 0.3 / found.options[1].seconds / 1e12
        assert tflops == pytest.approx(in_parts, rel=0.07)


def test_blocks_that_share_nothing_get_lists_of_their_own():
    keep = (torch.arange(900) % 3 == torch.arange(45)[:, None] % 3)[None, None].expand(1, 24, -1, -1)
    mask = fg.SliceMask.from_dense(keep, slice_m=64, slice_n=1, seqlen_q=45 * 64, seqlen_k=900)
    asked = problem(45 * 64, 24, 128, 64)
    found = choose(mask, asked, H200)
    # Three times 300 keys are twelve tiles; of the same 300 keys three tiles are common and sixty keys are each's own.
    assert found.chosen == OWN and found.options[1].loads_per_key == pytest.approx(12 * 80 / 900)
    order = torch.arange(45).view(15, 3).T.flatten()
    alike = choose(mask, asked, H200, order).options[1]
    assert alike.loads_per_key == pytest.approx(6 * 80 / 900) and alike.union_factor == 1.0
    empty = fg.SliceMask.empty(slice_m=64, slice_n=1, seqlen_q=100, seqlen_k=100)
    assert fg.best_plan(empty, gpu=H200).to_mask() == empty


def test_an_order_can_make_unions_worth_it():
    mask = pool_mask(32, 1.2, **SIZES, density=0.25)
    blocks = torch.randperm(mask.blocks_q)
    mask = dataclasses.replace(mask, bits=mask.bits[:, :, blocks].contiguous())
    assert type(fg.best_plan(mask, gpu=H200)) is fg.HalvesPlan  # of unions of 2.6 times what a block keeps
    plan = fg.best_plan(mask, gpu=H200, order="similar")
    assert type(plan) is fg.UnionPlan and plan.union_factor == pytest.approx(1.2, rel=0.02)
    assert type(fg.best_plan(mask, gpu=H200, order=blocks.argsort())) is fg.UnionPlan


@pytest.mark.parametrize("slice_m", [80, 128, 192, 320])
def test_blocks_that_cannot_share_get_lists_of_their_own(slice_m):
    mask = fg.SliceMask.full(slice_m=slice_m, slice_n=1, seqlen_q=700, seqlen_k=100)
    assert type(fg.best_plan(mask, gpu=H200)) is fg.Plan


def test_an_empty_mask_and_a_head_dim_without_wide_unions():
    empty = fg.SliceMask.empty(slice_m=16, slice_n=1, seqlen_q=100, seqlen_k=100)
    assert fg.best_plan(empty, gpu=H200).to_mask() == empty
    mask = pool_mask(48, 1.2, seqlen=384, heads=1, density=0.2)
    assert type(fg.best_plan(mask, head_dim=256, gpu=H200)) is fg.Plan
    with pytest.raises(fg.UnsupportedError, match="no preset has a tile of 192 rows that a union can use"):
        q = torch.empty(1, 384, 1, 256, dtype=torch.bfloat16)
        fg.explain(q, q, q, fg.UnionPlan.from_mask(mask), gpu=H200)


def test_factors_are_those_of_the_plans():
    mask = pool_mask(32, 1.5, seqlen=1000, heads=2, density=0.2)
    found = choose(mask, problem(1000, 2, 128, 32), H200, coarser=True)
    factors = {option.name: option.union_factor for option in found.options}
    for rows in (128, 192):
        assert factors[f"unions of {rows} rows"] == pytest.approx(fg.UnionPlan.from_mask(mask, rows=rows).union_factor)
        coarse = mask.coarsen(rows, 1)
        assert factors[f"slices of {rows} x 1"] == pytest.approx(coarse.density / mask.density)
    halves = fg.HalvesPlan.from_mask(mask)
    assert factors[IN_HALVES] == pytest.approx(halves.union_factor)
    [option] = [option for option in found.options if option.name == IN_HALVES]
    assert option.loads_per_key == pytest.approx(halves.loads_per_key)
    assert [o.exact for o in found.options] == [True] * 4 + [False] * 3


# ---- attention and explain ------------------------------------------------------------------------------------------
def test_a_mask_gets_its_best_plan_on_the_kernel_and_the_same_result(monkeypatch):
    monkeypatch.setattr(plan_choice, "UNION_MARGIN", 100)  # so few blocks leave most SMs idle either way
    mask = pool_mask(16, 1.1, seqlen=256, heads=2, density=0.3)
    q, k, v = (torch.randn(1, 256, 2, 128).bfloat16() for _ in range(3))
    with emulator.session(seed=1, checks="all"):
        out = fg.attention(q, k, v, mask, backend="emulator")
        again = fg.attention(q, k, v, mask, backend="emulator")
    [plan] = vars(mask)[api._BEST_OF_MASK].values()
    assert type(plan) is fg.UnionPlan and torch.equal(out, again)
    expected = fg.reference.attention(q, k, v, fg.Plan.from_mask(mask))
    assert (out.float() - expected.float()).norm() / expected.float().norm() < 1e-2
    # A named kernel is for lists of the blocks' own, and the reference needs no unions.
    assert type(api._plan_for(mask, q, k, v, "bshd", "emulator", "m64-d128", "fast")) is fg.Plan
    assert type(api._plan_for(mask, q, k, v, "bshd", "auto", None, "fast")) is fg.Plan
    # Nor can kernels be made without the compiler.
    monkeypatch.setattr(api, "_compiler_installed", lambda: False)
    assert type(api._plan_for(mask, q, k, v, "bshd", "emulator", None, "fast")) is fg.Plan


def test_the_best_plan_of_blocks_that_overlap_is_in_parts_and_the_result_the_same(monkeypatch):
    monkeypatch.setattr(plan_choice, "PARTS_MARGIN", 100)  # so few blocks leave most SMs idle either way
    mask = pool_mask(64, 1.1, seqlen=256, heads=2, density=0.5)
    q, k, v = (torch.randn(1, 256, 2, 128).bfloat16() for _ in range(3))
    plan = fg.best_plan(mask)
    assert type(plan) is fg.PartsPlan
    with emulator.session(seed=1, checks="all"):
        out = fg.attention(q, k, v, plan, backend="emulator")
    assert type(api._plan_for(mask, q, k, v, "bshd", "emulator", None, "fast")) is fg.PartsPlan
    expected = fg.reference.attention(q, k, v, fg.Plan.from_mask(mask))
    assert (out.float() - expected.float()).norm() / expected.float().norm() < 1e-2


def test_explain_and_describe_say_what_parts_load():
    mask = pool_mask(64, 1.1, seqlen=4096, heads=12, density=0.25)
    q = torch.empty(1, 4096, 12, 128, dtype=torch.bfloat16)
    advice = fg.explain(q, q, q, mask, gpu=H200).plans
    option = advice.option
    assert option.name == PARTS
    plan = fg.PartsPlan.from_mask(mask)
    explained = fg.explain(q, q, q, plan, gpu=H200)
    assert explained.choice.spec.union_lists == "parts"
    assert "lists in parts should take" in advice.why and f"{plan.loads_per_key:.2f} keys loaded" in str(explained)
    assert explained.loads_per_key == plan.loads_per_key == option.loads_per_key
    assert plan.describe()["loads_per_key"] == plan.loads_per_key
    # What the choice expects of mean lengths, and what explain does of the plan's own.
    assert explained.prediction.seconds == pytest.approx(option.seconds, rel=0.1)
    assert explained.prediction.packed_tflops == pytest.approx(
        4 * 128 * int(mask.kept_pairs().sum()) / explained.prediction.seconds / 1e12
    )


def test_explain_shows_every_kind_of_plan_and_says_why():
    mask = pool_mask(16, 1.3, **SIZES, density=0.1)
    q = torch.empty(1, 3072, 11, 128, dtype=torch.bfloat16)
    explained = fg.explain(q, q, q, mask, gpu=H200)
    text = str(explained)
    assert explained.plans.chosen == "unions of 128 rows" and explained.choice.spec.union_blocks == 8
    assert "unions of 128 rows should take" in text and "own lists: model" in text and "NOT exact" in text
    assert explained.union_factor == pytest.approx(1.3, rel=0.02)
    assert {o["name"] for o in explained.as_dict()["plans"]["options"]} >= {
        OWN,
        "unions of 192 rows",
        "slices of 64 x 1",
    }
    given = fg.explain(q, q, q, fg.UnionPlan.from_mask(mask), gpu=H200)
    assert given.plans is None and "factor 1.3" in str(given)
    assert given.choice == explained.choice


def test_describe_reports_the_factor():
    mask = pool_mask(48, 1.5, seqlen=960, heads=2, density=0.2)
    plan = fg.UnionPlan.from_mask(mask)
    assert plan.describe()["union_factor"] == plan.union_factor
    assert plan.describe()["union_factors"] == {"192 rows": pytest.approx(plan.union_factor)}
    assert fg.Plan.from_mask(mask).describe()["union_factors"] == mask.describe()["union_factors"]
    assert "union_factors" not in mask.coarsen(192, 1).describe()


def test_the_command_line_weighs_unions_by_their_factor():
    from typer.testing import CliRunner

    from fgattn_cute.cli import app

    sizes = ["explain", "--gpu", "h200", "--slice-m", "32", "--json"]
    for factor, blocks, lists in (("1.2", 4, "bits"), ("2", 4, "halves"), ("3.9", 1, "bits")):
        done = CliRunner().invoke(app, [*sizes, "--union-factor", factor])
        found = json.loads(done.stdout)
        assert found["choice"]["spec"]["union_blocks"] == blocks
        assert found["choice"]["spec"]["union_lists"] == lists
        assert len(found["plans"]["options"]) == 4
    assert CliRunner().invoke(app, [*sizes, "--union-factor", "2", "--density", "0"]).exit_code == 0
    text = CliRunner().invoke(app, [*sizes[:-1], "--union-factor", "2"]).stdout
    assert re.search(r"unions in halves: model [0-9.]+ ms, union factor 1\.5\d, 0\.5\d loads per kept key", text)
    sizes[sizes.index("32")] = "64"
    for factor, lists in (("1.2", "parts"), ("1.9", "bits")):
        found = json.loads(CliRunner().invoke(app, [*sizes, "--union-factor", factor]).stdout)
        assert found["choice"]["spec"]["union_lists"] == lists and len(found["plans"]["options"]) == 2
        assert (found["loads_per_key"] is None) == (lists == "bits")
    assert CliRunner().invoke(app, [*sizes, "--union-factor", "0.5"]).exit_code != 0
