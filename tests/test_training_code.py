"""What training code does to models: scaling, checkpointing, accumulating, averaging, copying, saving, threads."""

import copy
import io
import pickle
import threading

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from backbones import OwnNet
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from ar_kernels import AttendRectify, AttentionModule, use_implementation
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS = 5

MODELS = {
    "AttendRectify": lambda: AttendRectify(OwnNet(LABELS), ["middle.0", "end"], LABELS, heads=2),
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2),
    "official": lambda: WideResNetAttention(10, 1, LABELS, 0, 2, 2, 0.1),
}


def make(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device, dtype)


def images(device: torch.device, count: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 12, generator=generator, dtype=torch.float64).to(device, dtype)


def labels(device: torch.device, count: int = 4) -> torch.Tensor:
    return torch.arange(count, device=device) % LABELS


def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    target = labels(inputs.device, inputs.shape[0])
    output = model(inputs)
    if not isinstance(output, tuple):
        return F.cross_entropy(output, target)
    loss = F.nll_loss(output[0], target)
    return loss if output[1] is None else loss + output[1]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert (got[name].to(value.dtype) - value).norm() <= tolerance * max(value.norm().item(), 1e-3), name


# ---------------------------------------------------------------------------------------------- lower precision


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype, name, device):
    """float32 weights, maps that autocast makes half, a GradScaler for float16: gradients are float32, no further from
    float64's than twice what the paper's convolutions are under the same autocast, and an eps; no step is thrown away.
    """
    inputs = images(device, dtype=torch.float32)
    truth = gradients(make(name, device), inputs.double())
    errors = []
    for implementation in (None, "reference"):
        model = make(name, device, torch.float32)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype), use_implementation(implementation):
                loss = loss_of(model, inputs)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if step == 0:
                found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
                assert {grad.dtype for grad in found.values()} == {torch.float32}
                errors.append({key: ((found[key] - truth[key]).norm() / truth[key].norm()).item() for key in truth})
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert scaler.get_scale() == (2.0**12 if scaler.is_enabled() else 1.0)
    for key, error in errors[0].items():
        assert error <= 2 * (errors[1][key] + torch.finfo(dtype).eps), key


def test_a_step_that_overflows_is_skipped(implementation, device):
    """An infinite gradient comes out of the attention as such: the GradScaler sees it and keeps the weights."""
    model = make("AttendRectify", device, torch.float32)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    with use_implementation(implementation), torch.autocast(device.type, torch.float16):
        loss = loss_of(model, images(device, dtype=torch.float32))
    scaler.scale(loss * 8).backward()
    assert not any(parameter.grad.isfinite().all() for parameter in model.attention.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, kept) for value, kept in zip(weights(model), before, strict=True))


# ---------------------------------------------------------------------------------------------- loops


