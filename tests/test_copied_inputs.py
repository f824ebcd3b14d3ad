"""The operators on values that were copied to the GPU, and next to nothing of PyTorch's: for initcheck (sanitizer.py).

It knows what copies and the kernels that it looks at have written, and takes everything else for uninitialised: in
another test the results of PyTorch's own kernels, which are too many and too large to be looked at as well. Here, too,
memory is what the allocator hands out, where other tests find NaN in it.
"""

import pytest
import torch
from layers import LAYOUTS

from ar_kernels import ops

pytestmark = pytest.mark.gpu

POINTWISE = {
    "small": {},
    "split over positions": {"n": 1, "c": 40, "h": 17, "w": 19},
    "more images than programs": {"n": 300, "c": 8},
    "aligned rows": {"c": 32, "h": 8, "w": 16},
    "channels in parts": {"c": 160, "h": 4, "w": 8},
    "channels in chunks": {"n": 2, "c": 530, "h": 4, "w": 9},
    "channels of each warp's own": {"n": 2, "c": 648, "h": 3, "w": 6},
    "rows of eight channels": {"n": 2, "c": 136, "h": 7, "w": 7, "k": 2},
    "many heads": {"c": 70, "k": 60},
}
SPATIAL = {
    "small": {},
    "split over positions": {"n": 1, "c": 40, "h": 17, "w": 19},
    "bands": {"n": 2, "c": 16, "h": 30, "w": 20},
    "a band of each line": {"n": 1, "c": 4, "h": 3, "w": 260},
    "lines that are tiles": {"n": 2, "c": 72, "h": 3, "w": 40},
    "channels in chunks": {"n": 2, "c": 200, "h": 4, "w": 8},
    "sums over channels by several programs": {"n": 2, "c": 264, "h": 2, "w": 3},
    "lines with all their channels": {"n": 3, "c": 136, "h": 4, "w": 34, "k": 2},
    "images that are tiles": {"n": 8, "c": 72, "h": 9, "w": 8, "k": 2},
}


class Values:
    """Random ones, drawn and laid out on the CPU; a copy keeps the strides of what has no gaps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, layout=None, scale: float = 1.0) -> torch.Tensor:
        value = (torch.randn(shape, generator=self.generator) * scale).to(dtype)
        if layout is None:
            return value.to(self.device)
        placed = layout(value)
        storage = torch.empty(0, dtype=dtype).set_(placed.untyped_storage()).to(self.device)
        return storage.as_strided(placed.shape, placed.stride(), placed.storage_offset())

    def like(self, value: torch.Tensor) -> torch.Tensor:
        return self(*value.shape, dtype=value.dtype)


@pytest.fixture(autouse=True)
def copied_gradient(monkeypatch):
    """initcheck does not see what the copy engine writes, as csrc/cuda's sweeps write dZ. So dZ begins as a copy too,
    of NaN: a place that nothing writes is not finite."""
    allocate = ops._allocate_gradients

    def allocate_and_copy(*arguments):
        gradients = allocate(*arguments)
        dz = gradients[0]
        dz.copy_(torch.empty_strided(dz.shape, dz.stride(), dtype=dz.dtype).fill_(torch.nan))
        return gradients

    monkeypatch.setattr(ops, "_allocate_gradients", allocate_and_copy)


@pytest.fixture
def few_programs(monkeypatch):
    """So that 3×3 heads' kernels for many images take few."""
    attend3x3 = pytest.importorskip("ar_kernels.kernels.attend3x3", reason="the triton package is not installed")
    small = attend3x3.chip(torch.cuda.current_device())._replace(processors=2)
    monkeypatch.setattr(attend3x3, "chip", lambda index: small)
    for name, value in {"LEAST_LINES": 1, "LEAST_BUSY": 0.0, "MOST_BANDWIDTH": float("inf")}.items():
        monkeypatch.setattr(attend3x3, name, value)


