# SPDX-License-Identifier: Apache-2.0
"""The launch path: both ways of calling, modules loaded back, options, reports and refusals."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor, make_fake_stream

from fgattn_cute import emulator
from fgattn_cute.emulator import errors


@cute.kernel
def scale_kernel(source: cute.Tensor, target: cute.Tensor, n: cutlass.Int32, by: cutlass.Float32):
    i = cute.arch.thread_idx()[0] + cute.arch.block_idx()[0] * 128
    if i < n:
        target[i] = source[i] * by


@cute.jit
def scale(source: cute.Tensor, target: cute.Tensor, n: cutlass.Int32, by: cutlass.Float32, stream: cuda.CUstream):
    scale_kernel(source, target, n, by).launch(grid=[(n + 127) // 128, 1, 1], block=[128, 1, 1], stream=stream)


@pytest.fixture(scope="module")
def through_tvm_ffi():
    fake = make_fake_compact_tensor(cutlass.Float32, (cute.sym_int(),), stride_order=(0,), assumed_align=4)
    other = make_fake_compact_tensor(cutlass.Float32, (cute.sym_int(),), stride_order=(0,), assumed_align=4)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(scale, fake, other, 1, 1.0, stream, options="--enable-tvm-ffi")


@pytest.fixture(scope="module")
def plain():
    x = torch.zeros(300)
    compiled = cute.compile(scale, *(from_dlpack(x).mark_layout_dynamic() for _ in range(2)), 1, 1.0, cuda.CUstream(0))
    dynamic = lambda t: from_dlpack(t).mark_layout_dynamic()
    return lambda a, b, n, by: compiled(dynamic(a), dynamic(b), n, by, cuda.CUstream(0))


@pytest.fixture(params=["through_tvm_ffi", "plain"])
def compiled(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def data():
    return torch.randn(300), torch.zeros(300)


def test_call_with_cpu_tensors(compiled, data):
    a, b = data
    with emulator.session() as emu:
        compiled(a, b, 300, 2.0)
        compiled(a, b, 300, 3.0)
    assert torch.equal(b, a * 3)
    assert [x.result.grid for x in emu.report()] == [(3, 1, 1), (3, 1, 1)]


def test_outside_a_session_the_call_says_what_to_do(compiled, data):
    with pytest.raises(emulator.SetupError, match=r"emulator\.session"):
        compiled(*data, 300, 2.0)
    with emulator.session():  # and the process is still able to work
        compiled(*data, 300, 2.0)


def test_access_outside_the_tensors_of_this_call(compiled, data):
    a, b = data
    with emulator.session() as emu:
        compiled(a, b, 300, 2.0)  # an earlier call's tensors do not count for the next
        with pytest.raises(emulator.AccessError) as caught:
            compiled(a[:299], b, 300, 2.0)
    assert caught.value.kind == "bounds"
    for text in ("ld.global", "warp 1", "CTA (2, 0, 0)"):
        assert text in str(caught.value), text
    (finding,) = caught.value.findings
    assert finding.address == a.data_ptr() + 299 * 4 and finding.line is not None and finding.warp == 1
    assert len(emu.report()) == 2 and emu.report()[1].result.error is not None


def test_collecting_does_not_raise(compiled, data):
    a, b = data
    with emulator.session(on_violation="collect") as emu:
        compiled(a[:299], b, 300, 2.0)
    assert emu.report().kinds == {"bounds"}


def test_registered_memory_belongs_to_every_call(compiled, data):
    a, b = data
    with emulator.session() as emu:
        emu.register(a)
        compiled(a[:10], b, 300, 2.0)
    assert torch.equal(b, a * 2)


def test_outputs_must_be_written_in_full(compiled, data):
    a, b = data
    with pytest.raises(emulator.UninitialisedError, match="1 of 300 elements") as caught, emulator.session() as emu:
        emu.outputs(b)
        assert b.isnan().all()
        compiled(a, b, 299, 2.0)
    assert caught.value.kind == "unwritten" and emu.report().kinds == {"unwritten"}
    with emulator.session(outputs=[b]) as emu:
        compiled(a, b, 300, 2.0)
        assert emu.unwritten(b) == 0
    assert torch.equal(b, a * 2)


def test_outputs_that_are_strided_views():
    wide = torch.zeros(300, 2)
    with emulator.session(on_violation="collect") as emu:
        emu.outputs(wide[:, 1])
        assert emu.unwritten(wide[:, 1]) == 300
    assert wide[:, 0].abs().sum() == 0 and wide[:, 1].isnan().all()


def test_reading_an_output_before_it_is_written(compiled, data):
    a, b = data
    with emulator.session() as emu:
        emu.uninitialised(b)
        with pytest.raises(emulator.UninitialisedError) as caught:
            compiled(b, a, 300, 2.0)
        assert caught.value.kind == "uninitialised" and "ld.global" in str(caught.value)
    with emulator.session() as emu:
        emu.uninitialised(b)
        compiled(a, b, 300, 2.0)
        compiled(b, a, 300, 2.0)


def test_kernels_loaded_back_from_an_object_file(through_tvm_ffi, data, tmp_path):
    a, b = data
    path = str(tmp_path / "scale.o")
    through_tvm_ffi.export_to_c(path, function_name="scale")
    loaded = cute.runtime.load_module(path, enable_tvm_ffi=True)
    with emulator.session():
        loaded.scale(a, b, 300, 2.0)
    assert torch.equal(b, a * 2)
    with pytest.raises(emulator.SetupError, match=r"emulator\.session"):
        loaded.scale(a, b, 300, 2.0)


FRESH = """
import sys, torch, cutlass.cute as cute
from fgattn_cute import emulator
from fgattn_cute.emulator import errors
emulator.prepare()
path, ptx, key = sys.argv[1:4]
f = cute.runtime.load_module(path, enable_tvm_ffi=True).scale
a, b = torch.randn(300), torch.zeros(300)
with emulator.session():
    try:
        f(a, b, 300, 2.0)
    except emulator.SetupError as e:
        assert "register_ptx" in str(e), e
    else:
        raise AssertionError("ran without PTX")
    emulator.register_ptx(key if key else open(sys.argv[4], "rb").read(), open(ptx).read())
    f(a, b, 300, 2.0)
