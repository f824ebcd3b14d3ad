"""Forward and backward of every implementation against the reference: dtypes, layouts, odd sizes, error budgets."""

import re
from types import SimpleNamespace

import pytest
import torch
from layers import BUDGETS, LAYOUTS, Layer, assert_within_budget, slice_of_cat

import ar_kernels
from ar_kernels import eager, functional, native, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {
    "small": {},
    "one position": {"n": 2, "c": 16, "h": 1, "w": 1, "k": 1},
    "one channel, one head": {"n": 2, "c": 1, "h": 3, "w": 2, "k": 1},
    "global heads": {"n": 4, "c": 20, "h": 5, "w": 7, "k": 4, "globals": 3},
    "split over positions": {"n": 1, "c": 40, "h": 17, "w": 19, "k": 3},
    "more images than programs": {"n": 10, "c": 8, "h": 3, "w": 3, "k": 2},
    "aligned rows": {"n": 3, "c": 32, "h": 8, "w": 16, "k": 4, "globals": 2},
    "channels in parts": {"n": 3, "c": 160, "h": 4, "w": 8, "k": 4, "globals": 2},
    "channels in chunks": {"n": 2, "c": 530, "h": 4, "w": 9, "k": 3, "globals": 2},
    "64 heads": {"n": 2, "c": 70, "h": 4, "w": 5, "k": 64},
    "one row": {"n": 2, "c": 6, "h": 1, "w": 37, "k": 2, "mean": False, "tap": False},
    "ungated, no biases": {"n": 2, "c": 12, "h": 4, "w": 4, "gated": False, "bias": False},
    "ungated beside global heads": {"n": 2, "c": 12, "h": 4, "w": 4, "gated": False, "globals": 2},
}
SHAPES_OF_BUDGET = ["global heads", "aligned rows", "split over positions", "channels in parts", "channels in chunks"]


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_reference(shape, implementation, device):
    layer = Layer(**SHAPES[shape], device=device)
    got, exact = layer.run(implementation), layer.run("reference")
    assert got.keys() == exact.keys()
    for name, truth in exact.items():
        scale = 1e-12 * max(1.0, truth.abs().max().item())
        assert (got[name] - truth).abs().max().item() <= scale, name


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_without_masks(shape, device):
    """Then it does not make lse either: in float64 the same as the reference."""
    layer = Layer(**SHAPES[shape], device=device)
    got, exact = layer.run("eager", masks=False), layer.run("reference", masks=False)
    assert got.keys() == exact.keys() and "module.masks" not in got
    for name, truth in exact.items():
        assert (got[name] - truth).abs().max().item() <= 1e-12 * max(1.0, truth.abs().max().item()), name


@pytest.mark.parametrize(("layout", "dtype"), BUDGETS, ids=str)
@pytest.mark.parametrize("shape", SHAPES_OF_BUDGET)
def test_error_budget(shape, layout, dtype, fused, device):
    draws = []
    for seed in range(3):
        layer = Layer(**SHAPES[shape], dtype=dtype, device=device, seed=seed)
        runs = layer.run(fused, layout=LAYOUTS[layout]), layer.run("eager", layout=LAYOUTS[layout])
        draws.append((*runs, layer.run("reference", exact=True)))
    assert_within_budget(draws, dtype)


@pytest.mark.parametrize(
    ("kernel", "sizes", "layout"),
    [
        ("wide_kernel", {"n": 1, "c": 648, "h": 3, "w": 6, "k": 3}, "channels_last"),
        ("grouped_kernel", {"n": 2, "c": 136, "h": 7, "w": 7, "k": 3}, "contiguous"),
        ("grouped_kernel", {"n": 1, "c": 642, "h": 2, "w": 6, "k": 8}, "contiguous"),
        ("grouped_kernel", {"n": 1, "c": 648, "h": 1, "w": 2, "k": 1}, "contiguous"),
    ],
)
@pytest.mark.usefixtures("no_plans")
def test_triton_forward_kernels_of_many_channels(kernel, sizes, layout, device):
    """wide_kernel: each warp has channels of its own. grouped_kernel: eight, two and four channels are one row."""
    attend_forward = pytest.importorskip("ar_kernels.kernels.attend_forward")
    draws = []
    for seed in range(2):
        layer = Layer(**sizes, mean=kernel == "wide_kernel", dtype=torch.bfloat16, device=device, seed=seed)
        launched = set()

        def spy(launch, *tensors, launched=launched, call=attend_forward.Launch.__call__):
            launched.add(launch.kernel)
            return call(launch, *tensors)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attend_forward.Launch, "__call__", spy)
            runs = [layer.run(name, layout=LAYOUTS[layout], backward=False) for name in ("triton", "eager")]
        assert getattr(attend_forward, kernel) in launched
        draws.append((*runs, layer.run("reference", exact=True, backward=False)))
    assert_within_budget(draws, torch.bfloat16)


