from typing import NamedTuple
from torch import Tensor
class GatedAttended(NamedTuple):
    """What gated_attend returns; fields that were not asked for may be None."""

    pooled: Tensor
    lse: Tensor
    logits: Tensor | None
    scores: Tensor
    gates: Tensor
    features: Tensor
    mean: Tensor | None
    feature_map: Tensor | None
