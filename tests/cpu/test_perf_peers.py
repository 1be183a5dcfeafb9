# SPDX-License-Identifier: Apache-2.0
"""The side-by-side table, masks' share, real calls and whole blocks, without a GPU."""

import json

import pytest
import torch

import fgattn_cute as fg
from perf import blocks, compare, host, mask_share, providers, table
from perf.workloads import Case
from tests.cpu.test_perf import fixed, record


# ---- what other libraries are given -------------------------------------------------------------------------------
def test_one_matrix_holds_the_blocks_of_all_heads():
    """Read back densely, the BSR matrix has each head's own blocks on its diagonal and nothing beside them."""
    keep = torch.rand(1, 3, 4, 6) < 0.4
    mask = fg.SliceMask.from_dense(keep, slice_m=16, slice_n=32, seqlen_q=64, seqlen_k=192)
    indptr, indices, rows, columns, R, C = providers.bsr_of_heads(mask)
    assert (rows, columns, R, C) == (192, 576, 16, 32)
    dense = torch.zeros(12, 18, dtype=torch.bool)
    for row in range(12):
        dense[row, indices[indptr[row] : indptr[row + 1]].long()] = True
    assert torch.equal(dense, torch.block_diag(*keep[0]).bool())


def test_unions_are_a_provider_where_they_exist():
    case = Case("small", seqlen=256, heads=2, head_dim=64, density=0.3, slice_m=32, slice_n=1)
    x = case.inputs("cpu")
    found = providers.ours_union(case, x)
    expected = fg.reference.attention(x.q, x.k, x.v, x.plan)
    assert "u4" in found.note or "union" in found.note
    assert float((found.call().float() - expected).norm() / expected.norm()) < 1e-2
    best = providers.ours_best(case, x)
    assert float((best.call().float() - expected).norm() / expected.norm()) < 1e-2 and best.plan_ms > 0
    wide = Case("small", seqlen=256, heads=2, head_dim=64, density=0.3, slice_m=128, slice_n=1)
    with pytest.raises(fg.PlanError, match="slice_m 128"):
        providers.ours_union(wide, wide.inputs("cpu"))


# ---- the table ----------------------------------------------------------------------------------------------------
def timed(provider, ms, plan_ms=None, **changed):
    planning = {"plan_ms": plan_ms, "with_plan_ms": ms + (plan_ms or 0)} if ms else {}
    return record(provider, ms, **changed) | planning


