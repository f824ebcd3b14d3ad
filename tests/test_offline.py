"""Every kernel as its launcher would launch it, compiled for GPUs that need not be here: no spills, and it fits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the triton package is not installed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_spills(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "offline.py"), target]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join(line for line in lines if "FAULT" in line) + run.stderr[-2000:]
    assert lines[-1] == "0 faults" and len(lines) > 100


def test_a_spill_and_too_much_shared_memory_are_faults():
    """The check can fail: figures over a limit are reported."""
    sys.path.insert(0, str(HERE))
    import offline

    clean = {"spills": 0, "shared": 1000}
    assert offline.fault(clean, 80) is None
    assert "3 spills" in offline.fault(clean | {"spills": 3}, 80)
    assert "limit" in offline.fault(clean | {"shared": 10**6}, 90)
