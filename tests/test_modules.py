"""AttentionModule and GlobalGates: against the reference, under gradcheck and torch.compile, and with bad arguments."""

import copy

import pytest
import torch
from torch import nn

from ar_kernels import AttentionModule, GlobalGates, attention_module, reference, use_implementation

VARIANTS = {
    "plain": {},
    "one head": {"heads": 1},
    "biases": {"bias": True},
    "ungated": {"gated": False},
    "ungated, biases": {"gated": False, "bias": True},
    "3×3": {"kernel_size": 3},
    "3×3, biases": {"kernel_size": 3, "bias": True},
}


def make(device: torch.device, channels=6, labels=5, heads=3, **options: object) -> AttentionModule:
    torch.manual_seed(0)
    module = AttentionModule(channels, labels, heads, device=device, dtype=torch.float64, **options)
    for bias in (module.output_bias, module.gate_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def feature_map(device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (2, 6, 4, 5), generator=generator, dtype=torch.float64).to(device)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output.square().sum(), inputs))


def assert_close(got: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_module_equals_the_reference(variant, device):
    module = make(device, **VARIANTS[variant])
    maps = feature_map(device).requires_grad_()
    biases = {"output_bias": module.output_bias, "gate_bias": module.gate_bias}
    hypothesis, gates, logits = reference.attention_module(
        maps, module.mask_weight, module.output_weight, module.gate_weight, **biases
    )
    parameters = list(module.parameters())
    expected = gradients(hypothesis, maps, *parameters)
    got = module(maps, masks=True, mean=True, tap=True)
    assert_close(got.hypothesis, hypothesis)
    assert_close(got.gates, gates)
    assert_close(got.masks, reference.attention_masks(logits).unflatten(2, (4, 5)))
    assert_close(got.mean, maps.mean(dim=(2, 3)))
    assert torch.equal(got.feature_map, maps)
    assert got.global_scores is None
    for value, truth in zip(gradients(got.hypothesis, maps, *parameters), expected, strict=True):
        assert_close(value, truth)
    plain = module(maps)
    assert (plain.masks, plain.mean, plain.feature_map) == (None, None, None)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_global_gates_equal_the_reference_alone_and_in_one_pass(kernel_size, device):
    module = make(device, kernel_size=kernel_size)
    gates = GlobalGates(6, 4, kernel_size=kernel_size, device=device, dtype=torch.float64)
    maps = feature_map(device).requires_grad_()
    expected = reference.global_scores(maps, gates.mask_weight, gates.gate_weight)
    truth = gradients(expected, maps, gates.mask_weight, gates.gate_weight)
    alone = gates(maps)
    shared = module(maps, global_gates=gates)
    assert_close(shared.hypothesis, module(maps).hypothesis)
    for got in (alone, shared.global_scores):
        assert_close(got, expected)
        for value, gradient in zip(gradients(got, maps, gates.mask_weight, gates.gate_weight), truth, strict=True):
            assert_close(value, gradient)


def test_maps_of_rank_3_and_any_strides(device):
    module, gates = make(device), GlobalGates(6, 4, device=device, dtype=torch.float64)
    maps = feature_map(device)
    expected = module(maps, global_gates=gates)
    flat = module(maps.flatten(2), global_gates=gates, masks=True)
    assert_close(flat.hypothesis, expected.hypothesis)
    assert_close(flat.global_scores, expected.global_scores)
    assert flat.masks.shape == (2, 3, 20)
    assert_close(flat.masks.sum(dim=2), torch.ones(2, 3, dtype=torch.float64, device=device))
    for strided in (maps.contiguous(memory_format=torch.channels_last), torch.stack([maps, maps], dim=-1)[..., 0]):
        assert_close(module(strided).hypothesis, expected.hypothesis)


@pytest.mark.parametrize("variant", ["biases", "ungated", "3×3, biases"])
def test_gradcheck_of_whole_modules(variant, device):
    """First and second derivatives, through every parameter and the map, of all that comes out."""
    module = make(device, 3, 2, 2, **VARIANTS[variant])
    gates = GlobalGates(3, 2, kernel_size=module.kernel_size, device=device, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    own = len(names)

    def call(maps: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shared = copy.copy(gates)
        shared._parameters = dict(zip(gates._parameters, values[own:], strict=True))
        parameters = dict(zip(names, values[:own], strict=True))
        options = {"global_gates": shared, "masks": True, "mean": True, "tap": True}
        return tuple(torch.func.functional_call(module, parameters, (maps,), options))

    maps = feature_map(device, 2, 3, 2, 3).requires_grad_()
    inputs = (maps, *module.parameters(), *gates.parameters())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_fused_module_equals_eager(device):
    """What a caller sees is the same whichever implementation runs, gradients of a shared pass with a tap included."""
    pytest.importorskip("triton")
    module, gates = make(device), GlobalGates(6, 4, device=device, dtype=torch.float64)
    maps = feature_map(device).requires_grad_()
    results = {}
    for name in ("eager", "triton"):
        with use_implementation(name):
            output = module(maps, global_gates=gates, masks=True, mean=True, tap=True)
            loss = sum(value.square().sum() for value in output)
            inputs = (maps, *module.parameters(), *gates.parameters())
            results[name] = [*output, *torch.autograd.grad(loss, inputs)]
    for fused, eager in zip(results["triton"], results["eager"], strict=True):
        assert_close(fused, eager)


def test_initial_weights(device):
    """Variance 2/fan-in, biases 0, drawn anew by reset_parameters, in the dtype and on the device that were named."""
    module = AttentionModule(200, 50, 8, bias=True, kernel_size=3, device=device)
    for weight in (module.mask_weight, module.gate_weight, module.output_weight):
        assert weight.device.type == device.type and weight.dtype == torch.float32
        assert weight.var().item() == pytest.approx(2 / (200 * 9), rel=0.1)
    assert not module.output_bias.any() and not module.gate_bias.any()
    before = module.mask_weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.mask_weight, before)
    gates = GlobalGates(500, 20, device=device, dtype=torch.bfloat16)
    assert gates.mask_weight.dtype == torch.bfloat16
    assert gates.gate_weight.float().var().item() == pytest.approx(2 / 500, rel=0.1)


def test_copies_states_and_dtypes(device):
    module = make(device, bias=True)
    expected = module(feature_map(device))
    assert list(module.state_dict()) == ["mask_weight", "output_weight", "gate_weight", "output_bias", "gate_bias"]
    clone = copy.deepcopy(module)
    other = AttentionModule(6, 5, 3, bias=True, device=device, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        module.mask_weight.add_(1)
    for copied in (clone, other):
        assert torch.equal(copied(feature_map(device)).hypothesis, expected.hypothesis)
    half = clone.half()(feature_map(device).half())
    assert half.hypothesis.dtype == torch.float16 and half.gates.dtype == torch.float32
    torch.testing.assert_close(half.hypothesis.double(), expected.hypothesis, rtol=0.02, atol=0.02)


def test_autocast(device):
    """Float32 weights beside the half maps that autocast makes; their gradients are float32."""
    module = make(device).float()
    maps = feature_map(device)
    expected = make(device)(maps)
    with torch.autocast(device.type, torch.bfloat16):
        got = module(maps.bfloat16())
    assert got.hypothesis.dtype == torch.bfloat16 and got.gates.dtype == torch.float32
    torch.testing.assert_close(got.hypothesis.double(), expected.hypothesis, rtol=0.05, atol=0.05)
    got.hypothesis.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_compiled_in_one_graph(kernel_size, device):
    torch._dynamo.reset()
    module = make(device, kernel_size=kernel_size)
    gates = GlobalGates(6, 4, kernel_size=kernel_size, device=device, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for images in (2, 3):
        maps = feature_map(device, images, 6, 4, 5).requires_grad_()
        inputs = (maps, *module.parameters(), *gates.parameters())
        results = []
        for call in (module, compiled):
            output = call(maps, global_gates=gates, masks=True, mean=True, tap=True)
            loss = sum(value.square().sum() for value in output)
            results.append([*output, *torch.autograd.grad(loss, inputs)])
        for value, truth in zip(*results, strict=True):
            assert_close(value, truth)


def test_forward_mode_raises_on_the_fused_path_and_works_on_the_others(device):
    module, maps = make(device), feature_map(device)
    expected = None
    for name in ("reference", "eager"):
        with use_implementation(name):
            _, tangent = torch.func.jvp(lambda z: module(z).hypothesis, (maps,), (maps,))
        expected = tangent if expected is None else expected
        assert_close(tangent, expected)
    pytest.importorskip("triton")
    with use_implementation("triton"), pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda z: module(z).hypothesis, (maps,), (maps,))


def test_compiled_code_follows_the_choice_around_it(device):
    """use_implementation around a compiled call decides for it; what was compiled for one choice serves it again."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(any("conv2d" in str(node.target) for node in graph.graph.nodes))  # as the reference alone has it
        return graph

    module = make(device)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for name in (None, "reference", None, "reference"):
        with use_implementation(name), torch.no_grad():
            compiled(feature_map(device))
    assert graphs == [False, True]


@pytest.mark.parametrize(
    ("make_module", "error", "message"),
    [
        (lambda: AttentionModule(0, 5), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: AttentionModule(4.0, 5), TypeError, "in_channels must be an int, got float"),
        (lambda: AttentionModule(4, 0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: AttentionModule(4, "5"), TypeError, "num_classes must be an int, got str"),
        (lambda: AttentionModule(4, 5, 0), ValueError, "heads must be at least 1, got 0"),
        (lambda: AttentionModule(4, 5, -1), ValueError, "heads must be at least 1, got -1"),
        (lambda: AttentionModule(4, 5, True), TypeError, "heads must be an int, got bool"),
        (lambda: AttentionModule(4, 5, kernel_size=5), ValueError, "kernel_size must be 1 or 3, got 5"),
        (lambda: GlobalGates(0, 2), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: GlobalGates(4, 0), ValueError, "hypotheses must be at least 1, got 0"),
        (lambda: GlobalGates(4, 2.5), TypeError, "hypotheses must be an int, got float"),
        (lambda: GlobalGates(4, 2, kernel_size=2), ValueError, "kernel_size must be 1 or 3, got 2"),
    ],
)
def test_bad_arguments(make_module, error, message):
    with pytest.raises(error) as raised:
        make_module()
    assert str(raised.value) == message


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bad_maps(mode, device):
    """The error of the functional form reaches the caller of a module, compiled without fullgraph too."""
    torch._dynamo.reset()
    module = make(device)
    call = module if mode == "eager" else torch.compile(module, backend="aot_eager")
    cases = [
        (
            feature_map(device, 2, 7, 4, 4),
            ValueError,
            "must be [N, 6, H, W] or [N, 6, S] as in_channels says, got [2, 7,",
        ),
        (feature_map(device, 2, 6), ValueError, "feature_map must be [N, C, H, W] or [N, C, S], got [2, 6]"),
        (feature_map(device).float(), TypeError, "mask_weight must be torch.float32 to go with feature_map"),
        (feature_map(device).int(), TypeError, "feature_map must be float16, bfloat16, float32 or float64, got"),
    ]
    for maps, error, message in cases:
        with pytest.raises(error) as raised:
            call(maps)
        assert message in str(raised.value)
    wrong = GlobalGates(5, 2, device=device, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"must be \[N, 5, H, W\] or \[N, 5, S\] as in_channels says, got \[2, 6, 4, 4\]"
    ):
        wrong(feature_map(device, 2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"global_mask_weight must be \[2, 6\], got \[2, 5\]"):
        call(feature_map(device), global_gates=wrong)
    assert attention_module(feature_map(device), module.mask_weight, module.output_weight).gates.shape == (2, 3)
