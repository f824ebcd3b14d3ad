"""What no kernel can beat: reading a map once (forward), reading and writing it once (backward), as fast as it goes.

Both are searched for each size: tile, warps and grid of a streaming kernel, and PyTorch's own copy. The search is over
what moves the same bytes, on the same maps by the same harness, so a floor is a time that was reached, not a quotient.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .timing import Call, Graph, free, measure

STREAMS = tuple((tile, warps, per_sm) for tile, warps in ((2048, 4), (4096, 8), (8192, 8)) for per_sm in (0, 4, 8))
"""(32-bit words of a tile, warps, programs for each multiprocessor; 0: one program for each tile)."""


def flat(z: Tensor) -> Tensor:
    """A dense map as its 32-bit words in the order of memory, whatever its layout (a last odd half is left out)."""
    words = z.detach().as_strided((z.numel() - z.numel() * z.itemsize % 4 // z.itemsize,), (1,))
    return words.view(torch.int32)


def _stream(kernel, source: Tensor, target: Tensor, tile: int, warps: int, per_sm: int) -> None:
    size = source.numel()
    tiles = -(-size // tile)
    processors = torch.cuda.get_device_properties(source.device).multi_processor_count
    grid = min(tiles, per_sm * processors) if per_sm else tiles
    kernel[(grid,)](source, target, size, TILE=tile, num_warps=warps)


def _candidates(maps: Sequence[Tensor]) -> dict[str, dict[str, list[Call]]]:
    """For read and copy: by the name of a way to do it, a call for each map. Copies get a target for each map."""
    sources = [flat(z) for z in maps]
    targets = [torch.empty_like(source) for source in sources]
    if maps[0].device.type == "cpu":
        return {
            "read": {"sum": [lambda s=s: torch.sum(s.view(torch.float32)) for s in sources]},
            "copy": {"copy_": [lambda s=s, t=t: t.copy_(s) for s, t in zip(sources, targets)]},
        }
    from .streams import copy_kernel, read_kernel

    sink = torch.zeros(1, device=maps[0].device, dtype=torch.int32)
    found = {"read": {}, "copy": {"copy_": [lambda s=s, t=t: t.copy_(s) for s, t in zip(sources, targets)]}}
    for stream in STREAMS:
        name = "tile {}, {} warps, {} programs a multiprocessor".format(*stream)
        found["read"][name] = [lambda s=s, p=stream: _stream(read_kernel, s, sink, *p) for s in sources]
        found["copy"][name] = [
            lambda s=s, t=t, p=stream: _stream(copy_kernel, s, t, *p) for s, t in zip(sources, targets)
        ]
    return found


_best: dict[tuple[str, int], str] = {}


def fastest(maps: Sequence[Tensor]) -> dict[str, tuple[str, list[Call]]]:
    """{"read": ..., "copy": ...}: the fastest way and its calls, one for each map.

    The search is made once for each size of map in a process.
    """
    found = {}
    for what, ways in _candidates(maps).items():
        key = what, maps[0].nbytes
        if key not in _best:
            _best[key] = min(ways, key=lambda way: _quick(ways[way], maps[0].device.type))
        found[what] = _best[key], ways[_best[key]]
    return found


def floors(maps: Sequence[Tensor], warm: bool = False) -> dict[str, dict[str, float | str | None]]:
    """{"read": row, "copy": row}: timing.measure's figures of the fastest way, measured now, and that `way`."""
    device = maps[0].device.type
    rows = {what: measure(calls, device, warm) | {"way": way} for what, (way, calls) in fastest(maps).items()}
    free()
    return rows


def _quick(calls: Sequence[Call], device: str) -> float:
    if device == "cpu":
        return 0.0  # there is one way only
    return statistics.median(Graph(calls, keep=False, shortest_us=0).times(seconds=0.01))
