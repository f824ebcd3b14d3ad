"""The masks that the user gets, and their regulariser: each a kernel forward and one backward, for small tensors whose
many operations would take a launch each.

    A = exp(ℓ - lse):  dℓ = A ⊙ dA,  dlse = -Σ_s dℓ
    M = A averaged over 2×2 positions, E = M Mᵀ with a zero diagonal:  of f = Σ E²  dM = 4 E M

Bytes: what goes in read once, from cache by each head of an image, and what comes out written once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heuristics import SUMS_OVER_LANES, next_power_of_2
from .launch import Launch
from .tiles import accumulator, finite


@triton.jit
def softmax_kernel(
    logits, lse, masks, positions,
    ALL: tl.constexpr, HEADS: tl.constexpr, S_TILE: tl.constexpr,
):  # fmt: skip
    """logits [N, ALL, S], lse [N, ALL] → masks [N, HEADS, S] of the first heads. One program: some s of one head."""
    row = tl.program_id(0).to(tl.int64)
    source = row // HEADS * ALL + row % HEADS
    s = tl.program_id(1) * S_TILE + tl.arange(0, S_TILE)
    log_sum = finite(tl.load(lse + source))
    a = tl.exp(tl.load(logits + source * positions + s, mask=s < positions, other=float("-inf")) - log_sum)
    tl.store(masks + row * positions + s, a, mask=s < positions)


@triton.jit
def softmax_backward_kernel(
    grad, masks, dlogits, dlse, positions,
    ALL: tl.constexpr, HEADS: tl.constexpr, S_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits [N, ALL, S] and dlse [N, ALL], 0 for heads without masks. One program: one head of one image."""
    row = tl.program_id(0).to(tl.int64)
    k = row % ALL
    of_head = row // ALL * HEADS + k
    total = tl.zeros([S_TILE], ACC)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        real = (s < positions) & (k < HEADS)
        a = tl.load(masks + of_head * positions + s, mask=real, other=0.0)
        dl = a * tl.load(grad + of_head * positions + s, mask=real, other=0.0)
        tl.store(dlogits + row * positions + s, dl, mask=s < positions)
        total += dl
    tl.store(dlse + row, -tl.sum(total, axis=0))


