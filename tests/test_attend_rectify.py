"""AttendRectify on torchvision's, timm's and a user's own backbones, against convolutions on captured maps."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from backbones import OwnNet, assert_same, independent, measured, timm, vgg11, vision
from layers import assert_within_budget
from torch import nn
from torch.utils.checkpoint import checkpoint

from ar_kernels import AttendRectify, AttentionModule, AttentionOutput, Rectified, attend_rectify, use_implementation

LABELS = 5
OWN_LAYERS = ["middle.0", "middle.2", "end"]

BACKBONES = {
    "resnet18": (lambda: vision.resnet18(num_classes=LABELS), ["layer2.0.bn2", "layer3", "layer4"]),
    "convnext_tiny": (lambda: vision.convnext_tiny(num_classes=LABELS), ["features.3.1.block.3", "features.7"]),
    "efficientnet_b0": (lambda: vision.efficientnet_b0(num_classes=LABELS), ["features.3", "features.8"]),
    "mobilenet_v3_small": (lambda: vision.mobilenet_v3_small(num_classes=LABELS), ["features.0", "features.12"]),
    "densenet121": (lambda: vision.densenet121(num_classes=LABELS), ["features.transition2", "features.norm5"]),
    "vgg11": (lambda: vgg11(LABELS), ["features.3", "features.18"]),
    "swin_t": (lambda: vision.swin_t(num_classes=LABELS), ["features.1", "features.7"]),
    "timm test_resnet": (lambda: timm.create_model("test_resnet", num_classes=LABELS), ["layer2", "layer4"]),
    "timm test_convnext": (lambda: timm.create_model("test_convnext", num_classes=LABELS), ["stages.1", "stages.3"]),
    "timm test_efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=LABELS), ["blocks.2", "bn2"]),
    "timm test_mambaout": (lambda: timm.create_model("test_mambaout", num_classes=LABELS), ["stages.1", "stages.3"]),
    "own": (lambda: OwnNet(LABELS), OWN_LAYERS),
    "own, not in order": (lambda: OwnNet(LABELS), ["end", "stem"]),
}
OVERWRITTEN = {
    "resnet18": (True, False, False),  # out += identity
    "densenet121": (False, True),
    "vgg11": (True, True),
    "own": (True, False, False),
}
CHANNELS_LAST = {"convnext_tiny": (True, False), "swin_t": (True, True), "timm test_mambaout": (True, True)}


def images(device: torch.device, size: int = 32, count: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(device, dtype)


def own(device: torch.device, **options: object) -> AttendRectify:
    torch.manual_seed(0)
    checkpointed = options.pop("checkpointed", None)
    backbone = OwnNet(LABELS, checkpointed).to(device, torch.float64)
    return AttendRectify(backbone, options.pop("layers", OWN_LAYERS), LABELS, **options)


@pytest.mark.parametrize("name", BACKBONES)
def test_equals_convolutions_on_captured_maps(name, device):
    torch.manual_seed(0)
    make, layers = BACKBONES[name]
    backbone = make().to(device, torch.float64)
    keys = list(backbone.state_dict())
    plain = backbone.eval()(images(device, 64))
    model = AttendRectify(backbone, layers, LABELS, heads=3)
    assert list(backbone.state_dict()) == keys
    assert torch.equal(backbone(images(device, 64)), plain)
    assert model._overwritten == OVERWRITTEN.get(name, (False,) * len(layers))
    assert model._channels_last == CHANNELS_LAST.get(name, (False,) * len(layers))
    expected = independent(model, images(device, 64), last=0 if name == "own, not in order" else len(layers) - 1)
    got = measured(model, images(device, 64))
    assert_same(got, expected)
    torch.testing.assert_close(got["hypotheses"][:, -1], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("mix", ["logit", "log", "prob"])
def test_mixes_and_gatings(mix, gating, device):
    model = own(device, mix=mix, gating=gating, heads=2, gated=mix != "log", kernel_size=3 if mix == "prob" else 1)
    assert (model.global_gates is None) == (gating is None)
    assert_same(measured(model, images(device)), independent(model, images(device), last=2))


def test_every_implementation(device, implementation):
    """The tap lets the backbone go on with the attention's own view of the map: gradients must still be the same."""
    model = own(device)
    expected = independent(model, images(device, 16), last=2)
    with use_implementation(implementation):
        assert_same(measured(model, images(device, 16)), expected)


