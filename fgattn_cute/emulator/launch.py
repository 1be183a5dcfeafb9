# SPDX-License-Identifier: Apache-2.0
"""From a CUDA launch to a launch of the machine: handles, PTX by cubin, parameters, and the memory of the call."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import threading
from typing import TYPE_CHECKING

from . import ptx as ptx_frontend
from .errors import LimitError, SetupError

if TYPE_CHECKING:
    from .sessions import Session

MAX_SHARED = 232448  # bytes of shared memory a CTA can opt in to on sm_90 (227 KiB)
DEFAULT_SHARED = 49152  # bytes without opting in
_CUDA_ERROR_UNKNOWN = 999
_CUDA_ERROR_NO_DEVICE = 100

_FATBIN_MAGIC = b"\x50\xed\x55\xba"
_KERNEL_ATTRIBUTE = {"max_threads": 0, "static_smem": 1, "registers": 4, "max_dynamic_smem": 8}  # cudaFuncAttribute


class Pending:
    """Exceptions of callbacks: C code between them and the caller only carries an error number."""

    def __init__(self):
        self._local = threading.local()

    def put(self, error: BaseException) -> None:
        """Keeps `error` for the caller on this thread; the first one wins."""
        if getattr(self._local, "error", None) is None:
            self._local.error = error

    def take(self) -> BaseException | None:
        """Returns and forgets the error of this thread."""
        error, self._local.error = getattr(self._local, "error", None), None
        return error

    @contextlib.contextmanager
    def raising(self):
        """Raises the emulator's error at the end of the block, not what the DSL made of the error number."""
        self.take()
        try:
            yield
        except Exception:
            error = self.take()
            if error is None:
                raise
            raise error from None
        error = self.take()
        if error is not None:
            raise error


class Call:
    """The tensors handed over in the current call of a compiled function, per thread."""

    def __init__(self):
        self._local = threading.local()

    @property
    def tensors(self) -> list:
        """The tensors of the running call."""
        if not hasattr(self._local, "tensors"):
            self._local.tensors = []
        return self._local.tensors

    def add(self, tensor) -> None:
        """Notes a CPU tensor as memory of the call."""
        self.tensors.append(tensor)

    def clear(self) -> None:
        """Forgets the tensors of the last call."""
        self.tensors.clear()

    @contextlib.contextmanager
    def raising(self):
        """Runs the call: raises what the emulator found, and forgets the call's tensors afterwards."""
        try:
            with pending.raising():
                yield
        finally:
            self.clear()


class _Library:
    def __init__(self, key: str):
        self.key = key


class _Kernel:
    def __init__(self, library: _Library, name: str):
        self.library, self.name, self.max_dynamic_smem = library, name, DEFAULT_SHARED


pending = Pending()
call = Call()
_sessions: list[Session] = []
_libraries: dict[int, _Library] = {}
_kernels: dict[int, _Kernel] = {}
_ptx: dict[str, str] = {}  # hash of the cubin -> PTX
_shim = None
_callbacks = None  # keeps the ctypes callbacks alive


# ---------------------------------------------------------------------------------------------------- sessions
def active_session() -> Session | None:
    """The innermost active session of the process."""
    return _sessions[-1] if _sessions else None


def push(session: Session) -> None:
    """Makes `session` the active one."""
    _sessions.append(session)
    _shim.fge_set_active(1, session.options.num_sms)


def pop(session: Session) -> None:
    """Ends `session` and makes the one around it active again."""
    _sessions.remove(session)
    current = active_session()
    _shim.fge_set_active(int(current is not None), current.options.num_sms if current else 132)


def real_devices() -> int:
    """CUDA devices that the real runtime sees; 0 before `connect`."""
    return _shim.fge_real_devices() if _shim is not None else 0


# ---------------------------------------------------------------------------------------------------- PTX by cubin
def register_ptx(cubin: bytes | str, ptx: str) -> None:
    """Says which PTX belongs to a cubin, for kernels that were compiled elsewhere (an object file loaded back).

    Args:
        cubin: The cubin's bytes, or the key that `cubin_key` gave for them.
        ptx: The PTX text it was assembled from.

    Raises:
        SetupError: `cubin` is not an ELF image.
    """
    _ptx[cubin if isinstance(cubin, str) else cubin_key(cubin)] = ptx


def cubin_key(cubin: bytes) -> str:
    """The name under which a cubin's PTX is kept: SHA-256 of the ELF image, in hex."""
    buffer = ctypes.create_string_buffer(cubin, len(cubin) + 64)
    size = _elf_size(ctypes.addressof(buffer))
    if size is None or size > len(cubin):
        raise SetupError("register_ptx: the cubin is not a complete ELF image")
    return hashlib.sha256(cubin[:size]).hexdigest()


def ptx_of(name: str) -> str:
    """The PTX of the most recently loaded library that has the kernel `name` (for tools that mutate PTX)."""
    for kernel in reversed(_kernels.values()):
        if kernel.name == name and kernel.library.key in _ptx:
            return _ptx[kernel.library.key]
    raise SetupError(f"no PTX is known for a kernel {name!r}")


