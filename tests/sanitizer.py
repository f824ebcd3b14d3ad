"""The GPU's tests at small shapes under compute-sanitizer: python tests/sanitizer.py (needs a GPU and CUDA's toolkit)

memcheck and racecheck look at our kernels alone, Triton's and csrc/cuda's, by their names; initcheck at all that a test
of its own launches, for what it does not look at it does not know to have written. PyTorch's caching allocator is off:
an access past a tensor leaves its allocation. First each tool must find a planted fault, and every group of tests
passes without a tool, which says what kernels it launches. Writes
benchmarks/results/sanitizer-<device>.json, a row as soon as it is known; what the file has of the same commit is not
run again, so that --budget SECONDS can cut the work in pieces. Fails on a finding, a failing test, a kernel that no
test launched, and a row that is missing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    ("test_attend.py", "float64_equals and (small or one or ungated or images)"),
    ("test_attend.py", "float64_equals and (split or aligned or global and not ungated)"),
    ("test_attend.py", "float64_equals and (parts or heads and not global)"),
    ("test_attend.py", "float64_equals and chunks"),
    ("test_attend.py", "float16_"),
    ("test_attend.py", "many_channels or other_channel_of_its_row"),
    ("test_attend.py", "any_strides or flat_maps or same_bits"),
    ("test_attend.py", "takes_pytorchs_products"),
    ("test_attend3x3.py", "float64_equals and (small or one or ungated or images)"),
    ("test_attend3x3.py", "float64_equals and (split or bands or global and not ungated)"),
    ("test_attend3x3.py", "float64_equals and (line or many or sums)"),
    ("test_attend3x3.py", "float64_equals and chunks"),
    ("test_attend3x3.py", "float16_"),
    ("test_attend3x3.py", "lines_that_are_tiles or need_neither"),
    ("test_attend3x3.py", "same_bits"),
    ("test_ops.py", "test_rectify and not many_labels"),
    ("test_products.py", "values or needed or strides"),
    ("test_ops.py", "test_masks"),
]
OF_COPIES = [
    *(
        ("test_copied_inputs.py", f"test_attend and {taps} and torch.{dtype}")
        for taps in ("9-", "1-")
        for dtype in ("float32", "float16", "bfloat16")
    ),
    ("test_copied_inputs.py", "test_rectify or test_products"),
    ("test_copied_inputs.py", "test_masks"),
]
TOOLS = {"initcheck": OF_COPIES, "racecheck": TESTS, "memcheck": TESTS}
"""Groups of tests that run side by side, the slow tests apart: a file and what pytest's -k selects of it."""

OF_LIBRARY = [("test_copied_inputs.py", f"test_sweeps and {layout}") for layout in ("channels_last", "contiguous")]
"""The groups of csrc/cuda's kernels, of every tool."""

PLANTED = {
    "memcheck": 'extern "C" __global__ void planted_kernel(float* x) { x[threadIdx.x + 4] = 1.0f; }',
    "racecheck": 'extern "C" __global__ void planted_kernel(float* x) {'
    " __shared__ float y[64]; y[threadIdx.x] = 1.0f; x[threadIdx.x % 4] = y[63 - threadIdx.x]; }",
    "initcheck": 'extern "C" __global__ void planted_kernel(float* x) { if (x[threadIdx.x % 4] == 7.0f) x[0] = 1.0f; }',
}
"""A fault for each tool to find, on four floats that are not initialised."""

LAUNCHED = "AR_KERNELS_LAUNCHED"
"""The environment's name of a file that the launched kernels' names are written to."""


# ---------------------------------------------------------------------------------------------- what there is

_ATTRIBUTES = r"(?:__\w+__\s*(?:\((?:[^()]|\([^()]*\))*\))?\s*)*"
_GLOBAL = re.compile(rf"__global__\s+{_ATTRIBUTES}void\s+{_ATTRIBUTES}(\w+)\s*\(")


def kernels() -> list[str]:
    """Every kernel of the package, as file.name: two files may each have one of a name."""
    found = set()
    for path in (ROOT / "ar_kernels" / "kernels").glob("*.py"):
        names = re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        found.update(f"{path.stem}.{name}" for name in names)
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        found.update(f"{path.name}.{name}" for name in _GLOBAL.findall(path.read_text(encoding="utf-8")))
    return sorted(found)


