"""Networks of the paper: Wide ResNets, the digit net of the ablation, and their attentive twins."""

from .digits import DigitNet
from .wrn import WideAttentiveResNet, WideResNet

__all__ = ["DigitNet", "WideAttentiveResNet", "WideResNet"]
