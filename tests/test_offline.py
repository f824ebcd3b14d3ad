"""Every kernel as its launcher would launch it, compiled for GPUs that need not be here: no spills, and it fits."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "kernels.md"
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the triton package is not installed")

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]


def rows(lines):
    """{kernel: {target: (registers, shared)}} of a table in Markdown, and the Triton that compiled it."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines if line.startswith("|")]
    (triton, *targets), _, *kernels = lines
    found = {}
    for kernel, *cells in kernels:
        found[kernel] = {t: tuple(map(int, cell.split(","))) for t, cell in zip(targets, cells) if cell}
    return triton.removeprefix("Triton "), found


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "offline.py"), target, "--table"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join(line for line in lines if "FAULT" in line) + run.stderr[-2000:]
    assert lines[-1] == "0 faults" and len(lines) > 50
    compiler, compiled = rows(lines)
    documented_compiler, documented = rows(TABLE.read_text(encoding="utf-8").splitlines())
    if compiler != documented_compiler:
        return  # another Triton has other figures; that it spills nothing was asserted
    for kernel, figures in compiled.items():
        for mine, theirs in zip(figures[target], documented[kernel][target]):
            assert mine <= theirs, f"docs/kernels.md says {theirs} of {kernel} for {target}, got {mine}"


@needs_triton
def test_the_table_in_docs_is_of_the_pinned_triton_and_of_every_kernel():
    pinned = re.search(r"^triton==(.+)$", (HERE.parent / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    compiler, documented = rows(TABLE.read_text(encoding="utf-8").splitlines())
    assert compiler == pinned[1]
    for target in TARGETS:
        assert sum(target in figures for figures in documented.values()) > 10, target
    written = set()
    for path in (HERE.parent / "ar_kernels" / "kernels").glob("*.py"):
        kernels = re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        written |= {f"{path.stem}.{kernel}" for kernel in kernels}
    assert documented.keys() == written


def test_a_spill_and_too_much_shared_memory_are_faults():
    """The check can fail: figures over a limit are reported."""
    sys.path.insert(0, str(HERE))
    import offline

    clean = {"spills": 0, "shared": 1000}
    assert offline.fault(clean, 1000) is None
    assert "3 spills" in offline.fault(clean | {"spills": 3}, 1000)
    assert "limit" in offline.fault(clean | {"shared": 1001}, 1000)
