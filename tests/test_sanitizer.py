"""sanitizer.py without a GPU: it knows every kernel, its expressions select tests, and it reads the tools' words."""

import subprocess
import sys

import pytest
import sanitizer

pytest.importorskip("triton", reason="the triton package is not installed")


def test_every_kernel_is_looked_at():
    names = sanitizer.kernels()
    assert {"held_kernel", "tap_sums_kernel", "rectify_forward_kernel"} <= set(names) and len(names) == len(set(names))


def test_every_expression_selects_tests():
    for file, expression in sanitizer.TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", f"tests/{file}", "-k", expression]
        run = subprocess.run(command, cwd=sanitizer.ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout.count("::") > 10, run.stdout[-500:]


@pytest.mark.parametrize(
    "output, count",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 3 errors\n========= ERROR SUMMARY: 1 error\n", 4),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
    ],
)
def test_findings(output, count):
    assert sanitizer.findings(output) == count


def test_no_summary_is_not_no_finding():
    with pytest.raises(ValueError, match="no summary"):
        sanitizer.findings("the process did not start")


def test_the_plugin_writes_down_what_is_launched(tmp_path, monkeypatch):
    """The first launch of a kernel, by Triton's own call, in a process of pytest's with the plugin."""
    monkeypatch.setenv(sanitizer.LAUNCHED, str(tmp_path / "launched"))
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **options: "ran")
    try:
        sanitizer.pytest_configure(None)

        class Kernel:
            def fn(self):
                pass

        assert JITFunction.run(Kernel(), 1, grid=(1,)) == "ran"
    finally:
        monkeypatch.undo()
    assert JITFunction.run is run
    assert (tmp_path / "launched").read_text() == "fn\n"
