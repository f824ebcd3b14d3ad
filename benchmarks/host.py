"""What Python costs: host time of one small layer's forward and backward. python -m benchmarks.host [--profile]

At N 2, C 64, 7×7, L 10, K 4 the GPU is always done before Python is, so the time of a block of calls is Python's and
PyTorch's. It is told beside x * 2 on x [64, 256], forward and backward by torch.autograd.grad like the layer, in the
same process, block by block in turns: the speed of the machine cancels. Nothing is waited for inside a block;
`tail_us` is what was still in the queue at its end, spread over its calls, and is small where the figure is the host's
alone (on a CPU there is no queue). PyTorch runs the backward of CUDA tensors in a thread of its own; `one_thread_us` is
the time without it, which tells what handing over costs. Rows with `part` break ours down: what PyTorch takes for a
node of its own with as many inputs, for an autograd.Function in Python that only hands over what is there; the plans of
both directions (csrc/plans.cpp); the layer without the node in C++ (csrc/node), and without plans too. For comparison
PyTorch's three products with W_O, which float32's plans have and bfloat16's have kernels in place of.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from ar_kernels import node, plans

from .cases import LAYOUTS, Case, Shard
from .results import save
from .rivals import RIVALS
from .suite import Contender, Problem, error, our_contenders, rival_contender

CASE = Case(2, 64, 7, 10)


class Times(NamedTuple):
    """Microseconds of a call, and of what it leaves in the queue, of each block."""

    blocks: list[float]
    tails: list[float]

    @property
    def us(self) -> float:
        return round(statistics.median(self.blocks), 2)

    @property
    def tail_us(self) -> float:
        return round(statistics.median(self.tails), 2)


def in_turns(those: Sequence[Callable[[], object]], calls: int, count: int, device: str) -> list[Times]:
    """Times of each, `count` blocks of `calls` calls, a block of one after a block of another."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found = [Times([], []) for _ in those]
    for call in those:
        for _ in range(20):
            call()
    for _ in range(count):
        for call, times in zip(those, found):
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            end = time.perf_counter()
            wait()
            times.blocks.append((end - start) * 1e6 / calls)
            times.tails.append((time.perf_counter() - end) * 1e6 / calls)
    return found


def in_one_thread(call: Callable[[], object], calls: int, count: int, device: str) -> float:
    with torch.autograd.set_multithreading_enabled(False):
        return in_turns([call], calls, count, device)[0].us


def contenders(problem: Problem) -> list[Contender]:
    """The layer by ours (the default choice and what else can run) and by every uncompiled rival."""
    ours = [contender for contender in our_contenders(problem) if contender.operation == "layer"]
    return ours + [rival_contender(problem, rival, "eager") for rival in RIVALS]


