# SPDX-License-Identifier: Apache-2.0
"""The gate for what runs without a GPU: host overhead, import, compile, mask and plan, emulator, in a quarter minute.

    python -m perf.gate              # exit code 1 if a figure is worse than its limit in perf/limits.json
    python -m perf.gate --write      # measure on this machine and renew the figures; the factors stay

A limit is what was measured times a factor, and a figure gets three tries: CI machines are shared. The kernels' static
figures have a gate of their own, ``python -m perf.static``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fgattn_cute import attention
from fgattn_cute.kernels.spec import FwdSpec
from perf import emulator, host

LIMITS = Path(__file__).with_name("limits.json")
TRIES = 3
SMALL = FwdSpec(head_dim=64, tile_m=64, tile_n=32, softmax="exact")  # compiles fastest


def emulator_speed() -> dict:
    """Nanoseconds of one thread per emulated warp instruction, checks "fast"."""
    q, k, v, plan = emulator.problem(256, 2, 0.5, SMALL)
    call = lambda: attention(q, k, v, plan, backend="emulator", spec=SMALL, checks="off")
    found = emulator.measure(call, 3, seed=1, checks="fast", threads=1)
    return {"what": "emulator", "ns_per_instruction": round(1e9 * found["seconds_min"] / found["warp_instructions"], 2)}


def plans() -> dict:
    """Milliseconds to make a mask and a plan on one thread: a pool of threads waits for busy cores, 0.2 or 24 ms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return host.plans(seqlen=2048)
    finally:
        torch.set_num_threads(threads)


# What is measured how; the keys of limits.json are "<name> <key of the record>".
MEASURES: dict[str, Callable[[], dict]] = {
    "call": lambda: host.call_overhead(2000),
    "plans": plans,
    "emulator": emulator_speed,
    "import": host.import_time,
    "compile": lambda: host.compile_time(SMALL),
}


def limits() -> dict[str, dict]:
    """{"call us": {"measured": n, "factor": n}, ...}: more than their product is a regression."""
    return json.loads(LIMITS.read_text())["limits"]


def judge(found: dict[str, float], limits: dict[str, dict]) -> list[str]:
    """A sentence for each figure that is over its limit or missing."""
    said = []
    for name, entry in limits.items():
        limit = entry["measured"] * entry["factor"]
        if name not in found:
            said.append(f"{name} was not measured")
        elif found[name] > limit:
            said.append(f"{name} {found[name]:g} is more than {limit:g} ({entry['factor']} x {entry['measured']:g})")
    return said


def run(measures: dict[str, Callable[[], dict]], limits: dict[str, dict]) -> tuple[dict[str, float], list[str]]:
    """(the best figures seen, what is over its limit); a measure whose figures all pass is not repeated."""
    best: dict[str, float] = {}
    for name, measure in measures.items():
        own = {key: entry for key, entry in limits.items() if key.split()[0] == name}
        for _ in range(TRIES):
            for key, value in measure().items():
                if f"{name} {key}" in own:
                    best[f"{name} {key}"] = min(value, best.get(f"{name} {key}", float("inf")))
            if not judge(best, own):
                break
    return best, judge(best, limits)


def main() -> None:
    """Prints each figure beside its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    known = limits()
    best, said = run(MEASURES, known)
    for name, value in best.items():
        print(f"{name}: {value:g}, limit {known[name]['measured'] * known[name]['factor']:g}")
    if options.write:
        data = json.loads(LIMITS.read_text())
        for name, value in best.items():
            data["limits"][name]["measured"] = value
        LIMITS.write_text(json.dumps(data, indent=1) + "\n")
        return
    print("\n".join(said) or "all within their limits")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
