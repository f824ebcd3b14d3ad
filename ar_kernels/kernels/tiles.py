"""What the kernels share: addressing of a feature map of any strides, and what launchers derive from a tensor."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .heuristics import Chip


class MapStrides(NamedTuple):
    """How kernels address [N, C, S] or [N, C, H, W]: strides in units of `vector` elements, but for the unit stride."""

    n: int
    c: int
    h: int
    w: int
    unit: str  # "c" or "s": what lies next to each other in memory; "" for neither
    vector: int  # a power of two: rows start at multiples of it, so it can be loaded at once
    flat: bool  # position s lies at s · w: rows follow each other without a gap
    wide: bool  # an offset inside one image can pass 2³¹


def map_strides(sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> MapStrides:
    if len(sizes) == 3:
        (n, c, w), h = strides, 0
        flat = True
    else:
        n, c, h, w = strides
        height, width = sizes[2:]
        if width == 1:
            w = h  # the row stride is then the position stride
        flat = height == 1 or width == 1 or h == w * width
        if flat:
            h = 0
    last = sum((size - 1) * stride for size, stride in zip(sizes[1:], strides[1:]))
    unit, others = ("c", (n, h, w)) if c == 1 else ("s", (n, c, h)) if w == 1 else ("", (n, c, h, w))
    vector = 1
    if unit:
        bits = 16 // itemsize
        for value in others:
            bits |= value
        if unit == "s":  # the last positions are masked a vector at a time
            bits |= math.prod(sizes[2:])
        vector = min(bits & -bits, 16 // itemsize)
    divided = [value if value == 1 and name == unit else value // vector for name, value in zip("ncs", (n, c, w))]
    return MapStrides(divided[0], divided[1], h // vector, divided[2], unit, vector, flat, last >= 2**31)


LONGEST_ROW = 512
"""Elements, of those that row_group makes."""


def row_group(z: MapStrides, channels: int, positions: int, itemsize: int) -> int:
    """How many channels follow each other without a gap and together fill whole 16 bytes, which one channel does not;
    1 where nothing is gained. 49 positions of half precision: 8 channels make one row of 784 bytes."""
    group = 16 // itemsize // z.vector
    dense = z.unit == "s" and z.flat and z.c * z.vector == positions
    fits = channels % group == 0 and z.n % group == 0 and group * positions <= LONGEST_ROW
    return group if dense and fits else 1


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def float32_precision(dtype: torch.dtype) -> str:
    """What torch.backends.cuda.matmul.fp32_precision asks of a map's products: "tf32" or "ieee"."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


def matmul_precision(dtype: torch.dtype, precision: str, head_tile: int, chip: Chip) -> str:
    """tl.dot's input_precision. precision: float32_precision's answer, for PyTorch's own products follow it as well.

    Full precision is three TF32 products on the matrix units, which keep 21 of float32's 24 bits in each term; with so
    many heads that matrix units spill registers, plain multiplications. AMD's matrix units take float32 as it is.
    """
    if dtype != torch.float32 or chip.amd:
        return "ieee"
    most, fast = (128, "tf32") if precision == "tf32" else (64, "tf32x3")
    return fast if head_tile <= most else "ieee"


@triton.jit
def position_offsets(
    positions, width, stride_h, stride_w,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        positions = positions.to(tl.int64)
    if FLAT:
        rows = positions
        if UNIT != "s":
            rows = positions * VECTOR * stride_w
    else:
        rows = positions % width
        if UNIT != "s":
            rows = rows * VECTOR * stride_w
        rows += positions // width * VECTOR * stride_h
    return rows


@triton.jit
def channel_offsets(channels, stride_c, UNIT: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        channels = channels.to(tl.int64)
    if UNIT != "c":
        channels = channels * VECTOR * stride_c
    return channels


@triton.jit
def tile_offsets(
    positions, channels, width, stride_c, stride_h, stride_w,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip  # [S_tile], [C_tile] → [S_tile, C_tile]
    rows = position_offsets(positions, width, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
    return rows[:, None] + channel_offsets(channels, stride_c, UNIT, VECTOR, WIDE)[None, :]


@triton.jit
def load_tile(
    z, positions, end, channels, width, stride_c, stride_h, stride_w,
    C: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[S_tile, C_tile] of an image, 0 outside. Loaded with what is adjacent in memory first: only then do both products
    that read a tile, itself and transposed, get it copied ahead of its turn on the older matrix instructions."""
    offsets = tile_offsets(positions, channels, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
    real = (positions < end)[:, None] & (channels < C)[None, :]
    if UNIT == "c":
        tile = tl.trans(tl.load(z + tl.trans(offsets), mask=tl.trans(real), other=0.0))
    else:
        tile = tl.load(z + offsets, mask=real, other=0.0)
    return tile


@triton.jit
def load_parts(
    z, positions, end, channels, width, stride_c, stride_h, stride_w,
    C: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[PARTS, C_tile, S_tile] of an image whose channels [PARTS, C_tile] lie next to each other, 0 outside: in memory's
    order, so that it is copied ahead of its turn."""
    rows = position_offsets(positions, width, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
    offsets = rows[None, None, :] + channel_offsets(channels, stride_c, UNIT, VECTOR, WIDE)[:, :, None]
    real = (positions < end)[None, None, :] & (channels < C)[:, :, None]
    return tl.load(z + offsets, mask=real, other=0.0)


@triton.jit
def tanh(t):
    e = tl.exp(-2.0 * tl.abs(t))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(t < 0, -y, y)


@triton.jit
def origin(m):
    """What exponents are counted from: the maximum m, or 0 where that is infinite and nothing could be counted."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def finite(lse):
    """NaN where lse is infinite: then there is no softmax."""
    return tl.where(tl.abs(lse) == float("inf"), float("nan"), lse)


@triton.jit
def aligned(value, VECTOR: tl.constexpr):
    """A scalar that is a multiple of VECTOR, known as such to the compiler."""
    return value // VECTOR * VECTOR


@triton.jit
def split_bounds(row, positions, splits, split_length, S_TILE: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr):
    """Image n of a row (image, split), int64, and the positions begin..end of the split, int32."""
    begin = (row % splits).to(tl.int32) * split_length
    end = tl.minimum(begin + split_length, positions)
    if UNIT == "s":
        begin = aligned(begin, S_TILE)
        end = aligned(end, VECTOR)
    return (row // splits).to(tl.int64), begin, end


@triton.jit
def load_rows(rows, heads, channels, C: tl.constexpr, HEADS: tl.constexpr):
    """[HEADS, C] row by row → [C_tile, K_tile], 0 outside."""
    real = (channels < C)[:, None] & (heads < HEADS)[None, :]
    return tl.load(rows + heads[None, :] * C + channels[:, None], mask=real, other=0.0)


@triton.jit
def part_channels(PARTS: tl.constexpr, C_TILE: tl.constexpr):
    """[PARTS, C_tile]"""
    return (tl.arange(0, PARTS) * C_TILE)[:, None] + tl.arange(0, C_TILE)[None, :]


@triton.jit
def load_head_values(values, heads, HEADS: tl.constexpr, ACC: tl.constexpr):
    """[HEADS] → [K_tile], 0 outside and for values that are None."""
    result = tl.zeros([heads.shape[0]], ACC)
    if values is not None:
        result += tl.load(values + heads, mask=heads < HEADS, other=0.0).to(ACC)
    return result
