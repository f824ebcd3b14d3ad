"""Who may import whom (docs/design.md), and that the documents name tests that exist."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ar_kernels"

MAY_IMPORT = {
    "reference": set(),
    "eager": {"reference"},
    "kernels": {"kernels", "native"},
    "native": set(),
    "node": {"native"},
    "plans": {"native"},
    "ops": {"eager", "reference", "kernels", "native", "node", "plans"},
    "functional": {"ops", "eager", "reference", "native"},
    "env": {"functional", "native", "node", "plans", "ar_kernels"},
    "modules": {"functional"},
    "losses": {"functional", "ops", "eager", "reference"},
    "attend_rectify": {"modules", "functional", "reference"},
    "models": {"models", "attend_rectify", "modules", "functional"},
    "official": {"models", "losses", "modules", "functional"},
    "experiments": {"experiments", "models", "attend_rectify", "modules", "functional", "reference", "ar_kernels"},
    "ar_kernels": {"attend_rectify", "losses", "modules", "functional"},
}
"""By part of the package (a module or a folder): the parts it may import; ar_kernels is the package's __init__."""

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """ar_kernels.kernels.tiles → kernels; ar_kernels → ar_kernels."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(source: str, file: Path) -> list[tuple[str, bool]]:
    """Absolute names of all that a file of the package imports, and whether it does so when it is itself imported."""
    package = (PACKAGE.name, *file.relative_to(PACKAGE).parent.parts)
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else ())))
            if module == PACKAGE.name:  # from . import eager: each name may be a module
                submodules = [alias.name for alias in node.names if _is_module(alias.name)]
                found.extend((f"{module}.{name}", at_import) for name in submodules)
                if len(submodules) < len(node.names):
                    found.append((module, at_import))
            else:
                found.append((module, at_import))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(ast.parse(source), True)
    return found


def _is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()


def faults(source: str, file: Path) -> list[str]:
    relative = file.relative_to(PACKAGE)
    own = PACKAGE.name if relative == Path("__init__.py") else relative.parts[0].removesuffix(".py")
    if own not in MAY_IMPORT:
        return [f"{own} has no rule in MAY_IMPORT"]
    found = []
    for name, at_import in imports(source, file):
        top = name.split(".")[0]
        if top == PACKAGE.name and part_of(name) not in MAY_IMPORT[own]:
            found.append(f"{relative} imports {name}")
        if top == PACKAGE.name and part_of(name) == "kernels" and own != "kernels" and at_import:
            found.append(f"{relative} imports {name} before a kernel is to run")
        if top == "triton" and own != "kernels":
            found.append(f"{relative} imports triton")
        if own == "reference" and top not in (*sys.stdlib_module_names, "torch"):
            found.append(f"{relative} imports {name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_rules(file):
    assert faults(file.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/tiles.py", "from ..reference import accumulator_dtype"),
        ("kernels/tiles.py", "def f():\n    from .. import eager"),
        ("functional.py", "import triton.language as tl"),
        ("functional.py", "from .kernels import tiles"),
        ("modules.py", "def f():\n    import triton"),
        ("modules.py", "from . import ops"),
        ("ops.py", "from .kernels.rectify import rectify_forward"),
        ("reference.py", "import numpy"),
        ("models/wrn.py", "from ..experiments import data"),
        ("eager.py", "import ar_kernels.ops"),
        ("new_part.py", ""),
    ],
)
def test_a_broken_rule_is_seen(file, line):
    assert faults(line, PACKAGE / file)


def test_import_needs_no_triton_and_prints_nothing(tmp_path):
    """With a triton that raises when it is imported, and no GPU to be seen, the package imports and computes."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('triton was imported')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    code = (
        "import ar_kernels, ar_kernels.models, ar_kernels.official, sys\n"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules)\n"
        "assert 'torch._dynamo' not in sys.modules\n"  # seconds
        "import torch\n"
        "assert ar_kernels.attend(torch.ones(1, 2, 3), torch.ones(1, 2)).pooled.shape == (1, 1, 2)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "docs").glob("*.md")))
def test_documents_name_tests_that_exist(name):
    tests = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tests[file.name] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = re.findall(r"`(test_\w+)(?:\.py)?::(test_\w+)`", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert named
    missing = [f"{file}::{test}" for file, test in named if test not in tests.get(f"{file}.py", ())]
    assert missing == []
