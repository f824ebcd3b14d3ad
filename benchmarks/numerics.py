"""How far from float64 each implementation is: python -m benchmarks.numerics [--device cuda] [--out DIR].

A layer of K = 4 heads on a map [8, 160, 16, 16] of unit normal values, L = 100, 1×1 and 3×3 heads, all rounded to one
dtype; the exact results are those of reference.py in float64 on the same rounded values. Of each result and gradient
the error is its root mean square over that of the exact values, the larger of three draws. Beside ours stand PyTorch's
own forms of the layer (rivals.py): the re-associated products and the paper's convolutions, in the map's dtype.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ar_kernels

from .cases import DTYPES, Case, Shard
from .results import save
from .rivals import RIVALS, RIVALS_3X3, Rival
from .suite import Problem

CASE = Case(8, 160, 16, 100)
DRAWS = 3
NAMES = ("hypothesis", "d feature_map", "d mask_weight", "d output_weight", "d gate_weight")


def _run(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def _layer(implementation: str) -> Callable[..., Tensor]:
    def layer(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        by_head = output if output.dim() == 2 else output.transpose(0, 1)  # [L, K, C, 3, 3] → [K, L, C, 3, 3]
        return ar_kernels.attention_module(z, mask, by_head, gate, implementation=implementation).hypothesis

    return layer


def _errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]


def _rival_errors(rival: Rival, z: Tensor, weights: tuple, grad: Tensor, exact: list[Tensor]) -> list[float]:
    layout = torch.contiguous_format
    got = _run(rival.function, [z, *rival.store(weights, layout)], grad)
    turned = [exact[0], exact[1], *rival.store(tuple(exact[2:]), layout)]
    if len(turned) == len(exact):
        return _errors(got, turned)
    heads = CASE.K  # W_H over W_G as one kernel
    (mask, gate), (exact_mask, exact_gate) = got[2].split(heads), turned[2].split(heads)
    return _errors([*got[:2], mask, got[3], gate], [*turned[:2], exact_mask, turned[3], exact_gate])


def measure(dtype: str, taps: int, device: str) -> dict[str, list[float]]:
    """The errors of NAMES by implementation."""
    found: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        problem = Problem(Shard(CASE, dtype, "contiguous"), device, maps=1, seed=seed)
        z, weights, grad = problem.maps[0], problem.weights_of(taps), problem.grad
        exact = _run(_layer("reference"), [tensor.double() for tensor in (z, *weights)], grad.double())
        errors = {}
        for name in ("triton", "native", "eager"):
            named = ar_kernels.explain(z, weights[0], implementation=name)
            if named.chosen is not None:
                errors[name] = _errors(_run(_layer(name), [z, *weights], grad), exact)
        for rival in RIVALS[:3] if taps == 1 else RIVALS_3X3:
            errors[rival.name] = _rival_errors(rival, z, weights, grad, exact)
        for name, values in errors.items():
            found[name] = [max(pair) for pair in zip(values, found.get(name, values), strict=True)]
    return found


def table(rows: list[dict]) -> list[str]:
    """The rows of a result as the lines of docs/numerics.md."""
    lines = [f"| dtype, heads | | {' | '.join(NAMES)} |", "|---" * (len(NAMES) + 2) + "|"]
    for row in rows:
        heads = f"{row['dtype']}, {'1×1' if row['taps'] == 1 else '3×3'}"
        lines.append(f"| {heads} | {row['implementation']} | {' | '.join(f'{row[name]:.1e}' for name in NAMES)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for taps in (1, 9):
        for dtype in DTYPES:
            for name, errors in measure(dtype, taps, arguments.device).items():
                rows.append({"dtype": dtype, "taps": taps, "implementation": name} | dict(zip(NAMES, errors)))
    print(*table(rows), sep="\n")
    print(save("numerics", {"case": str(CASE), "draws": DRAWS, "rows": rows}, arguments.out))


if __name__ == "__main__":
    main()
