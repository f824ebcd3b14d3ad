"""The digit net of the ablation, plain and attentive, and where its maps lie on the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ar_kernels
from ar_kernels.models import DigitNet


def digit_net(device: torch.device, **options) -> DigitNet:
    torch.manual_seed(0)
    return DigitNet(num_classes=7, **options).double().to(device)


def images(device: torch.device, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_depth": 0},
        {"attention_depth": 1, "attention_width": 1},
        {"attention_depth": 3, "mix": "log", "gating": "sigmoid"},
        {"attention_depth": 4, "gating": None, "gated": False},
        {"attention_depth": 5, "attention_width": 2, "mix": "prob", "kernel_size": 3},
    ],
    ids=str,
)
def test_equals_the_reference_in_float64(options, device):
    """Outputs, everything in the details, and the gradient of every parameter."""
    results = []
    for name in (None, "reference"):
        net = digit_net(device, **options)
        with ar_kernels.use_implementation(name):
            details = net(images(device), return_details=True)
            details.output.square().sum().backward()
        tensors = [*details[:3], *details.head_gates, *details.masks]
        results.append(tensors + [parameter.grad for parameter in net.parameters()])
    for got, truth in zip(*results):
        assert (got - truth).abs().max() <= 1e-12 * max(1.0, truth.abs().max().item())


def test_the_output_is_what_the_details_tell(device):
    net = digit_net(device, attention_depth=4, attention_width=2).eval()
    details = net(images(device), return_details=True)
    assert torch.equal(net(images(device)), details.output)
    mixed = (details.global_gates.unsqueeze(2) * details.hypotheses).sum(dim=1)
    torch.testing.assert_close(details.output, mixed, rtol=0, atol=1e-12)
    sizes = [tuple(mask.shape) for mask in details.masks]
    assert sizes == [(3, 2, 8, 8), (3, 2, 6, 6), (3, 2, 6, 6), (3, 2, 4, 4)]
    for gates in (details.global_gates, *details.head_gates):
        torch.testing.assert_close(gates.sum(dim=1), torch.ones_like(gates[:, 0]))
    for mask in details.masks:
        torch.testing.assert_close(mask.sum(dim=(2, 3)), torch.ones_like(mask[:, :, 0, 0]))


def test_the_plain_net_is_the_papers():
    net = DigitNet()
    shapes = [tuple(module.weight.shape) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    convolutions = [(32, 1, 5, 5), (64, 32, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3)]
    assert shapes == [*convolutions, (256, 2048), (10, 256)]
    assert all(module.bias is None for module in net.modules() if isinstance(module, nn.Conv2d))
    assert not any("attention" in name or "gates" in name for name in net.state_dict())


def test_the_attentive_twin_starts_with_the_plain_nets_weights():
    torch.manual_seed(3)
    plain = DigitNet().state_dict()
    torch.manual_seed(3)
    twin = DigitNet(attention_depth=5).state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in plain.items())


def test_maps_lie_where_their_geometry_says():
    """The receptive field of an inner position, with all weights alike, is centred on its pixel."""
    net = digit_net(torch.device("cpu"), attention_depth=5).eval()
    for block in net.blocks:
        nn.init.ones_(block[0].weight)
        for index, layer in enumerate(block):
            if isinstance(layer, nn.MaxPool2d):
                block[index] = nn.AvgPool2d(2)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    for depth, geometry in enumerate(net.attended_maps, 1):
        image = torch.ones(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
        feature_map = nn.Sequential(*net.blocks[:depth])(image)
        assert feature_map.shape == (1, geometry.channels, geometry.size, geometry.size)
        row, column = geometry.size // 2, geometry.size // 2 - 1
        field = torch.autograd.grad(feature_map[0, 0, row, column], image)[0][0, 0]
        field = field / field.sum()
        assert (field * y).sum().item() == pytest.approx(geometry.first + geometry.step * row)
        assert (field * x).sum().item() == pytest.approx(geometry.first + geometry.step * column)


def test_the_images_norm_is_batchnorm2ds(device):
    torch.manual_seed(0)
    ours = DigitNet().normalise.to(device, torch.float64)
    theirs = torch.nn.BatchNorm2d(1).to(device, torch.float64)
    results = []
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.fill_(1.3), norm.bias.fill_(-0.2)
        images = torch.rand(3, 1, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        images = images.to(device).requires_grad_()
        for training in (True, True, False):
            output = norm.train(training)(images)
            grads = torch.autograd.grad(output.square().sum(), [images, norm.weight, norm.bias])
            results.append([output, *grads, *(value.double().clone() for value in norm.state_dict().values())])
    for found, expected in zip(results[:3], results[3:]):
        torch.testing.assert_close(found, expected)


def test_trains_under_autocast(device):
    torch.manual_seed(0)
    net = DigitNet(attention_depth=2).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = net(images(device, 4).float())
    F.cross_entropy(output, torch.arange(4, device=device)).backward()
    assert output.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"attention_depth": 6}, ValueError, "attention_depth must be from 0 to 5, got 6"),
        ({"attention_depth": "3"}, TypeError, "attention_depth must be an int, got str"),
        ({"attention_depth": 1, "attention_width": 0}, ValueError, "attention_width must be at least 1, got 0"),
        ({"mix": "mean"}, ValueError, "mix must be one of logit, log, prob, got 'mean'"),
        ({"gating": "tanh"}, ValueError, "gating must be 'softmax', 'sigmoid' or None, got 'tanh'"),
        ({"attention_depth": 1, "kernel_size": 5}, ValueError, "kernel_size must be 1 or 3, got 5"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DigitNet(**options)


def test_wrong_images():
    with pytest.raises(ValueError, match=r"images must be \[N, 1, 40, 40\], got \[2, 1, 28, 28\]"):
        DigitNet()(torch.zeros(2, 1, 28, 28))
