"""The layer with 3×3 heads against the official code's form and the re-associated one. python -m benchmarks.taps (GPU)

A row for each case and implementation, all of a case in one process on the same maps, correctness first: device time of
forward and backward, by CUDA-graph replay over maps that are not in L2, and peak memory. Beside ours stands what the
memory's bar allows: |dZ| + 0.3 |Z| + 3 × the pooled features of nine taps in float32, above inputs, weights and the
weights' gradients.
"""

from functools import partial

from torch import Tensor

import ar_kernels

from .cases import Shard
from .results import Results
from .rivals import RIVALS_3X3
from .suite import Contender, Problem, measure_cases, measure_contender, rival_contender
from .timing import free

OFFICIAL_BARS = {(128, 160, 32): 12.0, (256, 256, 56): 100.0, (256, 2048, 7): 15.0}
"""How many times the official form's speed is asked for, by (N, C, H)."""


def our_contender(problem: Problem) -> Contender:
    mask, output, gate = problem.weights_of(9)
    parameters = tuple(weight.detach().requires_grad_() for weight in (mask, output.flatten(1), gate))

    def layer(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor, implementation: str | None = None) -> Tensor:
        return ar_kernels.attention_module(z, mask, output, gate, implementation=implementation).hypothesis

    def exact() -> list[Tensor]:
        found = problem.exact_layer(9)
        return [*found[:3], found[3].flatten(1), *found[4:]]

    eager = partial(layer, implementation="eager")
    return Contender("layer", "ours", "ours", layer, parameters, problem.grad, exact, eager)


def measure_shard(shard: Shard, device: str, results: Results) -> None:
    """Adds a row for each implementation of one shard."""
    problem = Problem(shard, device)
    case = shard.case
    mine = None
    rivals = (partial(rival_contender, rival=rival, kind="eager") for rival in RIVALS_3X3)
    for make in (our_contender, *rivals):  # one at a time: each has weights of its own
        contender = make(problem)
        contender.operation = "layer-3x3"
        for row in measure_contender(contender, problem, ("forward_backward",)):
            row = shard.fields() | {"bytes": shard.nbytes} | row
            weights = sum(value.nbytes for value in contender.parameters) / 1e6
            if "peak_mb" in row:
                row["peak_above_gradients_mb"] = round(row["peak_mb"] - weights, 2)
            if contender.name == "ours":
                mine = row.get("p50_us")
                row["chosen"] = ar_kernels.explain(problem.maps[0], problem.weights_of(9)[0]).chosen
                row["peak_bar_mb"] = round(1.3 * shard.nbytes / 1e6 + 3 * case.N * case.K * case.C * 36 / 1e6, 2)
            elif mine and "p50_us" in row:
                row["times_ours"] = round(row["p50_us"] / mine, 2)
                if contender.name == "convolutions-3x3":
                    row["bar"] = OFFICIAL_BARS.get((case.N, case.C, case.side))
            results.add(row)
            told = ("p50_us", "times_ours", "bar", "peak_above_gradients_mb", "peak_bar_mb", "correct", "failed")
            figures = ", ".join(f"{name} {row[name]}" for name in told if row.get(name) is not None)
            print(f"{shard} {row['implementation']:17} {figures or 'out of memory'}", flush=True)
        del contender
        free()


if __name__ == "__main__":
    measure_cases("taps", __doc__, measure_shard)
