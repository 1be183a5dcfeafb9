# SPDX-License-Identifier: Apache-2.0
"""The library in front of the CUDA runtime, before a stand-in for that runtime which counts what reaches it."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from fgattn_cute.emulator import build, intercept

RUNTIME = """
static int devices = DEVICES;
int calls[8];
int _cudaGetDeviceCount(int* n) { *n = devices; return devices ? 0 : 35; }
int _cudaLibraryLoadData(void** l, const void* c, void* a, void* b, unsigned n, void* d, void* e, unsigned m) {
  calls[0]++; *l = (void*)0xABC0; return 0;
}
int _cudaLibraryGetKernel(void** k, void* l, const char* n) {
  calls[1]++; *k = (void*)0xDEF0; return l == (void*)0xABC0 ? 0 : 1;
}
int _cudaLaunchKernelEx(const void* c, void* k, void** a) { calls[2]++; return k == (void*)0xDEF0 ? 0 : 1; }
int _cudaKernelSetAttributeForDevice(void* k, int a, int v, int d) { calls[3]++; return 0; }
int _cudaGetDevice(int* d) { calls[4]++; *d = 5; return 0; }
int _cudaDeviceGetAttribute(int* v, int a, int d) { calls[5]++; *v = 78; return 0; }
"""
U64, INT = ctypes.c_uint64, ctypes.c_int
CALLBACKS = [
    ("load", [U64, U64]),
    ("kernel", [U64, U64, ctypes.c_char_p]),
    ("launch", [U64, ctypes.POINTER(ctypes.c_uint32), U64, ctypes.POINTER(U64)]),
    ("set_attribute", [U64, INT, INT]),
    ("get_attribute", [U64, INT]),
    ("no_session", []),
]


class Shim:
    """A fresh copy of the shim with callbacks that note their names and arguments."""

    def __init__(self, folder, devices):
        source = folder / "runtime.c"
        source.write_text(RUNTIME.replace("DEVICES", str(devices)))
        self.seen = []
        libraries = []
        for name, path in (("runtime", source), ("shim", Path(intercept.__file__).with_name("shim.c"))):
            target = folder / f"lib{name}{devices}.so"
            command = [*build.find_compiler(), "-shared", "-fPIC", str(path), "-o", str(target), "-ldl"]
            subprocess.run(command, check=True)
            libraries.append(ctypes.CDLL(str(target)))
        self.runtime, self.lib = libraries
        self._keep = [ctypes.CFUNCTYPE(INT, *types)(self._note(name)) for name, types in CALLBACKS]
        table = (ctypes.c_void_p * len(self._keep))(*[ctypes.cast(c, ctypes.c_void_p).value for c in self._keep])
        self.lib.fge_setup(table, str(folder / f"libruntime{devices}.so").encode())

    def _note(self, name):
        def callback(*args):
            self.seen.append((name, [tuple(a[:9]) if name == "launch" and i == 1 else a for i, a in enumerate(args)]))
            return {"no_session": 100}.get(name, 0)

        return callback

    def load(self):
        """Loads a library and its kernel as the DSL's host code does; returns both handles."""
        library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        code = ctypes.create_string_buffer(64)
        assert self.lib._cudaLibraryLoadData(ctypes.byref(library), code, None, None, 0, None, None, 0) == 0
        assert self.lib._cudaLibraryGetKernel(ctypes.byref(kernel), library, b"k") == 0
        return library.value, kernel.value

    def launch(self, kernel):
        """A launch of grid (6, 5, 4), block (128, 1, 1), cluster (2, 1, 1), 1024 bytes of shared memory."""

        class Attribute(ctypes.Structure):
            _fields_ = [("id", INT), ("pad", INT), ("cluster", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint8 * 52)]

        class Config(ctypes.Structure):
            _fields_ = [
                ("grid", ctypes.c_uint32 * 3),
                ("block", ctypes.c_uint32 * 3),
                ("smem", ctypes.c_size_t),
                ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(Attribute)),
                ("count", ctypes.c_uint32),
            ]

        attribute = Attribute(4, 0, (2, 1, 1))
        config = Config((6, 5, 4), (128, 1, 1), 1024, None, ctypes.pointer(attribute), 1)
        return self.lib._cudaLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(kernel), None)

    def forwarded(self):
        """Calls that reached the runtime: load, kernel, launch, attribute, get device, device attribute."""
        return list((INT * 8).in_dll(self.runtime, "calls"))[:6]


@pytest.mark.parametrize("devices", [0, 1])
def test_a_session_takes_the_launch(tmp_path, devices):
    shim = Shim(tmp_path, devices)
    shim.lib.fge_set_active(1, 64)
    library, kernel = shim.load()
    assert shim.launch(kernel) == 0
    names = [name for name, _ in shim.seen]
    assert names == ["load", "kernel", "launch"]
    handle, dims, smem, _ = shim.seen[2][1]
    assert handle == kernel and dims == (6, 5, 4, 128, 1, 1, 2, 1, 1) and smem == 1024
    assert shim.seen[1][1][:2] == [kernel, library]
    # loaded for real too, so that the same kernel can run on the device later; the launch stays here
    assert shim.forwarded()[:3] == ([1, 1, 0] if devices else [0, 0, 0])
    value = INT()
    assert shim.lib._cudaDeviceGetAttribute(ctypes.byref(value), 16, 0) == 0 and value.value == 64


def test_without_a_session_the_device_gets_the_launch(tmp_path):
    shim = Shim(tmp_path, 1)
    _, kernel = shim.load()
    assert kernel == 0xDEF0
    assert shim.launch(kernel) == 0
    assert shim.lib._cudaKernelSetAttributeForDevice(ctypes.c_void_p(kernel), 8, 1000, 0) == 0
    device, value = INT(), INT()
    shim.lib._cudaGetDevice(ctypes.byref(device))
    shim.lib._cudaDeviceGetAttribute(ctypes.byref(value), 16, 0)
    assert device.value == 5 and value.value == 78
    assert shim.forwarded() == [1, 1, 1, 1, 1, 1]
    assert [name for name, _ in shim.seen] == ["load", "kernel", "set_attribute"]
    shim.lib.fge_set_active(1, 132)  # loaded before the session, launched in it
    shim.launch(kernel)
    assert shim.seen[-1][0] == "launch" and shim.forwarded()[2] == 1


def test_without_a_session_and_a_device_there_is_an_explanation(tmp_path):
    shim = Shim(tmp_path, 0)
    _, kernel = shim.load()
    assert shim.launch(kernel) == 100 and shim.seen[-1][0] == "no_session"
