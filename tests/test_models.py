"""Wide ResNets and WARN: their structure as the paper has it, and WARN against the convolutions of reference.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ar_kernels import Rectified, reference, use_implementation
from ar_kernels.models import WideAttentiveResNet, WideResNet

LABELS = 7


def images(device: torch.device, count: int = 2, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(device)


def warn(device: torch.device, depth: int = 16, **options: object) -> WideAttentiveResNet:
    """A small one whose normalisations do something: statistics, weights and biases of no special values.

    Its gates are not sure of themselves, |t| of a few at most: the slope 1 - tanh² t of a sure gate, made of a rounded
    tanh, is wrong by up to 2⁻⁵² / slope of itself on every path, so its gradients could not be compared to 1e-10.
    """
    torch.manual_seed(0)
    model = WideAttentiveResNet(depth, 1, LABELS, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_weight"):
                parameter.div_(16)
    return model.to(device).eval()


def by_hand(model: WideAttentiveResNet, x: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The network written out from its state, with the convolutions of reference.py: nothing of wrn.py runs."""
    p = dict(model.named_parameters()) | dict(model.named_buffers())

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        statistics = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        return torch.relu(F.batch_norm(x, *statistics, p[f"{name}.weight"], p[f"{name}.bias"]))

    x = F.conv2d(x, p["conv0.weight"], padding=1)
    maps = []
    for group in range(3):
        for block in range((model.depth - 4) // 6):
            name = f"group_{group}.block_{block}"
            stride = 2 if group > 0 and block == 0 else 1
            activated = norm(f"{name}.bn0", x)
            if group > 0 and block == 0:
                maps.append(activated)
            y = F.conv2d(activated, p[f"{name}.conv0.weight"], stride=stride, padding=1)
            y = F.conv2d(norm(f"{name}.bn1", y), p[f"{name}.conv1.weight"], padding=1)
            if f"{name}.conv_reduce.weight" in p:
                x = F.conv2d(activated, p[f"{name}.conv_reduce.weight"], stride=stride)
            x = x + y
    maps.append(norm("bn_g2", x))
    own = F.linear(maps[-1].mean(dim=(2, 3)), p["classifier.weight"], p["classifier.bias"])
    maps = maps[3 - model.attention_depth :]
    hypotheses, gates, masks = [], [], []
    for index, feature_map in enumerate(maps):
        weights = [p.get(f"attention.{index}.{kind}_weight") for kind in ("mask", "output", "gate")]
        hypothesis, gate, logits = reference.attention_module(feature_map, *weights)
        hypotheses.append(hypothesis)
        gates.append(gate)
        masks.append(reference.attention_masks(logits).unflatten(2, feature_map.shape[2:]))
    hypotheses = torch.stack([*hypotheses, own], dim=1)
    scores = torch.zeros_like(hypotheses[:, :, 0])
    if "global_gates.mask_weight" in p:
        scores = reference.global_scores(maps[-1], p["global_gates.mask_weight"], p["global_gates.gate_weight"])
    output = reference.rectify(hypotheses, scores, model.mix, model.gating)
    weights = reference.global_gates(scores, model.gating)
    return {"output": output, "hypotheses": hypotheses, "global_gates": weights, "head_gates": gates, "masks": masks}


def assert_close(got: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-10 * truth.abs().max().item())


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(output.square().sum(), list(parameters.values())), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_depth": 1, "attention_width": 1},
        {"attention_depth": 2, "gated": False, "mix": "prob"},
        {"attention_depth": 3, "attention_width": 2, "gating": None, "mix": "log"},
        {"attention_depth": 2, "kernel_size": 3, "gating": "sigmoid"},
    ],
    ids=str,
)
def test_warn_equals_its_formulas(options, device):
    model = warn(device, **options)
    expected = by_hand(model, images(device))
    details = model(images(device), return_details=True)
    assert isinstance(details, Rectified)
    for name in ("output", "hypotheses", "global_gates"):
        assert_close(getattr(details, name), expected[name])
    for name in ("head_gates", "masks"):
        for got, truth in zip(getattr(details, name), expected[name], strict=True):
            assert_close(got, truth)
    output = model(images(device))
    assert_close(output, expected["output"])
    got = gradients(model, output)
    for name, truth in gradients(model, expected["output"]).items():
        assert_close(got[name], truth)


def test_warn_in_training_mode_on_every_implementation(device, implementation):
    """With batch statistics, each implementation's output and gradients are the reference's."""
    model = warn(device, depth=10).train()
    results = {}
    for name in ("reference", implementation):
        with use_implementation(name):
            output = model(images(device, size=8))
            results[name] = {"output": output} | gradients(model, output)
    for name, truth in results["reference"].items():
        assert_close(results[implementation][name], truth)