def measure(dtype: str, layout: str, device: str, calls: int, count: int) -> list[dict]:
    """Rows of the yardstick and of every contender; times over the yardstick, no time of a wrong result."""
    problem = Problem(Shard(CASE, dtype, layout), device, maps=1)
    x = torch.randn(64, 256, device=device, dtype=problem.maps[0].dtype, requires_grad=True)
    ones = torch.ones_like(x)
    base = {"dtype": dtype, "layout": layout}

    def double() -> object:
        return torch.autograd.grad(x * 2, x, ones)

    less = -(-calls // 3), -(-count // 2)  # of what has no bar
    (times,) = in_turns([double], calls, count, device)
    rows = [base | {"implementation": "x * 2", "host_us": times.us, "tail_us": times.tail_us}]
    rows[0]["one_thread_us"] = in_one_thread(double, *less, device)
    z = problem.maps[0]
    for contender in contenders(problem):
        row = base | {"implementation": contender.name, "correct": error(contender, problem) <= 1}
        if row["correct"]:
            call = partial(contender.forward_backward, z)
            yardstick, both = in_turns([double, call], calls, count, device)
            ratios = [ours / theirs for ours, theirs in zip(both.blocks, yardstick.blocks)]
            row |= {"host_us": both.us, "tail_us": both.tail_us, "yardstick_us": yardstick.us}
            row |= {"over_yardstick": round(both.us / yardstick.us, 2)}
            row |= {"ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2)}
            row["one_thread_us"] = in_one_thread(call, *less, device)
            parts = partial(contender.function, z, *contender.parameters), partial(contender.forward, z)
            with_graph, without = in_turns(parts, *less, device)
            row |= {"forward_us": with_graph.us, "forward_no_grad_us": without.us}
        rows.append(row)
    return rows


class Handover(torch.autograd.Function):
    """The least that a Function of a layer's inputs, outputs and saved tensors costs: it returns what is there."""

    @staticmethod
    def forward(ctx, z, mask, output, gate, there):
        ctx.save_for_backward(z, mask, output, gate, *there)
        ctx.set_materialize_grads(False)  # as ours: no zeros for the gates, which nothing reads
        return there[0].detach(), there[1].detach()

    @staticmethod
    def backward(ctx, *grads):
        return *(value.detach() for value in ctx.saved_tensors[:4]), None


def breakdown(dtype: str, layout: str, device: str, calls: int, count: int) -> list[dict]:
    """Rows of what ours is made of."""
    problem = Problem(Shard(CASE, dtype, layout), device, maps=1)
    z, by_name = problem.maps[0], {one.name: one for one in contenders(problem)}
    ours = by_name.get("triton", by_name["ours"])  # the default is no contender under its own name
    mask, output, gate = ours.parameters
    grad = problem.grad
    features = torch.randn(CASE.N, output.shape[1], device=device, dtype=z.dtype)
    there = [grad, *(torch.randn_like(gate) for _ in range(5))]

    def handover() -> object:
        return torch.autograd.grad(Handover.apply(z, *ours.parameters, there)[0], (z, *ours.parameters), grad)

    def own() -> object:
        return torch.autograd.grad(torch.cat((mask, gate, output.view(-1, mask.shape[1]), few)), leaves, whole)

    def products() -> object:
        with torch.no_grad():
            return torch.mm(features, output.t()), torch.mm(grad.t(), features), torch.mm(grad, output)

    few = torch.zeros(1, mask.shape[1], device=device, dtype=z.dtype, requires_grad=True)
    leaves = mask, gate, output, few
    whole = torch.ones(2 * CASE.K + output.numel() // mask.shape[1] + 1, mask.shape[1], device=device, dtype=z.dtype)
    parts: dict[str, Callable[[], object]] = {
        "PyTorch's cat of as many": own, "a Function in Python": handover, "products with W_O": products
    }  # fmt: skip
    rows = []
    call = partial(ours.forward_backward, z)

    def tell(name: str, part: Callable[[], object]) -> None:
        rows.append({"part": name, "host_us": in_turns([part], calls, count, device)[0].us})
        rows[-1]["one_thread_us"] = in_one_thread(part, calls, count, device)

    made: list[tuple] = []
    run = plans.run
    if device == "cuda" and plans.why_not() is None:
        with (
            patch.object(node, "wanted", False),
            patch.object(plans, "run", lambda *arguments: made.append(arguments) or run(*arguments)),
        ):
            call()

        def both() -> object:
            with torch.no_grad():
                return [run(*arguments) for arguments in made]

        parts["both plans"] = both
    for name, part in parts.items():
        tell(name, part)
    if node.why_not() is None:
        with patch.object(node, "wanted", False):
            tell("the layer without the node", call)
    if made:
        with patch.object(node, "wanted", False), patch.object(plans, "are_used", lambda *arguments: False):
            tell("the layer without plans", call)
    return [{"dtype": dtype, "layout": layout, "of": ours.name} | row for row in rows]


def profile(dtype: str, layout: str, device: str, calls: int) -> None:
    """Prints where the host time of ours goes, by function.

    The backward runs in this thread, not in autograd's own, where the profiler would not see it.
    """
    problem = Problem(Shard(CASE, dtype, layout), device, maps=1)
    ours = contenders(problem)[0]
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(20):
            ours.forward_backward(problem.maps[0])
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(calls):
            ours.forward_backward(problem.maps[0])
        profiler.disable()
    print(f"{dtype} {layout}: {calls} calls, seconds under the profiler (tottime: in the function itself)")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    parser.add_argument("--calls", type=int, default=500, help="calls in a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks, of which the median is told")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: both")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="contiguous")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time instead")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for dtype in ("bfloat16", "float32") if arguments.dtype is None else (arguments.dtype,):
        if arguments.profile:
            profile(dtype, arguments.layout, device, arguments.calls)
            continue
        sizes = dtype, arguments.layout, device, arguments.calls, arguments.blocks
        for row in (*measure(*sizes), *breakdown(*sizes)):
            rows.append(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
        path = save("host", {"case": str(CASE), "rows": rows}, arguments.out)  # now: the next may be cut off
    if rows:
        print(path)


if __name__ == "__main__":
    main()
