"""A batch's products with W_O by kernels of their own (ar_kernels.kernels.products): values, strides, which ones."""

import pytest
import torch

import ar_kernels
from ar_kernels import ops

products = pytest.importorskip("ar_kernels.kernels.products", reason="the triton package is not installed")

SIZES = [(1, 1, 1), (3, 10, 24), (17, 33, 130), (33, 65, 257), (16, 200, 136), (2, 130, 72)]  # images, labels, columns
HALVES = [torch.bfloat16, torch.float16]


def drawn(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def budget(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far the product of two matrices, float64, may be off: float32 sums of exact products, one rounding."""
    terms = left.shape[1] * torch.finfo(torch.float32).eps
    return terms * (left.abs() @ right.abs()) + torch.finfo(dtype).eps / 2 * (left @ right).abs() * 1.01


def check(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    left, right = left.double(), right.double()
    off, most = (got.double() - left @ right).abs(), budget(left, right, got.dtype)
    assert (off <= most).all(), (off / most).max()


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.parametrize("w_dtype", ["the features'", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, dtype, w_dtype, implementation, device):
    """A float32 W_O is rounded as it is read, its gradient is not."""
    images, labels, columns = sizes
    features = drawn(images, columns, dtype=dtype, device=device)
    weight = drawn(labels, columns, dtype=torch.float32, device=device, seed=1)
    weight = weight if w_dtype == "float32" else weight.to(dtype)
    grad = drawn(images, labels, dtype=dtype, device=device, seed=2)
    rounded = weight.to(dtype)
    hypothesis = torch.ops.ar_kernels.hypothesis(features, weight)
    assert hypothesis.dtype == dtype
    check(hypothesis, features, rounded.t())
    dfeatures, dweight = torch.ops.ar_kernels.hypothesis_backward(grad, features, weight, True, True)
    assert dfeatures.dtype == dtype and dweight.dtype == weight.dtype
    check(dfeatures, grad, rounded)
    check(dweight, grad.t(), features)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_is_empty(needs, implementation, device):
    features, weight, grad = (drawn(*s, dtype=torch.bfloat16, device=device) for s in ((5, 40), (7, 40), (5, 7)))
    both = torch.ops.ar_kernels.hypothesis_backward(grad, features, weight, True, True)
    found = torch.ops.ar_kernels.hypothesis_backward(grad, features, weight, *needs)
    for is_needed, whole, got in zip(needs, both, found):
        assert torch.equal(got, whole) if is_needed else got.numel() == 0


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("implementation", ["triton"])
def test_any_strides(implementation, device):
    """A gradient of a stack, one of a sum, a weight by columns and one with gaps, features that are not dense."""
    features, weight, grad = (drawn(*s, dtype=torch.bfloat16, device=device) for s in ((6, 40), (7, 40), (6, 7)))

    def results(features, weight, grad):
        return torch.ops.ar_kernels.hypothesis(features, weight), *torch.ops.ar_kernels.hypothesis_backward(
            grad, features, weight, True, True
        )

    want = results(features, weight, grad)
    gapped = torch.stack([weight, weight], dim=2)[..., 0]
    for odd in (
        (features, weight, torch.stack([grad, -grad], dim=1)[:, 0]),
        (features, weight, grad.t().contiguous().t()),
        (features, weight.t().contiguous().t(), grad),
        (features, gapped, grad),
        (features.t().contiguous().t(), weight, grad),
        (features, torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(7, 40), grad),  # unaligned
    ):
        for got, same in zip(results(*odd), want):
            assert torch.equal(got, same)
    expanded = grad[:1, :1].expand(6, 7)
    for got, same in zip(results(features, weight, expanded), results(features, weight, expanded.contiguous())):
        assert torch.equal(got, same)


def test_matrices_whose_offsets_pass_31_bits_are_copied():
    wide = torch.empty_strided((3, 2), (2**30, 1), device="meta")
    assert products._near(wide).stride() == (2, 1)
    assert products._near(wide[:2]).stride() == (2**30, 1)


def test_no_images(device):
    features, weight, grad = (drawn(*s, dtype=torch.bfloat16, device=device) for s in ((0, 40), (7, 40), (0, 7)))
    assert torch.ops.ar_kernels.hypothesis(features, weight).shape == (0, 7)
    dfeatures, dweight = torch.ops.ar_kernels.hypothesis_backward(grad, features, weight, True, True)
    assert dfeatures.shape == (0, 40) and torch.equal(dweight, torch.zeros_like(weight))


def test_a_row_has_the_same_bits_in_every_batch(device):
    features, weight, grad = (drawn(*s, dtype=torch.bfloat16, device=device) for s in ((40, 300), (20, 300), (40, 20)))
    hypothesis = torch.ops.ar_kernels.hypothesis(features, weight)
    dfeatures, _ = torch.ops.ar_kernels.hypothesis_backward(grad, features, weight, True, False)
    for rows in (slice(0, 1), slice(7, 30), slice(33, 40)):
        assert torch.equal(torch.ops.ar_kernels.hypothesis(features[rows], weight), hypothesis[rows])
        part, _ = torch.ops.ar_kernels.hypothesis_backward(grad[rows], features[rows], weight, True, False)
        assert torch.equal(part, dfeatures[rows])


def test_which_are_small(monkeypatch):
    def small(images, labels, columns, dtype=torch.bfloat16):
        return products.are_for_us(torch.empty(images, 1, device="meta", dtype=dtype), torch.empty(labels, columns))

    assert small(128, 100, 2560) and small(256, 100, 640) and small(2, 10, 256) and small(256, 128, 4096)
    assert not small(257, 10, 256)  # images
    assert not small(2, 257, 256)  # labels
    assert not small(256, 129, 256)  # results
    assert not small(2, 10, 4097)  # columns
    assert not small(2, 10, 256, torch.float32) and not small(2, 10, 256, torch.float64)
    z = torch.empty(2, 1, device="meta", dtype=torch.bfloat16)
    assert not products.are_for_us(z, torch.empty(256, 10).t())  # which PyTorch's products read as it lies
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not small(2, 10, 256)


def test_sizes_beyond_32_bits_are_refused():
    features, weight = torch.empty(2**16, 2**15, device="meta"), torch.empty(2, 2**15, device="meta")
    for call in (
        lambda: products.hypothesis(features, weight, features),
        lambda: products.hypothesis_backward(features, features, weight, None, None),
    ):
        with pytest.raises(ValueError, match="fewer than 2³¹ values each"):
            call()


@pytest.mark.parametrize("labels, few", [(10, True), (300, False)])
def test_layers_take_them(labels, few, device, monkeypatch):
    """And PyTorch's products where they are not small; gradients of a layer come of either."""
    seen = []
    launch = ops._launch
    monkeypatch.setattr(ops, "_launch", lambda name, *rest: seen.append(name) or launch(name, *rest))
    monkeypatch.setattr(ops.plans, "are_used", lambda *arguments: False)
    monkeypatch.setattr(ops, "_rehearse_backward", lambda *arguments: None)  # it launches the same, of stand-ins
    z = drawn(2, 8, 3, 3, dtype=torch.bfloat16, device=device).requires_grad_()
    weights = [drawn(*s, dtype=torch.bfloat16, device=device).requires_grad_() for s in ((2, 8), (labels, 16), (2, 8))]
    layer = ar_kernels.attention_module(z, *weights, implementation="triton")
    torch.autograd.grad(layer.hypothesis.float().sum(), (z, *weights))
    assert ("hypothesis" in seen) == ("hypothesis_backward" in seen) == few
    seen.clear()
    layer = ar_kernels.attention_module(z.detach(), weights[0].detach(), weights[1], implementation="triton")
    layer.hypothesis.float().sum().backward()
    assert seen == ["gated_attend", *["hypothesis", "hypothesis_backward"] * few]  # W_O alone is trained
    assert weights[1].grad is not None
