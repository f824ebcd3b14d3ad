"""Networks by name, and the ones that runs left behind."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attend_rectify import AttendRectify
from ..models.digits import DigitNet
from ..models.wrn import WideAttentiveResNet, WideResNet
from . import data, images
from .training import Identity, read_checkpoint

KINDS = "digitnet, wrn-DEPTH-WIDTH, warn-DEPTH-WIDTH, torchvision/NAME, timm/NAME"


@dataclass(frozen=True)
class Net:
    """All that builds a network, in plain values: it is part of a run's identity.

    model: one of KINDS. layers: of a torchvision or timm backbone, names parted by commas; none: the plain backbone.
    The others are the arguments of these names of AttendRectify, WideAttentiveResNet and DigitNet.
    """

    model: str = "digitnet"
    num_classes: int = 10
    attention_depth: int = 3
    attention_width: int = 4
    layers: str = ""
    mix: str = "logit"
    gating: str | None = "softmax"
    gated: bool = True
    kernel_size: int = 1
    dropout: float = 0.0
    image_size: int = 224

    @property
    def is_attentive(self) -> bool:
        """Whether it has masks to look at, and takes return_details."""
        wide = self.model == "digitnet" or self.model.startswith("warn-")
        return self.attention_depth > 0 if wide else self.layers != ""

    def build(self, pretrained: bool = False) -> nn.Module:
        """The network, its weights drawn. pretrained: a backbone's from ImageNet, but for its classifier.

        Raises ValueError for a name that is none, and what the network raises.
        """
        heads = {"mix": self.mix, "gating": self.gating, "gated": self.gated, "kernel_size": self.kernel_size}
        sizes = self.num_classes, self.attention_depth, self.attention_width
        if pretrained and "/" not in self.model:
            raise ValueError(f"only torchvision's and timm's backbones come pretrained, got {self.model}")
        if self.model == "digitnet":
            return DigitNet(*sizes, **heads)
        if wide := re.fullmatch(r"(wrn|warn)-(\d+)-(\d+)", self.model):
            depth, width = int(wide[2]), int(wide[3])
            if wide[1] == "wrn":
                return WideResNet(depth, width, self.num_classes, self.dropout)
            return WideAttentiveResNet(depth, width, self.num_classes, self.dropout, *sizes[1:], **heads)
        library, _, name = self.model.partition("/")
        if library not in ("torchvision", "timm") or not name:
            raise ValueError(f"model must be one of {KINDS}, got {self.model!r}")
        make = _torchvision if library == "torchvision" else _timm
        backbone = make(name, self.num_classes, pretrained)
        if not self.layers:
            return backbone
        example = torch.zeros(2, 3, self.image_size, self.image_size)
        layers = self.layers.split(",")
        return AttendRectify(backbone, layers, self.num_classes, self.attention_width, **heads, example_input=example)

    def settings(self) -> Identity:
        return asdict(self)


def net_of(identity: Identity) -> Net:
    """The network that a run with this identity trains. What an identity does not name has its default."""
    known = {field.name for field in fields(Net)}
    return Net(**{name: value for name, value in identity.items() if name in known})


def load_run(folder: str | Path, device: torch.device) -> tuple[nn.Module, Net, Identity]:
    """The network of a run as its last checkpoint has it, in eval mode, and the run's settings.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that is not a run's.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} must be a folder that train, ablate or demo wrote")
    state = read_checkpoint(path)
    net = net_of(state["identity"])
    model = net.build()
    model.load_state_dict(state["model"])
    return model.to(device).eval(), net, state["identity"]


class Examples(NamedTuple):
    """The images of a run."""

    train: Callable[[int], tuple[Tensor, Tensor]]
    """The batch of a step, which counts from 1."""
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    held_out: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Training images that the run was not trained on; none where it held none out."""


def examples_of(net: Net, identity: Identity, device: torch.device, root: str | Path, batch_size: int) -> Examples:
    """The images that a run was trained and tested on, in batches. Raises what data.load and images.load raise."""
    name, seed = identity["data"], identity["seed"]
    if net.model == "digitnet":
        source = data.load(name, root=root)
        train, test = (data.Clutter(digits.to(device)) for digits in (source.train, source.test))
        return Examples(
            lambda step: train.train_batch(seed, step, batch_size), lambda: test.test_batches(batch_size),
            lambda: iter(()),
        )  # fmt: skip
    held_out = int(identity.get("held_out", 0))
    pictures = images.load(name, device, root=root, size=net.image_size, held_out=held_out)
    batch_size = min(batch_size, pictures.train_count)
    return Examples(
        lambda step: pictures.train_batch(seed, step, batch_size), lambda: pictures.test_batches(batch_size),
        lambda: pictures.held_out_batches(batch_size),
    )  # fmt: skip


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Loads a state_dict, or a run's checkpoint, where names and shapes fit: a warm start; returns what kept its own.

    Backbones of AttendRectify take the weights of a plain backbone. Raises ValueError where nothing fits, or the file
    holds more than tensors and plain values.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes of the unpickler
        raise ValueError(f"{path} could not be read as weights: {error}") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return _take(model.backbone if isinstance(model, AttendRectify) else model, found, str(path))


def _take(model: nn.Module, weights: dict, where: str) -> list[str]:
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and isinstance(value, torch.Tensor) and value.shape == own[name].shape
    }
    if not fitting:
        raise ValueError(f"{where} holds no weight that fits the model")
    model.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    models = images.imported("torchvision.models")
    model = models.get_model(name, weights=None, num_classes=num_classes)
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        _take(model, weights.get_state_dict(check_hash=True), f"torchvision's weights of {name}")
    return model


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    return images.imported("timm").create_model(name, pretrained=pretrained, num_classes=num_classes)
