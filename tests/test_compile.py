"""torch.compile of whole models: one graph, any batch and resolution without recompiling, Inductor, CUDA graphs."""

import re

import pytest
import torch
from backbones import OwnNet, timm, vision
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ar_kernels import AttendRectify, AttentionModule, GlobalGates, losses, rectify, use_implementation
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS = 5


class Attended(nn.Module):
    """A network of the user's own that asks an attention module for everything it has."""

    def __init__(self, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.attention = AttentionModule(6, LABELS, 3, bias=True, kernel_size=kernel_size)
        self.gates = GlobalGates(6, 2, kernel_size=kernel_size)

    def forward(self, images):
        out = self.attention(self.conv(images), global_gates=self.gates, masks=True, mean=True, tap=True)
        rest = out.feature_map.mean(dim=(1, 2, 3)) + out.mean.sum(dim=1)
        return out.hypothesis * out.global_scores.sum(dim=1, keepdim=True) + rest[:, None], out.masks


class Rectified(nn.Module):
    """AttendRectify with its details, and the losses of both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AttendRectify(OwnNet(LABELS), ["middle.0", "end"], LABELS, heads=2, mix="log")

    def forward(self, images):
        details = self.net(images, return_details=True)
        target = torch.arange(images.shape[0], device=images.device) % LABELS
        gated = losses.gated_cross_entropy(details.hypotheses, details.global_gates, target)
        return details.output, gated + sum(losses.mask_regulariser(masks) for masks in details.masks)


MODELS = {
    "module": Attended,
    "3×3 module": lambda: Attended(kernel_size=3),
    "AttendRectify and losses": Rectified,
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2),
    "official": lambda: WideResNetAttention(10, 1, LABELS, 0, 1, 2, 0.1),
}


def make(name: str, device: torch.device) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return MODELS[name]().to(device, torch.float64)


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)


def measured(call, model: nn.Module, images: torch.Tensor, dynamic: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """What call(images) returns and the gradients of its squares, for the images and every parameter of model."""
    images = images.detach().requires_grad_()
    torch._dynamo.mark_dynamic(images, dynamic)
    outputs = call(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = [images, *(p for p in model.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)]


def assert_same(got: list[torch.Tensor], truth: list[torch.Tensor], tolerance: float = 1e-9) -> None:
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def compile_counting(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model compiled in one graph, without Inductor, and what has been compiled of it so far."""
    graphs = []

    def compiler(name: str):
        def counting(graph, inputs):
            graphs.append(name)
            return make_boxed_func(graph)

        return counting

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    return torch.compile(model, backend=backend, fullgraph=True), graphs


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, None) for name in MODELS), ("module", "eager"), ("module", "triton"), ("3×3 module", "triton")],
)
def test_any_batch_and_resolution_in_one_graph(name, implementation, device):
    """Marked as dynamic in the first call, neither compiles anything again, forward or backward."""
    if implementation == "triton":
        pytest.importorskip("triton")
    model = make(name, device)
    compiled, graphs = compile_counting(model)
    # Even maps: torch 2.11's pooling, in the regulariser of masks, compiles anew where a side becomes odd.
    shapes = [(4, 3, 16, 24), (5, 3, 32, 16), (9, 3, 24, 40)]
    if implementation == "triton":  # slow in the interpreter
        shapes = [(2, 3, 4, 6), (3, 3, 5, 3)]
    first, *others = (draw(*shape, device=device) for shape in shapes)
    with use_implementation(implementation):
        assert_same(measured(compiled, model, first, dynamic=(0, 2, 3)), measured(model, model, first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for images in others:
                assert_same(measured(compiled, model, images), measured(model, model, images))
    assert graphs == ["forward", "backward"]


BACKBONES = {
    "torchvision resnet50": (lambda: vision.resnet50(num_classes=LABELS), ["layer3", "layer4"]),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=LABELS), ["stages.1", "stages.3"]),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=LABELS), ["stages.2", "stages.3"]),
}


def wrapped(name: str, device: torch.device, dtype: torch.dtype) -> AttendRectify:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make_backbone, layers = BACKBONES[name]
    return AttendRectify(make_backbone().to(device, dtype), layers, LABELS, heads=2)


