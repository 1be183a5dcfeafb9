# SPDX-License-Identifier: Apache-2.0
"""Spec -> a function that launches its kernel: memory, then the disk cache, then cute.compile.

A spec is a FwdSpec or one of kernels/mask_spec.py or copy_spec.py. The key is the spec alone. Extents and strides are
symbolic, so no shape ever compiles again. Compilation needs no GPU. The DSL is imported when a kernel must be compiled
or emulated; one that lies on disk is loaded without it (``loading.py``). ``cute.compile`` aborts the process when two
threads call it, so one lock guards it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import cache, cubin, loading, signatures
from .cache import ARCH, Artifact
from .errors import CompileError
from .kernels.copy_spec import CopySpec
from .kernels.mask_spec import CompactSpec, HalfListSpec, MassSpec, MemberSpec, PartListSpec
from .kernels.spec import FwdSpec
from .settings import configure_logging, log

Spec = FwdSpec | CompactSpec | MassSpec | PartListSpec | HalfListSpec | MemberSpec | CopySpec
LOCK = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel ready to be launched.

    call: TVM-FFI function. Takes torch tensors and numbers in the order of the kernel's ``__call__`` but for the
        stream, which is torch's current one.
    source: "compiled" or "disk".
    artifact: object file, PTX and facts.
    """

    spec: Spec
    call: Callable
    source: str
    artifact: Artifact


_memory: dict[tuple[Spec, bool], Compiled] = {}


def get(spec: Spec, *, emulated: bool = False) -> Compiled:
    """The kernel of a spec, compiled if need be.

    Args:
        spec: complete; ``spec.reasons()`` is empty.
        emulated: bind it to the emulator, so that it runs in ``emulator.session()``.

    Raises:
        CompileError: the DSL is missing, or refuses the kernel.
        emulator.SetupError: no C compiler for the emulator.
    """
    found = _memory.get((spec, emulated))
    if found is not None:
        return found
    with LOCK:
        if (spec, emulated) not in _memory:
            configure_logging()
            if emulated:
                from . import emulator

                emulator.prepare()
            found = _load_or_compile(spec, emulated)
            if emulated:
                emulator.register_ptx(cubin.from_object(found.artifact.object_file), found.artifact.ptx)
            _memory[spec, emulated] = found
        return _memory[spec, emulated]


def artifact(spec: Spec) -> Artifact:
    """The kernel's files, from the disk cache or compiled into it, without loading them: for tools, tests, workers."""
    with LOCK:
        return _find_or_build(spec)[0]


def forget() -> None:
    """Drop every kernel held in memory. The disk cache stays."""
    with LOCK:
        _memory.clear()


def _load_or_compile(spec: Spec, emulated: bool) -> Compiled:
    found, source = _find_or_build(spec)
    try:
        return Compiled(spec, _load(spec, found, emulated), source, found)
    except CompileError as why:
        if source == "compiled":
            raise
        cache.discard(spec, str(why))
    found, source = _find_or_build(spec)
    return Compiled(spec, _load(spec, found, emulated), source, found)


def _find_or_build(spec: Spec) -> tuple[Artifact, str]:
    """(artifact, "disk" or "compiled"). Of several processes that want the same kernel, one compiles it."""
    why_not = spec.reasons()
    if why_not:
        raise CompileError(f"kernel {spec.name} cannot run:" + "".join(f"\n  - {reason}" for reason in why_not))
    found = cache.load(spec)
    if found is None:
        with cache.locked(spec):
            found = cache.load(spec)
            if found is None:
                found = build(spec)
                cache.publish(spec, found)
                return found, "compiled"
    log.debug("kernel %s: from the disk cache", spec.name)
    return found, "disk"


def build(spec: Spec) -> Artifact:
    """Compile a spec that can run, with no cache in between.

    Raises:
        CompileError: the DSL is missing, or it refuses the kernel.
    """
    with LOCK:
        cute = _import_dsl()
        try:
            return _build(spec, cute)
        except Exception as why:
            raise CompileError(f"kernel {spec.name} does not compile: {_plain(why)}") from why


def _import_dsl():
    # The DSL reads the architecture once, when it is imported; without a GPU it has no other way to know it.
    os.environ.setdefault("CUTE_DSL_ARCH", ARCH)
    try:
        import cutlass.cute
    except ImportError as why:
        raise CompileError(f"the CuTe DSL cannot be imported ({why}): pip install 'nvidia-cutlass-dsl>=4.8.1'") from why
    return cutlass.cute


def _build(spec: Spec, cute) -> Artifact:
    from cutlass.base_dsl.compiler import DumpDir

    kernel, arguments = signatures.kernel_of(spec)
    # One readable symbol per spec, for profilers and for whoever reads the PTX.
    for function in (type(kernel).__call__, type(kernel).kernel):
        function.set_name_prefix(f"fgattn_{spec.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        options = (cute.EnableTVMFFI(True), cute.KeepPTX(True), cute.KeepCUBIN(True), cute.GPUArch(ARCH))
        compiled = cute.compile[(*options, DumpDir(scratch))](kernel, *arguments)
        path = Path(scratch) / "kernel.o"
        compiled.export_to_c(object_file_path=str(path), function_name=spec.name)
        object_file = path.read_bytes()
    compile_ms = round(1e3 * (time.perf_counter() - started))
    facts = {
        **dataclasses.asdict(cubin.facts(compiled.__cubin__)),
        "smem_bytes": kernel.Storage.size_in_bytes() if hasattr(kernel, "Storage") else 0,
        "compile_ms": compile_ms,
    }
    log.info("kernel %s: compiled in %d ms, %d registers", spec.name, compile_ms, facts["registers"])
    return Artifact(object_file, compiled.__ptx__, facts, loading.link(object_file))


def _load(spec: Spec, found: Artifact, emulated: bool) -> Callable:
    """The launching function: from the shared library where there is one, else through the DSL's loader.

    The emulator stands in the DSL's loader. That one wants a file; it has read it when it returns.
    """
    if found.library is not None and not emulated:
        try:
            return loading.load(found.library, spec.name)
        except Exception as why:  # such as a temporary folder that forbids executable files
            log.info("kernel %s: its library cannot be loaded (%s), its object file is tried", spec.name, _plain(why))
    cute = _import_dsl()
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        path = Path(scratch) / "kernel.o"
        path.write_bytes(found.object_file)
        try:
            return getattr(cute.runtime.load_module(str(path), enable_tvm_ffi=True), spec.name)
        except Exception as why:
            raise CompileError(f"kernel {spec.name} cannot be loaded: {_plain(why)}") from why


def _plain(why: Exception) -> str:
    """The DSL colours its messages for a terminal; a log or another error's text is none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(why))
    return f"{type(why).__name__}: {text.strip()}"
