"""The native library's sweeps for NVIDIA's Hopper (csrc/cuda), in place of a Triton kernel where they are faster.

They take half-precision maps with up to 4 heads whose channels come in whole 64s (channels_last) or 128s (NCHW): what
Triton leaves behind. Where all channels of a few positions fit no multiprocessor's registers, Triton's sweep reads the
map twice; where rows of NCHW begin at no multiple of 16 bytes, it loads them element by element. Here tiles come into
shared memory by byte count, whatever the length of rows, and registers hold sums alone.

Forward they take few images of up to 512 channels in whole 8s as well, in both layouts: each is spread over a cluster,
where Triton would split it and merge.

And float32 maps with up to 4 heads, by plain multiply-adds, whatever PyTorch's matmul precision allows: dense
channels_last of up to 2,560 channels in whole 4s; NCHW of up to 1,024 channels in whole 8s whose positions come in
whole 4s; NCHW of up to 2,048 channels in whole 32s and up to 256 positions. These do without dZ too.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import heuristics, launch
from .tiles import MapStrides

_library = torch.library.Library(native.NAMESPACE, "IMPL")

_ALIGNMENT = 16
"""Of addresses that the copy engine takes, in bytes."""

MOST_SPREAD_CHANNELS, FEWEST_SPREAD_BYTES, MOST_SPREAD_BYTES = 512, 48 * 1024, 16 * 1024**2
"""Of the half-precision images that are spread over clusters of blocks forward, where there are few of them: as many
channels as that kernel takes (csrc/cuda/attend_forward_spread.cu), as many bytes as at least two blocks share, and
about as many as were measured: a cluster has sixteen multiprocessors at most, and Triton's splits have them all."""

FEWEST_CHANNELS = 768
"""Of half-precision channels_last maps that go here besides, in both directions: a forward sweep here with a backward
sweep of Triton's takes longer than two of Triton's (64 × 384 × 14² on an H100: 22.6 µs for 21.5)."""


@functools.cache
def _operators() -> Any:
    """torch.ops.ar_kernels_native, or None where it has no such kernels."""
    if not native.has_sweeps():
        return None
    found = torch.ops.ar_kernels_native
    for name in ("sweep_forward_", "sweep_backward_"):  # called where nothing is recorded
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    launch.operators[:] = found.sweep_forward_.default, found.sweep_backward_.default  # by two threads, it may be
    return found


def can_read(z: Tensor, w: Tensor, *others: Tensor | None) -> bool:
    """Whether addresses and dtypes are as these sweeps want them, on a GPU, in a library that has them. others: the
    scores' weights, and maps beside z."""
    return (
        z.is_cuda
        and (z.dtype.itemsize == 2 or (z.dtype == torch.float32 and native.SWEEPS_FLOAT32))
        and w.dtype in (z.dtype, torch.float32)
        and all([value is None or value.data_ptr() % _ALIGNMENT == 0 for value in (z, w, *others)])
        and _operators() is not None
    )


def _is_faster(z: MapStrides, channels: int, itemsize: int, chip: heuristics.Chip) -> bool:
    """Where this replaces Triton; docs/performance.md has the measurements."""
    if chip.capability != 9:
        return False
    if itemsize == 4:  # Triton makes three products of one
        return True
    return z.vector < 8 if z.unit == "s" else channels >= FEWEST_CHANNELS


def spreads_few(
    z: MapStrides, sizes: Sequence[int], heads: int, itemsize: int, alike: bool, chip: heuristics.Chip
) -> bool:
    """Whether a forward sweep here takes such maps where their images are too few for all of the GPU: Triton would
    split them and merge, or leave most of it idle."""
    fits = sizes[1] % 8 == 0 and sizes[1] <= MOST_SPREAD_CHANNELS and z.vector == 8 and z.flat
    fits = fits and FEWEST_SPREAD_BYTES <= math.prod(sizes[1:]) * itemsize <= MOST_SPREAD_BYTES
    return chip.capability == 9 and itemsize == 2 and heads <= 4 and fits and not alike


def forward_sweep(
    z: MapStrides,
    sizes: Sequence[int],
    strides: Sequence[int],
    heads: int,
    itemsize: int,
    alike: bool,
    chip: heuristics.Chip,
) -> tuple[Any, int]:
    """The operator for such maps and into how many splits it cuts an image, whose parts are then to be merged; or None
    and 0: the Triton kernel is faster, or there is none. alike: as in heuristics.sweep_config."""
    few = 2 * sizes[0] <= chip.processors and spreads_few(z, sizes, heads, itemsize, alike, chip)
    if not (few or _is_faster(z, sizes[1], itemsize, chip)):
        return None, 0
    splits = _operators().sweep_forward_splits(sizes, strides, heads, itemsize, alike)
    return (_operators().sweep_forward_.default, splits) if splits else (None, 0)


def backward_sweep(
    z: MapStrides,
    sizes: Sequence[int],
    strides: Sequence[int],
    up_strides: Sequence[int] | None,
    dz_strides: Sequence[int] | None,
    heads: int,
    itemsize: int,
    chip: heuristics.Chip,
) -> tuple[Any, int]:
    """The operator for such maps and the number of its shares of dW_H, or None and 0."""
    if not _is_faster(z, sizes[1], itemsize, chip):
        return None, 0
    programs = _operators().sweep_backward_programs(sizes, strides, up_strides, dz_strides, heads, itemsize)
    return (_operators().sweep_backward_.default, programs) if programs else (None, 0)


def upstream_as_read(
    z: Tensor, w: Tensor, score_w: Tensor | None, upstream: Tensor | None, dz: Tensor | None
) -> Tensor | None:
    """upstream, copied to dz's layout where these sweeps take a float32 map, but no upstream like this one.

    Triton's would make other logits than the forward sweep did, and its lse would not match them: half as exact, and
    slower."""
    if upstream is None or dz is None or heuristics.chip(z.get_device()).capability != 9:
        return upstream
    takes_map = native.sweeps_float32(z, w.shape[0]) and can_read(z, w, score_w, dz)
    if not takes_map or (upstream.stride() == dz.stride() and can_read(z, w, upstream)):
        return upstream
    return dz.new_empty_strided(dz.shape, dz.stride()).copy_(upstream)


def aligned(value: Tensor | None) -> Tensor | None:
    """value, copied if it does not begin where these sweeps can load several of its numbers at once."""
    return value if value is None or value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def score_weights(score_w: Tensor | None, gates: Tensor | None, w: Tensor) -> Tensor | None:
    """score_w as these sweeps take it: where there are gates without scores, which weigh every head alike, zeros."""
    return w.new_zeros(w.shape) if score_w is None and gates is not None else score_w


def makes_pooled_gradient(z: MapStrides, dtype: torch.dtype) -> bool:
    """Whether the backward sweep of such maps makes the pooled features' gradients itself. In float16 they are scaled
    by the largest, which must be known before; in NCHW it would take longer than a kernel of its own."""
    return dtype == torch.bfloat16 and z.unit == "c"