@pytest.fixture
def float_products(monkeypatch, no_plans):
    """PyTorch's products take float32 maps of any size, and no sweep of csrc/cuda does."""
    module = pytest.importorskip("ar_kernels.kernels.float_products")
    monkeypatch.setattr(module, "SMALL", -1)
    monkeypatch.setattr(native, "SWEEPS_FLOAT32", False)
    return module


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [*SHAPES_OF_BUDGET, "long", "ungated, no biases"])
def test_float32_by_pytorchs_products(shape, layout, float_products, monkeypatch, device):
    """As maps have it that are too large for Triton: no launch of a sweep of its own."""
    from ar_kernels.kernels import attend_backward, attend_forward, launch

    launched, call = set(), launch.Launch.__call__

    def spy(one, *tensors):
        launched.add(one.kernel)
        return call(one, *tensors)

    # What is between the products is judged: PyTorch's own are more exact than eager's, or less, by their sizes.
    monkeypatch.setattr(float_products, "_multiply", lambda a, b, out: out.copy_(a.double() @ b.double()))
    monkeypatch.setattr(launch.Launch, "__call__", spy)
    sizes = SHAPES.get(shape, {"n": 2, "c": 12, "h": 31, "w": 37, "k": 5, "globals": 1})  # long: in several tiles
    draws = []
    for seed in range(6):
        layer = Layer(**sizes, dtype=torch.float32, device=device, seed=seed)
        runs = [layer.run(name, layout=LAYOUTS[layout], tap_layout=slice_of_cat) for name in ("triton", "eager")]
        draws.append((*runs, layer.run("reference", exact=True, tap_layout=slice_of_cat)))
    sweeps = {attend_forward.held_kernel, attend_forward.wide_kernel, attend_forward.chunked_kernel}
    assert {float_products.weights_kernel, float_products.mask_gradient_kernel} <= launched
    assert not launched & {*sweeps, attend_backward.held_kernel, attend_backward.chunked_kernel}
    assert_within_budget(draws, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [{}, {"c": 1}, {"c": 1, "k": 1, "n": 1}, {"h": 1, "w": 1}], ids=str)
def test_triton_takes_pytorchs_products(sizes, layout, float_products, monkeypatch, device):
    """As PyTorch makes them, and of what is not needed none; or Triton's, where PyTorch would copy the map."""
    made, multiply = [], float_products._multiply
    monkeypatch.setattr(float_products, "_multiply", lambda *factors: made.append(multiply(*factors)))
    layer = Layer(**{"n": 2, "c": 24, "h": 5, "w": 7, "k": 5, **sizes}, dtype=torch.float32, device=device)
    got = layer.run("triton", layout=LAYOUTS[layout], tap_layout=LAYOUTS[layout])
    want = layer.run("reference", exact=True, layout=LAYOUTS[layout], tap_layout=LAYOUTS[layout])
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)
    if not sizes:  # a channel or a position alone may be a matrix in more than one way
        assert bool(made) == (layout in ("contiguous", "channels_last"))
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]
    z = z if LAYOUTS[layout] is None else LAYOUTS[layout](z)
    for needs_z in (True, False):
        z, w = z.detach().requires_grad_(needs_z), w.detach().requires_grad_(not needs_z)
        grads = [
            torch.autograd.grad(ar_kernels.attend(z, w, implementation=name).pooled.sum(), z if needs_z else w)[0]
            for name in ("triton", "reference")
        ]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_pytorchs_products_that_round(float_products, monkeypatch, device):
    """As TF32 rounds factors: what all positions of a map share cancels in dW_H all the same, as in a softmax's own
    backward with such products."""

    def rounded(value):
        return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    monkeypatch.setattr(float_products, "_multiply", lambda a, b, out: out.copy_(rounded(a) @ rounded(b)))
    generator = torch.Generator().manual_seed(0)
    z, w, grad = (torch.randn(shape, generator=generator) for shape in ((2, 64, 16, 16), (5, 64), (2, 5, 64)))
    z, w, grad = (z + 8).relu().to(device), (w / 8).to(device).requires_grad_(), grad.to(device)
    (got,) = torch.autograd.grad(ar_kernels.attend(z, w, implementation="triton").pooled, w, grad)
    (exact,) = torch.autograd.grad(
        ar_kernels.attend(z.double(), w.double(), implementation="eager").pooled, w, grad.double()
    )
    positions = rounded(z.flatten(2))
    masks = torch.softmax(rounded(w.detach()) @ positions, dim=2)
    of_masks = rounded(grad) @ positions
    of_logits = masks * (of_masks - (masks * of_masks).sum(dim=2, keepdim=True))
    other = (rounded(of_logits.float()) @ positions.mT).sum(dim=0)
    assert (got - exact).norm() <= 2 * (other - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [768, 2304])
