"""Products with W_O of the few rows that a batch is, in half precision: F = g ⊙ P [N, K·C], W_O [L, K·C].

    o = F W_Oᵀ         dF = do W_O,  dW_O = doᵀ F

Both gradients come of one launch, and a float32 W_O is rounded as it is read, its gradient not at all: autocast's
copies of it are not made. A sum goes over its terms in the same order whatever the batch.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_MOST_IMAGES, _MOST_LABELS, _MOST_RESULTS = 256, 256, 2**15
"""Images, labels, and images times labels. Measured on an H100 against cuBLAS: faster up to 128 × 200 and 256 × 100,
slower backward at 32 × 1000, 1 × 1000 and 1024 × 10, since few programs go through what is summed."""

_MOST_COLUMNS = 4096
"""K·C: a program goes through all of them, and cuBLAS splits them. 2,560 were measured."""


def are_for_us(z: Tensor, output_w: Tensor) -> bool:
    """Whether the products of z's batch with output_w are for these kernels: on NVIDIA's GPUs, in half precision, few
    images, labels and columns, W_O's rows dense."""
    images, (labels, columns) = z.shape[0], output_w.shape
    few = images <= _MOST_IMAGES and labels <= _MOST_LABELS and images * labels <= _MOST_RESULTS
    is_ours = torch.version.hip is None and z.dtype.itemsize == 2
    return is_ours and few and columns <= _MOST_COLUMNS and output_w.stride(1) == 1


@triton.jit
def _store_product(
    a, a_row, a_inner, b, b_inner, b_column, out, tile, rows, inner, columns,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = a b, of which a program has a tile. a, b: rounded to DTYPE, of any strides."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, inner, INNER):
        i = first + tl.arange(0, INNER)
        left = tl.load(a + row * a_row + i[None, :] * a_inner, mask=(row < rows) & (i < inner)[None, :], other=0.0)
        right = tl.load(
            b + i[:, None] * b_inner + column * b_column, mask=(i < inner)[:, None] & (column < columns), other=0.0
        )
        total = tl.dot(left.to(DTYPE), right.to(DTYPE), total)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


@triton.jit(do_not_specialize=["images"])
def hypothesis_kernel(
    features, output_w, hypothesis, images, labels, columns, w_label, w_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: some images and some labels."""
    _store_product(
        features, columns, 1, output_w, w_column, w_label, hypothesis, tl.program_id(0), images, columns, labels,
        features.dtype.element_ty, ROWS, COLUMNS, INNER,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images", "tiles"])
def hypothesis_backward_kernel(
    grad, features, output_w, dfeatures, doutput_w, images, tiles, labels, columns,
    grad_image, grad_label, w_label, w_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: some columns and, of the first `tiles` programs, some images, of the others some labels."""
    tile = tl.program_id(0)
    dtype: tl.constexpr = grad.dtype.element_ty
    if dfeatures is not None:
        if tile < tiles:
            _store_product(
                grad, grad_image, grad_label, output_w, w_label, w_column, dfeatures, tile, images, labels, columns,
                dtype, ROWS, COLUMNS, INNER,
            )  # fmt: skip
    if doutput_w is not None:
        if tile >= tiles:
            _store_product(
                grad, grad_label, grad_image, features, columns, 1, doutput_w, tile - tiles, labels, images, columns,
                dtype, ROWS, COLUMNS, INNER,
            )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _forward_plan(images: int, labels: int, columns: int, w_strides: tuple[int, ...]) -> Launch:
    rows = 16
    return Launch(
        hypothesis_kernel, (triton.cdiv(images, rows), triton.cdiv(labels, rows)),
        (images, labels, columns, *w_strides),
        ROWS=rows, COLUMNS=rows, INNER=128, num_warps=4, num_stages=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _backward_plan(
    images: int,
    labels: int,
    columns: int,
    grad_strides: tuple[int, ...],
    w_strides: tuple[int, ...],
    w_bytes: int,
    needs_features: bool,
    needs_output_w: bool,
) -> Launch:
    wide = labels > 128
    rows, width, warps = (64, 128, 8) if wide else (32, 64, 4)
    inner = 64 if wide else 256 // w_bytes  # of a float32 W_O as many bytes
    tiles = triton.cdiv(images, rows) if needs_features else 0
    programs = tiles + (triton.cdiv(labels, rows) if needs_output_w else 0)
    return Launch(
        hypothesis_backward_kernel, (programs, triton.cdiv(columns, width)),
        (images, tiles, labels, columns, *grad_strides, *w_strides),
        ROWS=rows, COLUMNS=width, INNER=inner, num_warps=warps, num_stages=2,
    )  # fmt: skip


def _check_sizes(features: Tensor, output_w: Tensor) -> None:
    if max(features.numel(), output_w.numel()) >= 2**31:
        sizes = f"{tuple(features.shape)} and {tuple(output_w.shape)}"
        raise ValueError(f"features and output_w must have fewer than 2³¹ values each, got {sizes}")


def _near(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of one whose offsets pass 2³¹."""
    last = sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride()))
    return matrix if last < 2**31 else matrix.contiguous()


def hypothesis(features: Tensor, output_w: Tensor, out: Tensor) -> None:
    """Launches into out [N, L]; features: contiguous [N, K·C]. output_w: [L, K·C], any strides."""
    _check_sizes(features, output_w)
    output_w = _near(output_w)
    _forward_plan(*out.shape, features.shape[1], output_w.stride())(features, output_w, out)


def hypothesis_backward(
    grad: Tensor, features: Tensor, output_w: Tensor, dfeatures: Tensor | None, doutput_w: Tensor | None
) -> None:
    """Launches into dfeatures [N, K·C] and doutput_w [L, K·C]; grad: [N, L], any strides."""
    _check_sizes(features, output_w)
    grad, output_w = _near(grad), _near(output_w)
    launch = _backward_plan(
        *grad.shape, features.shape[1], grad.stride(), output_w.stride(), output_w.itemsize,
        dfeatures is not None, doutput_w is not None,
    )  # fmt: skip
    launch(grad, features, output_w, dfeatures, doutput_w)
