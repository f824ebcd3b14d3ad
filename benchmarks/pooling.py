"""attend beside global average pooling, whose place it takes in a network. python -m benchmarks.pooling (GPU)

Rows of each case in both layouts, bfloat16: PyTorch's adaptive_avg_pool2d to one position, with which networks end, and
`attend` with four heads, all of a case in one process on the same maps, correctness first; device times of forward, and
of forward and backward, by CUDA-graph replay over maps that are not in L2. Beside them the floors of the same bytes, a
read and a copy; pooling's backward reads no map, so its floor is less.
"""

import torch.nn.functional as F
from torch import Tensor

from .cases import Shard
from .floors import floors
from .results import Results
from .suite import DIRECTIONS, Contender, Problem, measure_cases, measure_contender, our_contenders
from .timing import free


def pool(z: Tensor) -> Tensor:
    """z [N, C, H, W] → [N, C], as networks end."""
    return F.adaptive_avg_pool2d(z, 1).flatten(1)


def pooling_contender(problem: Problem) -> Contender:
    grad = problem.pooled_grad[:, 0]

    def exact() -> list[Tensor]:
        z = problem.maps[0].detach()[problem.picked].double()
        each = grad[problem.picked].double() / z[0, 0].numel()
        return [z.mean((2, 3)), each[:, :, None, None].expand_as(z)]

    return Contender("pool", "adaptive_avg_pool2d", "eager", pool, (), grad, exact, pool)


def measure_shard(shard: Shard, device: str, results: Results) -> None:
    """Adds a row for each implementation and direction of one shard."""
    problem = Problem(shard, device)
    floor = {what: row["p50_us"] for what, row in floors(problem.maps).items()}
    ours = next(contender for contender in our_contenders(problem) if contender.operation == "attend")
    pooling: dict[str, float] = {}
    for contender in (pooling_contender(problem), ours):
        for row in measure_contender(contender, problem, DIRECTIONS):
            row = shard.fields() | {"bytes": shard.nbytes, "read_us": floor["read"], "copy_us": floor["copy"]} | row
            if contender is not ours:
                pooling[row["direction"]] = row.get("p50_us")
            elif pooling.get(row["direction"]) and "p50_us" in row:
                row["over_pooling"] = round(row["p50_us"] / pooling[row["direction"]], 3)
            results.add(row)
            told = ("p50_us", "read_us", "copy_us", "over_pooling", "correct", "out_of_memory", "failed")
            figures = ", ".join(f"{name} {row[name]}" for name in told if row.get(name) is not None)
            print(f"{shard} {row['implementation']} {row['direction']}: {figures}", flush=True)
    del problem, ours, contender
    free()


if __name__ == "__main__":
    measure_cases("pooling", __doc__, measure_shard)
