"""What stops a kernel: Nsight Compute's counters. python -m benchmarks.counters --only C=1024,dtype=bf16 (ncu, GPU)

A process under ncu calls attend forward and backward once after a first call, on a map that is not in L2; a row for
each of our kernels of the second call: its time, the bytes that crossed to memory and to L2, how busy each part was,
what its warps waited for, and what its block takes of a multiprocessor. ncu runs a kernel many times over and holds
other work back, so `us` is only to compare rows with; clocks are not locked.
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Shard, select, shards
from .results import save

METRICS = {
    "us": "gpu__time_duration.sum",
    "memory_read_mb": "dram__bytes_read.sum",
    "memory_written_mb": "dram__bytes_write.sum",
    "from_l2_mb": "lts__t_bytes_op_read.sum",
    "memory_busy_pct": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_busy_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "issue_busy_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "matrix_busy_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps_per_scheduler": "smsp__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "shared_kb": "launch__shared_mem_per_block",
    "blocks_by_registers": "launch__occupancy_limit_registers",
}

STALLS = {
    "device memory": "long_scoreboard",
    "shared memory": "short_scoreboard",
    "barrier": "barrier",
    "fixed latency": "wait",
    "matrix units": "math_pipe_throttle",
    "memory queue": "mio_throttle",
    "load and store queue": "lg_throttle",
}
"""Why a warp did not issue, in cycles for each instruction that it did issue; by the words of the rows."""

_UNITS = {
    "byte": 1,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "ns": 1e-3,
    "us": 1,
    "usecond": 1,
    "ms": 1e3,
    "msecond": 1e3,
}


def _stall(name: str) -> str:
    return f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"


def call(shard: Shard, operation: str, taps: int) -> None:
    """Runs in the process under ncu: attend forward, or backward too, twice; between the calls L2 is flushed. taps: 1,
    or 9 for 3×3 heads."""
    import ar_kernels

    from .suite import Problem

    problem = Problem(shard, "cuda", maps=2)
    mask = problem.weights_of(taps)[0].requires_grad_()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for index, z in enumerate(problem.maps):
        flush.zero_()
        torch.cuda.synchronize()
        if index == 1 and operation == "forward":
            torch.cuda.profiler.start()
        pooled = ar_kernels.attend(z, mask).pooled
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        if operation == "backward":
            flush.zero_()
            torch.cuda.synchronize()
            if index == 1:
                torch.cuda.profiler.start()
            grad = problem.pooled_grad if taps == 1 else torch.randn_like(pooled)
            torch.autograd.grad(pooled, (z, mask), grad)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def rows_of(report: str) -> list[dict]:
    """The rows of ncu's CSV (--page raw: a line of names, a line of units, a line for each kernel)."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))

    def value(kernel: dict[str, str], metric: str, scale: float = 1.0) -> float | None:
        text = kernel.get(metric, "").replace(",", "")
        try:
            return round(float(text) * _UNITS.get(units[metric], 1) / scale, 2)
        except (KeyError, ValueError):  # not a counter of this chip
            return None

    rows = []
    for kernel in kernels:
        row: dict[str, object] = {"kernel": kernel["Kernel Name"]}
        for name, metric in METRICS.items():
            row[name] = value(kernel, metric, 1e6 if name.endswith("_mb") else 1e3 if name.endswith("_kb") else 1.0)
        row["stalls"] = {name: value(kernel, _stall(stall)) for name, stall in STALLS.items()}
        rows.append(row)
    return rows


def profile(shard: Shard, operation: str, taps: int) -> list[dict]:
    """Rows for one shard and operation; raises RuntimeError with ncu's words where it fails."""
    metrics = ",".join([*METRICS.values(), *map(_stall, STALLS.values())])
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off",
        "--kernel-name", "regex:_kernel$", "--metrics", metrics,
        sys.executable, "-m", "benchmarks.counters", "--child", str(shard), operation, str(taps),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ, capture_output=True, text=True)
    if done.returncode != 0 or '"ID"' not in done.stdout:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return [shard.fields() | {"operation": operation, "taps": taps} | row for row in rows_of(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="as python -m benchmarks run takes it")
    parser.add_argument("--operation", choices=("forward", "backward"), action="append", help="default: both")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--taps", type=int, choices=(1, 9), default=1, help="9: 3×3 heads (default: 1)")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, operation, taps = arguments.child
        return call(next(shard for shard in shards() if str(shard) == name), operation, int(taps))
    if not torch.cuda.is_available():
        parser.error("the counters are a GPU's; there is no CUDA GPU here")
    if shutil.which("ncu") is None:
        parser.error("Nsight Compute's ncu is not on the PATH; it comes with the CUDA toolkit")
    rows = []
    for shard in select(shards(), arguments.only):
        for operation in arguments.operation or ("forward", "backward"):
            for row in profile(shard, operation, arguments.taps):
                rows.append(row)
                stalls = sorted(((v or 0, k) for k, v in row["stalls"].items()), reverse=True)[:2]
                waits = ", ".join(f"{name} {cycles}" for cycles, name in stalls)
                print(
                    f"{shard} {operation:8} {row['kernel']:24} {row['us']} us, memory {row['memory_read_mb']} MB read "
                    f"{row['memory_written_mb']} written, {row['memory_busy_pct']} % busy; waits: {waits}",
                    flush=True,
                )
    print(save("counters", {"rows": rows}, arguments.out))


if __name__ == "__main__":
    main()