def test_the_table_holds_everyone_against_the_faster_of_ours(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [
        {"kind": "environment"},
        timed("flex", 9.0, 1.0, slice_m=16),
        timed("ours", 4.0, 1.0, slice_m=16),
        timed("ours-union", 3.0, 2.0, slice_m=16),
        timed("fa4-dense", 6.0, slice_m=16),
        timed("chipmunk", None, slice_m=16),
        timed("ours", 2.0, 0.5),
        timed("flex", 1.0, 9.0),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare.load(path)
    names = ["ours", "ours-union", "flex", "fa4-dense", "chipmunk"]
    assert table.rows(found, names) == [
        ["w, 16 x 1, 30%", "4 / 5", "3 / 5", "9 / 10 (3.00 x / 2.00 x)", "6 (2.00 x / 1.20 x)", "-"],
        ["w, 192 x 1, 30%", "2 / 2.5", "-", "1 / 10 (0.50 x / 4.00 x)", "-", "-"],
    ]
    assert "(2.25 x / 2.00 x)" in table.rows(found, names, ours="ours")[0][3]
    assert table.absences(found) == ["chipmunk: gone (w 16 x 1 30%)"]
    printed = table.markdown(["case", "ours"], [["w", "1"]])
    assert printed == "| case | ours |\n|---|---:|\n| w | 1 |"


# ---- masks, calls -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slice_m, parts", [(128, 6), (64, 2), (32, 3)])
def test_shares_are_of_the_attention(slice_m, parts):
    case = Case("small", seqlen=260, heads=2, head_dim=64, density=0.3, slice_m=slice_m, slice_n=1)
    x = case.inputs("cpu")
    found = {r["what"]: r for r in mask_share.shares(case, x, fixed(*range(2, 2 + parts)), 3)}
    assert len(found) == parts and found["attention"]["share_of_attention"] == 1.0
    other = found[{128: "lists", 64: "lists in parts", 32: "unions"}[slice_m]]
    assert other["share_of_attention"] == pytest.approx(other["median_ms"] / 2.0)
    json.dumps(list(found.values()))


def test_calls_are_timed_in_every_way(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, fullgraph: call)  # the compiler's own time is not the matter
    found = host.calls_on_gpu("cpu", calls=2)
    assert [r["way"] for r in found][:4] == ["eager", "eager, logits bounded", "eager, checks off", "torch.compile"]
    assert all(0 < r["host_us"] <= r["device_us"] for r in found)


# ---- blocks -------------------------------------------------------------------------------------------------------
def tiny(name):
    """The real blocks of diffusers at a size for the CPU, with inputs of batch one and no padding."""
    pytest.importorskip("diffusers")
    from tests import video_models

    if name == "wan":
        inputs = lambda: video_models.wan_inputs(batch=1)
        return blocks.Model(lambda: video_models.wan(layers=1), inputs, blocks._WAN_BLOCKS)

    def inputs():
        given = {key: value[:1] for key, value in video_models.hunyuan_inputs().items()}
        return given | {"encoder_attention_mask": torch.ones(1, 9)}

    return blocks.Model(video_models.hunyuan, inputs, blocks._HUNYUAN_BLOCKS)


@pytest.mark.parametrize("name, kinds", [("wan", ["block"]), ("hunyuan", ["double", "single"])])
def test_blocks_are_measured_dense_and_sparse(monkeypatch, name, kinds):
    monkeypatch.setattr(blocks, "MIN_TOKENS", 100)

    def fails(q, k, v):
        raise RuntimeError("not here")

    dense = {"torch": blocks._torch_sdpa, "absent": fails}
    records = list(blocks.measure(name, tiny(name), "cpu", dense, blocks.policies([16], [0.5]), rounds=1))
    measured = [r for r in records if r["kind"] == "block" and "absent" not in r]
    expected = {(p, k, a) for k in kinds for p, a in (("torch", "dense"), ("ours", "find"), ("ours", "reuse"))}
    assert {(r["provider"], r["block"], r["action"]) for r in measured} == expected
    assert all(0 < r["attention_ms"] < r["block_ms"] for r in measured)
    assert [r["absent"] for r in records if "absent" in r] == ["RuntimeError: not here"]
    (bound,) = [r for r in records if r["kind"] == "bound"]
    assert (bound["against"], bound["density"]) == ("torch", 0.5)
    json.dumps(records)


def test_bounds_add_up_blocks_and_steps():
    """By hand: 2 + 3 dense blocks of 10 and 20 ms against 5 and 10, of 8 and 16 where masks are found."""
    median = {
        ("slow", None, None, "a", "dense"): (11.0, 1.0),
        ("slow", None, None, "b", "dense"): (21.0, 1.0),
        ("fast", None, None, "a", "dense"): (10.0, 1.0),
        ("fast", None, None, "b", "dense"): (20.0, 1.0),
        ("ours", 128, 0.3, "a", "reuse"): (5.0, 1.0),
        ("ours", 128, 0.3, "b", "reuse"): (10.0, 1.0),
        ("ours", 128, 0.3, "a", "find"): (8.0, 1.0),
        ("ours", 128, 0.3, "b", "find"): (16.0, 1.0),
    }
    (found,) = blocks.bounds({"kind": "block"}, {"a": 2, "b": 3}, median)
    assert (found["kind"], found["against"]) == ("bound", "fast")
    assert (found["dense_blocks_ms"], found["sparse_blocks_ms"], found["finding_blocks_ms"]) == (80.0, 40.0, 64.0)
    assert found["speedup_of_a_sparse_step"] == 2.0
    # a fifth of the steps dense, a fifth of the rest finding: 0.2 * 80 + 0.8 * (64 + 4 * 40) / 5 = 51.84
    assert found["speedup_of_a_run"] == round(80 / 51.84, 3)


def test_the_models_are_the_published_ones():
    tokens = {
        name: [n // p for n, p in zip(model.inputs()["hidden_states"].shape[2:], (1, 2, 2), strict=True)]
        for name, model in blocks.MODELS.items()
    }
    assert tokens == {"wan-14b-480p": [21, 30, 52], "wan-14b-720p": [21, 45, 80], "hunyuan-720p": [33, 45, 80]}