@triton.jit
def _pooled(masks, row, p, width, P, P_WIDTH, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """M at pooled positions p of rows that start at `row`, averaged over DOWN×ACROSS positions; 0 past the last."""
    at = masks + row + p // P_WIDTH * (DOWN * width) + p % P_WIDTH * ACROSS
    real = (p < P) & (row >= 0)
    total = tl.load(at, mask=real, other=0.0)
    if ACROSS == 2:
        total += tl.load(at + 1, mask=real, other=0.0)
    if DOWN == 2:
        total += tl.load(at + width, mask=real, other=0.0)
        if ACROSS == 2:
            total += tl.load(at + width + 1, mask=real, other=0.0)
    return total / (DOWN * ACROSS)


@triton.jit
def overlap_kernel(
    masks, gram, parts, height, width,
    HEADS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, K_TILE: tl.constexpr, P_TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: row j of one image's E, gram [N, K, K], and the sum of its squares, parts [N, K]."""
    row = tl.program_id(0).to(tl.int64)
    n, j = row // HEADS, row % HEADS
    heads = tl.arange(0, K_TILE)
    size, P_WIDTH = height * width, width // ACROSS
    P = height // DOWN * P_WIDTH
    rows = tl.where(heads < HEADS, (n * HEADS + heads) * size, -1)
    e = tl.zeros([K_TILE], ACC)
    for start in range(0, P, P_TILE):
        p = start + tl.arange(0, P_TILE)
        m = _pooled(masks, rows[:, None], p[None, :], width, P, P_WIDTH, DOWN, ACROSS)
        own = _pooled(masks, row * size, p, width, P, P_WIDTH, DOWN, ACROSS)
        e += tl.sum(m * own[None, :], axis=1)
    e = tl.where(heads == j, 0.0, e)
    tl.store(gram + row * HEADS + heads, e, mask=heads < HEADS)
    tl.store(parts + row, tl.sum(e * e, axis=0))


@triton.jit
def overlap_backward_kernel(
    factor, masks, gram, dmasks, height, width,
    HEADS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, S_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dA = factor · df/dA of f = Σ E²: 4 E M / (DOWN·ACROSS), 0 where nothing is pooled. One program: some s of one
    head."""
    row = tl.program_id(0).to(tl.int64)
    first = row // HEADS * HEADS
    size, P_WIDTH = height * width, width // ACROSS
    P = height // DOWN * P_WIDTH
    s = tl.program_id(1) * S_TILE + tl.arange(0, S_TILE)
    y, x = s // width // DOWN, s % width // ACROSS
    p = tl.where((y < height // DOWN) & (x < P_WIDTH), y * P_WIDTH + x, P)
    da = tl.zeros([S_TILE], ACC)
    for j in range(HEADS):
        m = _pooled(masks, (first + j) * size, p, width, P, P_WIDTH, DOWN, ACROSS)
        da += tl.load(gram + row * HEADS + j) * m
    tl.store(dmasks + row * size + s, da * (tl.load(factor) * (4.0 / (DOWN * ACROSS))), mask=s < size)


# ---------------------------------------------------------------------------------------------- launching


@functools.lru_cache(maxsize=1024)
def _softmax_plan(images: int, every: int, heads: int, positions: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    tile = min(1024, next_power_of_2(positions))
    sizes, constants = (positions,), {"ALL": every, "HEADS": heads, "S_TILE": tile, "num_warps": 4}
    forward = Launch(softmax_kernel, (images * heads, -(-positions // tile)), sizes, **constants)
    backward = Launch(softmax_backward_kernel, (images * every,), sizes, **constants, ACC=accumulator(dtype))
    return forward, backward


def softmax_forward(logits: Tensor, lse: Tensor, masks: Tensor) -> None:
    """Launches into masks [N, K, S]."""
    (images, every, positions), heads = logits.shape, masks.shape[1]
    _softmax_plan(images, every, heads, positions, logits.dtype)[0](logits, lse, masks)


def softmax_backward(grad: Tensor, masks: Tensor, dlogits: Tensor, dlse: Tensor) -> None:
    """Launches into dlogits [N, K_all, S] and dlse [N, K_all]."""
    (images, every, positions), heads = dlogits.shape, masks.shape[1]
    _softmax_plan(images, every, heads, positions, masks.dtype)[1](grad, masks, dlogits, dlse)


@functools.lru_cache(maxsize=1024)
def _overlap_plan(sizes: torch.Size, dtype: torch.dtype) -> tuple[Launch, Launch]:
    images, heads, height, width = sizes
    constants = {"HEADS": heads, "DOWN": min(height, 2), "ACROSS": min(width, 2), "ACC": accumulator(dtype)}
    head_tile, tile = next_power_of_2(heads), min(512, next_power_of_2(height * width))
    forward = Launch(
        overlap_kernel, (images * heads,), (height, width), **constants, K_TILE=head_tile,
        P_TILE=min(max(16, 2048 // head_tile), tile), num_warps=4, **SUMS_OVER_LANES,
    )  # fmt: skip
    grid = images * heads, -(-height * width // tile)
    return forward, Launch(overlap_backward_kernel, grid, (height, width), **constants, S_TILE=tile, num_warps=4)


def overlap_forward(masks: Tensor, gram: Tensor, parts: Tensor) -> None:
    """Launches into gram [N, K, K] and parts [N, K]."""
    _overlap_plan(masks.shape, masks.dtype)[0](masks, gram, parts)


def overlap_backward(factor: Tensor, masks: Tensor, gram: Tensor, dmasks: Tensor) -> None:
    """Launches into dmasks [N, K, H, W]; factor: a number."""
    _overlap_plan(masks.shape, masks.dtype)[1](factor, masks, gram, dmasks)
