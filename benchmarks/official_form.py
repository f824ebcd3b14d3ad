"""The official form in plain PyTorch: layer, gates and attentive net, written from the description in docs/porting.md
alone. What ar_kernels.official is checked against and measured against; it uses nothing of ar_kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A 3×3 convolution, padding 1, no bias, under <name>.conv.weight."""

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, maps, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2)


class AttentionModule(nn.Module):
    def __init__(
        self, in_ch: int, nlabels: int, nheads: int = 1, reg_w: float = 0.0, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.in_ch, self.nlabels, self.nheads = in_ch, nlabels, nheads
        self.reg_w, self.self_attention = reg_w, self_attention
        self.att_head = Conv(in_ch, nheads)
        self.att_head.register_buffer("diag", torch.ones(1, nheads, nheads) - torch.eye(nheads))
        self.out_head = Conv(in_ch, nheads * nlabels)
        if self_attention:
            self.score = Conv(in_ch, nheads)

    def forward(self, x: Tensor) -> Tensor:
        masks = torch.softmax(self.att_head(x), dim=2)  # [N, K, S]
        if self.training and self.reg_w > 0:
            height, width = x.shape[2:]
            kernel = (min(2, height), min(2, width))
            self.pooled = F.avg_pool2d(masks.view(-1, self.nheads, height, width), kernel, kernel).flatten(2)
        maps = self.out_head(x).view(x.shape[0], self.nheads, self.nlabels, -1)
        outputs = (masks.unsqueeze(2) * maps).sum(dim=3)  # [N, K, L]
        if not self.self_attention:
            return outputs
        scores = torch.tanh((masks * self.score(x)).sum(dim=2))
        gates = torch.softmax(scores, dim=1)
        self.gates = gates.detach()  # with its graph it would keep the step's, which then cannot be captured
        return (gates.unsqueeze(2) * outputs).sum(dim=1, keepdim=True)

    def reg_loss(self) -> Tensor:
        gram = torch.bmm(self.pooled, self.pooled.transpose(1, 2)) * self.att_head.diag
        del self.pooled
        return self.reg_w * (gram**2).mean()

    @staticmethod
    def aggregate(outputs: list[Tensor], gates: Tensor | None, function: str = "softmax") -> Tensor:
        log_probabilities = F.log_softmax(torch.cat(outputs, dim=1), dim=2)
        if gates is None:
            return log_probabilities.mean(dim=1)
        if function == "softmax":
            return (torch.softmax(gates, dim=1).unsqueeze(2) * log_probabilities).sum(dim=1)
        gates = torch.sigmoid(gates).unsqueeze(2)
        return (gates * log_probabilities).sum(dim=1) / (1e-6 + gates.sum(dim=1))


class Gate(nn.Module):
    def __init__(self, in_ch: int, ngates: int = 1, gate_depth: int = 1) -> None:
        super().__init__()
        if gate_depth == 2:
            self.pre_gates = nn.Linear(in_ch, in_ch // 2, bias=False)
            self.pre_bn = nn.BatchNorm1d(in_ch // 2)
            in_ch //= 2
        self.gate_depth = gate_depth
        self.gates = nn.Linear(in_ch, ngates, bias=False)
        self.bn = nn.BatchNorm1d(ngates)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_depth == 2:
            x = torch.relu(self.pre_bn(self.pre_gates(x)))
        return torch.tanh(self.bn(self.gates(x)))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn0, self.bn1 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv0 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        if before != after or stride > 1:
            self.conv_reduce = nn.Conv2d(before, after, 1, stride, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and relu(bn0(x)), which attention reads."""
        first = torch.relu(self.bn0(x))
        second = torch.relu(self.bn1(self.conv0(first)))
        y = self.conv1(F.dropout(second, self.dropout, self.training))
        return y + (self.conv_reduce(first) if hasattr(self, "conv_reduce") else x), first


class WideResNetAttention(nn.Module):
    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        dropout: float,
        attention_depth: int,
        attention_width: int,
        reg_w: float = 0,
        attention_type: str | None = "softmax",
    ) -> None:
        super().__init__()
        self.reg_w, self.attention_type = reg_w, attention_type
        self.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(16)  # among the keys, and nowhere else in the description
        before, self.blocks = 16, (depth - 4) // 6
        for group, after in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = nn.Module()
            for block in range(self.blocks):
                blocks.add_module(f"block_{block}", Block(before, after, 2 if group and not block else 1, dropout))
                before = after
            self.add_module(f"group_{group}", blocks)
        self.bn_g2 = nn.BatchNorm2d(before)
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        self.attended = range(2, 2 - attention_depth, -1)
        for group in self.attended:
            channels = 16 * width * 2**group
            self.add_module(f"att{group}", AttentionModule(channels, num_classes, attention_width, reg_w))
        if attention_type is not None:
            self.output_gate = Gate(before, attention_depth + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x, maps = self.conv0(images), []
        for group in range(3):
            for block in range(self.blocks):
                x, first = getattr(getattr(self, f"group_{group}"), f"block_{block}")(x)
                if group > 0 and block == 0:
                    maps.append(first)
        maps.append(torch.relu(self.bn_g2(x)))
        features = maps[2].mean(dim=(2, 3))
        layers = [getattr(self, f"att{group}") for group in self.attended]
        outputs = [layer(maps[group]) for layer, group in zip(layers, self.attended)]
        outputs.append(self.classifier(features).unsqueeze(1))
        gates = None if self.attention_type is None else self.output_gate(features)
        output = AttentionModule.aggregate(outputs, gates, self.attention_type)
        if not (self.training and self.reg_w > 0 and layers):
            return output, None
        return output, sum(layer.reg_loss() for layer in layers) / len(layers)
