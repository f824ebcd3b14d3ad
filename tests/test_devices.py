"""A GPU that is not the current one (it takes two), several streams, and a training step as one CUDA graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backbones import OwnNet
from torch import nn

import ar_kernels
from ar_kernels import AttendRectify, use_implementation
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS = 5
MODELS = {
    "AttendRectify": lambda: AttendRectify(OwnNet(LABELS), ["middle.0", "end"], LABELS),
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS),
    "official": lambda: WideResNetAttention(10, 1, LABELS, 0, 3, 4),
}

pytestmark = pytest.mark.gpu


def make(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device)


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 32, 32, generator=generator).to(device), (torch.arange(8) % LABELS).to(device)


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16), use_implementation("triton"):
        output = model(images)
    if isinstance(output, tuple):
        return F.nll_loss(output[0], labels)
    return F.cross_entropy(output, labels)


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_that_is_not_current(name, device, monkeypatch):
    """Tensors on cuda:1 while cuda:0 is current: the same bits as where cuda:1 is, and cuda:0 stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    second, runs = torch.device("cuda", 1), []
    for current in (1, 0):
        with torch.cuda.device(current):
            model = make(name, second)
            loss = loss_of(model, *batch(0, second))
            loss.backward()
            assert torch.cuda.current_device() == current
        runs.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    assert all(value.device == second for value in runs[1])
    assert all(torch.equal(got, truth) for got, truth in zip(*runs, strict=True))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_streams(kernel_size, device):
    """Each stream's kernels run on it: they wait for what fills their map after a long sleep, forward and backward."""
    taps = (3, 3) if kernel_size == 3 else ()
    weight = torch.randn(4, 32, *taps, device=device)
    maps = [torch.randn(8, 32, 14, 14, device=device, dtype=torch.bfloat16) for _ in range(3)]

    def attended(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().requires_grad_()
        pooled = ar_kernels.attend(z, weight, implementation="triton").pooled
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), z)[0]

    expected = [attended(z) for z in maps]
    targets = [torch.zeros_like(z) for z in maps]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in maps], []
    for stream, source, target in zip(streams, maps, targets, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            target.copy_(source)
            got.append(attended(target))
    torch.cuda.synchronize()
    for found, truth in zip(got, expected, strict=True):
        assert all(torch.equal(value, wanted) for value, wanted in zip(found, truth, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_as_one_cuda_graph(name, device):
    """Forward, loss, backward and optimizer, captured once and replayed on new batches: ordinary steps' weights."""
    model = make(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = (tensor.clone() for tensor in batch(0, device))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, images, labels)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer, images, labels)
    torch.cuda.current_stream().wait_stream(side)
    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, images, labels)
    for number in range(1, 4):
        for target, source in zip((images, labels), batch(number, device), strict=True):
            target.copy_(source)
        graph.replay()
        expected = step(plain, plain_optimizer, *batch(number, device))
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    for got, truth in zip(model.parameters(), plain.parameters(), strict=True):
        assert (got - truth).abs().max() <= 1e-3  # these steps move a net's weights by up to 3e-3 to 5e-3
