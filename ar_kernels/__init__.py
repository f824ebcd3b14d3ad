"""ar_kernels: the gated attention of "Attend and Rectify" at next to no cost. README.md starts here."""

from .attend_rectify import AttendRectify, Rectified
from .functional import (
    IMPLEMENTATIONS,
    Attended,
    AttentionOutput,
    Explanation,
    ImplementationUnavailable,
    attend,
    attention_module,
    explain,
    rectify,
    use_implementation,
)
from .losses import gated_binary_cross_entropy, gated_cross_entropy, mask_regulariser
from .modules import AttentionModule, GlobalGates

__version__ = "0.1.0"

__all__ = [
    "IMPLEMENTATIONS",
    "AttendRectify",
    "Attended",
    "AttentionModule",
    "AttentionOutput",
    "Explanation",
    "GlobalGates",
    "ImplementationUnavailable",
    "Rectified",
    "attend",
    "attention_module",
    "explain",
    "gated_binary_cross_entropy",
    "gated_cross_entropy",
    "mask_regulariser",
    "rectify",
    "use_implementation",
]
