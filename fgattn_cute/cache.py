# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk.

A folder of files named by their content: ``<spec.name>-<hash>.o`` (host code with the cubin inside), ``.ptx`` beside it
(the emulator runs it), ``.so`` (the same linked, where that was possible) and ``.json`` (what it is, and the hashes of
the others). The hash covers the spec, the sources under ``kernels/``, the compile step and every version that shapes
the code, so an entry is never stale: it is simply not found any more. The JSON file is written last and marks the entry
complete. A damaged entry is a miss with a warning. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from . import settings
from .settings import log

ARCH = "sm_90a"
LOCK_TIMEOUT_S = 600
_SUFFIXES = (".o", ".so", ".ptx", ".json")
_SHOWN_HASH_CHARS = 12


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled kernel: what ``publish`` stores and ``load`` gives back.

    object_file: host object code that exports the TVM-FFI function ``spec.name``.
    ptx: the kernel's PTX.
    facts: JSON values: registers, stack_bytes, smem_bytes, code_bytes, compile_ms, kernel.
    library: the object file as a shared library; None where it could not be linked.
    """

    object_file: bytes
    ptx: str
    facts: dict
    library: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Info:
    """What a cache holds. ``stale``: entries of other sources or versions, which ``prune`` removes first."""

    folder: Path
    mode: str
    entries: int
    stale: int
    bytes: int


def folder() -> Path:
    """Where the object files lie."""
    return settings.cache_dir() / "kernels"


@functools.cache
def versions() -> dict[str, str]:
    """Everything outside the sources that shapes the code: DSL distributions, TVM-FFI, Python, GPU and CPU."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "arch": ARCH, "cpu": platform.machine()}
    # The names of the folders say it all, and importlib.metadata would open every package's metadata: 100 ms.
    for place in reversed(sys.path):  # the first on the path is the one that is imported
        # The CUDA family of the compiler is part of a distribution's name, so all of them count.
        for pattern in ("nvidia_cutlass_dsl*.dist-info", "apache_tvm_ffi-*.dist-info"):
            for path in Path(place).glob(pattern):
                name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
                found[name.replace("_", "-")] = version
    return dict(sorted(found.items()))


@functools.cache
def fingerprint() -> str:
    """Hash of ``sources()`` and ``versions()``."""
    return _sha256(json.dumps([sources(), versions()]).encode())


@functools.cache
def sources() -> str:
    """Hash of the kernel sources and the compile step."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    steps = [here / name for name in ("compile.py", "loading.py", "signatures.py")]
    for path in (*sorted((here / "kernels").glob("*.py")), *steps):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(spec) -> str:
    """Hash of a spec (a flat dataclass) and the fingerprint."""
    fields = {"type": type(spec).__name__, **dataclasses.asdict(spec)}
    text = json.dumps([fields, fingerprint()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stem_of(spec) -> str:
    """File name of the spec's entry without suffix."""
    return f"{spec.name}-{key_of(spec)[:_SHOWN_HASH_CHARS]}"


def load(spec) -> Artifact | None:
    """The spec's entry, or None where there is none, it is damaged (with a warning), or the cache is off."""
    mode = settings.cache_mode()
    base = folder() / stem_of(spec)
    if mode == "off":
        return None
    if not base.with_name(f"{base.name}.json").exists() or not trusted(folder()):
        from . import prebuilt

        return prebuilt.load(spec)
    try:
        artifact = read_entry(base, key_of(spec))
    except (OSError, ValueError, KeyError, TypeError) as why:
        discard(spec, f"{type(why).__name__}: {why}")
        return None
    if mode == "on":
        with contextlib.suppress(OSError):
            os.utime(base.with_name(f"{base.name}.json"))  # last use, for prune
    return artifact


def read_entry(base: Path, key: str) -> Artifact:
    """The entry with the files ``base`` + suffix.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged, or has another key.
    """
    record = json.loads(_read(base, ".json"))
    object_file, ptx = _read(base, ".o"), _read(base, ".ptx")
    library = _read(base, ".so") if record["library_sha256"] else None
    for what, expected, got in (
        ("key", key, record["key"]),
        ("object file", record["object_sha256"], _sha256(object_file)),
        ("PTX", record["ptx_sha256"], _sha256(ptx)),
        ("library", record["library_sha256"], library and _sha256(library)),
    ):
        if expected != got:
            raise ValueError(f"the {what} is not the recorded one")
    return Artifact(object_file, ptx.decode(), dict(record["facts"]), library)