def test_gradients_that_begin_anywhere(channels, layout, device):
    """What autograd hands over may begin at any element, also where a kernel would load several at once."""
    layer = Layer(2, channels, 3, 3, k=4, dtype=torch.bfloat16, device=device)
    found = []
    for before in (0, 7):
        z = layer.tensors["feature_map"].contiguous(memory_format=layout).detach().requires_grad_()
        w = layer.tensors["mask_weight"].detach().requires_grad_()
        pooled = ar_kernels.attend(z, w).pooled
        other = torch.zeros(before, device=device, requires_grad=True)
        grads = torch.linspace(-1, 1, before + pooled.numel(), device=device)
        grads[before:] = torch.linspace(-1, 1, pooled.numel(), device=device)
        torch.cat([other, pooled.flatten()]).backward(grads)
        found.append((z.grad, w.grad))
    for aligned, anywhere in zip(*found):
        assert torch.equal(aligned, anywhere)


def test_pytorchs_products_where_they_may_be_made(float_products, monkeypatch, device):
    """Not in deterministic mode, forward or backward."""
    made, multiply = [], float_products._multiply
    monkeypatch.setattr(ops, "_rehearse_backward", lambda *arguments: None)  # it makes them of stand-ins
    monkeypatch.setattr(float_products, "_multiply", lambda *factors: made.append(multiply(*factors)))
    z, w = torch.randn(2, 24, 5, 7, device=device, requires_grad=True), torch.randn(5, 24, device=device)
    for forward, backward, count in ((True, True, 0), (True, False, 2), (False, True, 2), (False, False, 4)):
        made.clear()
        monkeypatch.setattr(ops, "are_deterministic_algorithms_enabled", lambda it=forward: it)
        pooled = ar_kernels.attend(z, w, implementation="triton").pooled
        monkeypatch.setattr(ops, "are_deterministic_algorithms_enabled", lambda it=backward: it)
        pooled.sum().backward()
        assert len(made) == count


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_pytorchs_products_of_infinite_logits(float_products, device):
    """An infinite bias, and logits that are all -∞: lse, and where P is NaN, are the reference's."""
    z, w = torch.randn(2, 24, 5, 7, device=device), torch.randn(3, 24, device=device)
    z[1, 3, 2, 2], w[2, 3] = float("inf"), 1
    b = torch.tensor([float("inf"), float("-inf"), 0.5], device=device)
    got, exact = (ar_kernels.attend(z, w, b, implementation=name) for name in ("triton", "reference"))
    assert torch.equal(got.lse.isinf(), exact.lse.isinf()) and torch.equal(got.lse.isnan(), exact.lse.isnan())
    assert torch.equal(got.pooled.isnan(), exact.pooled.isnan())
    assert torch.equal(got.lse > 0, exact.lse > 0)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_triton_lets_an_infinite_element_reach_no_other_channel_of_its_row(device):
    """Its logit is -∞ for one head, whose other channels stay finite, and ∞ for the other."""
    pytest.importorskip("triton")
    z = torch.randn(2, 136, 7, 7, device=device).bfloat16()
    w = torch.randn(2, 136, device=device).bfloat16()
    z[1, 9, 3, 3], w[0, 9], w[1, 9] = float("inf"), -1, 1
    got, exact = (ar_kernels.attend(z, w, implementation=name).pooled for name in ("triton", "reference"))
    assert torch.equal(got.isnan(), exact.isnan()) and got.isnan().sum() == 137


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_beside_half_maps(dtype, fused, device):
    """As under autocast: weights are rounded inside, their gradients come back in float32 and unrounded."""
    layer = Layer(n=4, c=40, h=6, w=7, k=4, dtype=dtype, weight_dtype=torch.float32, device=device)
    exact = layer.run("reference", exact=True)
    with torch.autocast(device.type, dtype=dtype):
        got = layer.run(fused)
    assert got["module.hypothesis"].dtype == dtype
    assert got["attend.pooled"].dtype == got["module.gates"].dtype == torch.float32
    assert got["module.d_mask_weight"].dtype == got["module.d_gate_weight"].dtype == torch.float32
    assert not torch.equal(got["module.d_mask_weight"], got["module.d_mask_weight"].to(dtype).float())
    assert_within_budget([(got, layer.run("eager"), exact)], dtype)