def test_the_backbone_goes_on_with_the_tap(device, monkeypatch):
    """Where the map needs a gradient, so that one sweep adds both; where it is overwritten, with a copy of the tap."""
    model = own(device)
    taps = []
    forward = AttentionModule.forward

    def spy(module: AttentionModule, feature_map: torch.Tensor, **options: object) -> AttentionOutput:
        output = forward(module, feature_map, **options)
        if options["tap"]:
            taps.append(output.feature_map)
        return output

    monkeypatch.setattr(AttentionModule, "forward", spy)
    entering = []
    model.backbone.classifier.register_forward_pre_hook(lambda *_: entering.append(len(taps)))
    following = []
    for name in ("middle.0", "end"):
        hook = lambda _m, _i, output: following.append(output)  # noqa: E731
        model.backbone.get_submodule(name).register_forward_hook(hook)
    model(images(device))
    assert entering == [3]
    assert following[1] is taps[2]
    assert following[0] is not taps[0] and following[0]._base is None
    model._overwritten = (False, False, False)  # without the copy the next layer would spoil the attended map
    with pytest.raises(RuntimeError, match=r"'middle.0'|inplace"):
        model(images(device))


def test_training_mode_and_a_step(device):
    """Batch statistics are updated by forwards in training mode, and only there; one step lowers the loss."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=LABELS).to(device)
    model = AttendRectify(backbone, ["layer3", "layer4"], LABELS)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    inputs, labels = images(device, 64, count=4, dtype=torch.float32), torch.tensor([0, 1, 2, 3], device=device)
    model.eval()(inputs)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert not torch.equal(backbone.bn1.running_mean, before["bn1.running_mean"])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.attention.parameters())


# ---------------------------------------------------------------------------------------------- construction


def test_construction_leaves_no_trace(device):
    """Random state, training flags, statistics, gradients and the thread's record of calls are as they were."""
    backbone = timm.create_model("test_efficientnet", num_classes=LABELS, drop_rate=0.5).to(device).train()
    backbone.blocks[0].eval()
    flags = [module.training for module in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    class Random(nn.Module):  # draws in eval mode too
        def __init__(self):
            super().__init__()
            self.inner = backbone

        def forward(self, x):
            return F.dropout(self.inner(x), 0.5, training=True)

    def draw_after(construct: bool) -> torch.Tensor:
        torch.manual_seed(0)
        if construct:
            attend_rectify._dry_run(Random(), ("inner.blocks.1", "inner.bn2"), LABELS, None, None)
        return torch.rand(3, device=device)

    assert torch.equal(draw_after(True), draw_after(False))
    assert [module.training for module in backbone.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(not module._forward_hooks for module in backbone.modules())
    AttendRectify(backbone, ["bn2"], LABELS)
    assert [module.training for module in backbone.modules()] == flags
    assert all(p.grad is None for p in backbone.parameters())
    assert attend_rectify._calls.innermost is None


def test_parameters_on_the_backbones_device_and_dtype(device):
    backbone = OwnNet(LABELS).to(device, torch.bfloat16)
    model = AttendRectify(backbone, ["stem", "end"], LABELS)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device.type, torch.bfloat16)}
    with torch.autocast(device.type, torch.bfloat16):
        model = AttendRectify(OwnNet(LABELS).to(device), ["stem"], LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class OneSize(nn.Module):
    """Takes one size of image only, through a linear layer or an assertion, and keeps it."""

    def __init__(self, size: int, channels: int = 8) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, channels, 1)
        self.head = nn.Linear(channels * size * size, LABELS)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


def test_input_sizes(device):
    """64 first, 224 next, else example_input; the error says what the backbone said."""
    AttendRectify(OneSize(64).to(device), ["conv"], LABELS)
    AttendRectify(OneSize(224).to(device), ["conv"], LABELS)
    with pytest.raises(ValueError, match=r"^example_input must be given: .* at 64×64 RuntimeError: .* at 224×224"):
        AttendRectify(OneSize(40).to(device), ["conv"], LABELS)
    example = images(device, 40, dtype=torch.float32)
    model = AttendRectify(OneSize(40).to(device), ["conv"], LABELS, example_input=example)
    assert model.attention[0].in_channels == 8
    model = AttendRectify(OneSize(40).to(device), ["conv"], LABELS, example_input=(example,))
    assert model.attention[0].in_channels == 8
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # an error at the given size is the user's
        AttendRectify(OneSize(40).to(device), ["conv"], LABELS, example_input=example[:, :, :20])
    with pytest.raises(TypeError, match="^example_input must be a tensor or a tuple, got list"):
        AttendRectify(OneSize(40).to(device), ["conv"], LABELS, example_input=[example])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, LABELS))
    with pytest.raises(ValueError, match="^example_input must be given: the backbone has no Conv2d or Conv1d"):
        AttendRectify(linear, ["1"], LABELS)


