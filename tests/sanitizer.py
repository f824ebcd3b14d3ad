"""The GPU's tests at small shapes under compute-sanitizer: python tests/sanitizer.py (needs a GPU and CUDA's toolkit)

memcheck, racecheck and initcheck look at our kernels alone, by their names, with PyTorch's caching allocator off: an
access past a tensor leaves its allocation. First each tool must find a planted fault. Writes
benchmarks/results/sanitizer-<device>.json: what each tool found in each group of tests, and which kernels they
launched. A row is written as soon as it is known, and what the file has of the same commit is not run again. Fails on a
finding, a failing test, and a kernel that no test launched.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
LARGE = "(heads or chunks or band or programs)"
TESTS = [
    ("test_attend.py", f"triton and float64_equals and not {LARGE}"),
    ("test_attend.py", f"triton and float64_equals and {LARGE}"),
    ("test_attend.py", "triton and float16_"),
    ("test_attend.py", "triton and (any_strides or flat_maps or same_bits)"),
    ("test_attend3x3.py", f"triton and float64_equals and not {LARGE}"),
    ("test_attend3x3.py", f"triton and float64_equals and {LARGE}"),
    ("test_attend3x3.py", "triton and (float16_ or same_bits)"),
    ("test_ops.py", "test_rectify and triton and not many_labels"),
]
"""Groups that run side by side, the slow tests apart: a file and what pytest's -k selects of it."""

PLANTED = {
    "memcheck": 'extern "C" __global__ void planted_kernel(float* x) { x[threadIdx.x + 4] = 1.0f; }',
    "racecheck": 'extern "C" __global__ void planted_kernel(float* x) {'
    " __shared__ float y[64]; y[threadIdx.x] = 1.0f; x[threadIdx.x % 4] = y[63 - threadIdx.x]; }",
    "initcheck": 'extern "C" __global__ void planted_kernel(float* x) { if (x[threadIdx.x % 4] == 7.0f) x[0] = 1.0f; }',
}
"""A fault for each tool to find, on four floats that are not initialised."""

LAUNCHED = "AR_KERNELS_LAUNCHED"
"""The environment's name of a file that the launched kernels' names are added to."""


def kernels() -> list[str]:
    """Every kernel of the package."""
    found = set()
    for path in (ROOT / "ar_kernels" / "kernels").glob("*.py"):
        found.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(found)


def pytest_configure(config) -> None:
    """As a plugin of pytest: the first launch of each kernel, which goes through Triton's own call, is written down."""
    if LAUNCHED not in os.environ:
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    @functools.wraps(run)
    def recorded(self, *arguments, **options):
        with open(os.environ[LAUNCHED], "a", encoding="utf-8") as file:
            file.write(f"{self.fn.__name__}\n")
        return run(self, *arguments, **options)

    JITFunction.run = recorded


def findings(output: str) -> int:
    """The sum over a tool's summaries, one for each process; raises ValueError if there is none."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if not summaries:
        raise ValueError(f"no summary of compute-sanitizer in:\n{output[-2000:]}")
    return sum(int(errors or hazards) for errors, hazards in summaries)


def sanitized(tool: str, names: list[str], command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """The command under a tool that looks at kernels of these names."""
    filters = [word for name in names for word in ("--kernel-name", f"kns={name}")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *filters, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths, **environment},
    )


def plant(tool: str) -> None:
    """In a process of its own: launches the tool's fault."""
    import torch

    kernel = torch.cuda._compile_kernel(PLANTED[tool], "planted_kernel")
    kernel((1, 1, 1), (64, 1, 1), (torch.empty(4, device="cuda"),))
    torch.cuda.synchronize()


def finds_a_planted_fault(tool: str) -> bool:
    run = sanitized(tool, ["planted_kernel"], [sys.executable, str(Path(__file__)), "--plant", tool])
    return findings(run.stdout) > 0


def row_of(tool: str, file: str, expression: str, launched: str) -> dict:
    """What one tool finds in one group of tests, whose kernels' names go to the file `launched`."""
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider", "-p", "sanitizer"]
    start = time.perf_counter()
    run = sanitized(tool, kernels(), [*command, f"tests/{file}", "-k", expression], **{LAUNCHED: launched})
    last = next((line for line in reversed(run.stdout.splitlines()) if " in " in line and "passed" in line), "")
    result = {"tool": tool, "tests": file, "selected": expression, "findings": findings(run.stdout), "pytest": last}
    if failed(result):
        print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
    names = sorted(set(Path(launched).read_text(encoding="utf-8").split())) if os.path.exists(launched) else []
    return result | {"kernels": names, "seconds": round(time.perf_counter() - start, 1)}


def failed(row: dict) -> bool:
    return row["findings"] > 0 or "failed" in row["pytest"] or not row["pytest"]


def rows_of_before(path: Path, same: dict) -> list[dict]:
    """The rows of a file of the same commit, device and versions."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    mine = all(content.get(name) == same[name] for name in ("device", "torch", "triton", "commit"))
    return content["rows"] if mine else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all three")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--plant", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plant:
        plant(arguments.plant)
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    sys.path.insert(0, str(ROOT))
    from benchmarks.results import environment, path_of, save

    path = path_of("sanitizer", arguments.out)
    rows = rows_of_before(path, environment())
    has = {(row["tool"], row["tests"], row["selected"]) for row in rows if not failed(row)}
    tools = arguments.tool or TOOLS
    left = [(tool, *group) for tool in tools for group in TESTS if (tool, *group) not in has]
    rows = [row for row in rows if (row["tool"], row["tests"], row["selected"]) in has]
    planted: dict[str, bool] = {}

    def write() -> list[str]:
        launched = {name for row in rows for name in row["kernels"]}
        missed = [name for name in kernels() if name not in launched]
        groups = len(TOOLS) * len(TESTS)
        content = {"planted": planted, "groups": groups, "kernels": kernels(), "not_launched": missed, "rows": rows}
        save("sanitizer", content, arguments.out)
        return missed

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        searches = {pool.submit(finds_a_planted_fault, tool): tool for tool in tools}
        runs = [pool.submit(row_of, *each, f"{folder}/{number}") for number, each in enumerate(left)]
        for done in as_completed([*searches, *runs]):
            if done in searches:
                planted[searches[done]] = done.result()
            else:
                rows.append(done.result())
                print({name: value for name, value in rows[-1].items() if name != "kernels"}, flush=True)
            missed = write()
    missed = write()
    print(f"planted faults found: {planted}; kernels no test launched: {missed or 'none'}\n{path}")
    return 1 if any(map(failed, rows)) or missed or not all(planted.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
