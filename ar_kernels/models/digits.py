"""The digit net of the paper's ablation, plain and attentive."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attend_rectify import Rectified, rectified
from ..functional import AttentionOutput, _check_float, _shape
from ..modules import AttentionModule, GlobalGates, _check_depth, _check_kernel_size, _check_mixing, _check_positive

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


class DigitNet(nn.Module):
    """Five convolutions and two linear layers for 40×40 digits in one channel; with attention_depth its attentive twin.

    num_classes: L. attention_depth: D from 0 to 5, how many of the five normalised maps are attended, the last first
    (128@4², 128@6², 128@6², 64@8², 32@18²); with 0 this is the plain net. attention_width: K heads per attended map.
    mix, gating: as ar_kernels.rectify takes them; train mix="logit" with CrossEntropyLoss, "log" and "prob" with
        NLLLoss. kernel_size, gated: as AttentionModule takes them.

    The global gates are the paper's: an attention head of D+1 masks on the last map, in the same pass as its K heads
    (the author's code has them read the 256 features before the classifier instead).
    Hypotheses, attention.<i> and the fields of Rectified are in the order of the network, its own output last.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self,
        num_classes: int = 10,
        attention_depth: int = 0,
        attention_width: int = 4,
        *,
        mix: str = "logit",
        gating: str | None = "softmax",
        kernel_size: int = 1,
        gated: bool = True,
    ) -> None:
        super().__init__()
        _check_positive("num_classes", num_classes)
        _check_depth(attention_depth, len(_GEOMETRY))
        _check_positive("attention_width", attention_width)
        _check_mixing(mix, gating)
        _check_kernel_size(kernel_size)
        self.attention_depth, self.mix, self.gating = attention_depth, mix, gating
        self.normalise = _PixelNorm(1)
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

    def forward(self, images: Tensor, return_details: bool = False) -> Tensor | Rectified:
        """images: [N, 1, 40, 40] → the rectified output [N, L], or Rectified with all that led to it.

        Raises ValueError for another shape, TypeError for a dtype that the net does not take.
        """
        _check_float("images", images)
        if images.dim() != 4 or tuple(images.shape[1:]) != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be [N, 1, {IMAGE_SIZE}, {IMAGE_SIZE}], got {_shape(images)}")
        dtype = self.normalise.weight.dtype  # checked here: the norm counts a batch before it refuses it
        if images.dtype != dtype and not (dtype == torch.float32 and images.dtype.itemsize == 2):
            raise TypeError(f"images must be {dtype} like the net, got {images.dtype}")
        attended: list[AttentionOutput] = []
        feature_map, scores = self.normalise(images), None
        plain = len(self.blocks) - self.attention_depth
        for index, block in enumerate(self.blocks):
            feature_map = block(feature_map)
            if index >= plain:
                is_last = index == len(self.blocks) - 1
                layer = self.attention[index - plain](
                    feature_map, global_gates=self.global_gates if is_last else None, masks=return_details, tap=True
                )
                feature_map, scores = layer.feature_map, layer.global_scores
                attended.append(layer)
        return rectified(attended, self.classifier(feature_map), scores, self.mix, self.gating, return_details)


class _PixelNorm(nn.BatchNorm2d):
    """BatchNorm2d of one channel, as reductions over the whole batch: the libraries' kernels give a channel one block
    of threads, so that all of a GPU but one multiprocessor would wait for it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.weight.dtype)
        if self.training:
            variance, mean = torch.var_mean(images, correction=0)
            with torch.no_grad():
                count = images.numel()
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
                self.num_batches_tracked += 1
        else:
            variance, mean = self.running_var, self.running_mean
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (images - mean) * scale + self.bias


def _block(channels: int, out_channels: int, kernel_size: int, padding: int = 0, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, out_channels, kernel_size, padding=padding, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.ReLU(), nn.BatchNorm2d(out_channels))
