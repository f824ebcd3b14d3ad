"""The sweeps of float32 maps as PyTorch's own matrix products, with a kernel between them, where csrc/cuda has no sweep
for a map and it is not so small that Triton's is faster.

    ℓ = W_H Z,  p = exp(ℓ + b_H − m),  parts m, d = Σ p, p Zᵀ: one split's, which merge_kernel makes results of
    ℓ, dA = (W_H, dP) Z,  a = exp(ℓ + b_H − lse),  dℓ = a ⊙ (dA − δ) + direct,  δ = Σ a dA − dlse
    dZ = (W_H, dP)ᵀ (dℓ, a) + upstream,  dW_H = dℓ Zᵀ, a share of each image

W_H and dP lie side by side, row 2k and 2k+1, and so do dℓ and a; backward a mean is one more head. Triton has three
TF32 products on the matrix units for one in float32; these are as PyTorch is told to make them.

Bytes: |Z| read twice in each direction, |dZ| written once and once more where an upstream gradient is added, O(N·K·(C
+ S)) besides.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .heuristics import SUMS_OVER_LANES, next_power_of_2
from .launch import Call, Launch
from .tiles import map_strides, origin

SMALL, SMALL_HEADS = 10_000_000, 16
"""The most bytes and heads of a map that Triton's sweeps take on Hopper. A layer of 1.6 MB takes as long either way on
the device and by Triton's a third of the host's time; one of 9.6 MB 118 µs by Triton's and 84 here, which is faster
than eager's 133 both; one of 15.7 MB 212, 109 and 170 (8 heads, an H100; docs/tuning.md)."""


def are_faster(z: Tensor, heads: int, alike: bool) -> bool:
    """Whether these take a float32 map that no sweep of csrc/cuda takes; docs/tuning.md has the measurements. Not one
    whose images are no matrices in memory, which PyTorch would copy. alike: an image's results may not depend on its
    batch, by which PyTorch cuts products."""
    if z.dtype != torch.float32 or alike:
        return False
    if heads <= SMALL_HEADS and z.nbytes <= SMALL and heuristics.chip(z.get_device()).capability == 9:
        return False
    return _are_matrices(z.shape, z.stride())


