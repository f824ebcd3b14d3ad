"""sanitizer.py without a GPU: it knows every kernel, its expressions select tests, and it reads the tools' words."""

import json
import os
import subprocess
import sys

import pytest
import sanitizer

pytest.importorskip("triton", reason="the triton package is not installed")


def test_every_kernel_is_looked_at():
    names = sanitizer.kernels()
    assert {"held_kernel", "tap_sums_kernel", "rectify_forward_kernel"} <= set(names) and len(names) == len(set(names))


def test_every_expression_selects_tests():
    collect = "import json, pytest, sys\nfor words in json.loads(sys.argv[1]): print(int(pytest.main(words)), '===')"
    words = [["-q", "--collect-only", f"tests/{file}", "-k", expression] for file, expression in sanitizer.TESTS]
    command = [sys.executable, "-c", collect, json.dumps(words)]
    run = subprocess.run(command, cwd=sanitizer.ROOT, capture_output=True, text=True)
    *groups, _ = run.stdout.split("===\n")
    assert len(groups) == len(words), run.stderr[-500:]
    assert all(group.endswith("\n0 ") and "native" not in group and "eager" not in group for group in groups)
    assert run.stdout.count("::") > 40


def test_rows_are_written_at_once_and_not_measured_again(tmp_path, monkeypatch, capsys):
    """main, with a tool that runs nothing: it launches every kernel and finds what was planted."""
    tool = tmp_path / "compute-sanitizer"
    names = "\\n".join(sanitizer.kernels())
    tool.write_text(
        "#!/bin/sh\ncase \"$*\" in *--plant*) echo '= ERROR SUMMARY: 1 error';; *) echo '= ERROR SUMMARY: 0 errors';\n"
        f'echo "3 passed in 1 s"; printf "{names}\\n" > $AR_KERNELS_LAUNCHED; echo run >> {tmp_path}/runs;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("AR_KERNELS_COMMIT", "abc")
    for words, runs in (["--tool", "racecheck"], 1), ([], 3), ([], 3):
        monkeypatch.setattr(sys, "argv", ["sanitizer.py", "--out", str(tmp_path), *words])
        assert sanitizer.main() == 0, capsys.readouterr().out
        assert len((tmp_path / "runs").read_text().split()) == runs * len(sanitizer.TESTS)
    (path,) = tmp_path.glob("sanitizer-*.json")
    content = json.loads(path.read_text())
    assert len(content["rows"]) == content["groups"] and content["not_launched"] == []


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
