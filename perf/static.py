# SPDX-License-Identifier: Apache-2.0
"""Static figures of the presets' kernels: registers, bytes, instructions of the loops. Compiles, needs no GPU.

python -m perf.static            # compare with configs/kernel_figures.json; exit code 1 on a difference
python -m perf.static --write    # renew the file, after a change that is meant to change them
"""

from __future__ import annotations

import argparse
import json
import sys

from fgattn_cute import compile as compiler
from fgattn_cute import cubin, presets, roofline
from fgattn_cute.kernels.spec import FwdSpec

KEPT = ("registers", "stack_bytes", "smem_bytes", "code_bytes")
# A kernel's figures may drift by this share before it is a regression: ptxas schedules a little differently each time
# that an unrelated line changes.
TOLERANCE = 0.05


def kernels() -> list[FwdSpec]:
    """The bf16 kernels of the H200's presets, which every other file shares."""
    file = presets.builtin("h200")
    found = {spec: None for preset in file.presets if not preset.is_fallback for spec in preset.specs()}
    return [spec for spec in found if spec.dtype == "bf16"]


def measure(spec: FwdSpec) -> dict:
    """The figures of one kernel, compiled if need be.

    Raises:
        CompileError: it does not compile, or nvdisasm is missing.
    """
    artifact = compiler.artifact(spec)
    loops = roofline.loop_figures(spec, artifact) or cubin.loops(cubin.from_object(artifact.object_file))
    return {**{key: artifact.facts[key] for key in KEPT}, "loops": loops}


def differences(name: str, found: dict, committed: dict) -> list[str]:
    """What has become worse or simply different between two sets of figures of a kernel."""
    said = [
        f"{name}: {key} {committed[key]} -> {found[key]}"
        for key in ("registers", "stack_bytes", "smem_bytes")
        if found[key] != committed[key]
    ]
    for role in ("consumer", "producer"):
        before, now = (figures["loops"][role]["total"] for figures in (committed, found))
        if abs(now / before - 1) > TOLERANCE:
            said.append(f"{name}: {role} loop {before} -> {now} instructions")
        for op in ("HGMMA", "LDGSTS", "MUFU"):
            before, now = (figures["loops"][role].get(op, 0) for figures in (committed, found))
            if before != now:
                said.append(f"{name}: {role} loop has {now} {op}, not {before}")
    return said


def main() -> None:
    """Prints the differences, or writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = {spec.name: measure(spec) for spec in kernels()}
    if options.write:
        roofline.FIGURES.write_text(json.dumps(found, sort_keys=True, indent=1) + "\n")
        print(f"{len(found)} kernels written to {roofline.FIGURES.name}")
        return
    committed = roofline.committed_figures()
    said = [f"{name}: not in the file" for name in found.keys() - committed.keys()]
    for name in found.keys() & committed.keys():
        said += differences(name, found[name], committed[name])
    print("\n".join(said) or f"{len(found)} kernels as committed")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