def test_float16_gradients_of_a_mean_loss_do_not_underflow(fused, device):
    """Upstream gradients of 1e-7, as a mean over a large batch sends them, keep their relative accuracy in dW."""
    layer = Layer(n=3, c=40, h=12, w=12, k=4, bias=False, dtype=torch.float16, device=device)
    z, w = (layer.tensors[name] for name in ("feature_map", "mask_weight"))
    grad = 1e-7 * torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    w64 = w.double().requires_grad_()
    exact = torch.autograd.grad(ar_kernels.attend(z.double(), w64, implementation="reference").pooled, w64, grad)[0]
    w32 = w.float().requires_grad_()
    pooled = ar_kernels.attend(z, w32, implementation=fused).pooled
    got = torch.autograd.grad(pooled, w32, grad.float())[0]
    assert (got.double() - exact).norm() <= 2e-3 * exact.norm()


def test_float16_gradients_of_lse_take_part_in_the_scale(fused, device):
    """A gradient of lse far larger than that of P must not overflow, one of 1e-7 alone must not vanish."""
    layer = Layer(n=2, c=40, h=6, w=6, k=4, bias=False, dtype=torch.float16, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]
    for of_pooled, of_lse in ((1e-6, 1.0), (0.0, 1e-7)):
        grads = []
        for name, dtype in ((fused, torch.float16), ("reference", torch.float64)):
            values = [z.detach().to(dtype).requires_grad_(), w.detach().to(dtype).float().to(dtype).requires_grad_()]
            weight = values[1] if dtype == torch.float64 else values[1].detach().float().requires_grad_()
            out = ar_kernels.attend(values[0], weight, implementation=name)
            grads.append(torch.autograd.grad(of_pooled * out.pooled.sum() + of_lse * out.lse.sum(), weight)[0].double())
        assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[1].norm()