def groups(tool: str) -> list[tuple[str, str]]:
    """A tool's groups."""
    native = any((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [(file, f"triton and ({names})") for file, names in TOOLS[tool]] + (OF_LIBRARY if native else [])


def pytest_configure(config) -> None:
    """As a plugin of pytest: Triton's first launch of each kernel, which goes through its own call, is kept."""
    if LAUNCHED not in os.environ:
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    config.launched = set()

    def recorded(self, *arguments, **options):
        config.launched.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *arguments, **options)

    JITFunction.run = recorded


@pytest.hookimpl(hookwrapper=True)
def pytest_runtestloop(session):
    """The library's launches, which no Python sees, are in PyTorch's profile."""
    of_library = [name for name in kernels() if ".cu" in name]
    if LAUNCHED not in os.environ:
        yield
        return
    names = set()
    if of_library:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            yield
        names = {event.name for event in profiled.events()}
    else:
        yield
    launched = session.config.launched | {name for name in of_library if is_among(name, names)}
    Path(os.environ[LAUNCHED]).write_text("\n".join(sorted(launched)), encoding="utf-8")


def is_among(kernel: str, signatures: set[str]) -> bool:
    """Whether a kernel of the library, file.cu.name, is one of those that have these signatures."""
    word = re.compile(rf"\b{kernel.rpartition('.')[2]}\b")
    return any(word.search(signature) for signature in signatures)


# ---------------------------------------------------------------------------------------------- running


def findings(output: str) -> int:
    """The sum over a tool's summaries, one for each process; raises ValueError if there is none."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: (\d+) hazard", output, re.MULTILINE)
    if not summaries:
        raise ValueError(f"no summary of compute-sanitizer in:\n{output[-2000:]}")
    return sum(int(errors or hazards) for errors, hazards in summaries)


def sanitized(
    tool: str | None, names: list[str], command: list[str], left: float, **variables: str
) -> subprocess.CompletedProcess | None:
    """The command under a tool that looks at kernels of these names (none: at all; tool None: the command as it is);
    None after `left` seconds."""
    if tool is not None:
        filters = [word for name in names for word in ("--kernel-name", f"kns={name}")]
        if tool == "memcheck":  # of kernels alone: plans ask the driver for a parameter that a kernel must not have
            filters += ["--report-api-errors", "no"]
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *filters, *command]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=max(left, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what runs under it
            return None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def plant(tool: str) -> None:
    """In a process of its own: launches the tool's fault."""
    import torch

    kernel = torch.cuda._compile_kernel(PLANTED[tool], "planted_kernel")
    kernel((1, 1, 1), (64, 1, 1), (torch.empty(4, device="cuda"),))
    torch.cuda.synchronize()


def finds_a_planted_fault(tool: str, end: float) -> bool:
    command = [sys.executable, str(Path(__file__)), "--plant", tool]
    names = [] if tool == "initcheck" else ["planted_kernel"]
    run = sanitized(tool, names, command, end - time.monotonic())
    return run is not None and findings(run.stdout) > 0


_LAST = re.compile(r"\d+ (passed|skipped)\b.* in ")


def row_of(tool: str | None, file: str, expression: str, launched: str, end: float) -> dict | None:
    """What one tool finds in one group of tests, or without one: the kernels that it launches. None: out of time."""
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider", "-p", "sanitizer"]
    command += ["--durations=6", "--durations-min=1", f"tests/{file}", "-k", expression]
    names = [] if tool == "initcheck" else sorted({name.rpartition(".")[2] for name in kernels()})
    variables = {} if tool else {LAUNCHED: launched}
    start = time.monotonic()
    run = sanitized(tool, names, command, end - start, **variables)
    if run is None:
        return None
    last = next((line for line in reversed(run.stdout.splitlines()) if _LAST.search(line)), "")
    result = {"tool": tool, "tests": file, "selected": expression, "pytest": last}
    result |= {"findings": findings(run.stdout)} if tool else {"findings": 0}
    if failed(result):
        print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
    result["seconds"] = round(time.monotonic() - start, 1)
    print(result, *re.findall(r"^[0-9.]+s call .*", run.stdout, re.MULTILINE), sep="\n  ", flush=True)
    if tool is None and os.path.exists(launched):
        result["kernels"] = Path(launched).read_text(encoding="utf-8").split()
    return result


def failed(row: dict) -> bool:
    return row["findings"] > 0 or "failed" in row["pytest"] or not row["pytest"]


def rows_of_before(path: Path, same: dict) -> list[dict]:
    """The rows of a file of the same commit, device and versions."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    mine = all(content.get(name) == same[name] for name in ("device", "torch", "triton", "commit"))
    return content["rows"] if mine else []


def key_of(row: dict) -> tuple:
    return row["tool"], row["tests"], row["selected"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all three")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--budget", type=float, default=86400, help="seconds, after which what runs is stopped")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one a core)")
    parser.add_argument("--plant", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plant:
        plant(arguments.plant)
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    sys.path.insert(0, str(ROOT))
    from benchmarks.results import environment, path_of, save

    end = time.monotonic() + arguments.budget
    path = path_of("sanitizer", arguments.out)
    tools = arguments.tool or list(TOOLS)
    plain = dict.fromkeys(group for tool in TOOLS for group in groups(tool))
    wanted = [(None, *group) for group in plain] + [(tool, *group) for tool in TOOLS for group in groups(tool)]
    rows = [row for row in rows_of_before(path, environment()) if not failed(row) and key_of(row) in wanted]
    planted: dict[str, bool] = {}

    def write() -> tuple[dict[str, list[str]], list[tuple]]:
        launched = {key_of(row)[1:]: row["kernels"] for row in rows if "kernels" in row}
        missed = {}
        for tool in TOOLS:
            found = {name for group in groups(tool) for name in launched.get(group, [])}
            missed[tool] = [name for name in kernels() if name not in found]
        missing = [key for key in wanted if key not in map(key_of, rows)]
        content = {"planted": planted, "rows_missing": len(missing), "kernels": kernels(), "not_launched": missed}
        save("sanitizer", content | {"rows": rows}, arguments.out)
        return missed, [key for key in missing if key[0] in (None, *tools)]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        searches = {pool.submit(finds_a_planted_fault, tool, end): tool for tool in tools}
        for phase in ((None,), tools):  # without a tool first, which also leaves the kernels compiled in Triton's cache
            left = [key for key in wanted if key[0] in phase and key not in map(key_of, rows)]
            runs = [pool.submit(row_of, *key, f"{folder}/{number}", end) for number, key in enumerate(left)]
            for done in as_completed(runs):
                if done.result() is not None:
                    rows.append(done.result())
                    write()
        planted |= {tool: search.result() for search, tool in searches.items()}
    missed, missing = write()
    print(f"planted faults found: {planted}; kernels that no test of a tool launches: {missed}")
    print(f"rows missing: {missing or 'none'}\n{path}")
    return 1 if any(map(failed, rows)) or any(missed.values()) or missing or not all(planted.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
