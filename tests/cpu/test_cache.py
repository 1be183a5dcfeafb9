# SPDX-License-Identifier: Apache-2.0
"""The disk cache with made-up artifacts, and the environment variables that steer it."""

import json
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fgattn_cute import cache, settings
from fgattn_cute.errors import InputError
from fgattn_cute.kernels.spec import FwdSpec

SPEC = FwdSpec(head_dim=128)
OTHER = FwdSpec(head_dim=64)
ARTIFACT = cache.Artifact(b"object code", ".version 8.8", {"registers": 168}, b"linked code")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FGATTN_CACHE", raising=False)


def files():
    return sorted(path.name for path in cache.folder().iterdir() if path.suffix != ".lock")


def test_what_is_published_is_found():
    assert cache.load(SPEC) is None
    cache.publish(SPEC, ARTIFACT)
    assert cache.load(SPEC) == ARTIFACT
    assert cache.load(OTHER) is None


def test_names_are_readable_and_the_record_says_what_it_is():
    cache.publish(SPEC, ARTIFACT)
    stem = cache.stem_of(SPEC)
    assert stem.startswith(SPEC.name + "-") and len(stem) == len(SPEC.name) + 13
    assert files() == [f"{stem}.json", f"{stem}.o", f"{stem}.ptx", f"{stem}.so"]
    record = json.loads((cache.folder() / f"{stem}.json").read_text())
    assert record["spec"]["head_dim"] == 128 and record["facts"] == {"registers": 168}
    assert record["versions"]["arch"] == "sm_90a" and "nvidia-cutlass-dsl" in record["versions"]


