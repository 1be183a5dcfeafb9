# SPDX-License-Identifier: Apache-2.0
"""What importing the package costs and offers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fgattn_cute as fg

ROOT = Path(fg.__file__).parents[1]


def fresh(code):
    """The JSON that ``code`` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_quick():
    """0.3 s beyond torch's own, best of three: the machine may be busy."""
    code = (
        "import torch, time, json; start = time.perf_counter(); import fgattn_cute;"
        "print(json.dumps(time.perf_counter() - start))"
    )
    assert min(fresh(code) for _ in range(3)) < 0.3


def test_import_loads_next_to_nothing():
    code = (
        "import sys, json; import fgattn_cute;"
        "names = ('torch', 'cutlass', 'yaml', 'pydantic', 'tvm_ffi', 'cuda', 'numpy');"
        "print(json.dumps([n for n in names if n in sys.modules]))"
    )
    assert fresh(code) == []


def test_the_call_itself_needs_no_compiler():
    """A reference run and an explanation load neither the DSL nor a CUDA context."""
    code = """
import sys, json, torch, fgattn_cute as fg
q = torch.randn(1, 20, 1, 64).bfloat16()
keep = torch.ones(1, 1, 2, 20, dtype=torch.bool)
mask = fg.SliceMask.from_dense(keep, slice_m=16, slice_n=1, seqlen_q=20, seqlen_k=20)
fg.attention(q, q, q, mask); str(fg.explain(q, q, q, mask))
print(json.dumps([[n for n in ('cutlass', 'tvm_ffi') if n in sys.modules], torch.cuda.is_initialized()]))
"""
    assert fresh(code) == [[], False]


def test_every_public_name_resolves_and_is_listed():
    for name in fg.__all__:
        assert getattr(fg, name) is not None
        assert name in dir(fg)
    assert sorted(fg.__all__) == list(fg.__all__)


def test_names_fixed_by_the_documentation():
    assert {"attention", "explain", "SliceMask", "Plan", "FwdSpec", "reference", "emulator"} <= set(fg.__all__)
    assert fg.reference.attention and fg.emulator.session
    for error, builtin in (
        (fg.InputError, ValueError),
        (fg.PlanError, ValueError),
        (fg.PresetError, ValueError),
        (fg.UnsupportedError, NotImplementedError),
        (fg.DeviceError, RuntimeError),
        (fg.CompileError, RuntimeError),
    ):
        assert issubclass(error, fg.FgAttnError) and issubclass(error, builtin)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        fg.atention  # noqa: B018
