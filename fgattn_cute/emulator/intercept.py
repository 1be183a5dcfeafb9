# SPDX-License-Identifier: Apache-2.0
"""Puts the emulator between the CuTe DSL's host code and the CUDA runtime (nvidia-cutlass-dsl 4.8.x).

Two hooks. `CUTE_DSL_LIBS` names `shim.c`'s library before the DSL's own runtime, so that the compiled host code
resolves its CUDA entry points there; and a few Python methods are wrapped: to pair each cubin with its PTX, to know
which tensors belong to a call, to hand CPU tensors to TVM-FFI as device tensors while a session is active, and to
raise the emulator's own exception instead of "error 999".
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import tempfile
from pathlib import Path

from . import build, launch
from .errors import SetupError

_DLDEVICE_CUDA = 2
_installed = False


def install() -> None:
    """Prepares this process: environment, shim and patches. Idempotent; must precede the `cute.compile` of kernels to
    be emulated.

    Environment set: `CUTE_DSL_ARCH=sm_90a` if unset, `ptx` and `cubin` added to `CUTE_DSL_KEEP`, `CUTE_DSL_DUMP_DIR`
        to a temporary
    folder if unset, `CUTE_DSL_LIBS` with the shim in front.

    Raises:
        SetupError: No C compiler, nvidia-cutlass-dsl is missing, or this process has a kernel for the GPU already.
    """
    global _installed
    if _installed:
        return
    if _runtime_is_bound():
        raise SetupError(
            "this process has compiled or loaded a kernel for the GPU through the CuTe DSL, which binds the host code "
            "of all later kernels to the real CUDA runtime: call emulator.prepare() before the first kernel, or "
            "emulate in another process"
        )
    folder = Path(__file__).parent
    shim = str(build.shared_library("fgattn_emulator_shim", [folder / "shim.c"], libraries=("-ldl",)))
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    keep = {x for x in os.environ.get("CUTE_DSL_KEEP", "").split(",") if x} | {"ptx", "cubin"}
    os.environ["CUTE_DSL_KEEP"] = ",".join(sorted(keep))
    if "CUTE_DSL_DUMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="fgattn-emulator-")
        os.environ["CUTE_DSL_DUMP_DIR"] = folder
        atexit.register(shutil.rmtree, folder, True)
    try:
        from cutlass.base_dsl import env_manager
    except ImportError as e:
        raise SetupError("the emulator needs nvidia-cutlass-dsl: pip install 'nvidia-cutlass-dsl>=4.8.1,<4.9'") from e
    libs = env_manager.get_prefix_dsl_libs("CUTE_DSL")
    if not libs:
        raise SetupError("libcute_dsl_runtime.so was not found: is nvidia-cutlass-dsl installed completely?")
    os.environ["CUTE_DSL_LIBS"] = os.pathsep.join([shim, libs])
    runtime = next((p for p in libs.split(os.pathsep) if "libcute_dsl_runtime" in p), libs.split(os.pathsep)[0])
    launch.connect(shim, runtime)
    _update_live_dsl(keep)
    _patch_artifacts()
    _patch_tensors()
    _patch_calls()
    _patch_hardware_info()
    _patch_tvm_ffi()
    _installed = True


def _runtime_is_bound() -> bool:
    """Whether an execution engine of the DSL has opened the real runtime for the whole process.

    The engine never closes it, and later ones look for symbols in the order in which libraries were opened, so the
    shim would come second. A kernel of ours that was linked to a shared library opens the runtime for itself alone.
    """
    return not launch.is_connected() and hasattr(ctypes.CDLL(None), "_cudaLibraryLoadData")


def _update_live_dsl(keep: set[str]) -> None:
    """`import cutlass` builds the DSL singletons, which read the environment once; bring those up to date."""
    from cutlass.base_dsl.dsl import DSLSingletonMeta

    for dsl in list(DSLSingletonMeta._instances.values()):
        env = dsl.envar
        env.shared_libs = os.environ["CUTE_DSL_LIBS"]
        env.keep_tokens = frozenset(env.keep_tokens) | keep
        env.keep_ptx = env.keep_cubin = True
        env.dump_dir = os.environ["CUTE_DSL_DUMP_DIR"]
        if env._arch is None:
            env.arch = os.environ["CUTE_DSL_ARCH"]


def _patch_artifacts() -> None:
    """Kernel names are not unique over constexpr values, so PTX is found again by the hash of its cubin."""
    from cutlass.base_dsl import jit_executor

    original = jit_executor.JitFunctionArtifacts.__post_init__

    def __post_init__(self):
        original(self)
        if self.PTX and isinstance(self.CUBIN, (bytes, bytearray)):
            launch.register_ptx(bytes(self.CUBIN), self.PTX)

    jit_executor.JitFunctionArtifacts.__post_init__ = __post_init__


def _patch_tensors() -> None:
    """Remembers the torch tensor behind every `from_dlpack` result, and presents CPU tensors as device 0 to TVM-FFI."""
    import torch
    from cutlass.cute import runtime

    init, pointers = runtime._Tensor.__init__, runtime._Tensor.__c_pointers__

    @functools.wraps(init)
    def __init__(self, tensor, *args, enable_tvm_ffi=False, **kwargs):
        cpu = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        self._fgattn_tensor = tensor if cpu else None
        handed = DeviceView(tensor) if cpu and enable_tvm_ffi else tensor
        init(self, handed, *args, enable_tvm_ffi=enable_tvm_ffi, **kwargs)

    @functools.wraps(pointers)
    def __c_pointers__(self):
        if self._fgattn_tensor is not None:
            launch.call.add(self._fgattn_tensor)
        return pointers(self)

    runtime._Tensor.__init__ = __init__
    runtime._Tensor.__c_pointers__ = __c_pointers__


def _patch_calls() -> None:
    """Plain call path: collect the tensors of one call, and raise what the emulator found."""
    from cutlass.base_dsl import jit_executor
    from cutlass.cutlass_dsl import cuda_jit_executor

    executor, compiled = jit_executor.JitExecutor, cuda_jit_executor.CudaDialectJitCompiledFunction
    generate, run, to = jit_executor.ExecutionArgs.generate_execution_args, executor.run_compiled_program, compiled.to

    @functools.wraps(generate)
    def generate_execution_args(self, args, kwargs):
        launch.call.clear()
        return generate(self, args, kwargs)

    @functools.wraps(run)
    def run_compiled_program(self, exe_args):
        with launch.call.raising():
            return run(self, exe_args)

    @functools.wraps(to)
    def to_device(self, device=None):
        with launch.pending.raising():
            return to(self, device)

    jit_executor.ExecutionArgs.generate_execution_args = generate_execution_args
    executor.run_compiled_program = run_compiled_program
    compiled.to = to_device
    compiled.num_devices = property(lambda self: max(1, launch.real_devices()))


def _patch_hardware_info() -> None:
    """Inside a session the DSL's hardware queries answer for the emulated chip (an H200 unless the session says
    otherwise).
    """
    from cutlass.utils import hardware_info

    info = hardware_info.HardwareInfo
    init = info.__init__

    def __init__(self, device_id=0):
        if launch.active_session() is None and launch.real_devices():
            init(self, device_id)
        else:
            self.device_id, self.device, self.context = device_id, None, None

    def emulated(name, answer):
        original = getattr(info, name)

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            session = launch.active_session()
            if session is None and launch.real_devices():
                return original(self, *args, **kwargs)
            return answer(session.options.num_sms if session else 132, *args)

        setattr(info, name, method)

    info.__init__ = __init__
    emulated("get_max_active_clusters", lambda sms, cluster_size, *_: sms // cluster_size)
    emulated("get_l2_cache_size_in_bytes", lambda sms: 50 << 20)
    emulated("get_device_multiprocessor_count", lambda sms: sms)


class DeviceView:
    """A CPU tensor that says through DLPack that it lives on CUDA device 0 (TVM-FFI's argument checks ask for that)."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, *args, **kwargs):
        capsule = self.tensor.detach().__dlpack__()
        address = _capsule_pointer(capsule, b"dltensor")
        # DLTensor: void* data, then DLDevice {int32 device_type, int32 device_id}
        ctypes.c_int32.from_address(address + 8).value = _DLDEVICE_CUDA
        ctypes.c_int32.from_address(address + 12).value = 0
        return capsule

    def __dlpack_device__(self):
        return (_DLDEVICE_CUDA, 0)


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _patch_tvm_ffi() -> None:
    """TVM-FFI call path: compiled functions, and functions loaded back from an object file."""
    import tvm_ffi
    from cutlass.base_dsl.export import external_binary_module
    from cutlass.cutlass_dsl import tvm_ffi_provider

    for cls in (tvm_ffi_provider.TVMFFIJitCompiledFunction, tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs):
        cls.__call__ = _session_call(cls.__call__)
    module = external_binary_module.ExternalBinaryModule
    lookup = module.__getattr__

    @functools.wraps(lookup)
    def __getattr__(self, name):
        found = lookup(self, name)
        return LoadedFunction(found) if isinstance(found, tvm_ffi.Function) else found

    module.__getattr__ = __getattr__


class LoadedFunction:
    """A TVM-FFI function of a loaded module which also runs in sessions. Everything else is the function's own."""

    def __init__(self, function):
        self.function = function
        self._call = _session_call(lambda self, *args: self.function(*args))

    def __call__(self, *args):
        return self._call(self, *args)

    def __getattr__(self, name):
        return getattr(self.function, name)

    def __tvm_ffi_object__(self):
        return self.function


def _session_call(call):
    @functools.wraps(call)
    def __call__(self, *args, **kwargs):
        if launch.active_session() is None and launch.real_devices():
            return call(self, *args, **kwargs)
        launch.call.clear()
        args, kwargs = _present(args), {k: _present(v) for k, v in kwargs.items()}
        with launch.call.raising():
            return call(self, *args, **kwargs)

    return __call__


def _present(x):
    """CPU tensors as device tensors, inside tuples and lists too; each is noted as memory of the call."""
    import torch
    import tvm_ffi

    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        launch.call.add(x)
        return tvm_ffi.from_dlpack(DeviceView(x))
    tensor = getattr(x, "_fgattn_tensor", None)
    if tensor is not None:
        launch.call.add(tensor)
        return x
    if isinstance(x, tuple):
        return type(x)(*map(_present, x)) if hasattr(x, "_fields") else tuple(map(_present, x))
    if isinstance(x, list):
        return [_present(y) for y in x]
    return x