def discard(spec, why: str) -> None:
    """Warn about a damaged entry and take it away, so that the kernel is compiled again."""
    base = folder() / stem_of(spec)
    log.warning("damaged cache entry %s is ignored (%s)", base, why)
    if settings.cache_mode() == "on":
        _remove(base)


def publish(spec, artifact: Artifact) -> None:
    """Store an artifact where the mode allows it. A failure is a warning: the kernel works, only slower next time."""
    if settings.cache_mode() != "on":
        return
    try:
        _make_folder()
        write_entry(folder(), spec, artifact)
    except OSError as why:
        log.warning("kernel %s could not be stored in %s: %s", spec.name, folder(), why)


def write_entry(where: Path, spec, artifact: Artifact) -> None:
    """Store an artifact in a folder. Raises OSError."""
    ptx = artifact.ptx.encode()
    record = {
        "name": spec.name,
        "key": key_of(spec),
        "fingerprint": fingerprint(),
        "sources": sources(),
        "spec": dataclasses.asdict(spec),
        "facts": artifact.facts,
        "versions": versions(),
        "object_sha256": _sha256(artifact.object_file),
        "ptx_sha256": _sha256(ptx),
        "library_sha256": artifact.library and _sha256(artifact.library),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    base = where / stem_of(spec)
    _write(base, ".o", artifact.object_file)
    _write(base, ".ptx", ptx)
    if artifact.library is not None:
        _write(base, ".so", artifact.library)
    _write(base, ".json", json.dumps(record, indent=1).encode() + b"\n")


def annotate(spec, **facts) -> None:
    """Add facts to a complete entry, where the mode allows it; without effect where there is none."""
    base = folder() / stem_of(spec)
    if settings.cache_mode() != "on":
        return
    with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged record is for load() to report
        record = json.loads(_read(base, ".json"))
        record["facts"].update(facts)
        _write(base, ".json", json.dumps(record, indent=1).encode() + b"\n")


@contextlib.contextmanager
def locked(spec):
    """Hold the lock of one entry against other processes; without effect where the cache is not written."""
    if settings.cache_mode() != "on":
        yield
        return
    import filelock

    try:
        _make_folder()
        lock = filelock.FileLock(folder() / f"{stem_of(spec)}.lock", timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except (OSError, filelock.Timeout) as why:
        log.warning("kernel cache %s cannot be locked (%s): compiling without it", folder(), why)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def records() -> list[dict]:
    """The JSON record of every readable entry, with "bytes", "used" (seconds since the epoch) and "stale" added."""
    found = []
    for path in sorted(folder().glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            used = path.stat().st_mtime
            sizes = [own.stat().st_size for own in map(path.with_suffix, _SUFFIXES) if own.exists()]
        except (OSError, ValueError):
            continue
        stale = record.get("fingerprint") != fingerprint()
        found.append({**record, "stem": path.stem, "bytes": sum(sizes), "used": used, "stale": stale})
    return found


def info() -> Info:
    """What the cache holds."""
    found = records()
    stale = sum(record["stale"] for record in found)
    return Info(folder(), settings.cache_mode(), len(found), stale, sum(record["bytes"] for record in found))


def prune(max_bytes: int = 0) -> int:
    """Remove stale entries, then those not used for longest until at most ``max_bytes`` remain. Returns how many."""
    removed = 0
    kept = sorted(records(), key=lambda record: (not record["stale"], record["used"]))
    total = sum(record["bytes"] for record in kept)
    for record in kept:
        if record["stale"] or total > max_bytes:
            _remove(folder() / record["stem"])
            total -= record["bytes"]
            removed += 1
    return removed


# ---- files ---------------------------------------------------------------------------------------------------------
def _make_folder() -> None:
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)


def trusted(where: Path) -> bool:
    """A cache holds native code that is loaded into the process, so nobody else may have written it."""
    found = where.stat()
    if found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022:
        return True
    log.warning("kernel cache %s is not used: others can write to it (chmod 700 it, if it is yours)", where)
    return False


def _read(base: Path, suffix: str) -> bytes:
    return base.with_name(base.name + suffix).read_bytes()


def _write(base: Path, suffix: str, data: bytes) -> None:
    """Write beside the target, then rename: readers see the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=base.parent, prefix=f".{base.name}", suffix=suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, base.with_name(base.name + suffix))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove(base: Path) -> None:
    for suffix in (*reversed(_SUFFIXES), ".lock"):  # the JSON first: it makes the entry complete
        with contextlib.suppress(OSError):
            base.with_name(base.name + suffix).unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
