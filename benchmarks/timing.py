"""Device time by CUDA-graph replay over rotated inputs, so that no host time and no warm L2 is in it."""

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROTATED_BYTES = 150 * 2**20
"""Distinct input bytes that one captured graph goes through: several times the L2 of an H100 or H200."""


def device_times(calls: Sequence[Callable[[], object]], rounds: int = 20) -> list[float]:
    """Microseconds of one call, a figure for each of `rounds` replays of a graph that makes every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / len(calls) for start, end in events]


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    cuts = statistics.quantiles(times, n=10)
    return {"p20_us": round(cuts[1], 2), "p50_us": round(cuts[4], 2), "p80_us": round(cuts[7], 2)}


def rotation(nbytes: int) -> int:
    """How many distinct inputs of nbytes a graph should go through."""
    return max(1, -(-ROTATED_BYTES // nbytes))


@triton.jit
def _read_kernel(source, sink, size, TILE: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.sum(tl.load(source + offsets, mask=offsets < size, other=0.0).to(tl.float32), axis=0)
    if total == 1.5e38:  # never: the loads must not be optimised away
        tl.store(sink, total)


def read(source: Tensor, sink: Tensor) -> None:
    """A streaming read of a dense tensor: the floor of a forward pass."""
    size = source.numel()
    tile = 16384
    _read_kernel[(-(-size // tile),)](source, sink, size, TILE=tile, num_warps=8)