class Lasts(nn.Module):
    """A map of half the input's rows and columns, channels last or first; of one size of input alone, if that is
    given."""

    def __init__(self, channels: int, last: bool, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.conv, self.map, self.last = nn.Conv2d(3, channels, 2, stride=2), nn.Identity(), last
        self.head = nn.Linear(channels, LABELS)

    def forward(self, x):
        if self.size not in (None, x.shape[-1]):
            raise ValueError(f"{x.shape[-1]} is no {self.size}")
        x = self.conv(x)
        x = self.map(x.movedim(1, -1) if self.last else x)
        return self.head(x.mean(dim=(1, 2) if self.last else (2, 3)))


def test_hooks_go_with_the_wrapper(device):
    """With the last of it and its shallow copies; a deep copy has hooks of its own, on its own backbone."""
    backbone = Lasts(7, last=False).to(device)
    model, x = AttendRectify(backbone, ["map"], LABELS), images(device, dtype=torch.float32)
    shallow, deep, expected = copy.copy(model), copy.deepcopy(model), model(x)
    del model
    gc.collect()
    assert torch.equal(shallow(x), expected) and torch.equal(deep(x), expected)
    del shallow
    gc.collect()
    assert not backbone.map._forward_hooks and torch.equal(deep(x), expected)
    backbone = deep.backbone
    del deep
    gc.collect()
    assert not backbone.map._forward_hooks


def test_a_replaced_layer(device):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, LABELS)).to(device)
    x = images(device, dtype=torch.float32)
    model = AttendRectify(backbone, ["1"], LABELS, example_input=x)
    backbone[1] = nn.GELU()
    with pytest.raises(RuntimeError, match="^layer '1' is another module than when AttendRectify was made"):
        model(x)
    with pytest.raises(TypeError, match="^return_details must be True or False, got 1"):
        model(x, return_details=1)


def test_channel_dimension(device):
    """First by the proportions of the input; where those leave it open by a second size; else the user says it."""
    square = images(device, 64, dtype=torch.float32)
    for last in (False, True):
        net = Lasts(7, last).to(device)
        for example in (None, square, square[:, :, :40], square[:, :, :37, :53]):
            model = AttendRectify(net, ["map"], LABELS, example_input=example)
            assert (model.attention[0].in_channels, model._channels_last) == (7, (last,))
        net = Lasts(32, last).to(device)  # 32 channels at 32×32
        for example in (None, square):
            assert AttendRectify(net, ["map"], LABELS, example_input=example)._channels_last == (last,)
        net = Lasts(32, last, size=64).to(device)
        with pytest.raises(ValueError, match=r"^channel_dim must be given: .* layer 'map' .* \[2, 32, 32, 32\]"):
            AttendRectify(net, ["map"], LABELS, example_input=square)
        model = AttendRectify(net, ["map"], LABELS, example_input=square, channel_dim=-1 if last else 1)
        assert model._channels_last == (last,)
        assert model(square, return_details=True).masks[0].shape == (2, 4, 32, 32)


def test_channel_dimension_of_maps_that_have_not_the_proportions_of_the_input(device):
    """A map's rows are pooled to the proportions that make its channels look like rows; or its size is fixed."""
    wide = torch.zeros(2, 1, 64, 128, device=device)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, LABELS))
    pooled = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d((2, 1)), head).to(device)
    model = AttendRectify(pooled, ["1"], LABELS, example_input=wide)  # [2, 16, 32, 128]
    assert (model.attention[0].in_channels, model._channels_last) == (16, (False,))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 7, LABELS))
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((4, 7)), head).to(device)
    with pytest.raises(ValueError, match=r"^channel_dim must be given: .* layer '1' .* \[2, 4, 4, 7\]"):
        AttendRectify(fixed, ["1"], LABELS)
    assert AttendRectify(fixed, ["1"], LABELS, channel_dim=1).attention[0].in_channels == 4


