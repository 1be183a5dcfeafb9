# SPDX-License-Identifier: Apache-2.0
"""What the documents claim: the README's example runs, links lead somewhere, named commands and options exist."""

import ast
import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme_example():
    """The README's first example: its source, the names it leaves behind and what it prints."""
    example = code_blocks(ROOT / "README.md", "python")[0]
    scope: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), scope)
    return example, scope, printed.getvalue()


def test_readme_example_computes_sparse_attention(readme_example):
    example, scope, printed = readme_example
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) <= 12, "the README promises a short example"
    import torch

    q, k, v, keep, out, lse = (scope[name] for name in ("q", "k", "v", "keep", "out", "lse"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~keep.repeat_interleave(128, 2), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-3, rtol=1e-4)
    density = keep.double().mean().item()
    assert f"density {density:.3f}" in printed
    assert len(printed.splitlines()) >= 2, "explain prints nothing"


def test_readme_mask_examples_find_what_they_say(readme_example):
    from fgattn_cute import predict

    scope = dict(readme_example[1])
    printed = io.StringIO()
    for example in code_blocks(ROOT / "README.md", "python")[1:]:
        with contextlib.redirect_stdout(printed):
            exec(compile(example, "README.md", "exec"), scope)
    found, cheap, always, mask = (scope[name] for name in ("found", "cheap", "always", "mask"))
    assert predict.recall(found, scope["q"], scope["k"]).min() >= 0.9 - 1e-4
    assert cheap.density == pytest.approx(0.2, abs=0.02)
    assert always.to_dense()[..., :16].all() and not always.to_dense()[..., 16:].any()
    assert mask.to_dense().equal(cheap.to_dense() | always.to_dense())
    assert "density" in printed.getvalue() and "kept mass" in printed.getvalue()


def test_readme_policy_is_one_that_the_integration_takes():
    """The block needs a video model to run as a whole; its imports and its policy do not."""
    pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")
    (example,) = code_blocks(ROOT / "README.md", "py")
    tree = ast.parse(example)
    scope: dict = {}
    exec(compile(ast.Module([n for n in tree.body if isinstance(n, ast.ImportFrom)], []), "README.md", "exec"), scope)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "SparsePolicy"]
    policy = eval(compile(ast.Expression(calls[0]), "README.md", "eval"), scope)
    assert (policy.slice_m, policy.rule, policy.tau) == (128, "mass", 1e-4)
    for family in ("Wan", "HunyuanVideo", "CogVideoX", "Mochi", "LTX"):
        assert family in example
        assert any(family.lower() in name.lower() for name in scope["enable"].__globals__["FAMILIES"]), family


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(path):
    named = re.findall(
        r"`((?:kernels|fgattn_cute|configs|tests|docs|perf)/[\w./]+\.(?:py|yaml|json|md))`", path.read_text()
    )
    for name in named:
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_make_targets_that_documents_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in DOCUMENTS:
        for target in re.findall(r"\bmake ([a-z]+)\b(?=[`\s]*(?:#|`|$))", path.read_text(), flags=re.MULTILINE):
            assert target in targets, f"{path.name} says make {target}"


def test_settings_table_matches_the_code():
    """Every FGATTN_ variable that a document names is one that the package reads."""
    source = (ROOT / "fgattn_cute/settings.py").read_text()
    for path in DOCUMENTS:
        for name in set(re.findall(r"FGATTN_[A-Z_]+", path.read_text())):
            assert name in source, f"{path.name} names {name}"


def test_ci_is_executable_and_calls_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert "make test" in script.read_text()


def test_no_document_names_a_folder_of_some_machine():
    for path in DOCUMENTS:
        found = re.findall(r"(?<![\w.~])/(?:home|root|tmp|work|Users)/\S*", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_commands_in_the_readme_exist():
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from typer.main import get_command

    from fgattn_cute import cli_kernels  # noqa: F401 - adds its commands
    from fgattn_cute.cli import app

    root = get_command(app)
    lines = [
        line.split("#")[0].split() for block in code_blocks(ROOT / "README.md", "bash") for line in block.splitlines()
    ]
    calls = [words[1:] for words in lines if words[:1] == ["fgattn"]]
    assert len(calls) >= 5
    for words in calls:
        command = root
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"fgattn {' '.join(words)}"
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
