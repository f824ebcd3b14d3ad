"""Microbenchmarks under pytest-benchmark: pytest benchmarks. On a CPU a small set, on a GPU WRN-28-10's maps.

A round is one call and waits for the device. What a call takes on the device alone, by graph replay, is in extra_info.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from .cases import CASES, CPU_CASES, LAYOUTS, Shard
from .floors import fastest
from .suite import DIRECTIONS, Problem, error, our_contenders
from .timing import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SHARDS = [Shard(case, DTYPE, layout) for case in (CASES[:3] if DEVICE == "cuda" else CPU_CASES) for layout in LAYOUTS]


@pytest.fixture(scope="module", params=SHARDS, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, DEVICE)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operation", ["attend", "layer"])
def test_ours(benchmark, problem, operation, direction):
    contender = next(one for one in our_contenders(problem) if (one.operation, one.name) == (operation, "ours"))
    assert error(contender, problem) <= 1, "no speed is told of a wrong result"
    call = getattr(contender, direction)

    def one_round():
        call(problem.maps[0])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(one_round)
    benchmark.extra_info |= problem.shard.fields()
    benchmark.extra_info |= measure([lambda z=z: call(z) for z in problem.maps], DEVICE, seconds=0.05)


@pytest.mark.parametrize("what", ["read", "copy"])
def test_floor(benchmark, problem, what):
    way, calls = fastest(problem.maps)[what]

    def one_round():
        calls[0]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(one_round)
    benchmark.extra_info |= problem.shard.fields() | {"way": way} | measure(calls, DEVICE, seconds=0.05)
