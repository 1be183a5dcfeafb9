# SPDX-License-Identifier: Apache-2.0
"""What the autotuner has found, on disk: one JSON file per key under ``<cache folder>/tuned``.

The key holds everything that may change the winner: GPU, dtype, head dim, slices, buckets of density and lengths, and
the fingerprint of the kernels. A record of other kernels is therefore never found. A damaged one is ignored with a
warning. Files are replaced whole, so two processes that tune the same key leave one complete record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

from . import cache, settings
from .gpu import Gpu
from .kernels.spec import FwdSpec
from .problem import Problem
from .settings import log

FORMAT = 1


def folder() -> Path:
    """Where the records lie."""
    return settings.cache_dir() / "tuned"


def key_of(problem: Problem, gpu: Gpu) -> dict:
    """Plain values that a record is filed under. Lengths and density count by powers of two."""
    return {
        "gpu": gpu.name,
        "cc": list(gpu.cc),
        "sms": gpu.sms,
        "dtype": problem.dtype_name,
        "head_dim": problem.head_dim,
        "slice_m": problem.slice_m,
        "slice_n": problem.slice_n,
        "union_blocks": problem.union_blocks,
        "union_lists": problem.union_lists,
        "density_bucket": problem.density_bucket,
        "grouped": problem.grouped,
        "even": problem.even,
        "seqlen_q_bucket": problem.seqlen_q.bit_length(),
        "seqlen_k_bucket": problem.seqlen_k.bit_length(),
        "blocks_bucket": (problem.batch * problem.heads * problem.blocks_q).bit_length(),
        "fingerprint": cache.fingerprint(),
    }


def path_of(key: dict) -> Path:
    """File of a key: readable, then a hash of all of it."""
    text = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    gpu = "".join(c if c.isalnum() else "-" for c in key["gpu"]).strip("-").lower()
    return folder() / f"{gpu}-{key['dtype']}-d{key['head_dim']}-m{key['slice_m']}n{key['slice_n']}-{text}.json"


def find(problem: Problem, gpu: Gpu) -> tuple[FwdSpec, dict] | None:
    """The winner for a problem on a GPU and its record, or None."""
    if settings.cache_mode() == "off":
        return None
    key = key_of(problem, gpu)
    path = path_of(key)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["key"] != key:
            raise ValueError("it is filed under another key")
        spec = FwdSpec(**record["winner"]["spec"])
        why_not = spec.reasons()
        if why_not:
            raise ValueError("its winner cannot run: " + "; ".join(why_not))
        facts = (spec.dtype, spec.head_dim, spec.redo)
        if facts != (problem.dtype_name, problem.head_dim, False):
            raise ValueError("its winner is for another problem")
    except (OSError, ValueError, KeyError, TypeError) as why:
        log.warning("damaged tuning record %s is ignored (%s: %s)", path, type(why).__name__, why)
        return None
    lists = {"union_blocks": problem.union_blocks, "union_lists": problem.union_lists}
    return dataclasses.replace(spec, slice_n=problem.slice_n, **lists), record


def store(record: dict) -> Path | None:
    """Write a record under its key. A failure is a warning; None where the cache is not written."""
    if settings.cache_mode() != "on":
        return None
    path = path_of(record["key"])
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder(), prefix=f".{path.stem}", suffix=".json")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except OSError as why:
        log.warning("tuning record could not be stored in %s: %s", folder(), why)
        return None
    return path
