# SPDX-License-Identifier: Apache-2.0
"""Which kernel a problem gets, where from, and what is said about it."""

import dataclasses
import shutil

import pytest
import torch

from fgattn_cute import gpu, presets
from fgattn_cute.errors import DeviceError, InputError, PresetError, UnsupportedError
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.problem import Problem
from fgattn_cute.select import runners_up, select

H200 = gpu.Gpu("NVIDIA H200", (9, 0), 132, 50 << 20, "test")


def problem(slice_m=128, head_dim=128, dtype=torch.bfloat16, slice_n=1, seqlen=1000, **plan):
    strides = (seqlen * 2 * head_dim, 2 * head_dim, head_dim, 1)
    return Problem(
        batch=1,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        heads=2,
        kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        layout="bshd",
        device=torch.device("cpu"),
        q_strides=strides,
        k_strides=strides,
        v_strides=strides,
        slice_m=slice_m,
        slice_n=slice_n,
        plan_batch=1,
        plan_heads=2,
        **plan,
    )


# Direct where slice_m is a multiple of 192 or 128 or at most 64; else by rows computed / measured speed:
# 80: 128 / 0.947 beats 128 / 0.87 and 192 / 1.013.  144: 192 / 1.013.  208: 256 / 0.947.  320: 320 / 0.87 beats
# 384 / 1.013.
@pytest.mark.parametrize(
    "slice_m, preset_id",
    [
        (192, "m192-d128"),
        (384, "m192-d128"),
        (128, "m128-d128"),
        (256, "m128-d128"),
        (64, "m64-d128"),
        (48, "m64-d128"),
        (32, "m64-d128"),
        (16, "m64-d128"),
        (80, "m128-d128"),
        (96, "m128-d128"),
        (144, "m192-d128"),
        (176, "m192-d128"),
        (208, "m128-d128"),
        (320, "m64-d128"),
    ],
)
def test_slice_m_picks_the_tile(slice_m, preset_id):
    choice = select(problem(slice_m), H200)
    assert (choice.source, choice.preset_id) == ("preset", preset_id)
    assert choice.spec.reasons() == []
    assert "configs/h200.yaml" in choice.why and str(slice_m) in choice.why


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_problem_completes_the_spec(head_dim, dtype):
    for slice_m in range(16, 400, 16):
        for slice_n in (1, 3, 128):
            spec = select(problem(slice_m, head_dim, dtype, slice_n), H200).spec
            assert (spec.head_dim, spec.slice_n) == (head_dim, slice_n)
            assert spec.softmax == ("fixed_ref" if dtype == torch.bfloat16 else "exact")
            assert spec.reasons() == []


@pytest.mark.parametrize("stem", presets.builtin_names())
def test_no_gpu_file_leaves_a_problem_to_the_fallback(stem):
    for head_dim in (64, 96, 128, 256):
        for slice_m in (16, 64, 80, 128, 192, 320):
            choice = select(problem(slice_m, head_dim), gpu.from_config(stem))
            assert choice.source == "preset" and choice.preset_id != "fallback"


def test_explicit_spec_gets_what_belongs_to_the_plan():
    asked = FwdSpec(head_dim=128, tile_m=64, tile_n=64)
    choice = select(problem(48, slice_n=5), H200, asked)
    assert (choice.source, choice.preset_id) == ("explicit", None)
    assert (choice.spec.tile_n, choice.spec.slice_n) == (64, 5)


def test_explicit_preset_by_id():
    choice = select(problem(128), H200, "m128-exact-d128")
    assert (choice.source, choice.preset_id) == ("explicit", "m128-exact-d128")
    assert choice.spec.softmax == "exact"


@pytest.mark.parametrize(
    "spec, error, words",
    [
        (FwdSpec(head_dim=64), InputError, ["head_dim 64, the call has 128"]),
        (FwdSpec(head_dim=128, dtype="fp16", softmax="exact"), InputError, ["dtype fp16, the call has bf16"]),
        (FwdSpec(head_dim=128, tile_m=192, tile_n=128), UnsupportedError, ["registers", "redo pass", "spec=None"]),
        (FwdSpec(head_dim=128, softmax="exact", redo=True), UnsupportedError, ["second pass"]),
        ("m129", PresetError, ["m128-d128", "configs/h200.yaml"]),
        ("m128-d64", InputError, ["not for bf16, head_dim 128"]),
        (7, InputError, ["int"]),
    ],
)
def test_explicit_specs_that_do_not_fit(spec, error, words):
    with pytest.raises(error) as caught:
        select(problem(), H200, spec)
    for word in words:
        assert word in str(caught.value)


def test_no_hopper():
    ada = gpu.Gpu("NVIDIA L4", (8, 9), 58, 48 << 20, "test")
    with pytest.raises(UnsupportedError, match=r"NVIDIA L4 has compute capability 8\.9"):
        select(problem(), ada)


def own_file(tmp_path, name="mine.yaml"):
    """The H200's file, in which M = 128 at D = 128 takes tile 96."""
    text = (presets.CONFIG_DIR / "h200.yaml").read_text()
    start = text.index("- id: m128-d128")
    at = text.index("tile: {m: 128, n: 128}", start)
    path = tmp_path / name
    path.write_text(text[:at] + "tile: {m: 128, n: 96} " + text[at + len("tile: {m: 128, n: 128}") :])
    return path


def test_user_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FGATTN_CONFIG", str(own_file(tmp_path)))
    choice = select(problem(), H200)
    assert (choice.source, choice.spec.tile_n) == ("user", 96)
    assert "mine.yaml" in choice.why