def test_maps_of_rank_3(device):
    """A 1-d convolution's [N, C, S], and a transformer's tokens [N, S, C]."""
    torch.manual_seed(0)

    class Signal(nn.Sequential):
        def forward(self, x):
            return self[2](F.relu(self[1](self[0](x))).mean(dim=2))

    net = Signal(nn.Conv1d(2, 6, 3), nn.Conv1d(6, 4, 3), nn.Linear(4, LABELS)).to(device, torch.float64)
    model = AttendRectify(net, ["0", "1"], LABELS)
    assert [module.in_channels for module in model.attention] == [6, 4]
    signal = images(device)[:, 0, :2]
    assert_same(measured(model, signal), independent(model, signal, last=1))

    tokens = timm.create_model("test_vit", num_classes=LABELS, dynamic_img_size=True).to(device)
    model = AttendRectify(tokens, ["blocks.2"], LABELS)
    assert model._channels_last == (True,)
    assert model(images(device, 64, dtype=torch.float32), return_details=True).masks[0].shape == (2, 4, 17)
    model = AttendRectify(tokens, ["blocks.2"], LABELS, example_input=images(device, dtype=torch.float32))
    assert (model.attention[0].in_channels, model._channels_last) == (64, (True,))


class Odd(nn.Module):
    """Layers that cannot be attended."""

    def __init__(self, output: str = "scores") -> None:
        super().__init__()
        self.conv, self.pair, self.relu, self.unused = nn.Conv2d(3, 4, 3), Pair(), nn.ReLU(), nn.ReLU()
        self.indices, self.head, self.output = Indices(), nn.Linear(4, LABELS), output

    def forward(self, x):
        x = self.relu(self.conv(self.relu(x)))
        x, _ = self.pair(x)
        self.indices(x)
        scores = self.head(x.mean(dim=(2, 3)))
        return {"scores": scores, "tuple": (scores, scores), "map": x, "row": scores[0]}[self.output]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Indices(nn.Module):
    def forward(self, x):
        return x.argmax(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": ["con"]}, ValueError, "layers must name submodules .* got 'con'; did you mean 'conv'"),
        ({"layers": ["zzz"]}, ValueError, "got 'zzz'; it has conv, pair, relu"),
        ({"layers": [""]}, ValueError, "got ''"),
        ({"layers": ["conv", "conv"]}, ValueError, "layers must not repeat a name, got 'conv' 2 times"),
        ({"layers": []}, ValueError, "layers must name at least one layer, got none"),
        ({"layers": "conv"}, TypeError, "layers must be a sequence of names, got str"),
        ({"layers": [1]}, TypeError, "layers must hold names, got int"),
        ({"layers": ["relu"]}, ValueError, "layers must run once .* 'relu' ran 2 times"),
        ({"layers": ["unused"]}, ValueError, "layers must run once .* 'unused' never ran"),
        ({"layers": ["pair"]}, TypeError, "layer 'pair' must return one tensor, got tuple"),
        ({"layers": ["indices"]}, TypeError, "layer 'indices' must return a floating tensor, got torch.int64"),
        ({"layers": ["head"]}, ValueError, r"layer 'head' must return a feature map .* got \[2, 5\]"),
        ({"backbone": "resnet18"}, TypeError, "backbone must be a torch.nn.Module, got str"),
        ({"backbone": Odd("tuple")}, TypeError, r"backbone must return a tensor \[N, 5\], got tuple"),
        ({"backbone": Odd("map")}, ValueError, r"backbone must return .* = \[2, 5\], got \[2, 4, 62, 62\]"),
        ({"backbone": Odd("row")}, ValueError, r"backbone must return .* got \[5\]"),
        ({"num_classes": 6}, ValueError, r"backbone must return .* = \[2, 6\], got \[2, 5\]"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 5.0}, TypeError, "num_classes must be an int, got float"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": True}, TypeError, "heads must be an int, got bool"),
        ({"mix": "mean"}, ValueError, "mix must be one of logit, log, prob, got 'mean'"),
        ({"gating": "tanh"}, ValueError, "gating must be 'softmax', 'sigmoid' or None, got 'tanh'"),
        ({"kernel_size": 5}, ValueError, "kernel_size must be 1 or 3, got 5"),
        ({"channel_dim": 2}, ValueError, "channel_dim must be 1, -1 or None, got 2"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"backbone": Odd(), "layers": ["conv"], "num_classes": LABELS} | change
    with pytest.raises(error, match=message):
        AttendRectify(**arguments)
    assert isinstance(arguments["backbone"], str) or not arguments["backbone"].conv._forward_hooks


# ---------------------------------------------------------------------------------------------- one forward


class Whims(nn.Module):
    """Does in training, or on demand, what it does not do in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.repeats = nn.Conv2d(3, 4, 3), nn.Linear(4, LABELS), 1

    def forward(self, x):
        maps = [self.conv(x) for _ in range(self.repeats)]
        feature_map = maps[0] if maps else x.new_zeros(x.shape[0], 4, 2, 2)
        return self.head(F.dropout(feature_map, 0.5, self.training, inplace=True).mean(dim=(2, 3)))


def test_dropout_in_place(device):
    """It overwrites the map in training only; the map is attended as the convolution left it all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = AttendRectify(net.append(nn.Linear(4, LABELS)).to(device, torch.float64), ["0"], LABELS)
    assert model._overwritten == (True,)
    expected = model.eval()(images(device), return_details=True).hypotheses
    got = model.train()(images(device), return_details=True).hypotheses
    torch.testing.assert_close(got[:, 0], expected[:, 0])
    assert not torch.allclose(got[:, 1], expected[:, 1])
    got.sum().backward()


class Probed(nn.Module):
    """Attended where a layer hands back the very tensor that the net overwrites later, or a view of it."""

    def __init__(self, probe):
        super().__init__()
        self.conv, self.probe, self.head = nn.Conv2d(3, 4, 3), probe, nn.Linear(4, LABELS)

    def forward(self, x):
        feature_map = self.conv(x)
        self.probe(feature_map)
        return self.head(F.relu(feature_map, inplace=True).flatten(2).mean(dim=2))


@pytest.mark.parametrize("how", ["plain", "saved tensors elsewhere", "checkpoint", "no_grad"])
@pytest.mark.parametrize("probe", [nn.Identity(), nn.Flatten(2), nn.Dropout(0.0)], ids=str)
def test_a_layer_that_returns_its_input(probe, how, device):
    torch.manual_seed(0)
    model = AttendRectify(Probed(probe).to(device, torch.float64), ["probe"], LABELS, heads=2)
    assert model._overwritten == (True,)
    x = images(device).requires_grad_(how != "no_grad")

    def outputs():
        if how == "checkpoint":
            return checkpoint(model, x, use_reentrant=False, return_details=True).hypotheses
        if how == "saved tensors elsewhere":
            with torch.autograd.graph.save_on_cpu():
                return model(x, return_details=True).hypotheses
        with torch.set_grad_enabled(how == "plain"):
            return model(x, return_details=True).hypotheses

    feature_map = model.backbone.conv(x)
    expected = torch.stack([model.attention[0](feature_map).hypothesis, model.backbone(x)], dim=1)
    got = outputs()
    torch.testing.assert_close(got, expected)
    if how != "no_grad":
        grads = [
            torch.autograd.grad(value.square().sum(), [x, *model.backbone.parameters()]) for value in (got, expected)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("where", ["positions first", "windows"])
def test_maps_that_do_not_begin_with_the_batch_raise(where, device):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.turn, self.head = nn.Conv2d(3, 4, 4, 4), nn.Identity(), nn.Linear(4, LABELS)

        def forward(self, x):
            z = self.conv(x)
            if where == "windows":
                return self.head(self.turn(z.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)).mean((2, 3))[::2])
            return self.head(self.turn(z.flatten(2).permute(2, 0, 1)).mean(0))

    got = "[4, 4, 8, 16]" if where == "windows" else "[256, 2, 4]"
    with pytest.raises(ValueError) as raised:
        AttendRectify(Odd().to(device), ["turn"], LABELS, channel_dim=1 if where == "windows" else -1)
    assert str(raised.value) == (
        f"layer 'turn' must return a map whose first dimension is the batch's 2 images, got {got}"
    )


def test_what_changes_after_construction_raises(device, implementation):
    with use_implementation(implementation):
        check_what_changes(device)


def check_what_changes(device):
    model = AttendRectify(Whims().to(device), ["conv"], LABELS)
    inputs = images(device, dtype=torch.float32)
    with torch.no_grad():
        model.train()(inputs)  # the attention has seen the map by then, and no gradient will want it again
    with pytest.raises(RuntimeError, match="map of layer 'conv' was overwritten in place .* inplace=False"):
        model(inputs)
    model.eval()
    for repeats, message in ((2, "layer 'conv' ran twice"), (0, "layer 'conv' did not run")):
        model.backbone.repeats = repeats
        with pytest.raises(RuntimeError, match=message):
            model(inputs)
    model.backbone.repeats = 1
    model.backbone.conv.forward = lambda x: (x, x)
    with pytest.raises(TypeError, match="layer 'conv' must return one tensor, got tuple"):
        model(inputs)
    assert attend_rectify._calls.innermost is None
    net = vision.googlenet(num_classes=LABELS, init_weights=False).to(device)
    model = AttendRectify(net, ["inception4a"], LABELS)
    with pytest.raises(TypeError, match=r"backbone must return a tensor \[N, 5\], got GoogLeNetOutputs"):
        model.train()(images(device, 64, dtype=torch.float32))


def test_nothing_is_held_after_forward(device):
    """Not after an ordinary forward, nor after one that fails on its way."""
    model = own(device)
    kept = []
    handle = model.backbone.end.register_forward_hook(lambda _m, _i, out: kept.append(weakref.ref(out)))
    model(images(device), return_details=True).output.sum().backward()
    failing = model.backbone.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(device))
    failing.remove(), handle.remove()
    gc.collect()
    assert len(kept) == 2 and all(reference() is None for reference in kept)
    assert attend_rectify._calls.innermost is None
    assert_same(measured(model, images(device)), independent(model, images(device), last=2))


