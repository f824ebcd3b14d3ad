"""What the first call costs, and which new shapes compile again. python -m benchmarks.first_call (CUDA GPU)

A process of its own with an empty Triton cache calls one layer forward and backward on a row of shapes: seconds of each
first call, the kernels that Triton compiled for it, the binaries that it left in the cache. A second process has the
same cache, now filled. PyTorch's own start (context, cuBLAS, autograd, which imports SymPy for a gradient that it is
given) is paid before the clock starts; a process before all these has read Triton's library, which its keys are made
of, from the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .cases import DTYPES, LAYOUTS
from .results import save

CHANNELS, HEADS, LABELS = 256, 4, 100

SHAPES = (
    # name, N, H = W
    ("first call", 16, 16),
    ("same shape again", 16, 16),
    ("another batch size", 24, 16),
    ("an odd batch size", 17, 16),
    ("one image", 1, 16),
    ("more positions, also a multiple of 16", 16, 24),
    ("positions a multiple of 4", 16, 14),
    ("an odd number of positions", 16, 7),
    ("another odd number of positions", 16, 9),
)


def _count_compilations() -> list[str]:
    """A list that grows by a kernel's name whenever Triton has compiled one, or loaded its binary from the cache."""
    names: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        return names
    knobs.runtime.jit_post_compile_hook = lambda *positional, **named: names.append(named["fn"].name)
    return names


def _binaries() -> int:
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def first_calls(dtype: str, layout: str, device: str) -> list[dict]:
    """Runs in the process with TRITON_CACHE_DIR set: a row for each of SHAPES."""
    import ar_kernels

    names = _count_compilations()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype])

    square = normal(64, 64).requires_grad_()
    torch.autograd.grad(torch.softmax(square @ square, dim=1), square, normal(64, 64))
    weights = [normal(*shape) for shape in ((HEADS, CHANNELS), (LABELS, HEADS * CHANNELS), (HEADS, CHANNELS))]
    weights = [(weight * CHANNELS**-0.5).requires_grad_() for weight in weights]
    rows = []
    for name, images, side in SHAPES:
        z = normal(images, CHANNELS, side, side).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        grad = normal(images, LABELS)
        before, files = len(names), _binaries()
        wait()
        start = time.perf_counter()
        hypothesis = ar_kernels.attention_module(z, *weights).hypothesis
        torch.autograd.grad(hypothesis, (z, *weights), grad)
        wait()
        seconds = time.perf_counter() - start
        row = {"what": name, "N": images, "side": side, "seconds": round(seconds, 4)}
        rows.append(row | {"kernels": names[before:], "new_binaries": _binaries() - files})
    return rows


def in_new_process(dtype: str, layout: str, device: str, cache: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", dtype, layout, device]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), action="append", help="default: both")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_calls(*arguments.child)))
        return
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        in_new_process(arguments.dtype, "contiguous", device, cache)
    for layout in arguments.layout or LAYOUTS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                for row in in_new_process(arguments.dtype, layout, device, cache):
                    rows.append({"dtype": arguments.dtype, "layout": layout, "cache": state} | row)
                    counts = f"kernels {len(row['kernels'])}, new binaries {row['new_binaries']}"
                    print(f"{layout:14} cache {state:7} {row['what']:40} {row['seconds']:8.3f} s  {counts}", flush=True)
        path = save("first-call", {"C": CHANNELS, "K": HEADS, "L": LABELS, "rows": rows}, arguments.out)
    print(path)


if __name__ == "__main__":
    main()
