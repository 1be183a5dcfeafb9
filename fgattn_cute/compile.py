# SPDX-License-Identifier: Apache-2.0
"""FwdSpec -> a function that launches the kernel: memory, then the disk cache, then cute.compile.

The key is the spec alone. Extents and strides are symbolic, so no shape ever compiles again. Compilation needs no GPU.
The DSL is imported on first use. ``cute.compile`` aborts the process when two threads call it, so one lock guards it.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import cache, cubin
from .cache import ARCH, Artifact
from .errors import CompileError
from .kernels.spec import FwdSpec
from .settings import configure_logging, log

LOCK = threading.RLock()
STRIDE_ELEMS = 8  # rows of q, k, v, out start on 16 bytes
OPERAND_ALIGN_BYTES = 16
LIST_ALIGN_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel ready to be launched.

    call: TVM-FFI function. Takes torch tensors and numbers in the order of ``FgAttnForwardSm90.__call__`` but for the
        stream, which is torch's current one.
    source: "compiled" or "disk".
    artifact: object file, PTX and facts.
    """

    spec: FwdSpec
    call: Callable
    source: str
    artifact: Artifact


_memory: dict[tuple[FwdSpec, bool], Compiled] = {}


def get(spec: FwdSpec, *, emulated: bool = False) -> Compiled:
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
            found = _load_or_compile(spec)
            if emulated:
                emulator.register_ptx(cubin.from_object(found.artifact.object_file), found.artifact.ptx)
            _memory[spec, emulated] = found
        return _memory[spec, emulated]


def artifact(spec: FwdSpec) -> Artifact:
    """The kernel's files, from the disk cache or compiled into it, without loading them: for tools, tests, workers."""
    with LOCK:
        return _find_or_build(spec)[0]


def forget() -> None:
    """Drop every kernel held in memory. The disk cache stays."""
    with LOCK:
        _memory.clear()


def _load_or_compile(spec: FwdSpec) -> Compiled:
    found, source = _find_or_build(spec)
    try:
        return Compiled(spec, _load(spec, found), source, found)
    except Exception as why:
        if source == "compiled":
            raise CompileError(f"kernel {spec.name} was compiled but cannot be loaded: {why}") from why
        cache.discard(spec, f"it cannot be loaded: {why}")
    found, source = _find_or_build(spec)
    return Compiled(spec, _load(spec, found), source, found)


def _find_or_build(spec: FwdSpec) -> tuple[Artifact, str]:
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


def build(spec: FwdSpec) -> Artifact:
    """Compile a spec that can run, with no cache in between.

    Raises:
        CompileError: the DSL is missing, or it refuses the kernel.
    """
    with LOCK:
        cute = _import_dsl()
        try:
            return _build(spec, cute)
        except Exception as why:
            raise CompileError(f"kernel {spec.name} does not compile: {type(why).__name__}: {why}") from why


def _import_dsl():
    # The DSL reads the architecture once, when it is imported; without a GPU it has no other way to know it.
    os.environ.setdefault("CUTE_DSL_ARCH", ARCH)
    try:
        import cutlass.cute
    except ImportError as why:
        raise CompileError(f"the CuTe DSL cannot be imported ({why}): pip install 'nvidia-cutlass-dsl>=4.8.1'") from why
    return cutlass.cute


def _build(spec: FwdSpec, cute) -> Artifact:
    from cutlass.base_dsl.compiler import DumpDir

    from .kernels.fwd_sm90 import FgAttnForwardSm90

    # One readable symbol per spec, for profilers and for whoever reads the PTX.
    for function in (FgAttnForwardSm90.__call__, FgAttnForwardSm90.kernel):
        function.set_name_prefix(f"fgattn_{spec.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
    kernel = FgAttnForwardSm90(spec)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        options = (cute.EnableTVMFFI(True), cute.KeepPTX(True), cute.KeepCUBIN(True), cute.GPUArch(ARCH))
        compiled = cute.compile[(*options, DumpDir(scratch))](kernel, *forward_arguments(spec))
        path = Path(scratch) / "kernel.o"
        compiled.export_to_c(object_file_path=str(path), function_name=spec.name)
        object_file = path.read_bytes()
    compile_ms = round(1e3 * (time.perf_counter() - started))
    facts = {
        **dataclasses.asdict(cubin.facts(compiled.__cubin__)),
        "smem_bytes": kernel.Storage.size_in_bytes(),
        "compile_ms": compile_ms,
    }
    log.info("kernel %s: compiled in %d ms, %d registers", spec.name, compile_ms, facts["registers"])
    return Artifact(object_file, compiled.__ptx__, facts)


def forward_arguments(spec: FwdSpec) -> list:
    """Stand-ins for the arguments of ``FgAttnForwardSm90.__call__``: every extent and stride symbolic but D.

    Extents that must agree share a symbol, which TVM-FFI then checks at every call.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

    dtype = cutlass.BFloat16 if spec.dtype == "bf16" else cutlass.Float16
    batch, seqlen_q, seqlen_k, heads, kv_heads, num_ids, num_work = (cute.sym_int() for _ in range(7))

    def activation(seqlen, num_heads):
        strides = tuple(cute.sym_int64(divisibility=STRIDE_ELEMS) for _ in range(3))
        shape = (batch, seqlen, num_heads, spec.head_dim)
        return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=OPERAND_ALIGN_BYTES)

    def compact(element, shape, align):
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=align)

    return [
        activation(seqlen_q, heads),  # q
        activation(seqlen_k, kv_heads),  # k
        activation(seqlen_k, kv_heads),  # v
        activation(seqlen_q, heads),  # out
        compact(cutlass.Float32, (batch, heads, seqlen_q), 4),  # lse
        compact(cutlass.Int32, (num_ids,), LIST_ALIGN_BYTES),  # ids
        compact(cutlass.Int32, (num_work, 4), OPERAND_ALIGN_BYTES),  # work descriptors
        1.0,  # softmax_scale
        *(1, 1, 1),  # slice_m, ctas_per_block, num_ctas: types only, the values stay dynamic
        make_fake_stream(use_tvm_ffi_env_stream=True),
    ]


def _load(spec: FwdSpec, found: Artifact) -> Callable:
    """The launching function inside an object file. The loader wants a file; it has read it when it returns."""
    cute = _import_dsl()
    with tempfile.TemporaryDirectory(prefix="fgattn-") as scratch:
        path = Path(scratch) / "kernel.o"
        path.write_bytes(found.object_file)
        module = cute.runtime.load_module(str(path), enable_tvm_ffi=True)
        return getattr(module, spec.name)
