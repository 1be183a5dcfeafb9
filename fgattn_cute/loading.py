# SPDX-License-Identifier: Apache-2.0
"""Compiled host code -> a callable, without the compiler.

The DSL loads object files with the linker inside its compiler, and importing that takes seconds. So the object file is
linked to a shared library once, where it is compiled, if that machine has a C compiler to link with. Loading the
library then takes a millisecond and two small libraries: TVM-FFI's, and the DSL's runtime (from the distribution
nvidia-cutlass-dsl-libs-cu12 or -cu13), which it names by their sonames.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import CompileError
from .settings import log

RUNTIME = "libcute_dsl_runtime.so"
LINKERS = ("cc", "gcc", "clang")


def link(object_file: bytes) -> bytes | None:
    """A shared library made from an object file that exports TVM-FFI functions; None (and a log line) if that fails."""
    command = _linker()
    if command is None:
        log.info("no C compiler to link with (%s): the kernel is loaded through the DSL", ", ".join(LINKERS))
        return None
    try:
        needed = [str(runtime_library()), _tvm_ffi_library()]
    except CompileError as why:
        log.info("%s: the kernel is loaded through the DSL", why)
        return None
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        source, target = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        source.write_bytes(object_file)
        # -z defs: what the two libraries do not define is an error here, not at the first launch.
        done = subprocess.run(
            [*command, "-shared", "-nostdlib", "-o", str(target), str(source), *needed, "-Wl,-z,defs"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            log.warning("the kernel is not linked and will be loaded through the DSL: %s", done.stderr.strip())
            return None
        return target.read_bytes()


def load(library: bytes, name: str) -> Callable:
    """The TVM-FFI function ``name`` of a library that ``link`` has made.

    Raises:
        OSError, RuntimeError, AttributeError: it cannot be loaded, or has no such function.
        CompileError: the DSL's runtime is missing.
    """
    import tvm_ffi

    _open_runtime()
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        path = Path(scratch) / f"{name}.so"
        path.write_bytes(library)
        return tvm_ffi.load_module(path)[name]  # mapped: the file may go, TVM-FFI keeps the module


@functools.cache
def runtime_library() -> Path:
    """The DSL's runtime, found without importing the DSL: what CUTE_DSL_LIBS names, as for the DSL itself, else the
    installed one; of two, the one for torch's CUDA.

    Raises:
        CompileError: it is not installed.
    """
    for path in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep):
        if path.endswith(RUNTIME):
            return Path(path)
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    found = sorted(path for root in roots for path in (*root.glob(f"cu*/lib/{RUNTIME}"), *root.glob(f"lib/{RUNTIME}")))
    if not found:
        raise CompileError(f"{RUNTIME} cannot be found: pip install nvidia-cutlass-dsl-libs-cu12")
    import torch

    wanted = f"cu{(torch.version.cuda or '').split('.')[0]}"
    return next((path for path in found if path.parts[-3] == wanted), found[0])


@functools.cache
def _open_runtime() -> ctypes.CDLL:
    """Load the runtime, so that a kernel's library finds it by its soname."""
    return ctypes.CDLL(str(runtime_library()))


def _tvm_ffi_library() -> str:
    import tvm_ffi

    return tvm_ffi.libinfo.find_libtvm_ffi()


def _linker() -> list[str] | None:
    asked = shlex.split(os.environ.get("CC", ""))
    for words in [asked] if asked else [[name] for name in LINKERS]:
        if shutil.which(words[0]):
            return words
    return None
