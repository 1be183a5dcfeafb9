# SPDX-License-Identifier: Apache-2.0
"""What this machine can run and why not the rest, as plain data for `fgattn doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from fgattn_cute import gpu, settings
from fgattn_cute.errors import FgAttnError

PACKAGES = ("fgattn-cute", "torch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-python", "pydantic", "numpy")
VARIABLES = (
    "FGATTN_CACHE",
    "FGATTN_CACHE_DIR",
    "FGATTN_PREBUILT_DIR",
    "FGATTN_CONFIG",
    "FGATTN_GPU",
    "FGATTN_COMPILE_WORKERS",
    "FGATTN_LOG",
)


def examine() -> dict:
    """Versions, GPU, cache, environment, and for each backend of attention() whether it works (None) or why not."""
    missing_compiler = _no_c_compiler()
    missing_dsl = _no_dsl()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": _gpu(),
        "cpus": os.cpu_count(),
        "cache": _cache(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "backends": {
            "cuda": (missing_dsl if settings.prebuilt_dir() is None else None) or _no_hopper(),
            "emulator": missing_dsl or missing_compiler,
            "reference": None,
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    found = gpu.from_cuda()
    return {"name": found.name, "cc": list(found.cc), "sms": found.sms, "l2_bytes": found.l2_bytes}


def _cache() -> dict:
    try:
        folder = settings.cache_dir()
    except FgAttnError as wrong:
        return {"folder": None, "problem": str(wrong)}
    writable = os.access(next(parent for parent in (folder, *folder.parents) if parent.exists()), os.W_OK)
    return {"folder": str(folder), "problem": None if writable else "the folder cannot be written to"}


def _no_hopper() -> str | None:
    try:
        reasons = gpu.from_cuda().reasons()
    except FgAttnError as none:
        return str(none).splitlines()[0]
    return "; ".join(reasons) or None


def _no_dsl() -> str | None:
    if _version("nvidia-cutlass-dsl") is None:
        return "nvidia-cutlass-dsl is not installed, so no kernel can be compiled"
    return None


def _no_c_compiler() -> str | None:
    """The emulator builds its C core on first use."""
    from fgattn_cute.emulator import build

    try:
        build.find_compiler()
    except FgAttnError as missing:
        return str(missing)
    return None