def test_float16_images_of_one_program_keep_their_own_scales(fused, device):
    """More images than programs, gradients from 1 to 1e-6 in turns: their shares of dW add up in one unit."""
    images = 800 if device.type == "cuda" else 20
    layer = Layer(n=images, c=40, h=4, w=4, k=4, bias=False, dtype=torch.float16, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"].float()
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(images, 4, 40, generator=generator, dtype=torch.float64).to(device)
    grad *= 10.0 ** (-2 * (torch.arange(images, device=device) // 4 % 4)).double().view(-1, 1, 1)
    grads = []
    for name, dtype in ((fused, torch.float32), ("reference", torch.float64)):
        weight = w.detach().to(dtype).requires_grad_()
        pooled = ar_kernels.attend(z if name == fused else z.double(), weight, implementation=name).pooled
        grads.append(torch.autograd.grad(pooled, weight, grad.to(pooled.dtype))[0].double())
    assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[1].norm()


def test_mean_of_a_map_with_an_infinite_channel(implementation, device):
    z = torch.ones(1, 3, 2, 2, device=device)
    z[0, 1, 0, 1] = float("inf")
    mean = ar_kernels.attend(z, torch.randn(2, 3, device=device), mean=True, implementation=implementation).mean
    assert mean.tolist() == [[1.0, float("inf"), 1.0]]


def test_saved_tensors_may_come_back_with_other_strides(fused, device):
    """User hooks that unpack the same values in another layout change nothing."""
    layer = Layer(n=2, c=6, k=3, globals=2, device=device)
    want = layer.run(fused)

    def unpack(value):
        return value.transpose(-1, -2).contiguous().transpose(-1, -2) if value.dim() > 1 else value

    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
        got = layer.run(fused)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_tap_of_a_frozen_map_is_frozen(implementation, device):
    layer = Layer(n=2, c=6, device=device)
    weight = layer.tensors["mask_weight"].requires_grad_()
    out = ar_kernels.attend(layer.tensors["feature_map"], weight, tap=True, implementation=implementation)
    assert not out.feature_map.requires_grad and out.pooled.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_layout_follows_the_map(layout, fused, device):
    layer = Layer(n=2, c=6, h=4, w=5, device=device)
    z = layer.tensors["feature_map"] if LAYOUTS[layout] is None else LAYOUTS[layout](layer.tensors["feature_map"])
    z = z.detach().requires_grad_()
    grad = torch.autograd.grad(ar_kernels.attend(z, layer.tensors["mask_weight"], implementation=fused).lse.sum(), z)
    last = layout == "channels_last" or layout == "batch_last" and z.stride(1) < z.stride(3)
    assert grad[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_gradients_of_any_strides(fused, device):
    """The stride-0 gradient of a sum, a slice of a cat, a permuted tensor: for P, lse, logits and the tap."""
    layer = Layer(n=2, c=6, h=3, w=4, k=3, device=device)
    grads = {}
    for name in ("reference", fused):
        z = layer.tensors["feature_map"].detach().requires_grad_()
        out = ar_kernels.attend(z, layer.tensors["mask_weight"], logits=True, mean=True, tap=True, implementation=name)
        generator = torch.Generator().manual_seed(5)
        loss = out.pooled.sum() + torch.cat([out.lse, out.lse], dim=1)[:, 1:4].sum() + out.mean.t().sum()
        weight = torch.randn(3, 4, 3, 2, generator=generator, dtype=torch.float64).to(device)
        loss = loss + (out.logits.permute(1, 3, 2, 0) * weight).sum()
        weight = torch.randn(4, 6, 2, 3, generator=generator, dtype=torch.float64).to(device)
        loss = loss + (out.feature_map.permute(3, 1, 0, 2) * weight).sum()
        (grads[name],) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grads[fused], grads["reference"], rtol=1e-12, atol=1e-12)


def test_flat_maps_and_expanded_maps(implementation, device):
    z = torch.randn(2, 6, 20, dtype=torch.float64, device=device)
    w = torch.randn(3, 6, dtype=torch.float64, device=device)
    flat = ar_kernels.attend(z, w, logits=True, implementation=implementation)
    grid = ar_kernels.attend(z.unflatten(2, (4, 5)), w, logits=True, implementation="reference")
    torch.testing.assert_close(flat.pooled, grid.pooled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat.logits, grid.logits.flatten(2), rtol=1e-12, atol=1e-12)
    same = z[:1, :, :1, None].expand(3, 6, 4, 5)  # stride 0 everywhere but over channels
    got = ar_kernels.attend(same, w, implementation=implementation)
    want = ar_kernels.attend(same.contiguous(), w, implementation="reference")
    torch.testing.assert_close(got.pooled, want.pooled, rtol=1e-12, atol=1e-12)


def test_a_column_of_a_wider_map(fused, device):
    """Its positions lie a row stride apart, whatever the stride of its one column."""
    layer = Layer(n=2, c=6, h=5, w=1, device=device)
    assert slice_of_cat(layer.tensors["feature_map"]).stride()[2:] == (2, 1)
    got = layer.run(fused, layout=slice_of_cat)
    for name, truth in layer.run("reference").items():
        torch.testing.assert_close(got[name], truth, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_images(dtype, implementation, device):
    layer = Layer(n=0, c=6, dtype=dtype, globals=2, device=device)
    results = layer.run(implementation)
    assert results["module.hypothesis"].shape == (0, 7)
    assert results["module.d_feature_map"].shape == (0, 6, 3, 4)
    for name in ("d_mask_weight", "d_output_weight", "d_gate_weight", "d_gate_bias"):
        assert results[f"module.{name}"].abs().max() == 0, name


def test_masks_sum_to_one_over_positions(implementation, device):
    """Softmax over positions: not over channels, not over heads; sums, not means."""
    layer = Layer(n=2, c=6, h=3, w=4, k=3, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]
    masks = ar_kernels.attend(z, w, masks=True, implementation=implementation).masks
    torch.testing.assert_close(masks.sum(dim=(2, 3)), torch.ones(2, 3, dtype=torch.float64, device=device))
    ones = torch.ones_like(z)
    pooled = ar_kernels.attend(ones, w, implementation=implementation).pooled
    torch.testing.assert_close(pooled, torch.ones_like(pooled))  # a mean over 12 positions would give 1/12


def test_extreme_logits_stay_finite(implementation, device):
    z = torch.zeros(1, 4, 3, 3, device=device)
    z[0, 0, 1, 2] = 1e4
    w = torch.eye(4, device=device)
    out = ar_kernels.attend(z, w, masks=True, implementation=implementation)
    assert out.masks[0, 0, 1, 2] == 1 and out.pooled[0, 0, 0] == 1e4 and out.lse[0, 0] == 1e4


def test_large_common_offset_does_not_leak_into_the_mask_gradient(fused, device):
    """dP·Z of a map with a large mean is nearly the same everywhere; δ, of the same rounded dP, cancels it."""
    layer = Layer(n=2, c=64, h=8, w=8, k=4, bias=False, dtype=torch.bfloat16, mean=False, tap=False, device=device)
    layer.tensors["feature_map"] = layer.tensors["feature_map"] + 8
    layer.tensors["mask_weight"] -= layer.tensors["mask_weight"].mean(dim=1, keepdim=True)
    got, exact = layer.run(fused, masks=False), layer.run("reference", exact=True, masks=False)
    error = (got["attend.d_mask_weight"].double() - exact["attend.d_mask_weight"]).norm()
    assert error <= 2e-2 * exact["attend.d_mask_weight"].norm()


def test_same_bits_on_every_run(fused, device):
    layer = Layer(n=10, c=40, h=9, w=9, k=4, globals=2, dtype=torch.float32, device=device)
    first = layer.run(fused)
    one_order = fused == "triton" and device.type == "cpu"  # the interpreter has no other
    for _ in range(1 if one_order else 4):
        again = layer.run(fused)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_small_tensors_are_saved_for_backward(fused, device):
    """The feature map and O(N·K·C), never a tensor of K·S or K·L·S."""
    layer = Layer(n=2, c=8, h=40, w=40, k=4, bias=False, dtype=torch.float32, device=device)
    tensors = {name: value.requires_grad_() for name, value in layer.tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ar_kernels.attention_module(**tensors, implementation=fused)
    z = tensors["feature_map"]
    others = [t for t in saved if t.data_ptr() != z.data_ptr()]
    assert len(others) < len(saved), "the map itself is saved"
    assert max(t.numel() for t in others) <= max(2 * 4 * 8, tensors["output_weight"].numel())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_forward_allocates_no_copy_of_the_map(layout, fused, device):
    """Under 2 % of |Z| besides the outputs, in both layouts. (Few images are split, and then each multiprocessor may
    take two partial sums of K·C; eight images fill the interpreter's four multiprocessors.)"""
    images = 256 if device.type == "cuda" else 8
    z = torch.randn(images, 256, 56, 56, device=device).to(torch.bfloat16)
    z = z if LAYOUTS[layout] is None else LAYOUTS[layout](z)
    w = torch.randn(4, 256, device=device)
    if device.type == "cuda":
        ar_kernels.attend(z, w, implementation=fused)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = ar_kernels.attend(z, w, implementation=fused)
        allocated = torch.cuda.max_memory_allocated() - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            out = ar_kernels.attend(z, w, implementation=fused)
        allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert allocated > 0
    outputs = out.pooled.nbytes + out.lse.nbytes
    assert allocated - outputs < 0.02 * z.nbytes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_eager_makes_no_copy_of_the_map(layout, device):
    if device.type != "cpu":
        pytest.skip("the profiler of a CPU's memory is asked")
    z = torch.randn(4, 64, 16, 16)
    z = z if LAYOUTS[layout] is None else LAYOUTS[layout](z)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ar_kernels.attend(z, torch.randn(2, 64, requires_grad=True), implementation="eager")
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) < z.nbytes / 2


def test_frozen_map_gets_no_gradient_write(device, monkeypatch):
    """Only the gradients asked for are computed."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from ar_kernels.kernels import attend_backward, launch

    written = []
    original = attend_backward.attend_backward

    def spy(*arguments):
        if not isinstance(arguments[0], launch.StandIn):
            written.append([value is not None for value in arguments[-5:-3]])  # dz, dw
        return original(*arguments)

    monkeypatch.setattr(attend_backward, "attend_backward", spy)
    layer = Layer(n=2, c=6, dtype=torch.float32, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]
    ar_kernels.attend(z, w.requires_grad_(), implementation="triton").pooled.sum().backward()
    ar_kernels.attend(z.requires_grad_(), w.detach(), implementation="triton").pooled.sum().backward()
    assert written == [[False, True], [True, False]]


def test_a_named_implementation_runs(monkeypatch, device):
    """A spy on each path: what was named is what ran, by argument, by context and by default."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    ran = []
    for module, name in ((ops, "gated_attend"), (eager, "gated_attend")):
        original = getattr(module, name)

        def spy(*arguments, original=original, module=module):
            ran.append(module.__name__.rsplit(".")[-1])
            return original(*arguments)

        monkeypatch.setattr(module, name, spy)
    layer = Layer(n=1, device=device, dtype=torch.bfloat16)
    ar_kernels.attention_module(**layer.tensors, implementation="triton")
    ar_kernels.attention_module(**layer.tensors, implementation="eager")
    with ar_kernels.use_implementation("triton"):
        ar_kernels.attention_module(**layer.tensors)
        ar_kernels.attention_module(**layer.tensors, implementation="eager")
        with ar_kernels.use_implementation("reference"):
            ar_kernels.attention_module(**layer.tensors)
    ar_kernels.attention_module(**layer.tensors)
    default = "eager" if device.type == "cpu" and native.why_not("cpu") else "ops"
    assert ran == ["ops", "eager", "ops", "eager", default]


def test_explain_says_what_runs_and_why(device):
    z, w = torch.randn(1, 4, 2, 2, device=device).bfloat16(), torch.randn(2, 4, device=device)
    explanation = ar_kernels.explain(z, w)
    if device.type == "cpu":  # the native library where it is built, never the interpreter
        missing = native.why_not("cpu")
        assert explanation.chosen == ("eager" if missing else "native")
        assert explanation.reasons["native"] == (missing or "can run")
        assert "CPU" in explanation.reasons["triton"]
    else:
        assert explanation.chosen == "triton"
        assert ar_kernels.explain(z.float(), w).chosen == "triton"
    spatial = ar_kernels.explain(z, torch.randn(2, 4, 3, 3, device=device))
    assert spatial.chosen == explanation.chosen
    assert spatial.reasons["reference"] == "can run"
    assert f"→ {spatial.chosen}" in str(spatial)
    assert ar_kernels.explain(z, w, implementation="reference").chosen == "reference"


@pytest.mark.parametrize("swept", [False, True])
def test_float32_maps_that_are_ours(swept, monkeypatch):
    """Of 1×1 heads on NVIDIA's GPUs; in forward mode those with sweeps, on Hopper."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(native, "sweeps_float32", lambda data, heads: swept)
    mask_weights = torch.empty(4, 8), torch.empty(4, 8, 3, 3)
    for dtype in (torch.float32, torch.float64):
        data = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
        for capability in ((9, 0), (8, 0), (10, 0)):
            monkeypatch.setattr(functional, "_capability", lambda device, it=capability: it)
            found = [functional._is_for_us(data, mask_weight) for mask_weight in mask_weights]
            assert found == [dtype == torch.float32, False]
            with torch.autograd.forward_ad.dual_level():
                is_swept = swept and dtype == torch.float32 and capability == (9, 0)
                assert functional._is_for_us(data, mask_weights[0]) == is_swept
    monkeypatch.setattr(torch.version, "hip", "7")
    assert not functional._is_for_us(
        SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32), mask_weights[0]
    )


def test_float32_maps_that_pytorchs_products_take(monkeypatch):
    """Where no sweep does: not small ones on Hopper, nor what PyTorch would copy, nor where batches may not count."""
    float_products = pytest.importorskip("ar_kernels.kernels.float_products")
    small, heads = float_products.SMALL, float_products.SMALL_HEADS
    for capability in (8, 9, 10):
        chip = SimpleNamespace(capability=capability)
        monkeypatch.setattr(float_products.heuristics, "chip", lambda index, it=chip: it)
        for size, count in ((small // 4, heads), (small // 4 + 1, heads), (small // 4, heads + 1)):
            z = torch.empty(1, 1, size, 1, device="meta")
            is_small = capability == 9 and (size, count) == (small // 4, heads)
            assert float_products.are_faster(z, count, alike=False) != is_small
            assert not float_products.are_faster(z, count, alike=True)
            assert not float_products.are_faster(z.double(), count, alike=False)
            wide = torch.empty(1, 2 * size, 2, 4, device="meta")
            overlapping = wide.as_strided((1, 8, size, 1), (8 * size, size - 1, 1, 1))
            for copied in (wide[..., ::2], wide[..., :3], wide[:, :, :1, :1].expand(1, -1, 4, 4), overlapping):
                assert not float_products.are_faster(copied, count, alike=False)


def test_a_named_implementation_raises_where_it_cannot_run(device):
    z = torch.randn(1, 4, 3, 3, device=device)
    with pytest.raises(ar_kernels.ImplementationUnavailable, match="'triton' cannot run: at most 28 3×3 heads"):
        ar_kernels.attend(z, torch.randn(29, 4, 3, 3, device=device), implementation="triton")
    reason = native.why_not(device.type)
    if reason is not None:
        with pytest.raises(ar_kernels.ImplementationUnavailable, match=f"'native' cannot run: {re.escape(reason)}"):
            ar_kernels.attend(z, torch.randn(2, 4, 3, 3, device=device), implementation="native")
    with pytest.raises(ar_kernels.ImplementationUnavailable, match="at most 64 heads"):
        ar_kernels.attend(z, torch.randn(65, 4, device=device), implementation="triton")


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device):
    """Both layouts, forward and backward, checked at the far end of a map of more than 2³¹ elements."""
    n, c, side = 44, 64, 896  # 2.26e9 elements, 4.5 GB
    w = torch.randn(4, c, device=device) / 8
    for layout in (torch.contiguous_format, torch.channels_last):
        z = torch.empty(n, c, side, side, dtype=torch.bfloat16, device=device, memory_format=layout).normal_()
        z.requires_grad_()
        pooled = ar_kernels.attend(z, w, implementation="triton").pooled
        (grad,) = torch.autograd.grad(pooled.sum(), z)
        last = z[-1:].detach().clone(memory_format=layout).requires_grad_()
        alone = ar_kernels.attend(last, w, implementation="reference").pooled
        (want,) = torch.autograd.grad(alone.sum(), last)
        torch.testing.assert_close(pooled[-1:], alone, rtol=1e-2, atol=1e-2)
        assert (grad[-1:].float() - want.float()).norm() <= 1e-2 * want.float().norm()
        del z, grad, pooled
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_follows_the_matmul_precision(tf32, device):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    # More heads than the native library's sweeps take, which never round to TF32.
    layer = Layer(n=4, c=160, h=16, w=16, k=5, dtype=torch.float32, device=device)
    exact = layer.run("reference", exact=True)
    got = layer.run("triton")["attend.pooled"].double()
    error = (got - exact["attend.pooled"]).norm() / exact["attend.pooled"].norm()
    assert (error < 1e-5) != tf32
    assert error < 2e-3


def test_a_batch_that_needs_no_merge_has_it_compiled(monkeypatch, device):
    """A smaller batch of the same maps does need one, and is not to wait for a compiler then."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from ar_kernels.kernels import attend_forward, launch
    from ar_kernels.kernels.heuristics import chip

    prepared = []
    monkeypatch.setattr(launch, "prepare", lambda calls: prepared.append([call.kernel for call, _ in calls]))
    attend_forward._plan.cache_clear()
    w = torch.zeros(4, 16, dtype=torch.bfloat16, device=device)
    z = torch.zeros(chip(w.get_device()).processors + 1, 16, 12, 12, dtype=torch.bfloat16, device=device)
    ar_kernels.attend(z, w, implementation="triton")
    attend_forward._plan.cache_clear()
    assert prepared == [[attend_forward.held_kernel, attend_forward.merge_kernel]]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"globals": 2},
        {"kernel_size": 3},
        {"tap": False, "mean": True},
        {"bias": True},
        {"bias": True, "kernel_size": 3},
        {"masks": True},
        {"dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [(), ("feature_map",), ("mask_weight", "gate_weight")], ids=str)
@pytest.mark.usefixtures("no_plans")
def test_the_backward_is_expected_as_it_comes(sizes, frozen, device, monkeypatch):
    """What a recorded forward expects its backward to launch, and what that launches: kernels, constants and dtypes."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from ar_kernels.kernels import attend3x3, attend_backward, heuristics, launch

    ops._import_kernels()
    masks = "masks" in sizes
    defaults = {"c": 24, "dtype": torch.bfloat16, "mean": False, "bias": False, "device": device}
    layer = Layer(**defaults | {name: value for name, value in sizes.items() if name != "masks"})
    tensors = {name: value.requires_grad_(name not in frozen) for name, value in layer.tensors.items()}
    if device.type == "cpu":  # stand-ins are on a GPU that is not there
        for module in (attend_backward, attend3x3, heuristics):
            monkeypatch.setattr(module, "chip", lambda index: heuristics.Chip(4, 8, 163 * 1024))
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
    expected, launched = {}, {}

    def expect_backward(inputs, how, recorded=None):
        if recorded is not None:
            expected.update(launch._rehearse(lambda: ops._rehearse_backward(inputs, how, recorded)))
        return made(inputs, how)

    made, backward = ops._made, ops._layer_backward

    def watched(*arguments):
        before, launch._recording.recorder = launch._recording.recorder, SimpleNamespace(hold=hold, prepare=list)
        try:
            return backward(*arguments)
        finally:
            launch._recording.recorder = before

    def hold(one, given):
        launched[one] = launch._dtypes(given)
        one.launch(given)

    monkeypatch.setattr(ops, "_made", expect_backward)
    monkeypatch.setitem(ops._launchers, "layer_backward", watched)
    output = ar_kernels.attention_module(
        **tensors, masks=masks, mean=layer.mean, tap=layer.tap, implementation="triton"
    )
    received = [output.hypothesis, output.masks, output.mean, output.global_scores, output.feature_map]
    received = [value for value in received if value is not None and value.requires_grad]
    torch.autograd.backward(received, [torch.randn_like(value) for value in received])

    def of(calls):
        return [(one.kernel, one.grid, one.sizes, one.constants, dtypes) for one, dtypes in calls.items()]

    assert launched and of(launched) == of(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("by_node", [True, False])
def test_a_recorded_forward_compiles_the_backward_too(by_node, device, monkeypatch):
    """And where nothing is recorded it does not."""
    triton = pytest.importorskip("triton", reason="the triton package is not installed")

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(str(call["fn"])))
    monkeypatch.setattr("ar_kernels.node.wanted", by_node)
    for is_recorded in (False, True):
        channels = 40 + 16 * by_node + 8 * is_recorded  # no other test's
        layer = Layer(n=3, c=channels, h=6, w=9, k=3, labels=11, dtype=torch.bfloat16, device=device, bias=False)
        tensors = [layer.tensors[name].requires_grad_() for name in ("feature_map", "mask_weight", "output_weight")]
        before = len(compiled)
        with torch.set_grad_enabled(is_recorded):
            hypothesis = ar_kernels.attention_module(*tensors, implementation="triton").hypothesis
        forward = [name for name in compiled[before:] if "backward" not in name]
        assert 0 < len(forward) and (len(compiled) - before > len(forward)) == is_recorded
        if is_recorded:
            known = list(compiled)
            hypothesis.backward(torch.randn_like(hypothesis))
            assert compiled == known
