# SPDX-License-Identifier: Apache-2.0
"""Compiles the emulator's C code on first use, cached by content.

A shared library is identified by a hash of its sources, the compiler (path, version), the flags and the CPU's
features, so that a cache directory may be shared between hosts. It is built under a file lock, in a temporary
directory, and published by one rename.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .errors import SetupError

CORE_DIR = Path(__file__).with_name("core")
# -ffp-contract=off: the interpreter must round exactly where PTX rounds. -fno-trapping-math lets selects of floats
# become masks.
BASE_FLAGS = (
    "-std=gnu11 -O2 -ftree-vectorize -fno-math-errno -fno-trapping-math -ffp-contract=off -fno-strict-aliasing"
    " -fPIC -shared -pthread -g1 -Wall -Wno-unknown-pragmas"
).split()
# Tried in order, the first that the compiler accepts is used.
NATIVE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


class EmulatorBuildError(SetupError):
    """The C compiler is missing, or refused the sources."""


def cache_directory() -> Path:
    """The directory of compiled libraries: `$FGATTN_CACHE_DIR/emulator`, or the platform's user cache directory."""
    root = os.environ.get("FGATTN_CACHE_DIR")
    if root:
        return Path(root) / "emulator"
    import platformdirs

    return platformdirs.user_cache_path("fgattn_cute") / "emulator"


@lru_cache(maxsize=1)
def find_compiler() -> tuple[str, ...]:
    """The compiler command: `$CC` if set, else the first of cc, gcc, clang on the PATH.

    Raises:
        EmulatorBuildError: there is none.
    """
    wanted = os.environ.get("CC", "").split()
    for words in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        path = shutil.which(words[0])
        if path:
            return (path, *words[1:])
    tried = f"CC={' '.join(wanted)}" if wanted else "cc, gcc and clang"
    raise EmulatorBuildError(
        f"the emulator is compiled on first use and needs a C compiler, but {tried} cannot be found. Install gcc or "
        "clang (Debian: apt install gcc libc6-dev) or set CC to one."
    )


@lru_cache(maxsize=1)
def _cpu_features() -> str:
    """What -march=native depends on: the feature line of the kernel's CPU table where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() + platform.machine()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))]
    return "\n".join(sorted(set(lines)))


def _version(compiler: Sequence[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(command: list[str]) -> str | None:
    """Runs the compiler; None if it succeeded, else what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def shared_library(
    name: str,
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
    libraries: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compiles `sources` into one shared library, or finds it in the cache.

    Args:
        name: Stem of the library's file name.
        sources: C files.
        headers: Files the sources include; part of the content hash.
        libraries: Linker arguments such as "-lm".
        flags: Further compiler flags.

    Returns:
        The path of the library.

    Raises:
        EmulatorBuildError: no compiler, or it refused the sources (its message is in the text).
    """
    compiler = find_compiler()
    digest = hashlib.sha256()
    for part in ("1", *compiler, _version(compiler), *BASE_FLAGS, *flags, *libraries, _cpu_features()):
        digest.update(part.encode() + b"\0")
    for path in [*sources, *headers]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    directory = cache_directory() / digest.hexdigest()[:20]
    target = directory / f"lib{name}.so"
    if target.exists():
        return target
    from filelock import FileLock

    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory / f"{name}.lock")):
        if not target.exists():
            _build([*compiler, *BASE_FLAGS, *flags], sources, headers, libraries, target)
    return target


def _build(
    compiler: Sequence[str], sources: Sequence[Path], headers: Sequence[Path], libraries: Sequence[str], target: Path
) -> None:
    include = sorted({f"-I{path.parent}" for path in [*sources, *headers]})
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        complaint = None
        for native in NATIVE_FLAGS:
            command = [*compiler, *native, *include, *map(str, sources), "-o", str(output), *libraries]
            said = _compile(command)
            if said is None:
                os.replace(output, target)
                return
            complaint = complaint or said
    raise EmulatorBuildError(f"the C compiler refused the emulator's sources:\n{complaint}")


def core_library() -> Path:
    """The library of the machine itself, compiled from `core/`."""
    sources, headers = sorted(CORE_DIR.glob("*.c")), sorted(CORE_DIR.glob("*.h"))
    # Hidden symbols: calls inside the library are direct, and its names cannot meet those of other libraries.
    return shared_library("fgattn_emulator", sources, headers, ("-lm",), ("-fvisibility=hidden",))
