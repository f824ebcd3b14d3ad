"""sanitizer.py without a GPU: it knows every kernel, its expressions select tests, and it reads the tools' words."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitizer

pytest.importorskip("triton", reason="the triton package is not installed")


def _program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    path.chmod(0o755)


def test_every_kernel_is_looked_at():
    names = sanitizer.kernels()
    of_triton = {"attend_forward.held_kernel", "attend_backward.held_kernel", "attend3x3.tap_sums_kernel"}
    assert of_triton <= set(names) and len(names) == len(set(names))


def test_kernels_of_the_library_are_found_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source = """
        __global__ void plain_kernel(float* x) {}
        template <typename T>
        __global__ void __launch_bounds__(Cut<T>::threads(2), 1) bounded_kernel(
            T* x) {}
        __global__ __launch_bounds__(128) void other_kernel(const __grid_constant__ Map map) {}
        // __global__ functions are kernels
        __device__ void helper(float* x) {}
    """
    (tmp_path / "csrc" / "cuda" / "some.cu").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sanitizer, "ROOT", tmp_path)
    assert sanitizer.kernels() == ["some.cu.bounded_kernel", "some.cu.other_kernel", "some.cu.plain_kernel"]
    for tool in sanitizer.TOOLS:
        assert {expression.split()[0] for _, expression in sanitizer.groups(tool)} == {"triton", "test_sweeps"}
    signatures = {"void ar_kernels::bounded_kernel<float>(float*)", "void not_other_kernel(int)"}
    assert sanitizer.is_among("some.cu.bounded_kernel", signatures)
    assert not sanitizer.is_among("some.cu.other_kernel", signatures)


def test_every_expression_selects_tests():
    """And every form of float64's: what was thought to be in a group is."""
    groups = list(dict.fromkeys([*sanitizer.groups("memcheck"), *sanitizer.groups("initcheck")]))
    files = sorted({f"tests/{file}" for file, _ in groups})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    run = subprocess.run(command, cwd=sanitizer.ROOT, capture_output=True, text=True)
    nodes = [line.removeprefix("tests/") for line in run.stdout.splitlines() if "::" in line]

    def is_selected(node: str, expression: str) -> bool:  # as pytest's -k
        words = re.sub(r"(?!and\b|or\b|not\b)\b[\w.-]+", lambda word: str(word[0].lower() in node.lower()), expression)
        return eval(words)

    selected = []
    for file, expression in groups:
        found = [node for node in nodes if node.startswith(file) and is_selected(node, expression)]
        others = {"triton", "native", "eager"} - {expression.split()[0]}
        assert found and not any(name in node for name in others for node in found), expression
        selected += found
    assert len(selected) == len(set(selected)) > 40
    every = ("float64_equals_the_reference[triton", "test_copied_inputs.py::test_attend[triton", "test_rectify[triton")
    every += ("test_copied_inputs.py::test_sweeps",)
    assert all(node in selected for node in nodes if any(name in node for name in every) and "many_labels" not in node)


def test_rows_are_written_at_once_and_not_measured_again(tmp_path, monkeypatch, capsys):
    """main, with a tool that runs nothing: it launches every kernel and finds what was planted."""
    names, lines = "\\n".join(sanitizer.kernels()), f'echo "3 passed in 1 s"; echo run >> {tmp_path}/runs'
    _program(tmp_path / "python", f'{lines}; printf "{names}\\n" > $AR_KERNELS_LAUNCHED')
    planted = "case \"$*\" in *--plant*) echo '= ERROR SUMMARY: 1 error';; *) echo '= ERROR SUMMARY: 0 errors'"
    _program(tmp_path / "compute-sanitizer", f"{planted}; {lines};; esac")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("AR_KERNELS_COMMIT", "abc")
    each = {tool: len(sanitizer.groups(tool)) for tool in sanitizer.TOOLS}
    plain = len({group for tool in sanitizer.TOOLS for group in sanitizer.groups(tool)})
    every = plain + sum(each.values())
    for words, runs in (["--tool", "racecheck"], plain + each["racecheck"]), ([], every), ([], every):
        monkeypatch.setattr(sys, "argv", ["sanitizer.py", "--out", str(tmp_path), *words])
        assert sanitizer.main() == 0, capsys.readouterr().out
        assert len((tmp_path / "runs").read_text().split()) == runs
    (path,) = tmp_path.glob("sanitizer-*.json")
    content = json.loads(path.read_text())
    assert len(content["rows"]) == every and content["rows_missing"] == 0
    assert content["not_launched"] == dict.fromkeys(sanitizer.TOOLS, [])


def test_what_does_not_end_is_stopped_and_missing(tmp_path, monkeypatch, capsys):
    """With everything that it started."""
    (tmp_path / "compute-sanitizer").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _program(tmp_path / "python", f"sleep 30 & echo $! >> {tmp_path}/started; sleep 30")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sanitizer, "finds_a_planted_fault", lambda tool, end: True)
    words = ["--budget", "1", "--jobs", "100", "--tool", "memcheck"]
    monkeypatch.setattr(sys, "argv", ["sanitizer.py", "--out", str(tmp_path), *words])
    start = time.monotonic()
    assert sanitizer.main() == 1
    assert time.monotonic() - start < 20
    (path,) = tmp_path.glob("sanitizer-*.json")
    groups = [group for tool in sanitizer.TOOLS for group in sanitizer.groups(tool)]
    assert json.loads(path.read_text())["rows_missing"] == len(set(groups)) + len(groups)
    started = (tmp_path / "started").read_text().split()
    assert len(started) == len(set(groups))
    for process in started:
        status = Path("/proc", process, "status")  # one that was killed may wait for somebody to take note
        assert not status.exists() or "State:\tZ" in status.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "output, count",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 3 errors\n========= ERROR SUMMARY: 1 error\n", 4),
        ("========= ERROR SUMMARY: 30 errors\n========= ERROR SUMMARY: 10 errors were not printed. Use ...\n", 30),
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
    monkeypatch.setattr(sanitizer, "kernels", lambda: [])  # the library's are seen by a profiler, on a GPU
    from triton.runtime.jit import JITFunction

    run, session = JITFunction.run, SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **options: "ran")
    try:
        sanitizer.pytest_configure(session.config)

        class Kernel:
            def fn(self):
                pass

        tests = sanitizer.pytest_runtestloop(session)
        next(tests)
        assert JITFunction.run(Kernel(), 1, grid=(1,)) == "ran"
        assert list(tests) == []
    finally:
        monkeypatch.undo()
    assert JITFunction.run is run
    assert (tmp_path / "launched").read_text() == "test_sanitizer.fn"
