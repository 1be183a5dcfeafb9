# SPDX-License-Identifier: Apache-2.0
"""Everything that `make gpu` needs on a machine that can download nothing and has torch, triton and CUDA.

    python -m perf.bundle --out folder [--python 3.12]

Made anywhere with the same CPU architecture; no GPU needed. Downloads wheels, compiles kernels (minutes), copies the
sources, and writes a README.txt of how to use them there.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fgattn_cute import cache, prebuilt
from perf.workloads import slice_keys

ROOT = Path(__file__).parent.parent
MARK = "bundle.json"
HEAD_DIMS = (64, 128)  # of the models in workloads.yaml
TESTING = ("pytest", "pytest-timeout")
# pip takes only tags that it is told. CUDA's packages are at 2_28 by now, older ones below.
MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
SOURCES = ("fgattn_cute", "kernels", "configs", "perf", "tests", "pyproject.toml", "Makefile", "README.md", "LICENSE")
README = """\
python3 -m pip install --no-index --find-links wheels -r requirements.txt   # Python {python}; torch is there already
cd source
make gpu GPU_PYTHON=python3   # results in .gpu-results/; the kernels in ../kernels are found and checked first
"""


def requirements(pyproject: str) -> list[str]:
    """What the package, its command line, its plots and the tests need besides torch; kernels' libraries pinned.

    Args:
        pyproject: text of pyproject.toml.
    """

    def array(name: str) -> list[str]:
        found = re.search(rf"^{name} = (\[.*?\])(?: #.*)?$", pyproject, re.DOTALL | re.MULTILINE)
        return ast.literal_eval(found[1])

    named = (*array("dependencies"), *array("cli"), *array("perf"), *TESTING)
    exact = cache.versions()  # a kernel is refused with any other
    found = {}
    for line in named:
        name = re.match(r"[\w-]+", line)[0]
        if name != "torch":
            found[name] = f"{name}=={exact[name]}" if name in exact else line
    return list(found.values())


def download(wanted: list[str], where: Path, python: str) -> None:
    """The wheels of some requirements and of all that they need. Raises CalledProcessError with pip's exit code."""
    tags = [f"--platform={tag}_{platform.machine()}" for tag in MANYLINUX]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(where)]
    subprocess.run([*pip, "--only-binary=:all:", f"--python-version={python}", *tags, *wanted], check=True)


def copy_sources(where: Path) -> None:
    """The repository without what it makes; its symlinks stay symlinks."""
    where.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, where / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, where / name)


def make(out: Path, python: str, gpu: str, say: Callable[[str], None]) -> dict:
    """Fill an empty folder with wheels/, kernels/, source/, requirements.txt and README.txt.

    Returns:
        What bundle.json holds: versions, GPU, Python, kernels that compiled and those that did not.

    Raises:
        FileExistsError: the folder has something in it.
        CalledProcessError: pip does not find a wheel.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    wanted = requirements((ROOT / "pyproject.toml").read_text())
    (out / "requirements.txt").write_text("\n".join(wanted) + "\n")
    say(f"wheels for Python {python}: {', '.join(wanted)}")
    download(wanted, out / "wheels", python)
    copy_sources(out / "source")
    specs = [*prebuilt.specs_of(gpu, slice_keys(), ["bf16"], HEAD_DIMS), *prebuilt.helpers()]
    say(f"{len(specs)} kernels for {gpu}")
    outcomes = prebuilt.build(out / "kernels", specs, on_done=lambda outcome: say(outcome.spec.name))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu,
        "python": python,
        "versions": cache.versions(),
        "kernels": sum(outcome.error is None for outcome in outcomes),
        "failed": {outcome.spec.name: outcome.error for outcome in outcomes if outcome.error},
    }
    (out / MARK).write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.txt").write_text(README.format(python=python))
    return record


def around(source: Path) -> Path | None:
    """The bundle that a copy of the sources lies in, or None."""
    return source.parent if (source.parent / MARK).exists() else None


def main() -> None:
    """Exit code 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the target: 3.12")
    parser.add_argument("--gpu", default="h200", help="file of configs/ without .yaml")
    options = parser.parse_args()
    record = make(options.out, options.python, options.gpu, lambda said: print(said, flush=True))
    print(f"{record['kernels']} kernels, {len(record['failed'])} failed; how to use it: {options.out / 'README.txt'}")
    sys.exit(int(bool(record["failed"])))


if __name__ == "__main__":
    main()