@functools.lru_cache(maxsize=1024)
def _are_matrices(sizes: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the images of a float32 map are matrices of rows that do not overlap."""
    z, positions = map_strides(sizes, strides, torch.float32.itemsize), sizes[2:].numel()
    if not z.flat or z.unit == "" or sizes[0] * positions >= 2**31:
        return False
    row, length = (z.c, positions) if z.unit == "s" else (z.w, sizes[1])
    return row * z.vector >= length


SIZES = ("positions", "image", "row_step", "step")
"""What changes with resolution and layout, and must not compile anew: of logits the steps in memory of an image, a row
and a position."""


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    products, b, logits, weights, part_m, part_d, positions, image, row_step, step,
    HEADS: tl.constexpr, S_TILE: tl.constexpr,
):  # fmt: skip
    """products [N, HEADS, S] → logits, unless None, with b; weights, part_m and part_d [N, HEADS]. One program: one
    row."""
    row = tl.program_id(0).to(tl.int64)
    products += row // HEADS * image + row % HEADS * row_step
    bias = tl.load(b + row % HEADS) if b is not None else 0.0
    most = tl.full([S_TILE], float("-inf"), tl.float32)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        real = s < positions
        logit = tl.load(products + s.to(tl.int64) * step, mask=real, other=0.0) + bias
        if logits is not None:
            tl.store(logits + row * positions + s, logit, mask=real)
        most = tl.maximum(most, tl.where(real, logit, float("-inf")))
    m = tl.max(most, axis=0)
    beginning = origin(m)
    total = tl.zeros([S_TILE], tl.float32)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        real = s < positions
        logit = tl.load(products + s.to(tl.int64) * step, mask=real, other=0.0) + bias
        weight = tl.where(real, tl.exp(logit - beginning), 0.0)
        tl.store(weights + row * positions + s, weight, mask=real)
        total += weight
    tl.store(part_m + row, m)
    tl.store(part_d + row, tl.sum(total, axis=0))


@triton.jit
def _mask_and_gradient(products, s, real, shift, row_step, step):
    """a and dA at some positions of a row, 0 outside."""
    products += s.to(tl.int64) * step
    a = tl.where(real, tl.exp(tl.load(products, mask=real, other=0.0) - shift), 0.0)
    return a, tl.load(products + row_step, mask=real, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def mask_gradient_kernel(
    products, b, lse, grad_lse, grad_logits, dl_a, positions, image, row_step, step,
    HEADS: tl.constexpr, ROWS: tl.constexpr, S_TILE: tl.constexpr,
):  # fmt: skip
    """products [N, 2 ROWS, S], of a row the logit without its bias and dA → dl_a [N, ROWS, 2, S], dℓ and a; 0 and 1/S
    for the mean. One program: one row.

    δ is summed from the dA that it is taken from, not made of P: however products round, Σ_s dℓ stays 0."""
    row = tl.program_id(0).to(tl.int64)
    k = row % ROWS
    head = row // ROWS * HEADS + k
    products += row // ROWS * image + 2 * k * row_step
    dl_a += 2 * row * positions
    shift = tl.load(lse + head, mask=k < HEADS, other=0.0)
    if b is not None:
        shift -= tl.load(b + k, mask=k < HEADS, other=0.0)
    total = tl.zeros([S_TILE], tl.float32)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        a, da = _mask_and_gradient(products, s, (s < positions) & (k < HEADS), shift, row_step, step)
        total += a * da
    delta = tl.sum(total, axis=0)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + head, mask=k < HEADS, other=0.0)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        attends = (s < positions) & (k < HEADS)
        a, da = _mask_and_gradient(products, s, attends, shift, row_step, step)
        dl = a * (da - delta)
        if grad_logits is not None:
            dl += tl.load(grad_logits + head * positions + s, mask=attends, other=0.0)
        tl.store(dl_a + s, dl, mask=s < positions)
        tl.store(dl_a + positions + s, tl.where(k < HEADS, a, 1.0 / positions), mask=s < positions)


# ---------------------------------------------------------------------------------------------- launching


@functools.lru_cache(maxsize=1024)
def _plan(images: int, heads: int, rows: int | None, positions: int, steps: tuple[int, ...]) -> Launch:
    """Of the forward without rows, of the backward with them."""
    tile = min(1024, next_power_of_2(positions))
    constants = {"HEADS": heads, "S_TILE": tile, "num_warps": 4}
    if rows is None:
        return Launch(weights_kernel, (images * heads,), (positions, *steps), **constants)
    return Launch(
        mask_gradient_kernel, (images * rows,), (positions, *steps), **constants, ROWS=rows, **SUMS_OVER_LANES
    )  # fmt: skip


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out=out)


def _average(z: Tensor, out: Tensor) -> None:
    torch.mean(z, 2, out=out)


def _new_products(like: Tensor, z: Tensor, rows: int) -> Tensor:
    """[N, rows, S] for sums over channels, with what lies beside each other in z [N, C, S] beside each other."""
    images, _, positions = z.shape
    if z.stride(1) == 1:
        return like.new_empty(images, positions, rows).mT
    return like.new_empty(images, rows, positions)


def forward_calls(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    logits: Tensor | None,
    mean: Tensor | None,
    part_m: Tensor,
    part_d: Tensor,
    part_p: Tensor,
) -> list[Call]:
    """What makes logits [N, K, S] and the mean [N, C], those that are not None, and the parts [N, K, ...] of one split.
    PyTorch averages by itself: its products add up one position after another, less exactly."""
    images, heads, z = len(z), len(w), z.flatten(2)
    products = _new_products(part_m, z, heads)
    weights = part_m.new_empty(images, heads, z.shape[2])
    plan = _plan(images, heads, None, z.shape[2], products.stride())
    factors = w.expand(images, -1, -1), z, products
    if z.mT.is_contiguous() and products.mT.is_contiguous():  # one product; a batch of them takes up to a third longer
        factors = z.mT.flatten(0, 1), w.t(), products.mT.flatten(0, 1)
    calls: list[Call] = [
        (_multiply, factors),
        (plan, (products, b, logits, weights, part_m, part_d)),
        (_multiply, (weights, z.mT, part_p)),
    ]
    return calls if mean is None else [*calls, (_average, (z, mean))]


def backward_calls(
    z: Tensor,
    b: Tensor | None,
    lse: Tensor,
    pairs: Tensor,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    upstream: Tensor | None,
    dz: Tensor | None,
    shares: Tensor | None,
) -> list[Call]:
    """What makes dz and shares [N, K, C] of dW_H, those that are not None; pairs: [N, K (+ 1), 2, C]."""
    images, heads, rows, z = len(z), lse.shape[1], pairs.shape[1], z.flatten(2)
    w_dp = pairs.flatten(1, 2)
    products = _new_products(lse, z, 2 * rows)
    dl_a = lse.new_empty(images, rows, 2, z.shape[2])
    plan = _plan(images, heads, rows, z.shape[2], products.stride())
    calls: list[Call] = [
        (_multiply, (w_dp, z, products)),
        (plan, (products, b, lse, grad_lse, grad_logits, dl_a)),
    ]
    if dz is not None:
        calls.append((_multiply, (w_dp.mT, dl_a.flatten(1, 2), dz.flatten(2))))
    if dz is not None and upstream is not None:
        calls.append((Tensor.add_, (dz, upstream)))
    if shares is not None:
        calls.append((_multiply, (dl_a[:, :, 0][:, :heads], z.mT, shares)))
    return calls
