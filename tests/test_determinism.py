"""torch.use_deterministic_algorithms(True): the same bits on every run, and of an image in whatever batch it comes."""

import os

import pytest
import torch
from backbones import OwnNet
from layers import channels_last
from torch import nn

import ar_kernels
from ar_kernels import AttendRectify, losses
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS = 5


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS raises in this mode
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def warn_step(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    net = WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2).to(device)
    labels = torch.arange(3, device=device)
    return net, nn.functional.cross_entropy(net(draw(3, 3, 8, 8, device=device)), labels)


def attend_rectify_step(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    net = AttendRectify(OwnNet(LABELS).to(device), ["middle.0", "end"], LABELS, heads=3, mix="prob")
    details = net(draw(3, 3, 16, 16, device=device), return_details=True)
    labels = torch.arange(3, device=device)
    masks = sum(losses.mask_regulariser(mask) for mask in details.masks)
    gated = losses.gated_cross_entropy(details.hypotheses, details.global_gates, labels)
    return net, nn.functional.nll_loss(details.output, labels) + masks + gated


def official_step(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    net = WideResNetAttention(10, 1, LABELS, 0, 1, 2, 0.1).to(device)
    output, reg_loss = net(draw(3, 3, 8, 8, device=device))
    return net, nn.functional.nll_loss(output, torch.arange(3, device=device)) + reg_loss


@pytest.mark.parametrize("step", [warn_step, attend_rectify_step, official_step])
def test_five_runs_give_the_same_bits(step, implementation, device):
    runs = []
    for _ in range(5):
        torch.manual_seed(0)
        with ar_kernels.use_implementation(implementation):
            net, loss = step(device)
            loss.backward()
        runs.append([loss.detach(), *[p.grad for p in net.parameters() if p.grad is not None]])
    assert len(runs[0]) > 10 and all(value.isfinite().all() for value in runs[0])
    for run in runs[1:]:
        assert all(torch.equal(value, first) for value, first in zip(run, runs[0], strict=True))


def attended(
    z: torch.Tensor, weight: torch.Tensor, grads: tuple[torch.Tensor, ...], implementation: str
) -> dict[str, torch.Tensor]:
    """What attend returns, and dZ for the given gradients of pooled, lse, masks and the tap."""
    z = z.detach().requires_grad_()
    out = ar_kernels.attend(z, weight, logits=True, masks=True, mean=True, tap=True, implementation=implementation)
    (dz,) = torch.autograd.grad((out.pooled, out.lse, out.masks, out.feature_map), z, grads)
    return {name: value.detach() for name, value in out._asdict().items()} | {"dz": dz}


SHAPES = {
    "triton": {"channels_last": (2, 24, 30, 40), "contiguous": (2, 8, 18, 18), "3×3": (3, 6, 10, 12)},
    "native": {"channels_last": (20, 24, 30, 40), "contiguous": (33, 64, 36, 36), "3×3": (20, 6, 20, 12)},
}
"""Images, channels and maps that an implementation cuts otherwise, by default, where an image comes alone."""

KINDS = {
    "channels_last": (1, torch.bfloat16, channels_last),
    "contiguous": (1, torch.float32, torch.Tensor.contiguous),
    "3×3": (3, torch.float32, torch.Tensor.contiguous),
}


def together_and_alone(name: str, fused: str, device: torch.device) -> list[tuple[dict, dict]]:
    """For each image: its rows of what attend makes of the batch, and what it makes of the image by itself."""
    shape, (kernel_size, dtype, layout) = SHAPES[fused][name], KINDS[name]
    z = layout(draw(*shape, device=device, dtype=dtype))
    taps = (3, 3) if kernel_size == 3 else ()
    weight = draw(2, shape[1], *taps, device=device, dtype=dtype)
    out = ar_kernels.attend(z, weight, masks=True, implementation=fused)
    grads = [draw(*value.shape, device=device, dtype=value.dtype) for value in (out.pooled, out.lse, out.masks, z)]
    whole = attended(z, weight, tuple(grads), fused)
    return [
        (
            {key: value[n : n + 1] for key, value in whole.items()},
            attended(z[n : n + 1], weight, tuple(grad[n : n + 1] for grad in grads), fused),
        )
        for n in range(shape[0])
    ]


@pytest.mark.parametrize("name", KINDS)
def test_an_image_has_the_same_bits_alone_and_in_a_batch(name, fused, device):
    """attend's outputs and dZ: how an image is cut up depends on C, S and K alone."""
    for whole, alone in together_and_alone(name, fused, device):
        different = [key for key, value in whole.items() if not torch.equal(value, alone[key])]
        assert different == []


@pytest.mark.parametrize("name", KINDS)
def test_by_default_few_images_are_split_otherwise(name, fused, device):
    """Or the test above could not fail: without the mode, an image alone is shared by more programs or threads."""
    if device.type != "cpu":
        pytest.skip("on a GPU several images are split as well")
    torch.use_deterministic_algorithms(False)
    pairs = together_and_alone(name, fused, device)
    assert any(not torch.equal(whole["pooled"], alone["pooled"]) for whole, alone in pairs)