@pytest.mark.parametrize("name", ["torchvision resnet50", "timm convnext"])
def test_attend_rectify_over_a_backbone_in_one_graph(name, device):
    """Any batch, forward and backward; at this size the last maps are single positions, so the resolution stays."""
    model = wrapped(name, device, torch.float64)
    compiled, graphs = compile_counting(model)
    first, other = (draw(count, 3, 32, 32, device=device) for count in (3, 4))
    assert_same(measured(compiled, model, first, dynamic=(0,)), measured(model, model, first), 1e-8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(measured(compiled, model, other), measured(model, model, other), 1e-8)
    assert graphs == ["forward", "backward"]


def attention_and_loss(attention: nn.ModuleList, feature_map: torch.Tensor) -> torch.Tensor:
    out = attention[0](feature_map, global_gates=attention[1], masks=True, mean=True)
    mixed = rectify([out.hypothesis, out.hypothesis + out.mean[:, :LABELS]], out.global_scores, mix="prob")
    target = torch.arange(feature_map.shape[0], device=feature_map.device) % LABELS
    return nn.functional.nll_loss(mixed, target) + losses.mask_regulariser(out.masks)


def test_inductor_of_attention_and_losses(device):
    """Any batch and resolution, one compilation. Of a whole network Inductor fixes the resolution: a convolution's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention = nn.ModuleList([AttentionModule(6, LABELS, 3), GlobalGates(6, 2)]).to(device)

    def call(feature_map):
        return attention_and_loss(attention, feature_map)

    compiled = torch.compile(call, fullgraph=True)
    first, *others = (
        draw(*shape, device=device, dtype=torch.float32) for shape in ((4, 6, 8, 12), (6, 6, 6, 10), (9, 6, 16, 4))
    )
    assert_same(measured(compiled, attention, first, dynamic=(0, 2, 3)), measured(call, attention, first), 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for maps in others:
            assert_same(measured(compiled, attention, maps), measured(call, attention, maps), 1e-4)


def test_inductor_of_a_network(device):
    """A whole WARN as Inductor writes it, with any batch."""
    model = make("WARN", device).float()
    compiled = torch.compile(model, fullgraph=True)
    first, other = (draw(n, 3, 8, 12, device=device, dtype=torch.float32) for n in (4, 6))
    assert_same(measured(compiled, model, first, dynamic=(0,)), measured(model, model, first), 1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(measured(compiled, model, other), measured(model, model, other), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["WARN", "torchvision resnet50", "timm convnext_atto"])
def test_reduce_overhead(name, device):
    """Steps replayed from CUDA graphs leave the gradients of eager mode, and no graph was refused.

    In float64: a replay that reads or writes the wrong memory shows in any dtype, while 50 layers of norms and ReLUs
    make of float32's rounding 3% of the largest gradient (H200), and of float64's 2⁻²⁹ times that, 6e-11. The limit
    leaves room for another chip's.
    """
    from torch._dynamo.utils import counters

    model = make(name, device) if name in MODELS else wrapped(name, device, torch.float64)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    for seed in range(5):  # warm-up, recording, replays
        torch.manual_seed(seed)
        images = torch.randn(8, 3, 64, 64, dtype=torch.float64, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        got = [value.clone() for value in measured(compiled, model, images)]
        assert_same(got, measured(model, model, images), 1e-8)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_a_compiled_nchw_resnet50_copies_no_feature_map(device):
    """The attention reads the very buffers that the next convolutions read, forward and backward, whatever layout
    Inductor gives them. A copy would be read by the attention alone.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = vision.resnet50(num_classes=LABELS).to(device)
    model = AttendRectify(backbone, ["layer2", "layer3"], LABELS)
    compiled = torch.compile(model)
    images = torch.randn(8, 3, 96, 96, device=device)  # NCHW

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(images), torch.arange(8, device=device) % LABELS)
        loss.backward()

    _, codes = run_and_get_code(step)
    forward, backward = codes
    calls = r"layer{}\.default\((\w+),"
    attended = re.findall(calls.format(""), forward)
    assert len(attended) == 2
    for name in attended:
        assert f"extern_kernels.convolution({name}," in forward, forward
    read_again = re.findall(calls.format("_backward"), backward)
    assert len(read_again) == 2
    for name in read_again:
        assert f"torch.ops.aten.convolution_backward.default({name}," in backward or re.search(
            rf"convolution_backward\.default\(\w+, {name},", backward
        ), backward
