"""attend against the floor, and the peak memory of a whole layer: python -m benchmarks.layer [--out DIR] (CUDA GPU).

Floor: reading Z once (forward), copying it once (backward), both measured here on the same data by the same harness.
Every case is checked against the reference formulas before it is timed.
"""

import argparse
from pathlib import Path

import torch

import ar_kernels

from .results import save
from .timing import device_times, quantiles, read, rotation

HEADS = 4
CASES = [
    # N, C, side
    (256, 256, 56),
    (256, 512, 28),
    (256, 1024, 14),
    (256, 2048, 7),
    (128, 160, 32),
    (128, 320, 16),
    (128, 640, 8),
]
SHOWN = (
    *("N", "C", "side", "dtype", "layout", "correct"),
    *("forward_over_read", "backward_over_copy", "both_over_read_and_copy", "faster_than_eager"),
)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _forward(z, w):
    with torch.no_grad():
        return ar_kernels.attend(z, w, implementation="triton")


def _both(z, w, grad, implementation="triton"):
    return torch.autograd.grad(ar_kernels.attend(z, w, implementation=implementation).pooled, (z, w), grad)


def _is_correct(z, w, grad) -> bool:
    """Two images against float64: relative RMS error at most 2 (the eager path's + eps), as the tests ask."""

    def run(dtype, implementation):
        values = [value[:2].detach().to(dtype) if value is z else value.detach().to(dtype) for value in (z, w)]
        values = [value.requires_grad_() for value in values]
        pooled = ar_kernels.attend(*values, implementation=implementation).pooled
        return (pooled, *torch.autograd.grad(pooled, values, grad[:2].to(pooled.dtype)))

    exact, eager, got = run(torch.float64, "reference"), run(z.dtype, "eager"), run(z.dtype, "triton")
    for truth, yardstick, mine in zip(exact, eager, got):
        allowed = 2 * ((yardstick - truth).norm() / truth.norm() + torch.finfo(z.dtype).eps)
        if not (mine - truth).norm() / truth.norm() <= allowed:
            return False
    return True


def time_attend(images: int, channels: int, side: int, dtype: torch.dtype, layout: str) -> dict:
    nbytes = images * channels * side**2 * dtype.itemsize
    maps = [
        torch.randn(images, channels, side, side, device="cuda", dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(rotation(nbytes))
    ]
    w = (torch.randn(HEADS, channels, device="cuda") * channels**-0.5).to(dtype).requires_grad_()
    grad = torch.randn(images, HEADS, channels, device="cuda")
    sink, target = torch.zeros(1, device="cuda"), torch.empty_like(maps[0])
    row = {"N": images, "C": channels, "side": side, "K": HEADS, "dtype": str(dtype)[6:], "layout": layout}
    row |= {"bytes": nbytes, "correct": _is_correct(maps[0], w, grad)}
    if not row["correct"]:
        return row  # no speed is told of a wrong result
    row["read"] = quantiles(device_times([lambda z=z: read(z, sink) for z in maps]))
    row["copy"] = quantiles(device_times([lambda z=z: target.copy_(z) for z in maps]))
    for z in maps:
        z.requires_grad_()
    row["forward"] = quantiles(device_times([lambda z=z: _forward(z, w) for z in maps]))
    row["forward_backward"] = quantiles(device_times([lambda z=z: _both(z, w, grad) for z in maps]))
    row["eager_forward_backward"] = quantiles(device_times([lambda z=z: _both(z, w, grad, "eager") for z in maps], 5))
    read_us, copy_us = row["read"]["p50_us"], row["copy"]["p50_us"]
    forward, both = row["forward"]["p50_us"], row["forward_backward"]["p50_us"]
    row["forward_over_read"] = round(forward / read_us, 3)
    row["backward_over_copy"] = round((both - forward) / copy_us, 3)
    row["both_over_read_and_copy"] = round(both / (read_us + copy_us), 3)
    row["faster_than_eager"] = round(row["eager_forward_backward"]["p50_us"] / both, 2)
    return row


def peak_memory(images: int, channels: int, side: int, labels: int, implementation: str) -> dict:
    """Peak bytes above the inputs of one layer, forward and backward with all gradients, bf16 channels_last."""
    torch.cuda.empty_cache()
    z = torch.randn(images, channels, side, side, device="cuda", dtype=torch.bfloat16)
    z = z.contiguous(memory_format=torch.channels_last).requires_grad_()
    shapes = [(HEADS, channels), (labels, HEADS * channels), (HEADS, channels)]
    weights = [(torch.randn(s, device="cuda") * channels**-0.5).bfloat16().requires_grad_() for s in shapes]
    grad = torch.randn(images, labels, device="cuda", dtype=torch.bfloat16)

    def step():
        out = ar_kernels.attention_module(z, *weights, implementation=implementation)
        return torch.autograd.grad(out.hypothesis, (z, *weights), grad)

    row = {"N": images, "C": channels, "side": side, "K": HEADS, "L": labels, "implementation": implementation}
    try:
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return row | {"out_of_memory": True}
    return row | {"peak_mb": round(peak / 1e6, 1), "peak_less_dz_mb": round((peak - z.nbytes) / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in CASES if dtype == torch.bfloat16 else CASES[:1] + CASES[3:5]:
            for layout in LAYOUTS:
                rows.append(time_attend(*case, dtype, layout))
                torch.cuda.empty_cache()
                keys = ("N", "C", "side", "dtype", "layout", "correct", "forward_over_read", "backward_over_copy")
                print(
                    *(f"{key}={rows[-1].get(key)}" for key in (*keys, "both_over_read_and_copy", "faster_than_eager")),
                    flush=True,
                )
    memory = [peak_memory(256, 256, 56, 1000, name) for name in ("triton", "eager", "reference")]
    print(*memory, sep="\n")
    print(save("layer", {"attend": rows, "memory": memory}, arguments.out))


if __name__ == "__main__":
    main()