def test_nobody_else_may_write_the_folder():
    cache.publish(SPEC, ARTIFACT)
    assert stat.S_IMODE(cache.folder().stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(caplog):
    cache.publish(SPEC, ARTIFACT)
    cache.folder().chmod(0o777)
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert cache.load(SPEC) is None
    assert "others can write to it" in caplog.text
    cache.folder().chmod(0o755)
    assert cache.load(SPEC) == ARTIFACT


def test_key_depends_on_every_field_and_on_the_sources(monkeypatch):
    keys = {cache.key_of(s) for s in (SPEC, OTHER, FwdSpec(head_dim=128, slice_n=2), SPEC.redo_spec())}
    assert len(keys) == 4
    before = cache.key_of(SPEC)
    monkeypatch.setattr(cache, "fingerprint", lambda: "other sources")
    assert cache.key_of(SPEC) != before


def test_fingerprint_covers_kernels_compile_step_and_versions():
    here = Path(cache.__file__).parent
    probe = f"""
import sys; sys.path.insert(0, {str(here.parent)!r})
from pathlib import Path
from fgattn_cute import cache
read = Path.read_bytes
seen = []
Path.read_bytes = lambda self: seen.append(self.name) or read(self)
cache.fingerprint()
print(*seen)
"""
    seen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    steps = ["compile.py", "loading.py", "signatures.py"]
    assert seen == [*sorted(path.name for path in (here / "kernels").glob("*.py")), *steps]


@pytest.mark.parametrize("suffix", [".o", ".so", ".ptx", ".json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_entry_is_a_miss_with_a_warning(suffix, damage, caplog):
    cache.publish(SPEC, ARTIFACT)
    path = cache.folder() / (cache.stem_of(SPEC) + suffix)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "truncated" else b"x" + data[1:])
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert cache.load(SPEC) is None
    if (suffix, damage) == (".json", "missing"):
        return  # the entry was never completed: an ordinary miss
    assert "damaged cache entry" in caplog.text and SPEC.name in caplog.text
    assert files() == []
    cache.publish(SPEC, ARTIFACT)
    assert cache.load(SPEC) == ARTIFACT


def test_read_only_cache_is_used_and_left_alone(monkeypatch, caplog):
    cache.publish(SPEC, ARTIFACT)
    monkeypatch.setenv("FGATTN_CACHE", "ro")
    assert cache.load(SPEC) == ARTIFACT
    cache.publish(OTHER, ARTIFACT)
    assert cache.load(OTHER) is None
    (cache.folder() / (cache.stem_of(SPEC) + ".o")).write_bytes(b"damaged")
    before = files()
    with caplog.at_level(logging.WARNING, "fgattn_cute"), cache.locked(SPEC):
        assert cache.load(SPEC) is None
    assert files() == before and "damaged" in caplog.text


def test_cache_turned_off(monkeypatch):
    cache.publish(SPEC, ARTIFACT)
    monkeypatch.setenv("FGATTN_CACHE", "off")
    assert cache.load(SPEC) is None
    monkeypatch.setenv("FGATTN_CACHE", "on")
    assert cache.load(SPEC) == ARTIFACT


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "cache"
    blocked.mkdir()
    (blocked / "kernels").write_text("a file in the way")
    with caplog.at_level(logging.WARNING, "fgattn_cute"), cache.locked(SPEC):
        cache.publish(SPEC, ARTIFACT)
    assert "could not be stored" in caplog.text and "cannot be locked" in caplog.text


def test_prune_takes_stale_entries_then_the_least_used(monkeypatch):
    third = FwdSpec(head_dim=256, tile_n=64)
    real = cache.fingerprint()
    monkeypatch.setattr(cache, "fingerprint", lambda: "sources of yesterday")
    cache.publish(third, ARTIFACT)
    monkeypatch.setattr(cache, "fingerprint", lambda: real)
    for age, spec in ((100, SPEC), (200, OTHER)):
        cache.publish(spec, ARTIFACT)
        record = cache.folder() / (cache.stem_of(spec) + ".json")
        os.utime(record, (record.stat().st_mtime - age,) * 2)
    info = cache.info()
    assert (info.entries, info.stale, info.mode) == (3, 1, "on")
    assert cache.prune(max_bytes=info.bytes) == 1, "only the stale one"
    assert cache.prune(max_bytes=cache.info().bytes - 1) == 1, "the one not used for longest"
    assert cache.load(OTHER) is None and cache.load(SPEC) == ARTIFACT
    assert cache.prune() == 1 and files() == []


def test_loading_counts_as_use():
    cache.publish(SPEC, ARTIFACT)
    record = cache.folder() / (cache.stem_of(SPEC) + ".json")
    os.utime(record, (1, 1))
    cache.load(SPEC)
    assert record.stat().st_mtime > 1


def test_the_lock_holds_off_another_process(tmp_path):
    probe = f"""
import sys; sys.path.insert(0, {str(Path(cache.__file__).parent.parent)!r})
from fgattn_cute import cache
from fgattn_cute.kernels.spec import FwdSpec
with cache.locked(FwdSpec(head_dim=128)):
    print("in", flush=True)
"""
    with cache.locked(SPEC):
        other = subprocess.Popen([sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True)
        line = []
        reader = threading.Thread(target=lambda: line.append(other.stdout.readline()))
        reader.start()
        reader.join(3)
        assert line == [], "the other process got the lock while it was held"
    reader.join(30)
    assert line == ["in\n"] and other.wait(30) == 0
    other.stdout.close()


# ---- settings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, value, read",
    [
        ("FGATTN_CACHE", "yes", settings.cache_mode),
        ("FGATTN_COMPILE_WORKERS", "two", settings.compile_workers),
        ("FGATTN_COMPILE_WORKERS", "0", settings.compile_workers),
        ("FGATTN_LOG", "verbose", settings.configure_logging),
        ("FGATTN_CONFIG", "/nowhere/at/all", settings.config_path),
        ("FGATTN_CACHE_DIR", __file__, settings.cache_dir),
    ],
)
def test_a_senseless_setting_is_an_error_that_names_it(name, value, read, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        read()


def test_every_setting_is_in_the_table():
    import re

    source = Path(settings.__file__).read_text()
    used = set(re.findall(r'"(FGATTN_[A-Z_]+)"', source))
    listed = set(re.findall(r"^\| (FGATTN_[A-Z_]+) \|", settings.__doc__, re.M))
    assert used == listed


def test_no_setting_is_read_elsewhere():
    for path in Path(settings.__file__).parent.glob("*.py"):
        if path.name != "settings.py":
            assert 'environ.get("FGATTN' not in path.read_text(), path.name


def test_default_folder_is_the_users_cache(monkeypatch):
    import platformdirs

    monkeypatch.delenv("FGATTN_CACHE_DIR")
    assert settings.cache_dir() == platformdirs.user_cache_path("fgattn_cute")