assert torch.equal(b, a * 2)
"""


def test_register_ptx_makes_a_loaded_kernel_run_in_another_process(through_tvm_ffi, tmp_path):
    path, ptx, cubin = (tmp_path / f"scale.{x}" for x in ("o", "ptx", "cubin"))
    through_tvm_ffi.export_to_c(str(path), function_name="scale")
    artifacts = through_tvm_ffi.artifacts
    ptx.write_text(artifacts.PTX)
    cubin.write_bytes(artifacts.CUBIN)
    key = emulator.cubin_key(artifacts.CUBIN)
    for by_key in (key, ""):
        command = [sys.executable, "-c", FRESH, str(path), str(ptx), by_key, str(cubin)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_register_ptx_refuses_what_is_no_cubin():
    with pytest.raises(emulator.SetupError, match="ELF"):
        emulator.register_ptx(b"no ELF at all" * 10, "")


def test_report_as_data_and_text(compiled, data):
    a, b = data
    with emulator.session(seed=3, on_violation="collect") as emu:
        compiled(a, b, 300, 2.0)
        compiled(a, b[:200], 300, 2.0)
    report = json.loads(emu.report().to_json())
    good, bad = report["launches"]
    assert good["completed"] and good["findings"] == [] and good["seed"] == 3 and good["grid"] == [3, 1, 1]
    assert not bad["completed"]
    finding = bad["findings"][0]
    assert finding["kind"] == "bounds" and "st.global" in finding["instruction"]
    assert finding["address"] >= b.data_ptr() + 800  # the order of CTAs is random with this seed
    text = str(emu.report())
    assert "scale_kernel" in text and "bounds" in text and "instructions" in text


def test_edited_ptx_runs_instead(compiled, data):
    a, b = data
    with emulator.session(edit_ptx=lambda name, ptx: ptx.replace("mul.f32", "add.f32")):
        compiled(a, b, 300, 2.0)
    assert torch.equal(b, a + 2)


def test_an_unknown_instruction_is_named_and_never_skipped(compiled, data):
    edit = lambda name, ptx: ptx.replace("mul.f32", "frobnicate.f32")
    for how in ("raise", "collect"):
        with (
            emulator.session(edit_ptx=edit, on_violation=how),
            pytest.raises(emulator.UnsupportedError, match=r"frobnicate\.f32"),
        ):
            compiled(*data, 300, 2.0)


def test_sessions_nest(compiled, data):
    a, b = data
    with emulator.session() as outer:
        with emulator.session(seed=1) as inner:
            compiled(a, b, 300, 2.0)
        compiled(a, b, 300, 2.0)
    assert len(inner.report()) == len(outer.report()) == 1


def test_an_error_in_the_body_ends_the_session(compiled, data):
    with pytest.raises(ZeroDivisionError), emulator.session(outputs=[data[1]]):
        raise ZeroDivisionError
    with pytest.raises(emulator.SetupError):
        compiled(*data, 300, 2.0)


def test_endless_loops_hit_the_limit(compiled, data):
    edit = lambda name, ptx: ptx.replace("mul.f32", "SPIN: bra SPIN; mul.f32")
    with emulator.session(edit_ptx=edit, max_instructions=10_000), pytest.raises(emulator.LimitError) as caught:
        compiled(*data, 300, 2.0)
    assert caught.value.kind == "limit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checks": ["bounds", "everything"]}, "everything"),
        ({"on_violation": "shrug"}, "shrug"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((emulator.SetupError, ValueError), match=message):
        emulator.session(**options)


def test_schedules_are_distinct_and_stable():
    all_of_them = [emulator.of_seed(s) for s in emulator.schedules(40)]
    assert [s.name for s in all_of_them[:4]] == ["late", "eager", "newest-first", "random-3"]
    assert len({s.name for s in all_of_them}) == 40
    assert emulator.of_seed(17) == emulator.of_seed(17)
    assert {s.quantum for s in all_of_them[3:]} == {5, 20, 60, 200, 1000}


def test_importing_the_package_needs_neither_the_dsl_nor_a_compiler():
    code = (
        "import sys; from fgattn_cute import emulator; emulator.schedules(3); emulator.EmulatorError('x');"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('cutlass', 'torch', 'tvm_ffi')], 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd(), "PATH": ""})


def test_no_compiler_is_a_clear_error(tmp_path):
    code = (
        "from fgattn_cute import emulator\n"
        "try: emulator.prepare()\n"
        "except emulator.SetupError as e: assert 'C compiler' in str(e), e\n"
        "else: raise AssertionError('prepared without a compiler')"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "PATH": str(tmp_path), "FGATTN_CACHE_DIR": str(tmp_path)}
    env.pop("CC", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


BOUND = """
import sys
from fgattn_cute import compile, emulator
from fgattn_cute.kernels.mask_spec import CompactSpec
compile.build(CompactSpec(step="count"))
for enter in (emulator.prepare, emulator.session):
    try: enter()
    except emulator.SetupError as why: assert "kernel for the GPU" in str(why) and "another process" in str(why), why
    else: sys.exit(f"{enter} was not refused")
"""


def fresh_process(code):
    """Runs code in a process that knows nothing of what prepare() has set in this one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CUTE_DSL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**clean, "PYTHONPATH": os.getcwd()})


def test_a_process_with_a_kernel_for_the_gpu_is_refused():
    fresh_process(BOUND)


def test_a_runtime_of_a_kernels_own_is_none_of_the_processs():
    """A linked kernel opens the runtime for itself, as loading.py does, and the process can still emulate."""
    fresh_process("from fgattn_cute import emulator, loading; loading._open_runtime(); emulator.prepare()")


def test_the_page_names_every_option_and_every_kind_of_error():
    text = (Path(__file__).resolve().parents[3] / "docs" / "emulator.md").read_text()
    for option in inspect.signature(emulator.session).parameters:
        assert f"`{option}`" in text, option
    for kind in errors.KINDS:
        assert f"`{kind}`" in text, kind