class Checkpointed(nn.Module):
    """An attended layer between two of the user's, in a region that is computed again in backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.attention = AttentionModule(6, LABELS, 2)
        self.reentrant = reentrant

    def region(self, inputs):
        out = self.attention(self.before(inputs), masks=True, tap=True)
        return out.hypothesis, out.masks.square().sum(dim=(1, 2, 3)), self.after(out.feature_map).mean(dim=(1, 2, 3))

    def forward(self, inputs):
        if self.reentrant is None:
            parts = self.region(inputs)
        else:
            parts = checkpoint(self.region, inputs, use_reentrant=self.reentrant)
        return parts[0] + (parts[1] + parts[2])[:, None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, implementation, device):
    inputs = images(device).requires_grad_()  # reentry wants an input that needs gradients
    found = []
    for kind in (None, reentrant):
        model = Checkpointed(kind).to(device, torch.float64)
        for module in model.modules():
            if isinstance(module, AttentionModule):
                module.implementation = implementation  # backward's own threads know no use_implementation
        found.append(gradients(model, inputs))
    assert len(found[0]) == 7
    assert_close(found[1], found[0], 1e-12)


def test_a_thread_started_inside_does_not_see_use_implementation(device):
    """Nor do DataParallel's threads, nor on a GPU the one of backward that recomputes: modules and the environment's
    variable reach those."""
    seen = []

    def look() -> None:
        seen.append(type(module(images(device)[:, :3]).hypothesis.grad_fn).__name__)

    module = AttentionModule(3, LABELS, 2, device=device, dtype=torch.float64)
    with use_implementation("reference"):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        module.implementation = "reference"
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen[0] != seen[1] and seen[0] == seen[2]


@pytest.mark.parametrize("name", MODELS)
def test_gradient_accumulation(name, device):
    """Two halves of a batch, each loss halved, leave the gradients of the whole. Norms in eval mode see no batch."""
    model = make(name, device).eval()
    inputs = images(device)
    target = labels(device)
    total = gradients(model, inputs)
    model.zero_grad()
    for part, wanted in zip(inputs.chunk(2), target.chunk(2), strict=True):
        output = model(part)
        loss = F.cross_entropy(output, wanted) if name != "official" else F.nll_loss(output[0], wanted)
        (loss / 2).backward()
    assert_close({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, total)


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_groups(name, device):
    """Weights decay, biases and norms do not, the attention learns at a rate of its own: each parameter is in one
    group, and takes the step that its group says."""
    model = make(name, device)
    groups: dict[tuple[bool, bool], list[str]] = {}
    for key, parameter in model.named_parameters():
        of_attention = key.startswith(("attention", "global_gates", "att", "output_gate"))
        groups.setdefault((of_attention, parameter.dim() > 1), []).append(key)
    parameters = dict(model.named_parameters())
    assert sum(map(len, groups.values())) == len(parameters) == len({id(p) for p in parameters.values()})
    assert {(True, True), (False, True), (False, False)} <= groups.keys()
    rates = {True: 0.5, False: 0.1}
    optimizer = torch.optim.SGD(
        [
            {"params": [parameters[key] for key in keys], "lr": rates[own], "weight_decay": 0.01 * decays}
            for (own, decays), keys in groups.items()
        ]
    )
    found = gradients(model, images(device))
    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer.step()
    for (own, decays), keys in groups.items():
        for key in set(keys) & found.keys():
            expected = before[key] - rates[own] * (found[key] + 0.01 * decays * before[key])
            torch.testing.assert_close(parameters[key].detach(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_exponential_moving_average(name, device):
    """AveragedModel copies the model, hooks and all; its average, its own forward and its norms' statistics are right,
    and training goes on untouched."""
    model = make(name, device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = None
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, images(device)).backward()
        optimizer.step()
        average.update_parameters(model)
        now = weights(model)
        expected = now if expected is None else [0.9 * a + 0.1 * b for a, b in zip(expected, now, strict=True)]
    for value, truth in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), truth)
    update_bn([images(device)], average)
    twin = make(name, device)
    twin.load_state_dict(average.module.state_dict())
    assert torch.equal(loss_of(average.eval(), images(device)), loss_of(twin.eval(), images(device)))
    assert not torch.equal(loss_of(average, images(device)), loss_of(model.eval(), images(device)))


# ---------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("name", MODELS)
def test_copies_after_a_step(name, device):
    """deepcopy, pickle and torch.save of a model that has trained, gradients and all: the copies go on as it does."""
    model = make(name, device)
    gradients(model, images(device))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    truth = gradients(model, images(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # what shared anything with the original would notice
    for other in copies:
        assert_close(gradients(other, images(device)), truth, 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_safetensors(name, device, tmp_path):
    """save_model and load_model: nothing is shared or non-contiguous, every key comes back."""
    model = make(name, device)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = MODELS[name]().to(device, torch.float64)
    assert not torch.equal(loss_of(other.eval(), images(device)), loss_of(model.eval(), images(device)))
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert torch.equal(loss_of(other, images(device)), loss_of(model, images(device)))


# ---------------------------------------------------------------------------------------------- threads


def test_threads_share_one_model(implementation, device):
    """Forward and backward of one model in four threads at once: everyone's gradients are right."""
    if implementation == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter keeps one program's state for the whole process: no two threads at a time")
    model = make("AttendRectify", device)
    model.requires_grad_(False)
    inputs = [scale * images(device) for scale in (0.5, 1.0, 1.5, 2.0)]

    def gradient(index: int) -> torch.Tensor:
        leaf = inputs[index].clone().requires_grad_()
        with use_implementation(implementation):
            return torch.autograd.grad(loss_of(model, leaf), leaf)[0]

    expected = [gradient(index) for index in range(4)]
    got: list[list[torch.Tensor]] = [[] for _ in range(4)]
    start = threading.Barrier(4, timeout=60)

    def work(index: int) -> None:
        start.wait()
        got[index] += [gradient(index) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, truth in zip(got, expected, strict=True):
        assert len(found) == 5
        for value in found:
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)
