"""torch.func over whole modules: gradients of each sample, ensembles, Hessian-vector products; double backward."""

import pytest
import torch
import torch.nn.functional as F
from backbones import OwnNet
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

from ar_kernels import AttendRectify, AttentionModule, GlobalGates, attend, losses, rectify, use_implementation
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS = 3


class Attended(nn.Module):
    """A layer, its global gates, the mix and the regulariser."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gates = AttentionModule(3, LABELS, 2, bias=True), GlobalGates(3, 2)

    def forward(self, images):
        out = self.attention(images, global_gates=self.gates, masks=True, mean=True)
        mixed = rectify([out.hypothesis, out.mean], out.global_scores, mix="prob")
        return mixed + losses.mask_regulariser(out.masks)


MODELS = {
    "layer": Attended,
    "AttendRectify": lambda: AttendRectify(OwnNet(LABELS), ["middle.0", "end"], LABELS, heads=2),
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=1, attention_width=2),
    "official": lambda: WideResNetAttention(10, 1, LABELS, 0, 1, 2),
}
CASES = [("layer", "eager"), ("layer", "triton"), ("layer", "native")]
CASES += [(name, "eager") for name in ("AttendRectify", "WARN", "official")]


@pytest.fixture(params=CASES, ids=" ".join)
def case(request, device):
    """A model in eval mode (norms in training would mix the samples), images, and an implementation around the test."""
    name, implementation = request.param
    if implementation == "triton":
        pytest.importorskip("triton", reason="the triton package is not installed")
    if implementation == "native":
        from ar_kernels import native

        reason = native.why_not(device.type)
        if reason is not None:
            pytest.skip(reason)
    with use_implementation(implementation):
        yield make(name, device), draw(2 if implementation == "triton" else 3, device)


def make(name: str, device: torch.device, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().to(device, torch.float64).eval()


def draw(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 6, generator=generator, dtype=torch.float64).to(device)


def states(model: nn.Module) -> tuple[dict, dict]:
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    rest = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    return parameters, rest | dict(model.named_buffers())


def called(model: nn.Module, state: tuple[dict, dict], images: torch.Tensor) -> torch.Tensor:
    output = functional_call(model, state, (images,))
    return output[0] if isinstance(output, tuple) else output


def loss_of(model: nn.Module, parameters: dict, rest: dict, images: torch.Tensor) -> torch.Tensor:
    target = torch.arange(images.shape[0], device=images.device) % LABELS
    return F.cross_entropy(called(model, (parameters, rest), images), target)


def test_gradients_of_each_sample(case):
    model, images = case
    parameters, rest = states(model)

    def loss(parameters, image):
        return loss_of(model, parameters, rest, image.unsqueeze(0))

    mapped = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        model.zero_grad()
        output = model(image.unsqueeze(0))
        output = output[0] if isinstance(output, tuple) else output
        F.cross_entropy(output, torch.zeros(1, dtype=torch.int64, device=image.device)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                truth = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(mapped[name][index], truth, rtol=1e-9, atol=1e-12)


def test_an_ensemble(case, device):
    """Several models' weights stacked, one vmap over them."""
    model, images = case
    name = next(name for name, kind in MODELS.items() if type(kind()) is type(model))
    models = [model, make(name, device, seed=1)]
    parameters, buffers = (
        {key: value.detach() for key, value in found.items()} for found in stack_module_state(models)
    )
    together = vmap(lambda p, b: called(model, (p, b), images))(parameters, buffers)
    for got, member in zip(together, models, strict=True):
        truth = member(images)
        torch.testing.assert_close(got, truth[0] if isinstance(truth, tuple) else truth, rtol=1e-9, atol=1e-12)


def test_gradients_of_each_sample_compile(device):
    """Nothing is named, so eager does it, in one graph; as it would break where a name is given (test_ops)."""
    module = AttentionModule(6, 5, heads=3).to(device)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    maps = torch.randn(3, 6, 4, 4, device=device)
    each = vmap(grad(lambda p, z: functional_call(module, p, (z[None],)).hypothesis.sum()), in_dims=(None, 0))
    torch._dynamo.reset()
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)(parameters, maps)
    for name, value in each(parameters, maps).items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-4)


def test_no_samples(implementation, device):
    """A vmap over none of them has the shapes of what one would give."""
    maps, w = torch.randn(0, 2, 6, 4, 4, device=device), torch.randn(3, 6, device=device)
    pooled = vmap(lambda z: attend(z, w, implementation=implementation).pooled)(maps)
    assert pooled.shape == (0, 2, 3, 6)
    scores = torch.randn(2, 3, device=device)
    mixed = vmap(lambda h: rectify(h, scores, implementation=implementation))(torch.randn(0, 2, 3, 5, device=device))
    assert mixed.shape == (0, 2, 5)


def test_hessian_vector_products(case):
    """Reverse over reverse equals a difference of gradients."""
    model, images = case
    parameters, rest = states(model)
    generator = torch.Generator().manual_seed(2)
    vector = {
        key: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for key, p in parameters.items()
    }

    def gradient(parameters):
        return grad(lambda values: loss_of(model, values, rest, images))(parameters)

    _, pull = vjp(gradient, parameters)
    product = pull(vector)[0]
    step = 1e-6
    ahead, behind = (
        gradient({key: value + sign * step * vector[key] for key, value in parameters.items()}) for sign in (1, -1)
    )
    largest = max(value.abs().max() for value in product.values())
    for key, value in product.items():
        torch.testing.assert_close(value, (ahead[key] - behind[key]) / (2 * step), rtol=1e-5, atol=1e-6 * largest)


def test_forward_mode_where_it_is(case):
    """Through the eager formulas; the fused operators, the losses and the official heads have none and say so."""
    model, images = case
    parameters, rest = states(model)

    def loss(values):
        return loss_of(model, values, rest, images)

    tangents = {key: torch.ones_like(value) for key, value in parameters.items()}
    if isinstance(model, Attended | WideResNetAttention):
        with pytest.raises(NotImplementedError, match="jvp"):
            jvp(loss, (parameters,), (tangents,))
    else:
        _, tangent = jvp(loss, (parameters,), (tangents,))
        expected = sum(value.sum() for value in grad(loss)(parameters).values())
        torch.testing.assert_close(tangent, expected)


def test_double_backward_of_a_compiled_model_raises(case):
    """Eager mode has it (above); compiled, PyTorch's error comes, not a wrong number."""
    model, images = case
    torch._dynamo.reset()
    images.requires_grad_()
    output = torch.compile(model, backend="aot_eager")(images)
    output = output[0] if isinstance(output, tuple) else output
    (first,) = torch.autograd.grad(output.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()