def test_without_attention_it_is_the_plain_net(device):
    """Same weights, same outputs and gradients; WARN's last normalisation is bn_g2 where the plain net's is bn."""
    model = warn(device, attention_depth=0)
    plain = WideResNet(16, 1, LABELS).to(device, torch.float64).eval()
    state = {key.replace("bn_g2.", "bn."): value for key, value in model.state_dict().items()}
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    output, truth = model(images(device)), plain(images(device))
    assert_close(output, truth)
    expected = gradients(plain, truth)
    for name, value in gradients(model, output).items():
        assert_close(value, expected[name.replace("bn_g2.", "bn.")])
    details = model(images(device), return_details=True)
    assert details.hypotheses.shape == (2, 1, LABELS) and details.masks == ()
    assert torch.equal(details.global_gates, torch.ones_like(details.global_gates))
    attentive = warn(device)
    attentive.load_state_dict(model.state_dict(), strict=False)
    assert_close(attentive(images(device), return_details=True).hypotheses[:, -1], truth)


def test_as_the_paper_has_it():
    """WRN-28-10 has 36.5 million parameters; WARN attends 160@32², 320@16² and 640@8²; names are as documented."""
    with torch.device("meta"):
        plain, model = WideResNet(28, 10, 100), WideAttentiveResNet(28, 10, 100)
    assert sum(p.numel() for p in plain.parameters()) == 36_536_884
    assert [module.in_channels for module in model.attention] == [160, 320, 640]
    # 3 layers of K heads: masks and gates K·C, outputs L·K·C; and the D+1 global heads
    extra = 4 * (160 + 320 + 640) * (2 + 100) + 2 * 4 * 640
    assert sum(p.numel() for p in model.parameters()) == 36_536_884 + extra
    names = {name for name, _ in plain.named_modules()}
    assert names >= {"conv0", "bn", "classifier", "group_0.block_0.conv_reduce", "group_2.block_3.bn1"}
    reduces = {f"group_{group}.block_0.conv_reduce" for group in range(3)}
    assert {name for name in names if "conv_reduce" in name} == reduces
    assert {"bn_g2", "attention.2", "global_gates"} <= {name for name, _ in model.named_modules()}
    narrow = WideResNet(10, 1, 5)
    assert narrow.group_0.block_0.conv_reduce is None and narrow.group_1.block_0.conv_reduce.stride == (2, 2)
    model = WideAttentiveResNet(10, 1, 5).eval()
    with torch.no_grad():
        sizes = [mask.shape[1:] for mask in model(torch.zeros(1, 3, 32, 32), return_details=True).masks]
    assert sizes == [(4, 32, 32), (4, 16, 16), (4, 8, 8)]


def test_dropout_between_the_convolutions():
    """Dropped in training only, between the convolutions of a block: with everything dropped a block adds nothing."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 5, dropout=0.999999)
    block = model.group_0.block_0
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_it_learns(device):
    """Ten steps on four images bring the loss far down, and every parameter has a gradient."""
    torch.manual_seed(0)
    model = WideAttentiveResNet(10, 1, 4).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, labels = images(device, 4).float(), torch.arange(4, device=device)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_copies_and_autocast(device):
    model = warn(device, depth=10)
    expected = model(images(device))
    clone = copy.deepcopy(model)
    other = WideAttentiveResNet(10, 1, LABELS).to(device, torch.float64).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(clone(images(device)), expected) and torch.equal(other(images(device)), expected)
    clone.float()
    with torch.autocast(device.type, torch.bfloat16):
        half = clone(images(device).float())
    assert half.dtype == torch.float32
    assert (half.double() - expected).norm() / expected.norm() < 0.05
    half = clone.bfloat16()(images(device).bfloat16())
    assert (half.double() - expected).norm() / expected.norm() < 0.1


def test_compiled_in_one_graph(device):
    torch._dynamo.reset()
    model = warn(device, depth=10).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output, truth = compiled(images(device)), model(images(device))
    assert_close(output, truth)
    expected = gradients(model, truth)
    for name, value in gradients(model, output).items():
        assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((27, 10, 10), ValueError, r"depth must be 6n \+ 4 with n of at least 1 .*, got 27"),
        ((4, 10, 10), ValueError, r"depth must be 6n \+ 4 .*, got 4"),
        ((28.0, 10, 10), TypeError, "depth must be an int, got float"),
        ((28, 0, 10), ValueError, "width must be at least 1, got 0"),
        ((28, 1.5, 10), TypeError, "width must be an int, got float"),
        ((10, 1, 0), ValueError, "num_classes must be at least 1, got 0"),
        ((10, 1, 5, 1.0), ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ((10, 1, 5, 0.0, 4), ValueError, "attention_depth must be from 0 to 3, got 4"),
        ((10, 1, 5, 0.0, -1), ValueError, "attention_depth must be from 0 to 3, got -1"),
        ((10, 1, 5, 0.0, 1.0), TypeError, "attention_depth must be an int, got float"),
        ((10, 1, 5, 0.0, 3, 0), ValueError, "attention_width must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        WideAttentiveResNet(*arguments)
    if len(arguments) <= 4:
        with pytest.raises(error, match=message):
            WideResNet(*arguments)


def test_bad_mixes():
    with pytest.raises(ValueError, match="mix must be one of logit, log, prob, got 'mean'"):
        WideAttentiveResNet(10, 1, 5, mix="mean")
    with pytest.raises(ValueError, match="gating must be 'softmax', 'sigmoid' or None, got 'tanh'"):
        WideAttentiveResNet(10, 1, 5, gating="tanh")
