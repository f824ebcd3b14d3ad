"""The digit net of the paper's ablation, plain and attentive."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import rectify
from ..modules import AttentionModule, GlobalGates
from ..reference import global_gates

IMAGE_SIZE = 40
"""Height and width in pixels of the images that DigitNet takes."""


class MapGeometry(NamedTuple):
    """Where a feature map lies on the image: position i looks at pixel first + i · step, along both axes."""

    channels: int
    size: int
    first: float
    step: int


# conv 5×5 and pool 2; conv 3×3 and pool 2; three convs 3×3, the middle one padded.
_GEOMETRY = (
    MapGeometry(32, 18, 2.5, 2),
    MapGeometry(64, 8, 5.5, 4),
    MapGeometry(128, 6, 9.5, 4),
    MapGeometry(128, 6, 9.5, 4),
    MapGeometry(128, 4, 13.5, 4),
)


class DigitNetDetails(NamedTuple):
    """What DigitNet returns with details=True. Layers count from the first attended to the last."""

    output: Tensor
    """The rectified output: [N, L]."""
    hypotheses: Tensor
    """[N, D+1, L]: the attended layers', and last the network's own output."""
    global_gates: Tensor
    """γ, how much each hypothesis counts: [N, D+1]."""
    gates: tuple[Tensor, ...]
    """How much each head counts, one [N, K] per attended layer."""
    masks: tuple[Tensor, ...]
    """Where each head looks, one [N, K, H, W] per attended layer; sums to 1 over positions."""


class DigitNet(nn.Module):
    """Five convolutions and two linear layers for 40×40 digits in one channel; with attention_depth its attentive twin.

    num_classes: L. attention_depth: D from 0 to 5, how many of the five normalised maps are attended, the last first
    (128@4², 128@6², 128@6², 64@8², 32@18²). attention_width: K heads per attended map.
    kernel_size: of the attention heads, 1 or 3. gated: whether heads are gated or count alike within a layer.
    mix, gating: how the D+1 hypotheses become the output, as ar_kernels.rectify takes them. With mix="logit", and
        without attention, train with CrossEntropyLoss; with "prob" and "log", NLLLoss.

    The global gates are the paper's: an attention head of D+1 masks on the last map, in the same pass as its K heads.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self,
        num_classes: int = 10,
        attention_depth: int = 0,
        attention_width: int = 4,
        *,
        kernel_size: int = 1,
        gated: bool = True,
        mix: str = "logit",
        gating: str | None = "softmax",
    ) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 1), ("attention_depth", attention_depth, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if attention_depth > len(_GEOMETRY):
            raise ValueError(f"attention_depth must be at most {len(_GEOMETRY)}, got {attention_depth}")
        if mix not in ("logit", "log", "prob"):
            raise ValueError(f"mix must be 'logit', 'log' or 'prob', got {mix!r}")
        if gating not in ("softmax", "sigmoid", None):
            raise ValueError(f"gating must be 'softmax', 'sigmoid' or None, got {gating!r}")
        self.num_classes, self.attention_depth, self.mix, self.gating = num_classes, attention_depth, mix, gating
        self.normalise = nn.BatchNorm2d(1)
        self.blocks = nn.ModuleList(
            [
                _block(1, 32, 5, pool=True),
                _block(32, 64, 3, pool=True),
                _block(64, 128, 3),
                _block(128, 128, 3, padding=1),
                _block(128, 128, 3),
            ]
        )
        last = _GEOMETRY[-1]
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(last.channels * last.size**2, 256),
            nn.ReLU(),
            nn.BatchNorm1d(256),
            nn.Linear(256, num_classes),
        )
        self.attention = nn.ModuleList(
            AttentionModule(geometry.channels, num_classes, attention_width, gated=gated, kernel_size=kernel_size)
            for geometry in self.attended_maps
        )
        self.global_gates = None
        if attention_depth > 0 and gating is not None:
            self.global_gates = GlobalGates(last.channels, attention_depth + 1, kernel_size=kernel_size)

    @property
    def attended_maps(self) -> tuple[MapGeometry, ...]:
        """Where the attended maps lie on the image, from the first to the last."""
        return _GEOMETRY[len(_GEOMETRY) - self.attention_depth :]

    def forward(self, images: Tensor, details: bool = False) -> Tensor | DigitNetDetails:
        """images: [N, 1, 40, 40] → class scores [N, L], or with details=True DigitNetDetails.

        Raises ValueError for another shape.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be [N, 1, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
        feature_map = self.normalise(images)
        plain = len(self.blocks) - self.attention_depth
        attended = []
        for index, block in enumerate(self.blocks):
            feature_map = block(feature_map)
            if index >= plain:
                ends = index == len(self.blocks) - 1
                attention = self.attention[index - plain](
                    feature_map, global_gates=self.global_gates if ends else None, masks=details, tap=True
                )
                feature_map = attention.feature_map
                attended.append(attention)
        own = self.classifier(feature_map)
        if not attended:
            ones = own.new_ones(own.shape[0], 1)
            return DigitNetDetails(own, own.unsqueeze(1), ones, (), ()) if details else own
        hypotheses = torch.stack([layer.hypothesis.to(own.dtype) for layer in attended] + [own], dim=1)
        scores = attended[-1].global_scores
        if scores is None:  # no global gates: rectify counts every hypothesis alike, whatever the scores
            scores = hypotheses.new_zeros(hypotheses.shape[:2])
        output = rectify(hypotheses, scores, mix=self.mix, gating=self.gating)
        if not details:
            return output
        return DigitNetDetails(
            output,
            hypotheses,
            global_gates(scores, self.gating),
            tuple(layer.gates for layer in attended),
            tuple(layer.masks for layer in attended),
        )


def _block(channels: int, out_channels: int, kernel_size: int, padding: int = 0, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(channels, out_channels, kernel_size, padding=padding, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.ReLU(), nn.BatchNorm2d(out_channels))
