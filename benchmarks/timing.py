"""Time, launches and memory of a call. All times in microseconds.

On a GPU, device time by CUDA-graph replay over rotated inputs, so that no host time and no warm L2 is in it: each call
in the graph reads an input of its own and keeps its results until the graph is dropped, so what it writes is cold too.
Host time apart: what a call takes from Python while the GPU has room in its queue. On a CPU, time by the clock.
"""

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROTATED_BYTES = 150 * 2**20
"""Distinct input bytes that one captured graph goes through: several times the L2 of an H100 or H200."""

CACHED_BYTES = 40 * 2**20
"""A map no larger than this can be warm in L2 (50 MB on an H100 or H200); of larger ones no warm time is told."""

SHORTEST_GRAPH_US = 1000.0
"""A graph that takes less goes through its calls again: launching a graph costs some 4 µs, a tenth of a small one."""

ROUNDS = 5, 20
"""The fewest and the most replays that are timed."""

Call = Callable[[], object]


def rotation(nbytes: int) -> int:
    """How many distinct inputs of nbytes a graph should go through."""
    return max(1, -(-ROTATED_BYTES // nbytes))


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    cuts = statistics.quantiles(times, n=10)
    return {"p20_us": round(cuts[1], 2), "p50_us": round(cuts[4], 2), "p80_us": round(cuts[7], 2)}


def rounds_within(seconds: float, round_us: float) -> int:
    """As many rounds as fit into `seconds`, within ROUNDS."""
    fewest, most = ROUNDS
    return max(fewest, min(most, int(seconds * 1e6 / max(round_us, 1e-3))))


# ---------------------------------------------------------------------------------------------- GPU


class Graph:
    """A captured CUDA graph that makes every call in turn, after each was made once outside of it.

    shortest_us: a graph that takes less is captured again with up to eight such turns.
    keep: hold all results, so that no call writes where another has just written. Raises what a call raises, in
    particular torch.OutOfMemoryError, and RuntimeError where a call cannot be captured.
    """

    def __init__(self, calls: Sequence[Call], keep: bool = True, shortest_us: float = SHORTEST_GRAPH_US) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0], *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._capture(calls, keep)
        repeats = min(8, math.ceil(shortest_us / max(self._replay(1)[0], 1)))
        if repeats > 1:
            self._capture(list(calls) * repeats, keep)

    def _capture(self, calls: Sequence[Call], keep: bool) -> None:
        self.calls = len(calls)
        self._kept: list[object] = []  # the last graph's results go before its memory does
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            for call in calls:
                result = call()
                if keep:
                    self._kept.append(result)
                del result  # or the last call's results would live on while the next call runs
        self._graph.instantiate()
        self._graph.replay()  # the first replay uploads the graph

    def times(self, seconds: float = 0.3) -> list[float]:
        """Microseconds of one call, a figure for each replay; about `seconds` in all."""
        rounds = rounds_within(seconds, self._replay(1)[0])
        return [us / self.calls for us in self._replay(rounds)]

    def _replay(self, rounds: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in events:
            start.record()
            self._graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def launches(self) -> float | None:
        """Kernels, copies and fills of memory in one call; None where the driver does not tell."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            graph = ctypes.c_void_p(self._graph.raw_cuda_graph())
            count = ctypes.c_size_t(0)
            if driver.cuGraphGetNodes(graph, None, ctypes.byref(count)) != 0:
                return None
            nodes = (ctypes.c_void_p * count.value)()
            if driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count)) != 0:
                return None
            kinds = []
            for node in nodes:
                kind = ctypes.c_int(-1)
                driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
                kinds.append(kind.value)
        except (OSError, AttributeError, RuntimeError):
            return None
        kernel, copy, fill = 0, 1, 2  # of CUgraphNodeType
        return round(sum(kind in (kernel, copy, fill) for kind in kinds) / self.calls, 2)


def host_time(call: Call, device_us: float, blocks: int = 5) -> float:
    """Microseconds that Python takes for one call: the median of blocks of calls, nothing waited for inside a block.

    device_us: what the call takes on the device; a block is short enough for the GPU's queue never to fill.
    """
    calls = int(max(2, min(20, 50_000 / max(device_us, 1))))
    blocks = blocks if device_us < 20_000 else 2  # of a call that takes this long the host's share is no question
    times = []
    for _ in range(blocks):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_bytes(call: Call) -> int:
    """The most memory that one call holds at once above what was held before it, its results included."""
    call()
    torch.cuda.synchronize()
    gc.collect()
    time.sleep(0.05)  # autograd's thread lets go of the last gradients when the call has returned
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Gives back what is no longer used, so that one measurement's leftovers are not in the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------- both


NEW_BYTES = 32 * 2**30
"""Of memory, at most, that is written before anything is measured on a CPU."""


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process could still get: of the machine, and of the container that it runs in; 0 where no system
    says."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((groups / most).read_text()) - int((groups / used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return max(free, 0)


def touch_memory() -> None:
    """Writes nine tenths of the memory that is free, at most NEW_BYTES, and lets go of it again.

    What a virtual machine hands out for the first time its host must provide first. Of the same calls some took 2 ms,
    others, whose 21 MB were such memory, 22; whether a call gets it, the calls beside it decide.
    """
    torch.empty(min(NEW_BYTES, free_memory() // 10 * 9), dtype=torch.uint8).fill_(1)


def keep_memory() -> bool:
    """Makes glibc keep what is freed, in blocks of up to 32 MB, as PyTorch does on a GPU; False without glibc.

    Else it gives blocks of some MB back to the system or not, by what was freed before: of the same calls at 256 × 28²
    some took 3 ms, others, whose 26 MB of gradient the system had to clear again, 4 to 13.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


def clock_times(calls: Sequence[Call], seconds: float = 0.3) -> list[float]:
    """Microseconds of one call by the clock, on a CPU: one figure for each, the calls taken in turn."""
    calls[0]()
    start = time.perf_counter()
    calls[-1]()
    rounds = rounds_within(seconds, (time.perf_counter() - start) * 1e6)
    times = []
    for index in range(rounds):
        call = calls[index % len(calls)]
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def measure_beside(calls: Sequence[Call], others: Sequence[Call], seconds: float = 0.6) -> dict[str, float | None]:
    """On a CPU, which is seldom idle: p20_us, p50_us, p80_us of calls, and others' median as ours_us, taken in turn."""
    pairs = [(call, others[index % len(others)]) for index, call in enumerate(calls)]
    times = clock_times([call for pair in pairs for call in pair], seconds)
    return quantiles(times[::2]) | {"ours_us": round(statistics.median(times[1::2]), 2)}


def measure(calls: Sequence[Call], device: str, warm: bool = False, seconds: float = 0.3) -> dict[str, float | None]:
    """What a row tells of a call's cost: p20_us, p50_us, p80_us, warm_us, host_us, launches, peak_mb.

    calls: the same work on distinct inputs. warm: also the time over and over on the first input. On a CPU only
    quantiles are told. Raises what a call raises, and RuntimeError where it cannot be captured.
    """
    if device == "cpu":
        return quantiles(clock_times(calls, seconds))
    graph = Graph(calls)
    row = quantiles(graph.times(seconds)) | {"launches": graph.launches()}
    del graph
    free()
    if warm:
        graph = Graph([calls[0]] * min(10, len(calls)), keep=False)
        row["warm_us"] = round(statistics.median(graph.times(seconds / 3)), 2)
        del graph
        free()
    row["host_us"] = round(host_time(calls[0], row["p50_us"]), 1)
    row["peak_mb"] = round(peak_bytes(calls[0]) / 1e6, 2)
    return row
