"""The native library's sweeps for NVIDIA's Hopper (csrc/cuda), in place of a Triton kernel where they are faster.

They take half-precision maps with up to 4 heads whose channels come in whole 64s (channels_last) or 128s (NCHW): what
Triton leaves behind. Where all channels of a few positions fit no multiprocessor's registers, Triton's sweep reads the
map twice; where rows of NCHW begin at no multiple of 16 bytes, it loads them element by element. Here tiles come into
shared memory by byte count, whatever the length of rows, and registers hold sums alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import launch
from .heuristics import Chip
from .tiles import MapStrides

_library = torch.library.Library(native.NAMESPACE, "IMPL")

_ALIGNMENT = 16
"""Of addresses that the copy engine takes, in bytes."""

FEWEST_CHANNELS = 768


@functools.cache
def _operators() -> Any:
    """torch.ops.ar_kernels_native, or None where it has no such kernels."""
    if native.why_not("cpu") is not None or not native.has_kernels("cuda", "sweep_forward_"):
        return None
    found = torch.ops.ar_kernels_native
    for name in ("sweep_forward_", "sweep_backward_"):  # called where nothing is recorded
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    launch.operators += [found.sweep_forward_.default, found.sweep_backward_.default]
    return found


def can_read(*maps: Tensor | None) -> bool:
    """Whether addresses and dtypes are as these sweeps want them, on a GPU, in a library that has them."""
    first = maps[0]
    assert first is not None
    return (
        first.is_cuda
        and first.dtype.itemsize == 2
        and all([value is None or value.data_ptr() % _ALIGNMENT == 0 for value in maps])
        and _operators() is not None
    )


def _is_faster(z: MapStrides, channels: int, chip: Chip) -> bool:
    """Where this replaces Triton; docs/performance.md has the measurements."""
    if chip.capability != 9:
        return False
    return channels >= FEWEST_CHANNELS or (z.unit == "s" and z.vector < 8)


def forward_sweep(z: MapStrides, sizes: Sequence[int], strides: Sequence[int], heads: int, chip: Chip) -> Any:
    """The operator for such maps, or None: the Triton kernel is faster, or there is none."""
    if not _is_faster(z, sizes[1], chip) or not _operators().sweep_forward_fits(sizes, strides, heads):
        return None
    return _operators().sweep_forward_.default


def backward_sweep(
    z: MapStrides,
    sizes: Sequence[int],
    strides: Sequence[int],
    up_strides: Sequence[int] | None,
    dz_strides: Sequence[int] | None,
    heads: int,
    chip: Chip,
) -> tuple[Any, int]:
    """The operator for such maps and the number of its shares of dW_H, or None and 0."""
    if dz_strides is None or not _is_faster(z, sizes[1], chip):
        return None, 0
    programs = _operators().sweep_backward_programs(sizes, strides, up_strides, dz_strides, heads)
    return (_operators().sweep_backward_.default, programs) if programs else (None, 0)
