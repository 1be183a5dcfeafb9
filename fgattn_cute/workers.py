# SPDX-License-Identifier: Apache-2.0
"""Compiles many kernels side by side into the disk cache.

``cute.compile`` is not thread-safe, so each worker is a process of its own: a fresh interpreter that sees no GPU and
takes one spec after the other. It needs no ``if __name__ == "__main__"`` in the caller's script, unlike
multiprocessing. The results are found in the cache, by this process as by any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from . import cache, settings
from .errors import CompileError

if typing.TYPE_CHECKING:
    from .compile import Spec

STOP_TIMEOUT_S = 10


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one spec.

    error: None, or why it did not compile.
    seconds: wall time in the worker, a cache hit included.
    facts: as in ``cache.Artifact``; empty after an error.
    """

    spec: Spec
    error: str | None
    seconds: float
    facts: dict


def compile_all(
    specs: Iterable[Spec],
    *,
    processes: int | None = None,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Fill the disk cache with the kernels of ``specs``.

    Args:
        specs: duplicates are compiled once.
        processes: how many at a time; None takes FGATTN_COMPILE_WORKERS.
        on_done: called after each spec, in the order of completion, from one thread at a time.

    Returns:
        One Outcome per distinct spec, in their order. A kernel that does not compile is an Outcome, not an exception.

    Raises:
        CompileError: the cache is not written (FGATTN_CACHE is not "on"), so the work would be lost.
    """
    if settings.cache_mode() != "on":
        raise CompileError(f"compiling into the cache needs FGATTN_CACHE=on, it is {settings.cache_mode()}")
    wanted = list(dict.fromkeys(specs))
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for spec in wanted:
        waiting.put(spec)
    outcomes: dict[Spec, Outcome] = {}
    done = threading.Lock()

    def serve():
        worker = None
        while True:
            try:
                spec = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None or worker.ended:  # one that a kernel has brought down makes way for the next
                worker = _Worker()
            outcome = worker.compile(spec)
            with done:
                outcomes[spec] = outcome
                if on_done is not None:
                    on_done(outcome)
        if worker is not None:
            worker.stop()

    number = min(processes or settings.compile_workers(), len(wanted))
    threads = [threading.Thread(target=serve, name=f"fgattn-compile-{i}") for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[spec] for spec in wanted]


class _Worker:
    """One process that compiles what it is told: a spec as a line of JSON in, an outcome as a line of JSON out."""

    def __init__(self):
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # The architecture must be known before the DSL is imported, and no worker may create a CUDA context.
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "CUDA_VISIBLE_DEVICES": "",
            "CUTE_DSL_ARCH": cache.ARCH,
        }
        command = [sys.executable, "-m", "fgattn_cute.workers"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.ended = False

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def compile(self, spec: Spec) -> Outcome:
        started = time.perf_counter()
        line = ""
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps([type(spec).__name__, dataclasses.asdict(spec)]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self.ended = True
            self.stop()
        lost = f"the compiling process ended with status {self._process.poll()}"
        answer = json.loads(line) if line else {"error": lost, "facts": {}}
        return Outcome(spec, answer["error"], time.perf_counter() - started, answer["facts"])


def _serve() -> None:
    """The worker's side. Whatever the DSL prints goes to stderr: stdout carries answers only."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from . import compile as compiler

    kinds = {kind.__name__: kind for kind in typing.get_args(compiler.Spec)}
    for line in sys.stdin:
        kind, fields = json.loads(line)
        spec = kinds[kind](**fields)
        try:
            answer = {"error": None, "facts": compiler.artifact(spec).facts}
        except CompileError as why:
            answer = {"error": str(why), "facts": {}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
