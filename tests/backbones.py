"""Backbones for the tests: torchvision (where its compiled part loads or not), and a user's own small nets."""

import copy
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ar_kernels import AttendRectify, reference


def _torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # PyPI's torchvision beside a CPU torch
        importlib.import_module("torchvision_on_cpu_torch")
        return importlib.import_module("torchvision")


vision = _torchvision().models
timm = importlib.import_module("timm")  # after torchvision, which it imports


def vgg11(labels: int) -> nn.Module:
    """torchvision's, with a linear classifier: its own has 120 million weights."""
    with torch.device("meta"):
        net = vision.vgg11(num_classes=labels)
    net.features = vision.vgg.make_layers(vision.vgg.cfgs["A"])
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, labels)
    return net


class OwnNet(nn.Module):
    """Three stages of a user's own; the middle one is checkpointed on request and ends in a ReLU in place."""

    def __init__(self, labels: int = 5, checkpointed: str | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
        self.end = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.classifier = nn.Linear(12, labels)
        self.checkpointed = checkpointed

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        if self.checkpointed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointed == "reentrant")
        return self.classifier(F.relu(self.end(x)).mean(dim=(2, 3)))


def independent(model: AttendRectify, images: Tensor, last: int) -> dict[str, Tensor]:
    """What `model` should return and the gradients of Σ output² by parameter name, from a copy of its backbone with
    maps captured by hooks of the test's own, and the convolutions of reference.py. last: which of its layers runs last.
    """
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    backbone = copy.deepcopy(model.backbone)
    for module in backbone.modules():
        module._forward_hooks.clear()
    captured = {}

    def capture(name: str) -> object:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            captured[name] = output
            return output.clone()  # later layers may overwrite their copy

        return hook

    for name in model.layers:
        backbone.get_submodule(name).register_forward_hook(capture(name))
    own_parameters = {name[9:]: value for name, value in parameters.items() if name.startswith("backbone.")}
    own = torch.func.functional_call(backbone, own_parameters, (images,))
    hypotheses, gates, masks = [], [], []
    for index, name in enumerate(model.layers):
        weights = [parameters.get(f"attention.{index}.{kind}_weight") for kind in ("mask", "output", "gate")]
        feature_map = captured[name]
        if feature_map.shape[1] != weights[0].shape[1]:
            feature_map = feature_map.permute(0, 3, 1, 2)
        hypothesis, gate, logits = reference.attention_module(feature_map, *weights)
        hypotheses.append(hypothesis)
        gates.append(gate)
        masks.append(reference.attention_masks(logits).unflatten(2, feature_map.shape[2:]))
        if index == last:
            last_map = feature_map
    hypotheses = torch.stack([*hypotheses, own], dim=1)
    if model.gating is None:
        scores = torch.zeros_like(hypotheses[:, :, 0])
    else:
        scores = reference.global_scores(
            last_map, parameters["global_gates.mask_weight"], parameters["global_gates.gate_weight"]
        )
    output = reference.rectify(hypotheses, scores, model.mix, model.gating)
    results = {"output": output, "hypotheses": hypotheses, "global_gates": reference.global_gates(scores, model.gating)}
    results |= {f"head_gates.{i}": gate for i, gate in enumerate(gates)}
    results |= {f"masks.{i}": mask for i, mask in enumerate(masks)}
    found = torch.autograd.grad(output.square().sum(), list(parameters.values()), allow_unused=True)
    results |= {f"d {name}": grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
    return {name: value.detach() for name, value in results.items()}


def measured(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the model returns, and the gradients of Σ output² that backward leaves in its parameters."""
    model.zero_grad(set_to_none=True)
    details = model(images, return_details=True)
    output = model(images)
    output.square().sum().backward()
    results = {"output": output, "hypotheses": details.hypotheses, "global_gates": details.global_gates}
    torch.testing.assert_close(details.output, output, rtol=0, atol=0)
    results |= {f"head_gates.{i}": gate for i, gate in enumerate(details.head_gates)}
    results |= {f"masks.{i}": mask for i, mask in enumerate(details.masks)}
    results |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in results.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Same names, and every tensor within tolerance of the largest expected value."""
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        assert got[name].shape == truth.shape, name
        error, scale = (got[name] - truth).abs().max().item(), max(truth.abs().max().item(), 1e-3)
        assert error <= tolerance * scale, f"{name}: error {error:.3e} beside {scale:.3e}"