def _elf_size(address: int) -> int | None:
    head = ctypes.string_at(address, 64)
    if head[:4] != b"\x7fELF":
        return None

    def word(at: int, n: int) -> int:
        return int.from_bytes(head[at : at + n], "little")

    # ELF64 header: e_phoff 32, e_shoff 40, e_phentsize 54, e_phnum 56, e_shentsize 58, e_shnum 60
    return max(word(40, 8) + word(58, 2) * word(60, 2), word(32, 8) + word(54, 2) * word(56, 2))


# --------------------------------------------------------------------------------------------- callbacks of the shim
def _on_load(library: int, code: int) -> int:
    if (
        ctypes.string_at(code, 4) == _FATBIN_MAGIC
    ):  # 16-byte header, then an entry header (its size at +4), then the ELF image
        code += 16 + int.from_bytes(ctypes.string_at(code + 20, 4), "little")
    size = _elf_size(code)
    key = hashlib.sha256(ctypes.string_at(code, size)).hexdigest() if size is not None else ""
    _libraries[library] = _Library(key)
    return 0


def _on_kernel(kernel: int, library: int, name: bytes) -> int:
    _kernels.pop(kernel, None)  # so that the newest is last in order
    _kernels[kernel] = _Kernel(_libraries[library], name.decode())
    return 0


def _on_launch(handle: int, dims, smem: int, args) -> int:
    kernel = _kernels[handle]
    ptx = _ptx.get(kernel.library.key)
    if ptx is None:
        raise SetupError(
            f"no PTX is known for kernel {kernel.name}: call emulator.prepare() before the cute.compile that makes it, "
            "or emulator.register_ptx(cubin, ptx) for one that was loaded from a file"
        )
    if smem > kernel.max_dynamic_smem:
        raise LimitError(
            f"{kernel.name}: launched with {smem} bytes of dynamic shared memory, its attribute allows "
            f"{kernel.max_dynamic_smem}",
            "limit",
        )
    active_session().launch(kernel.name, ptx, tuple(dims[0:3]), tuple(dims[3:6]), tuple(dims[6:9]), smem, args)
    return 0


def _on_set_attribute(handle: int, attribute: int, value: int) -> int:
    if attribute == _KERNEL_ATTRIBUTE["max_dynamic_smem"] and handle in _kernels:
        if value > MAX_SHARED:
            raise LimitError(f"{_kernels[handle].name}: {value} bytes of dynamic shared memory exceed 227 KiB", "limit")
        _kernels[handle].max_dynamic_smem = value
    return 0


def _on_get_attribute(handle: int, attribute: int) -> int:
    kernel = _kernels[handle]
    if attribute == _KERNEL_ATTRIBUTE["static_smem"]:
        ptx = _ptx.get(kernel.library.key)
        return ptx_frontend.load(ptx).kernels[kernel.name].static_smem if ptx else 0
    answers = {"max_threads": 1024, "registers": 168, "max_dynamic_smem": kernel.max_dynamic_smem}
    return next((answers[n] for n, a in _KERNEL_ATTRIBUTE.items() if a == attribute and n in answers), 0)


def _on_no_session() -> int:
    pending.put(
        SetupError(
            "this kernel was compiled for the emulator and there is no CUDA device: call it inside emulator.session()"
        )
    )
    return _CUDA_ERROR_NO_DEVICE


def _guarded(f):
    def callback(*args):
        try:
            return f(*args)
        except BaseException as e:  # a C frame is above; the Python caller raises it again
            pending.put(e)
            return _CUDA_ERROR_UNKNOWN

    return callback


def is_connected() -> bool:
    """Whether the shim has been loaded."""
    return _shim is not None


def connect(shim_path: str, runtime_path: str) -> None:
    """Loads the shim and gives it the callbacks and the path of the real runtime."""
    global _shim, _callbacks
    u64, u32p, i32 = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.c_int
    kinds = [
        (_on_load, [u64, u64]),
        (_on_kernel, [u64, u64, ctypes.c_char_p]),
        (_on_launch, [u64, u32p, u64, ctypes.POINTER(u64)]),
        (_on_set_attribute, [u64, i32, i32]),
        (_on_get_attribute, [u64, i32]),
        (_on_no_session, []),
    ]
    _callbacks = [ctypes.CFUNCTYPE(i32, *types)(_guarded(f)) for f, types in kinds]
    table = (ctypes.c_void_p * len(_callbacks))(*[ctypes.cast(c, ctypes.c_void_p).value for c in _callbacks])
    shim = ctypes.CDLL(shim_path, mode=ctypes.RTLD_GLOBAL)
    shim.fge_setup(table, runtime_path.encode())
    _shim = shim


# --------------------------------------------------------------------------------------------- parameters
def parameter_bytes(kernel, args) -> bytes:
    """The launch arguments (`args[i]` points to the i-th parameter) laid out as the kernel's parameter space."""
    raw = bytearray(kernel.param_bytes)
    for i, (_, offset, size) in enumerate(kernel.params):
        raw[offset : offset + size] = ctypes.string_at(args[i], size)
    return bytes(raw)
