# SPDX-License-Identifier: Apache-2.0
"""From a spec to a loaded function: the caches in between, threads, processes and failures."""

import dataclasses
import logging
import sys
import threading

import pytest

from fgattn_cute import cache, cubin, signatures, workers
from fgattn_cute import compile as compiler
from fgattn_cute.errors import CompileError
from fgattn_cute.kernels.spec import FwdSpec

SPEC = FwdSpec(head_dim=64, tile_m=64, tile_n=32, softmax="exact")  # small: compiles fastest
CANNOT_RUN = FwdSpec(head_dim=64, tile_m=64, tile_n=40)


@pytest.fixture(scope="module")
def made():
    """SPEC compiled once, whatever cache the run uses."""
    return compiler.artifact(SPEC)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty disk cache and an empty memory."""
    monkeypatch.setenv("FGATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_memory", {})
    return tmp_path


@pytest.fixture
def builds(monkeypatch, made):
    """Counts compilations, and lets them cost nothing."""
    done = []
    monkeypatch.setattr(compiler, "build", lambda spec: done.append(spec) or made)
    return done


def test_memory_then_disk_then_compiler(own_cache, builds, monkeypatch):
    first = compiler.get(SPEC)
    assert first.source == "compiled" and builds == [SPEC]
    assert compiler.get(SPEC) is first
    compiler.forget()
    again = compiler.get(SPEC)
    assert again.source == "disk" and builds == [SPEC]
    assert again.artifact == first.artifact
    assert callable(again.call)


def test_without_a_disk_cache(own_cache, builds, monkeypatch):
    monkeypatch.setenv("FGATTN_CACHE", "off")
    assert compiler.get(SPEC).source == "compiled"
    assert list(own_cache.iterdir()) == []


def test_damage_is_repaired(own_cache, builds, caplog):
    compiler.get(SPEC)
    compiler.forget()
    path = cache.folder() / f"{cache.stem_of(SPEC)}.o"
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "fgattn_cute"):
        assert compiler.get(SPEC).source == "compiled"
    assert "damaged" in caplog.text and len(builds) == 2
    compiler.forget()
    assert compiler.get(SPEC).source == "disk"


def test_an_intact_entry_that_cannot_be_loaded_is_replaced(own_cache, builds, made, caplog):
    """Of another spec, say: the hash is right and the function is not in it."""
    other = dataclasses.replace(SPEC, tile_n=16)
    cache.publish(other, made)
    caplog.set_level(logging.WARNING, "fgattn_cute")
    with pytest.raises(CompileError, match="cannot be loaded"):
        compiler.get(other)  # the stand-in compiler makes the same wrong object again
    assert "cannot be loaded" in caplog.text and builds == [other]
    assert "\x1b" not in caplog.text


def test_threads_compile_one_after_the_other(own_cache):
    """cute.compile aborts the process when two threads are in it."""
    specs = [dataclasses.replace(SPEC, tile_n=n) for n in (16, 16, 48, 48)]
    found, failed = {}, []

    def work(index):
        try:
            found[index] = compiler.get(specs[index])
        except Exception as why:
            failed.append(why)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert found[0] is found[1] and found[2] is found[3]
    assert cache.info().entries == 2


def test_a_spec_that_cannot_run_is_refused_with_its_reasons(own_cache):
    with pytest.raises(CompileError) as caught:
        compiler.get(CANNOT_RUN)
    assert all(reason in str(caught.value) for reason in CANNOT_RUN.reasons())
    assert cache.info().entries == 0


def test_without_the_dsl(own_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "cutlass.cute", None)
    with pytest.raises(CompileError, match="pip install 'nvidia-cutlass-dsl"):
        compiler.get(SPEC)


def test_what_the_compiler_refuses_names_the_kernel(own_cache, monkeypatch):
    monkeypatch.setattr(signatures, "_forward", lambda spec: [])
    with pytest.raises(CompileError, match=f"kernel {SPEC.name} does not compile"):
        compiler.get(SPEC)


def test_facts_and_files(made):
    assert made.facts["smem_bytes"] == SPEC.smem_bytes()
    assert made.facts["kernel"].startswith(f"fgattn_{SPEC.name}")
    assert f".entry {made.facts['kernel']}(" in made.ptx
    image = cubin.from_object(made.object_file)
    assert image[:4] == b"\x7fELF"
    facts = cubin.facts(image)
    assert (facts.kernel, facts.registers) == (made.facts["kernel"], made.facts["registers"])
    assert 0 < facts.registers <= 255 and facts.code_bytes > 4096 and facts.stack_bytes == 0


@pytest.mark.parametrize("data", [b"", b"no object file", b"\x50\xed\x55\xba", b"\x50\xed\x55\xba" + bytes(60)])
def test_no_cubin_in_there(data):
    with pytest.raises(CompileError, match="holds no cubin"):
        cubin.from_object(data)
    with pytest.raises(CompileError, match="not an ELF"):
        cubin.facts(data)


# ---- processes -----------------------------------------------------------------------------------------------------
def test_workers_fill_the_cache(own_cache):
    wanted = [SPEC, CANNOT_RUN, SPEC]
    seen = []
    outcomes = workers.compile_all(wanted, processes=2, on_done=seen.append)
    assert [outcome.spec for outcome in outcomes] == [SPEC, CANNOT_RUN]
    assert sorted(map(id, seen)) == sorted(map(id, outcomes))
    good, bad = outcomes
    assert good.error is None and good.facts["registers"] > 0
    assert CANNOT_RUN.reasons()[0] in bad.error and bad.facts == {}
    assert compiler.get(SPEC).source == "disk"


def test_workers_that_die_are_reported(own_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    outcomes = workers.compile_all([SPEC, dataclasses.replace(SPEC, tile_n=16)], processes=1)
    assert [outcome.error for outcome in outcomes] == ["the compiling process ended with status 1"] * 2


def test_workers_need_a_cache_to_fill(own_cache, monkeypatch):
    monkeypatch.setenv("FGATTN_CACHE", "ro")
    with pytest.raises(CompileError, match="FGATTN_CACHE=on, it is ro"):
        workers.compile_all([SPEC])


def test_nothing_to_compile(own_cache):
    assert workers.compile_all([]) == []
