"""Wide Residual Networks (arXiv 1605.07146) and WARN, their attentive twins of "Attend and Rectify"."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..attend_rectify import Rectified, rectified
from ..functional import AttentionOutput, _check_float, _shape
from ..modules import AttentionModule, GlobalGates, _check_depth, _check_kernel_size, _check_mixing, _check_positive


class Block(nn.Module):
    """Pre-activation block: a = relu(bn0(x)), then conv0, relu(bn1), dropout, conv1, plus x (or conv_reduce of a where
    channels or stride change).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv0 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv_reduce = None
        if in_channels != channels or stride != 1:
            self.conv_reduce = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        self.dropout = dropout

    def activate(self, x: Tensor) -> Tensor:
        """relu(bn0(x)), the map that this block's convolutions read: [N, C, H, W]."""
        return F.relu(self.bn0(x), inplace=True)

    def forward(self, x: Tensor, activated: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W] → [N, C', H / stride, W / stride]. activated: activate(x), where it is known already."""
        if activated is None:
            activated = self.activate(x)
        y = F.relu(self.bn1(self.conv0(activated)), inplace=True)
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training)
        y = self.conv1(y)
        return y + (x if self.conv_reduce is None else self.conv_reduce(activated))


class _WideNet(nn.Module):
    """What the plain and the attentive nets share: everything but the last normalisation and the attention."""

    group_0: nn.Sequential
    group_1: nn.Sequential
    group_2: nn.Sequential
    bn: nn.BatchNorm2d  # the plain net's last norm
    bn_g2: nn.BatchNorm2d  # an attentive net's

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        _check_positive("depth", depth)
        _check_positive("width", width)
        _check_positive("num_classes", num_classes)
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6n + 4 with n of at least 1 (10, 16, 22, 28, 40, ...), got {depth}")
        if not isinstance(dropout, int | float) or isinstance(dropout, bool):
            raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.depth, self.width, self.num_classes, self.dropout = depth, width, num_classes, dropout
        self.channels = (16 * width, 32 * width, 64 * width)
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)

    def _add_rest(self, norm: str) -> None:
        """Adds the groups, the last normalisation under the name `norm` and the classifier; draws all weights."""
        in_channels = 16
        for group, channels in enumerate(self.channels):
            blocks = nn.Sequential()
            for index in range((self.depth - 4) // 6):
                stride = 2 if index == 0 and group > 0 else 1
                blocks.add_module(f"block_{index}", Block(in_channels, channels, stride, self.dropout))
                in_channels = channels
            self.add_module(f"group_{group}", blocks)
        self.add_module(norm, nn.BatchNorm2d(in_channels))
        self.classifier = nn.Linear(in_channels, self.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.classifier.weight, nonlinearity="linear")
        nn.init.zeros_(self.classifier.bias)

    def _last_of_groups(self, images: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What group 2 returns. attend(i, a) is shown the output of group i = 0, 1 as the next group's first block
        normalises it, a = relu(bn0(x)), and returns the map that this block goes on with: a, or its tap.
        """
        _check_images(images)
        x = self.group_0(self.conv0(images))
        for index, group in enumerate((self.group_1, self.group_2)):
            blocks: list[Any] = list(group)  # list[Any](group) would break the graph under torch.compile
            first, *others = blocks
            x = first(x, attend(index, first.activate(x)))
            for block in others:
                x = block(x)
        return x


def _check_images(images: Tensor) -> None:
    _check_float("images", images)
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be [N, 3, H, W] with H and W of at least 1, got {_shape(images)}")


class WideResNet(_WideNet):
    """WRN-depth-width for images of 32×32 (other sizes work too).

    depth: 6n + 4, n blocks in each of three groups. width: the factor on 16, 32 and 64 channels. num_classes: L.
    dropout: between the two convolutions of a block. Weights are drawn as He et al. do. Raises TypeError and ValueError
    naming the argument. Train with CrossEntropyLoss.
    """

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(depth, width, num_classes, dropout)
        self._add_rest("bn")

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] → class scores [N, L]. Raises TypeError and ValueError for other images."""
        _check_images(images)
        x = self.group_2(self.group_1(self.group_0(self.conv0(images))))
        return self.classifier(F.relu(self.bn(x), inplace=True).mean(dim=(2, 3)))


class WideAttentiveResNet(_WideNet):
    """WARN: a WideResNet that attends to the outputs of its groups and rectifies its class scores.

    Attended, at width 10 and 32×32 images: the output of group 0 as the first block of group 1 normalises it,
    relu(bn0(x)), 160@32²; that of group 1 likewise, 320@16²; and relu(bn_g2(x)), which the classifier reads, 640@8².
    attention_depth d takes the last d of them; with 0 this is the plain net. On the last map the K heads, the D+1 masks
    of the global gates and the spatial mean for the classifier are one pass.

    depth, width, num_classes, dropout: as WideResNet takes them. attention_width: K heads per attended map.
    mix, gating: as ar_kernels.rectify takes them; train mix="logit" with CrossEntropyLoss, "log" and "prob" with
        NLLLoss. kernel_size, gated: as AttentionModule takes them.
    Hypotheses, attention.<i> and the fields of Rectified are in the order of the network, its own output last.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        dropout: float = 0.0,
        attention_depth: int = 3,
        attention_width: int = 4,
        *,
        mix: str = "logit",
        gating: str | None = "softmax",
        kernel_size: int = 1,
        gated: bool = True,
    ) -> None:
        _check_depth(attention_depth, 3)
        _check_positive("attention_width", attention_width)
        _check_mixing(mix, gating)
        _check_kernel_size(kernel_size)
        super().__init__(depth, width, num_classes, dropout)
        self.attention_depth, self.mix, self.gating = attention_depth, mix, gating
        self._add_rest("bn_g2")
        self.attention = nn.ModuleList(
            AttentionModule(channels, num_classes, attention_width, gated=gated, kernel_size=kernel_size)
            for channels in self.channels[3 - attention_depth :]
        )
        self.global_gates = None
        if attention_depth > 0 and gating is not None:
            self.global_gates = GlobalGates(self.channels[-1], attention_depth + 1, kernel_size=kernel_size)

    def forward(self, images: Tensor, return_details: bool = False) -> Tensor | Rectified:
        """images: [N, 3, H, W] → the rectified output [N, L], or Rectified with all that led to it. Raises TypeError
        and ValueError for other images.
        """
        attended: list[AttentionOutput] = []

        def attend(group: int, feature_map: Tensor) -> Tensor:
            if self.attention_depth < 3 - group:
                return feature_map
            layer = self.attention[len(attended)](feature_map, masks=return_details, tap=True)
            attended.append(layer)
            return layer.feature_map

        last = F.relu(self.bn_g2(self._last_of_groups(images, attend)), inplace=True)
        if self.attention_depth == 0:
            return rectified((), self.classifier(last.mean(dim=(2, 3))), None, self.mix, self.gating, return_details)
        layer = self.attention[-1](last, global_gates=self.global_gates, masks=return_details, mean=True)
        attended.append(layer)
        own = self.classifier(layer.mean.to(last.dtype))
        return rectified(attended, own, layer.global_scores, self.mix, self.gating, return_details)