def test_user_folder_is_searched_by_gpu_name(tmp_path, monkeypatch):
    own_file(tmp_path)
    monkeypatch.setenv("FGATTN_CONFIG", str(tmp_path))
    assert select(problem(), H200).source == "user"
    other = gpu.Gpu("NVIDIA H20", (9, 0), 78, 60 << 20, "test")
    with pytest.raises(PresetError, match="NVIDIA H20"):
        select(problem(), other)
    shutil.copy(presets.CONFIG_DIR / "sm90.yaml", tmp_path)
    assert select(problem(), other).spec.tile_n == 128


def test_user_path_that_is_missing(monkeypatch):
    monkeypatch.setenv("FGATTN_CONFIG", "/nowhere/at/all.yaml")
    with pytest.raises(InputError, match="FGATTN_CONFIG"):
        select(problem(), H200)


def test_runners_up_are_the_rest_best_first():
    others = runners_up(problem(80), H200, select(problem(80), H200).spec)
    assert [r.preset_id for r in others][:3] == ["m128-exact-d128", "m64-d128", "m64-exact-d128"]
    assert others[-1].preset_id == "fallback"
    assert "128 rows computed for 80, cost 147" in others[1].why


# ---- the GPU's facts ------------------------------------------------------------------------------------------------
def test_named_gpu(monkeypatch):
    monkeypatch.setenv("FGATTN_GPU", "h20")
    assert gpu.assumed() == gpu.current()
    assert (gpu.assumed().name, gpu.assumed().sms) == ("NVIDIA H20", 78)
    monkeypatch.setenv("FGATTN_GPU", "h2000")
    with pytest.raises(PresetError, match="did you mean h200"):
        gpu.assumed()


def test_no_gpu_at_all(monkeypatch):
    monkeypatch.delenv("FGATTN_GPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match='backend="emulator"'):
        gpu.current()
    assert gpu.assumed().source == "configs/sm90.yaml"


def test_facts_of_a_cuda_device(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count, L2_cache_size = "NVIDIA H100 PCIe", 9, 0, 114, 52428800

    gpu._properties.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = gpu.current("cuda:3")
    gpu._properties.cache_clear()
    assert found == gpu.Gpu("NVIDIA H100 PCIe", (9, 0), 114, 52428800, "cuda:3")
    assert found.reasons() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("slice_m", [64, 128, 192])
def test_grouped_lists_take_octets(slice_m, head_dim, dtype):
    """By every preset, full lists too; scattered lists never do."""
    for nearly_full in (False, True):
        lists = {"slice_m": slice_m, "head_dim": head_dim, "dtype": dtype, "nearly_full": nearly_full}
        assert select(problem(**lists, grouped=True), H200).spec.kv_loads == "octets"
        assert select(problem(**lists), H200).spec.kv_loads != "octets"


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_even_lists_go_in_zigzag_where_that_was_measured_faster(head_dim):
    """Uneven lists, boxes, octets, runs, the exact softmax and other head dims keep waves; a grid stays a grid."""

    def chosen(**facts):
        spec = select(problem(slice_m=128, head_dim=head_dim, **facts), H200).spec
        return spec.scheduler, spec.kv_loads

    assert chosen()[0] == chosen(grouped=True)[0] == "persistent"
    assert chosen(even=True) == ("zigzag" if head_dim == 128 else "persistent", "gather")
    assert chosen(even=True, grouped=True) == ("persistent", "octets")
    assert chosen(even=True, nearly_full=True) == ("persistent", "runs")
    assert chosen(even=True, slice_n=8) == ("persistent", "boxes")
    assert chosen(even=True, slice_n=3) == ("persistent", "runs" if head_dim == 128 else "gather")
    assert chosen(even=True, dtype=torch.float16) == ("persistent", "gather")
    for slice_m in (64, 192):
        asked = problem(slice_m=slice_m, head_dim=head_dim)
        assert select(dataclasses.replace(asked, even=True), H200) == select(asked, H200)
    named = f"m128-d{head_dim}"
    assert (
        select(problem(slice_m=128, head_dim=head_dim, even=True), H200, named).spec.scheduler == chosen(even=True)[0]
    )
    waves = FwdSpec(head_dim=head_dim, tile_n=64, scheduler="persistent")
    assert select(problem(slice_m=128, head_dim=head_dim, even=True), H200, waves).spec == waves


def test_loads_that_need_another_order():
    """Runs need ascending lists and octets grouped ones; the gather reads any, and named presets follow the plan."""
    runs, octets, gather = (FwdSpec(head_dim=128, kv_loads=loads) for loads in ("runs", "octets", "gather"))
    for spec, grouped in ((runs, True), (octets, False)):
        with pytest.raises(UnsupportedError, match=f"kv_loads {spec.kv_loads} reads"):
            select(problem(grouped=grouped), H200, spec)
        assert select(problem(grouped=not grouped), H200, spec).spec == spec
    assert select(problem(grouped=True), H200, gather).spec == gather
    assert select(problem(slice_m=192, grouped=True), H200, "m192-d128").spec.kv_loads == "octets"
    assert select(problem(slice_m=192), H200, "m192-d128").spec.kv_loads == "runs"


def test_octets_that_cannot_run_leave_grouped_lists_to_the_gather(tmp_path, monkeypatch):
    path = own_file(tmp_path)
    text = path.read_text().replace("    softmax: exact\n", "    softmax: exact\n    proxy_fence: consumer\n")
    path.write_text(text)
    monkeypatch.setenv("FGATTN_CONFIG", str(path))
    asked = problem(dtype=torch.float16, grouped=True)
    spec = select(asked, H200).spec
    assert (spec.proxy_fence, spec.kv_loads) == ("consumer", "gather")
