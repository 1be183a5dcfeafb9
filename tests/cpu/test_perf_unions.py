# SPDX-License-Identifier: Apache-2.0
"""The benchmark of unions without a GPU: its masks have the factor that was asked for, its records the right rates."""

from pathlib import Path

import pytest

from fgattn_cute.plan_choice import share_of_pool
from fgattn_cute.timing import Samples
from fgattn_cute.unions import UnionPlan
from perf import unions


def test_two_blocks_with_half_of_a_pool_each():
    """Two blocks keep half of a pool at random: together 1 - 1/4 of it, 1.5 times what one keeps."""
    assert share_of_pool(1.5, 2) == pytest.approx(0.5)
    assert share_of_pool(1.0, 8) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="from 1 to 2, not 2"):
        share_of_pool(2, 2)


@pytest.mark.parametrize(("slice_m", "factor"), [(16, 1.05), (16, 3.0), (32, 1.88), (48, 2.0), (64, 1.5), (96, 1.4)])
def test_masks_have_the_factor_that_was_asked_for(slice_m, factor):
    mask = unions.pool_mask(slice_m, factor, seqlen=3072, heads=2, density=0.2)
    assert mask.density == pytest.approx(0.2, rel=0.05)
    assert UnionPlan.from_mask(mask).union_factor == pytest.approx(factor, rel=0.02)


def test_a_factor_beyond_that_of_random_blocks_is_refused():
    with pytest.raises(ValueError, match="random blocks already have a smaller factor"):
        unions.pool_mask(96, 1.9, seqlen=1024, heads=1, density=0.3)


def test_records_count_useful_and_executed_flops():
    mask = unions.pool_mask(32, 1.5, seqlen=768, heads=2, density=0.3)
    milliseconds = {
        "own lists": 0.002,
        "unions of 128 rows": 0.001,
        "unions of 192 rows": 0.004,
        "unions in halves": 0.003,
    }

    def timer(calls, rounds):
        return [Samples((1e-3 * ms,) * rounds) for ms, _ in zip(milliseconds.values(), calls, strict=True)]

    records = {r["provider"]: r for r in unions.run_case(mask, 1.5, timer, 3, 64, None)}
    assert {name: r["median_ms"] for name, r in records.items()} == milliseconds
    flops = 4 * 64 * int(mask.kept_pairs().sum())
    for name, record in records.items():
        rate = flops / milliseconds[name] / 1e9
        assert record["useful_tflops"] == pytest.approx(rate, abs=0.06)
        assert record["executed_tflops"] == pytest.approx(rate * record["union_factor"], abs=0.06)
    assert records["unions in halves"]["kernel"].endswith("u4_halves")
    assert records["own lists"]["union_factor"] == 1.0 and "_u4" in records["unions of 128 rows"]["kernel"]


def test_blocks_of_64_have_lists_in_parts_beside_them():
    mask = unions.pool_mask(64, 1.1, seqlen=768, heads=1, density=0.3)
    timer = lambda calls, rounds: [Samples((1e-3,) * rounds) for _ in calls]
    records = {r["provider"]: r for r in unions.run_case(mask, 1.1, timer, 3, 128, None)}
    assert records.keys() == {"own lists", "unions of 128 rows", "unions of 192 rows", "lists in parts"}
    found = records["lists in parts"]
    assert found["kernel"].endswith("u3_parts") and 1 / 3 < found["loads_per_key"] < 0.7
    assert found["executed_tflops"] == found["useful_tflops"] and "loads_per_key" not in records["own lists"]


def test_the_documents_tables_are_the_models():
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert unions.table() in text and unions.against_prototype() in text


def test_the_model_is_near_the_prototype():
    rows = [line.split("|") for line in unions.against_prototype().splitlines()[2:]]
    assert len(rows) == 7
    for _, _, _, measured, model, _ in rows:
        assert float(model) == pytest.approx(float(measured), rel=0.07)
