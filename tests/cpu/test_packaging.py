# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds and that the package works from a wheel, an editable install and a bare checkout alike."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Reads each kind of shipped file through the import system, and tells where the package came from.
PROBE = """
import importlib.util, json
from importlib.resources import files
import fgattn_cute
from fgattn_cute.kernels.spec import FwdSpec
hf = importlib.util.find_spec("kernels")
print(json.dumps({
    "where": fgattn_cute.__file__,
    "spec": FwdSpec(head_dim=128).name,
    "yaml": sorted(p.name for p in (files("fgattn_cute") / "configs").iterdir() if p.name.endswith(".yaml")),
    "top_level_kernels": getattr(hf, "origin", None),
}))
"""


# Compiles a kernel from the shipped device code and runs it on the emulator from its shipped C code.
RUN_PROBE = """
import json, torch
import fgattn_cute as fg
q, k, v = torch.randn(3, 1, 70, 1, 64, dtype=torch.bfloat16).unbind()
mask = fg.SliceMask.from_dense(torch.rand(1, 1, 2, 70) < 0.5, slice_m=64, slice_n=1, seqlen_q=70, seqlen_k=70)
out = fg.attention(q, k, v, mask, backend="emulator")
print(json.dumps({"error": (out.float() - fg.reference.attention(q, k, v, mask)).abs().max().item()}))
"""


def probe(cwd: Path, pythonpath: Path | None, code: str = PROBE) -> dict:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("the list of shipped files is read from git, and this is no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, so that no build folder appears in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    tree.mkdir()
    for name in ("kernels", "configs", "fgattn_cute"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", work, tree]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = work.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_under_one_package(wheel):
    members = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for name in tracked_files():
        if name.startswith(("kernels/", "configs/")) and name.endswith((".py", ".yaml", ".json", ".md")):
            if not (name.startswith("kernels/") and name.endswith(".md")):
                expected.add("fgattn_cute/" + name)
        elif name.startswith("fgattn_cute/") and name.endswith((".py", ".c", ".h", ".json", ".yaml")):
            expected.add(name)
    assert "fgattn_cute/kernels/spec.py" in expected
    assert expected <= members, f"missing from the wheel: {sorted(expected - members)}"


def test_the_wheel_claims_no_name_but_its_own(wheel):
    """`kernels` at top level belongs to the Hugging Face package of that name."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"fgattn_cute", next(top for top in tops if top.endswith(".dist-info"))}
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow that package in a checkout"


def test_the_wheel_carries_licence_and_console_script(wheel):
    archive = zipfile.ZipFile(wheel)
    by_name = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(by_name["LICENSE"]).decode()
    assert "fgattn = fgattn_cute.cli:main" in archive.read(by_name["entry_points.txt"]).decode()


def test_works_from_a_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    seen = probe(cwd=tmp_path, pythonpath=site)
    assert Path(seen["where"]).is_relative_to(site)
    assert seen["spec"].startswith("fwd_bf16_d128_")
    assert seen["yaml"] == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def test_a_kernel_from_the_wheel_compiles_and_runs(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert probe(cwd=tmp_path, pythonpath=site, code=RUN_PROBE)["error"] < 0.02


def test_works_from_a_bare_checkout():
    """Python puts the current folder on sys.path, where the folders kernels/ and configs/ also lie."""
    seen = probe(cwd=ROOT, pythonpath=None)
    assert Path(seen["where"]) == ROOT / "fgattn_cute/__init__.py"
    assert seen["spec"].startswith("fwd_bf16_d128_")
    assert seen["top_level_kernels"] is None or "site-packages" in seen["top_level_kernels"]


def test_works_from_an_editable_install(tmp_path):
    """`pip install --editable`, as `make test` does it, into a folder that is asked first for packages."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(ROOT / "fgattn_cute", tree / "fgattn_cute", symlinks=True)
    shutil.copytree(ROOT / "kernels", tree / "kernels")
    shutil.copytree(ROOT / "configs", tree / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site]
    done = subprocess.run([*command, "--editable", tree], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A .pth file is read in site folders only, so the probe is told to treat the target as one.
    code = f"import site; site.addsitedir({str(site)!r});" + PROBE
    outside = tmp_path / "outside"
    outside.mkdir()
    ran = subprocess.run([sys.executable, "-c", code], cwd=outside, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["spec"].startswith("fwd_bf16_d128_")