def test_backbone_alone_runs_no_attention(device, monkeypatch):
    model = own(device)
    monkeypatch.setattr(model.attention[0], "forward", lambda *_, **__: pytest.fail("attention ran"))
    model.backbone(images(device)).sum().backward()


def test_wrappers_of_one_backbone_and_of_a_wrapper(device):
    first = own(device, layers=["stem", "end"])
    plain = copy.deepcopy(first)
    second = AttendRectify(first.backbone, ["end"], LABELS, heads=2)
    assert torch.equal(first(images(device)), plain(images(device)))
    hypotheses = second(images(device), return_details=True).hypotheses
    outer = AttendRectify(second, ["backbone.stem"], LABELS).double()
    details = outer(images(device), return_details=True)
    torch.testing.assert_close(details.hypotheses[:, -1], second(images(device)))
    torch.testing.assert_close(second(images(device), return_details=True).hypotheses, hypotheses)


def test_threads_do_not_meet(device):
    """Two wrappers of one backbone, each in threads of its own, at the same time."""
    first = own(device, layers=["stem", "end"])
    second = AttendRectify(first.backbone, ["middle.2"], LABELS, heads=2)
    inputs = [images(device) * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    models = [first, second, first, second]
    expected = [model(x) for model, x in zip(models, inputs, strict=True)]
    got: list = [None] * 4

    def work(index: int) -> None:
        for _ in range(5):
            got[index] = models[index](inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_replicas_of_data_parallel(device):
    """DataParallel's replicas share hooks with the original but use their own parameters."""
    model = own(device)
    replica = model._replicate_for_data_parallel()
    replica.attention = copy.deepcopy(model.attention)
    with torch.no_grad():
        for parameter in replica.attention.parameters():
            parameter.mul_(2)
    other = copy.deepcopy(model)
    other.attention.load_state_dict(replica.attention.state_dict())
    assert torch.equal(replica(images(device)), other(images(device)))
    assert not torch.equal(replica(images(device)), model(images(device)))


# ---------------------------------------------------------------------------------------------- copies and states


def test_deepcopy_and_pickle(device):
    model = own(device)
    expected = measured(model, images(device))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # a copy that shared anything with the original would notice
    for other in copies:
        assert_same(measured(other, images(device)), expected, tolerance=1e-12)
        assert other._token is not model._token


def test_state_dict(device):
    model = own(device)
    state = model.state_dict()
    plain = OwnNet(LABELS).state_dict()
    attention = [f"attention.{i}.{kind}_weight" for i in range(3) for kind in ("mask", "output", "gate")]
    gates = ["global_gates.mask_weight", "global_gates.gate_weight"]
    assert set(state) == {f"backbone.{key}" for key in plain} | {*attention, *gates}
    torch.manual_seed(1)
    other = AttendRectify(OwnNet(LABELS).to(device, torch.float64), OWN_LAYERS, LABELS)
    assert not torch.equal(other(images(device)), model(images(device)))
    other.load_state_dict(state)
    assert torch.equal(other(images(device)), model(images(device)))
    bare = OwnNet(LABELS).to(device, torch.float64)
    bare.load_state_dict(model.backbone.state_dict())
    assert torch.equal(bare(images(device)), model.backbone(images(device)))


def test_dtypes_and_modes(device):
    model = own(device)
    expected = measured(model, images(device))
    model.float()
    single = model(images(device, dtype=torch.float32))
    torch.testing.assert_close(single.double(), expected["output"], rtol=1e-4, atol=1e-5)
    half = model.bfloat16()(images(device, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected["output"], rtol=0.1, atol=0.1)
    model.double().load_state_dict(own(device).state_dict())
    assert_same(measured(model.train(), images(device)), expected, tolerance=1e-12)
    assert_same(measured(model.eval(), images(device)), expected, tolerance=1e-12)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("implementation", "yardstick"), [("eager", "reference"), ("triton", "eager")])
def test_autocast(implementation, yardstick, device):
    """No further from float64 than twice a plainer path is under the same autocast, and an eps: what the backbone's own
    rounding does to each gradient is in both, and the largest of several draws is compared with the largest."""
    if implementation == "triton":
        pytest.importorskip("triton")
    model = own(device)
    single = copy.deepcopy(model).float()
    draws = []
    for scale in (0.5, 1.0, 1.5):
        runs = []
        for name in (implementation, yardstick):
            with use_implementation(name), torch.autocast(device.type, torch.bfloat16):
                runs.append(measured(single, images(device, dtype=torch.float32) * scale))
        for name, value in runs[0].items():
            dtypes = (torch.float32,) if name.startswith("d ") else (torch.float32, torch.bfloat16)
            assert value.dtype in dtypes, name
        draws.append((*runs, measured(model, images(device).float().double() * scale)))
    assert_within_budget(draws, torch.bfloat16)


def test_frozen_backbone(device):
    """Only the attention learns, its gradients are those of the unfrozen model, and the backbone's maps need none."""
    model = own(device)
    expected = {k: v for k, v in measured(model, images(device)).items() if not k.startswith("d backbone")}
    model.backbone.requires_grad_(False)
    needs = []
    model.backbone.classifier.register_forward_pre_hook(lambda _m, inputs: needs.append(inputs[0].requires_grad))
    assert_same(measured(model, images(device)), expected)
    assert needs == [False, False]


def test_inference(device):
    model = own(device)
    expected = model(images(device))
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            got = model(images(device))
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)


def test_strides(device):
    model = own(device)
    expected = measured(model, images(device))
    model.to(memory_format=torch.channels_last)
    assert_same(measured(model, images(device).contiguous(memory_format=torch.channels_last)), expected)


# ---------------------------------------------------------------------------------------------- checkpoint, compile


def test_checkpoint_without_reentry(device):
    plain = own(device)
    model = own(device, checkpointed="no reentry")
    runs = []
    model.backbone.middle[0].register_forward_hook(lambda *_: runs.append(1))
    expected = measured(plain, images(device))
    got = measured(model, images(device))
    assert len(runs) == 3  # two forwards and the recomputation in backward
    assert_same(got, expected, tolerance=1e-12)
    bare = model.backbone(images(device))  # without its wrapper the backbone checkpoints as ever
    (grad,) = torch.autograd.grad(bare.square().sum(), [model.backbone.stem.weight])
    truth = torch.autograd.grad(plain.backbone(images(device)).square().sum(), [plain.backbone.stem.weight])
    torch.testing.assert_close(grad, truth[0], rtol=1e-12, atol=1e-12)


def test_checkpointed_wrapper(device):
    """The whole AttendRectify in somebody's checkpoint: recomputation runs it again, attention and all."""
    model = own(device)
    expected = measured(model, images(device))
    model.zero_grad(set_to_none=True)
    inputs = images(device).requires_grad_()
    for reentrant in (False, True):
        model.zero_grad(set_to_none=True)
        checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
        got = {f"d {name}": p.grad for name, p in model.named_parameters()}
        assert_same(got, {name: value for name, value in expected.items() if name.startswith("d ")}, tolerance=1e-12)


def test_checkpoint_with_reentry_raises(device):
    model = own(device, checkpointed="reentrant")
    with pytest.raises(RuntimeError, match="layer 'middle.0' ran with gradients off .* use_reentrant=False"):
        model(images(device))
    with torch.no_grad():
        torch.testing.assert_close(model(images(device)), own(device)(images(device)), rtol=1e-12, atol=1e-12)
    outside = own(device, checkpointed="reentrant", layers=["stem", "end"])
    expected = measured(own(device, layers=["stem", "end"]), images(device))
    assert_same(measured(outside, images(device)), expected, tolerance=1e-12)


def test_timms_checkpointing(device):
    torch.manual_seed(0)
    backbone = timm.create_model("test_convnext", num_classes=LABELS).to(device, torch.float64)
    model = AttendRectify(backbone, ["stages.1.blocks.0.conv_dw", "stages.2"], LABELS)
    expected = measured(model, images(device))
    backbone.set_grad_checkpointing(True)
    assert_same(measured(model.train(), images(device)), expected, tolerance=1e-12)


def test_saved_tensors_hooks_of_the_user(device):
    model = own(device)
    expected = measured(model, images(device))
    with torch.autograd.graph.save_on_cpu():
        assert_same(measured(model, images(device)), expected, tolerance=1e-12)


@pytest.mark.parametrize("layers", [OWN_LAYERS, ["end", "stem"]], ids=str)
def test_compiled_whole(layers, device):
    """One graph, no breaks; the batch may vary; details too."""
    torch._dynamo.reset()
    model = own(device, layers=layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for count in (2, 3):
        inputs = images(device, count=count)
        expected = measured(model, inputs)
        assert_same(measured_compiled(compiled, inputs), expected, 1e-12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        details = compiled(images(device, count=5), return_details=True)
    assert isinstance(details, Rectified)
    torch.testing.assert_close(details.output, model(images(device, count=5)), rtol=1e-12, atol=1e-12)
    assert attend_rectify._calls.innermost is None


def measured_compiled(compiled: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    got = measured(compiled, inputs)
    return {name.replace("d _orig_mod.", "d "): value for name, value in got.items()}


class _AutocastsInside(OwnNet):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_backbone_that_autocasts_inside(dtype, kept, device):
    """Its maps are bfloat16, the attention's parameters what the backbone's own are."""
    inputs = images(device, dtype=dtype)
    model = AttendRectify(_AutocastsInside(LABELS).to(device, dtype), OWN_LAYERS, LABELS, example_input=inputs)
    attention = [*model.attention.parameters(), *model.global_gates.parameters()]
    assert {parameter.dtype for parameter in attention} == {kept}
    model(inputs).float().sum().backward()
    assert all(parameter.grad.dtype == kept and parameter.grad.any() for parameter in model.attention.parameters())


def test_a_backbone_that_ran_compiled_before_it_was_wrapped(device):
    """Dynamo has left the hooks out: the error says what to do instead."""
    torch._dynamo.reset()
    inputs = images(device)
    compiled = torch.compile(OwnNet(LABELS).to(device, torch.float64), backend="eager")
    compiled(inputs)
    with pytest.raises((ValueError, RuntimeError), match="wrap it uncompiled, and compile the AttendRectify"):
        AttendRectify(compiled, ["_orig_mod.middle.0"], LABELS, example_input=inputs)(inputs)
    torch._dynamo.reset()


def test_compiled_backbone_and_checkpoint(device):
    """A backbone that is compiled by itself, and a checkpointed one compiled with graph breaks."""
    torch._dynamo.reset()
    model = own(device)
    expected = measured(model, images(device))
    inner = copy.deepcopy(model)
    inner.backbone.compile(backend="aot_eager", fullgraph=True)
    assert_same(measured(inner, images(device)), expected, 1e-12)
    checkpointed = torch.compile(own(device, checkpointed="no reentry"), backend="aot_eager")
    assert_same(measured_compiled(checkpointed, images(device)), expected, 1e-12)


def test_functional_call(device):
    """torch.func sees an ordinary module: gradients through functional_call equal backward's."""
    model = own(device)
    expected = measured(model, images(device))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (images(device),)).square().sum()

    grads = {f"d {name}": value for name, value in torch.func.grad(loss)(parameters).items()}
    assert_same(grads, {name: value for name, value in expected.items() if name.startswith("d ")}, tolerance=1e-12)
