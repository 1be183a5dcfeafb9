# SPDX-License-Identifier: Apache-2.0
"""Every environment variable of the package, read in one place and refused when it makes no sense.

| variable | values | default | meaning |
|---|---|---|---|
| FGATTN_CACHE | on, ro, off | on | compiled kernels on disk: read and write, read only, not used |
| FGATTN_CACHE_DIR | folder | the user's cache folder | where they lie |
| FGATTN_PREBUILT_DIR | folder | none | kernels that `fgattn compile` has made, read where the cache has none |
| FGATTN_CONFIG | YAML file or folder of them | none | presets that are searched before the shipped ones |
| FGATTN_GPU | a file of configs/, such as h200 | none | the GPU to choose kernels for, not the one found |
| FGATTN_COMPILE_WORKERS | 1, 2, ... | half the CPUs | processes that compile side by side |
| FGATTN_LOG | debug, info, warning, error | none | write the package's log to stderr from this level on |

Values are read when they are needed, so a test or a program may change them between calls.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

from .errors import InputError

CACHE_MODES = ("on", "ro", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")

log = logging.getLogger("fgattn_cute")


def _choice(name: str, legal: tuple[str, ...], default: str | None) -> str | None:
    value = os.environ.get(name)
    if value is None or value == "":
        return default
    if value not in legal:
        raise InputError(f"environment variable {name}={value!r} is not one of {', '.join(legal)}")
    return value


def cache_mode() -> str:
    """FGATTN_CACHE: "on", "ro" or "off"."""
    return _choice("FGATTN_CACHE", CACHE_MODES, "on")


def cache_dir() -> Path:
    """FGATTN_CACHE_DIR, or the user's cache folder. The folder need not exist."""
    value = os.environ.get("FGATTN_CACHE_DIR")
    if value:
        path = Path(value).expanduser()
        if path.exists() and not path.is_dir():
            raise InputError(f"environment variable FGATTN_CACHE_DIR={value!r} is a file, not a folder")
        return path
    import platformdirs

    return platformdirs.user_cache_path("fgattn_cute")


def prebuilt_dir() -> Path | None:
    """FGATTN_PREBUILT_DIR: an existing folder; else that of an installed package fgattn_cute_kernels; else None."""
    value = os.environ.get("FGATTN_PREBUILT_DIR")
    if value:
        path = Path(value).expanduser()
        if not path.is_dir():
            raise InputError(f"environment variable FGATTN_PREBUILT_DIR={value!r} is not a folder")
        return path
    return _packaged_kernels()


@functools.cache
def _packaged_kernels() -> Path | None:
    import importlib.util

    found = importlib.util.find_spec("fgattn_cute_kernels")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else None


def config_path() -> Path | None:
    """FGATTN_CONFIG: an existing file or folder, or None."""
    value = os.environ.get("FGATTN_CONFIG")
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.exists():
        raise InputError(f"environment variable FGATTN_CONFIG={value!r} does not exist")
    return path


_CHOOSING = tuple(os.environ.encodekey(name) for name in ("FGATTN_CONFIG", "FGATTN_GPU"))


def choosing() -> tuple:
    """The variables that decide which kernel a call takes, as they stand: part of a key, nothing to read.

    From the bytes behind os.environ, whose get() encodes and decodes: a microsecond for two variables, on every call.
    """
    found = os.environ._data
    return found.get(_CHOOSING[0]), found.get(_CHOOSING[1])


def config_text() -> str | None:
    """FGATTN_CONFIG as it stands, unchecked: cheap enough to be part of a key under which choices are remembered."""
    return os.environ.get("FGATTN_CONFIG")


def gpu_name() -> str | None:
    """FGATTN_GPU: the stem of a file in configs/, unchecked here."""
    return os.environ.get("FGATTN_GPU") or None


def compile_workers() -> int:
    """FGATTN_COMPILE_WORKERS, at least 1."""
    value = os.environ.get("FGATTN_COMPILE_WORKERS")
    if not value:
        return max(1, (os.cpu_count() or 2) // 2)
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"environment variable FGATTN_COMPILE_WORKERS={value!r} is not a whole number of at least 1")
    return int(value)


def configure_logging() -> None:
    """Give the package's logger a stderr handler where FGATTN_LOG asks for one. Called once, on first use."""
    level = _choice("FGATTN_LOG", LOG_LEVELS, None)
    if level is None or any(getattr(handler, "fgattn", False) for handler in log.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    handler.fgattn = True
    log.addHandler(handler)
    log.setLevel(level.upper())