def assert_finite(results: tuple[torch.Tensor, ...]) -> None:
    assert all(value.cpu().isfinite().all() for value in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("taps", "shape"), [*((1, shape) for shape in POINTWISE), *((9, shape) for shape in SPATIAL)], ids=str
)
def test_attend(taps, shape, layout, dtype, fused, device, request):
    if shape in ("lines with all their channels", "images that are tiles"):
        request.getfixturevalue("few_programs")
    if layout in ("batch_last", "slice") and (shape != "small" or dtype != torch.bfloat16):
        pytest.skip("addresses alone differ")
    sizes = {"n": 3, "c": 5, "h": 3, "w": 4, "k": 3} | (POINTWISE if taps == 1 else SPATIAL)[shape]
    n, c, h, w, k = sizes.values()
    values, operators, kernel = Values(device), ops._operators(fused), () if taps == 1 else (3, 3)
    z = values(n, c, h, w, dtype=dtype, layout=LAYOUTS[layout])
    weight, score_weight = (values(k + 2, c, *kernel, dtype=dtype, scale=0.125) for _ in range(2))
    biases = [values(k + 2, dtype=dtype) for _ in range(2)]
    last, mean = layout == "channels_last", shape != "rows of eight channels"  # which are no rows beside a mean
    if taps == 1:
        saved = operators.gated_attend(z, weight, biases[0], score_weight, biases[1], k, True, mean)
    else:
        saved = operators.gated_attend3x3(z, weight, biases[0], score_weight, biases[1], k, True)
    assert_finite(saved)
    pooled, lse, logits, scores, gates, _, _ = saved
    kept = (pooled, lse, scores, gates) if taps == 1 else (pooled, lse, logits, scores, gates)
    grads = [values.like(value) if value.numel() else None for value in (*saved, z)]
    to_receive = (grads, [grads[0], *[None] * 7], [None, *grads[1:]])
    for wanted in ((*received, True, True, True, last) for received in to_receive):
        if taps == 1:
            assert_finite(operators.gated_attend_backward(z, weight, biases[0], score_weight, *kept, *wanted))
        else:
            assert_finite(operators.gated_attend3x3_backward(z, weight, score_weight, *kept, *wanted))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "n", "c", "h", "w", "mean", "dtype"),
    [
        *(("channels_last", 3, 64, 3, 5, True, dtype) for dtype in DTYPES),
        *(("channels_last", 2, 1152, 5, 7, False, dtype) for dtype in DTYPES),
        *(("channels_last", 2, 128, 15, 17, True, dtype) for dtype in DTYPES),
        *(("contiguous", 3, 128, 7, 7, True, dtype) for dtype in DTYPES),
        *(("contiguous", 2, 256, 14, 14, False, dtype) for dtype in DTYPES),
        *(("contiguous", 2, 256, 8, 17, True, dtype) for dtype in DTYPES),
        ("contiguous", 3, 32, 6, 12, True, torch.float32),
        ("contiguous", 3, 32, 8, 16, True, torch.float32),
        ("contiguous", 2, 640, 8, 8, False, torch.float32),
    ],
    ids=str,
)
def test_sweeps(native_sweeps, layout, n, c, h, w, mean, dtype, device):
    values, operators = Values(device), ops._operators("triton")
    z = values(n, c, h, w, dtype=dtype, layout=LAYOUTS[layout])
    weight, score_weight = (values(4, c, dtype=dtype, scale=0.125) for _ in range(2))
    biases = [values(4, dtype=dtype) for _ in range(2)]
    saved = operators.gated_attend(z, weight, biases[0], score_weight, biases[1], 3, True, mean)
    assert_finite(saved)
    pooled, lse, logits, scores, gates, _, _ = saved
    grads = [values.like(value) if value.numel() else None for value in saved]
    wanted = (True, True, True, layout == "channels_last")
    for upstream in (None, values(n, c, h, w, dtype=dtype, layout=LAYOUTS[layout])):
        given = (pooled, lse, scores, gates, *grads[:2], grads[2], grads[3], grads[4], grads[5], grads[6], upstream)
        assert_finite(operators.gated_attend_backward(z, weight, biases[0], score_weight, *given, *wanted))
    assert ("forward_sweep", True) in native_sweeps and ("backward_sweep", True) in native_sweeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", ["logit", "log", "prob"])
def test_rectify(mix, dtype, fused, device):
    values, operators = Values(device), ops._operators(fused)
    hypotheses, scores = values(3, 4, 37, dtype=dtype), values(3, 4, dtype=torch.float32)
    output, lse = operators.rectify(hypotheses, scores, mix, "softmax")
    grad = values.like(output)
    gradients = operators.rectify_backward(grad, hypotheses, scores, output, lse, mix, "softmax")
    assert_finite((output, *gradients))


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.parametrize("labels", [37, 150])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(w_dtype, labels, implementation, device):
    values, operators = Values(device), ops._operators(implementation)
    features, output_w = values(35, 130, dtype=torch.bfloat16), values(labels, 130, dtype=w_dtype)
    hypothesis = operators.hypothesis(features, output_w)
    gradients = operators.hypothesis_backward(values.like(hypothesis), features, output_w, True, True)
    assert_finite((hypothesis, *gradients))


@pytest.mark.parametrize("implementation", ["triton"])
def test_masks(implementation, device):
    values, operators = Values(device), ops._operators(implementation)
    logits, lse = values(3, 5, 35, dtype=torch.float32), values(3, 5, dtype=torch.float32, scale=0.125)
    masks = operators.attention_masks(logits, lse, 3)
    gradients = operators.attention_masks_backward(values.like(masks), masks, 5)
    maps = values.like(masks).unflatten(2, (5, 7))
    parts, gram = operators.mask_overlap(maps)
    slope = operators.mask_overlap_backward(values(1, dtype=torch.float32)[0], maps, gram)
    assert_finite((masks, *gradients, parts, gram, slope))
