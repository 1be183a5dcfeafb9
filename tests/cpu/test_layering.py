# SPDX-License-Identifier: Apache-2.0
"""Who may import what, and how long a file or function may grow, read from the syntax trees of the sources."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Path.rglob follows the symlinks fgattn_cute/kernels and fgattn_cute/configs on some Python versions and not on others.
SOURCES = sorted(
    path
    for folder in ("kernels", "fgattn_cute", "perf", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() == path
)
MAX_FILE_LINES = 470
MAX_FUNCTION_LINES = 120
MAX_KERNEL_LINES = 200  # device code: what is staged together reads best together
FILE_ALLOWANCE: dict[str, int] = {
    "tests/cpu/test_convert.py": 490,  # one section for each of the ten foreign formats
}
FUNCTION_ALLOWANCE: dict[str, int] = {}

# Third-party package -> the only files of fgattn_cute (folders end with a slash) that may import it.
RESTRICTED = {
    "yaml": {"preset_reading.py", "integrations/policy_file.py"},
    "pydantic": {"presets.py", "preset_reading.py", "integrations/policy_file.py"},
    "typer": {"cli.py", "cli_kernels.py"},
    "rich": {"cli.py", "cli_kernels.py"},
    "matplotlib": {"demo_picture.py", "pictures.py"},
    "skimage": {"demo_scene.py", "quality.py"},
    "diffusers": {"integrations/"},
    "transformers": {"integrations/"},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, top_level_only: bool = False):
    """(line, relative level, module, imported names) of each import statement."""
    tree = ast.parse(path.read_text(), filename=str(path))
    nodes = _module_level(tree.body) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or "", tuple(alias.name for alias in node.names)


def _module_level(body):
    """Statements that run when the module is imported; `if TYPE_CHECKING` blocks do not."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _module_level(getattr(node, block, []))
        if isinstance(node, ast.ExceptHandler):
            yield from _module_level(node.body)


def sources(folder: str):
    return [path for path in SOURCES if relative(path).startswith(folder + "/")]


def test_the_sources_are_found():
    found = {relative(path) for path in SOURCES}
    assert {"kernels/spec.py", "fgattn_cute/__init__.py", "tests/cpu/test_layering.py"} <= found
    assert not any(name.startswith("fgattn_cute/kernels/") for name in found), "the symlink must not be followed"


@pytest.mark.parametrize("path", sources("kernels"), ids=relative)
def test_device_code_imports_cutlass_and_its_siblings_only(path):
    allowed = {"cutlass", "cuda", *sys.stdlib_module_names}
    for line, level, module, _ in imports(path):
        assert level <= 1, f"{relative(path)}:{line} reaches outside kernels/"
        if level == 0:
            assert module.split(".")[0] in allowed, f"{relative(path)}:{line} imports {module}"
            assert module != "__future__", f"{relative(path)}:{line}: cute.struct needs evaluated annotations"


def test_spec_is_plain_python():
    outside = [module for _, level, module, _ in imports(ROOT / "kernels/spec.py") if level == 0]
    assert set(outside) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sources("fgattn_cute"), ids=relative)
def test_third_party_packages_stay_in_their_rooms(path):
    inside = path.relative_to(ROOT / "fgattn_cute").as_posix()
    for line, level, module, _ in imports(path):
        package = module.split(".")[0]
        if level or package not in RESTRICTED:
            continue
        rooms = RESTRICTED[package]
        at_home = any(inside == room or (room.endswith("/") and inside.startswith(room)) for room in rooms)
        assert at_home, f"{relative(path)}:{line} imports {package}, which belongs to {', '.join(sorted(rooms))}"


def test_the_oracle_stands_alone():
    """The reference must not share code with what it judges, except the plan it is given and the errors it raises."""
    path = ROOT / "fgattn_cute/reference.py"
    allowed = {"torch", *sys.stdlib_module_names}
    for line, level, module, names in imports(path):
        if level == 0:
            assert module.split(".")[0] in allowed, f"{relative(path)}:{line} imports {module}"
        else:
            shared = {module} if module else set(names)
            assert shared <= {"errors", "mask", "plan"}, f"{relative(path)}:{line} imports {module or names}"


@pytest.mark.parametrize("path", sources("fgattn_cute"), ids=relative)
def test_heavy_packages_are_imported_on_use(path):
    heavy = {"cutlass", "cuda", "tvm_ffi", "matplotlib", "skimage", "diffusers"}
    for line, level, module, _ in imports(path, top_level_only=True):
        assert level or module.split(".")[0] not in heavy, f"{relative(path)}:{line} imports {module} when imported"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    lines = text.count("\n")
    limit = FILE_ALLOWANCE.get(relative(path), MAX_FILE_LINES)
    assert lines <= limit, f"{relative(path)} has {lines} lines (limit {limit}): which room is missing?"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        staged = any("cute." in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MAX_KERNEL_LINES if staged else MAX_FUNCTION_LINES
        limit = FUNCTION_ALLOWANCE.get(f"{relative(path)}:{node.name}", limit)
        length = node.end_lineno - node.lineno + 1
        assert length <= limit, f"{relative(path)}:{node.lineno} {node.name} has {length} lines (limit {limit})"


def test_allowances_are_still_needed():
    """An exception that has been repaired must leave the list."""
    for name, limit in FILE_ALLOWANCE.items():
        assert (ROOT / name).read_text().count("\n") > MAX_FILE_LINES, f"{name} no longer needs {limit} lines"
    for key in FUNCTION_ALLOWANCE:
        name, function = key.split(":")
        lengths = [
            node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse((ROOT / name).read_text()))
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        assert lengths and max(lengths) > MAX_FUNCTION_LINES, f"{key} no longer needs an allowance"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_file_has_the_licence_line_and_a_docstring(path):
    text = path.read_text()
    if not text.strip():
        return
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), relative(path)
    assert ast.get_docstring(ast.parse(text)), f"{relative(path)} does not say what it is for"


def test_importing_the_package_loads_neither_the_compiler_nor_cuda():
    """In a fresh interpreter: what `import fgattn_cute` adds to what torch itself has loaded."""
    probe = (
        "import sys, json, torch; before = set(sys.modules); import fgattn_cute;"
        "heavy = {'cutlass', 'cuda', 'tvm_ffi', 'yaml', 'pydantic', 'typer', 'rich', 'matplotlib', 'skimage'};"
        "added = sorted(heavy & {name.split('.')[0] for name in set(sys.modules) - before});"
        "print(json.dumps([added, torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]
