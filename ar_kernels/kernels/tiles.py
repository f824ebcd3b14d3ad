"""What the kernels share: addressing of a feature map of any strides, and what launchers derive from a tensor."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class MapStrides(NamedTuple):
    """Strides in elements of [N, C, S] or [N, C, H, W], and how kernels address positions with them."""

    n: int
    c: int
    h: int
    w: int
    flat: bool  # position s lies at s · stride_w: rows follow each other without a gap
    wide: bool  # an offset inside one image can pass 2³¹


def map_strides(tensor: Tensor) -> MapStrides:
    if tensor.dim() == 3:
        (n, c, w), h, width = tensor.stride(), 0, tensor.shape[2]
        flat = True
    else:
        n, c, h, w = tensor.stride()
        height, width = tensor.shape[2:]
        if width == 1:
            w = h  # the row stride is then the position stride
        flat = height == 1 or width == 1 or h == w * width
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]))
    return MapStrides(n, c, h, w, flat, last >= 2**31)


def row_width(tensor: Tensor) -> int:
    return tensor.shape[-1]


def position_count(tensor: Tensor) -> int:
    return tensor.shape[2] if tensor.dim() == 3 else tensor.shape[2] * tensor.shape[3]


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def matmul_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch.set_float32_matmul_precision, as PyTorch's own do on the same device."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def tile_offsets(
    positions, channels, width, stride_c, stride_h, stride_w, FLAT: tl.constexpr, WIDE: tl.constexpr
):  # [S_tile], [C_tile] → [S_tile, C_tile]
    if WIDE:
        positions = positions.to(tl.int64)
        channels = channels.to(tl.int64)
    if FLAT:
        rows = positions * stride_w
    else:
        rows = positions // width * stride_h + positions % width * stride_w
    return rows[:, None] + (channels * stride_c)[None, :]
