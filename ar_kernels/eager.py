"""The re-associated formulas (docs/math.md) in plain PyTorch: the path that runs anywhere.

Everything after the masks is linear in Z, so Z is pooled first and the labels never meet the positions. No custom
autograd: first and second derivatives come from PyTorch, and the double backward of every other path comes from here.
Half-precision maps are raised to float32 first: accurate, at the price of one copy of the map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulator_dtype, global_gates, log_global_gates


def attend(
    feature_map: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor | None = None,
    mean: bool = False,
    wants_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Pooled features [N, K, C] (3×3 heads: [N, K, C, 9]), lse [N, K], logits [N, K, S], mean [N, C]; mean, and lse of
    1×1 heads, are None where they are not asked for: lse takes PyTorch several kernels."""
    dtype = accumulator_dtype(feature_map.dtype)
    maps, weight = feature_map.to(dtype), mask_weight.to(dtype)
    positions = maps.flatten(2)  # [N, C, S]
    if weight.dim() == 4:
        logits = F.conv2d(maps, weight, padding=1).flatten(2)
    elif positions.stride(2) == 1:
        logits = torch.bmm(weight.expand(positions.shape[0], -1, -1), positions)  # @ would copy the map to fold it
    else:
        logits = weight @ positions
    if mask_bias is not None:
        logits = logits + mask_bias.to(dtype)[:, None]
    lse = torch.logsumexp(logits, dim=2) if wants_lse or weight.dim() == 4 else None
    if weight.dim() == 4 and lse is not None:  # the masks that a regulariser gets are, to the bit, those that pooled
        masks = attention_masks(logits, lse)
        taps = shifted_masks(masks.unflatten(2, feature_map.shape[2:]))  # [N, K, 9, S]
        pooled = (taps.flatten(1, 2) @ positions.mT).unflatten(1, taps.shape[1:3]).mT
    else:
        pooled = torch.softmax(logits, dim=2) @ positions.mT
    return pooled, lse, logits, positions.mean(dim=2) if mean else None


def attention_masks(logits: Tensor, lse: Tensor) -> Tensor:
    """A = exp(ℓ - lse), [N, K, S]; NaN where lse is infinite, as a softmax is."""
    return torch.exp(logits - _finite(lse).unsqueeze(2))


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse.isinf(), torch.nan, lse)


def pooled_masks(masks: Tensor) -> Tensor:
    """M: A [N, K, H, W], averaged over 2×2 positions, as [N, K, ⌊H/2⌋·⌊W/2⌋] in the dtype that sums are kept in."""
    masks = masks.to(accumulator_dtype(masks.dtype))
    return F.avg_pool2d(masks, tuple(min(side, 2) for side in masks.shape[2:])).flatten(2)


def off_diagonal_gram(pooled: Tensor) -> Tensor:
    """E = M Mᵀ with a zero diagonal: [N, K, S] → [N, K, K]."""
    gram = torch.bmm(pooled, pooled.mT)
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram


def shifted_masks(masks: Tensor) -> Tensor:
    """A_{k, s-τ} for the nine taps τ = (dy, dx), 0 outside the grid: [N, K, H, W] → [N, K, 9, S].

    Pooling Z with the masks shifted by -τ is pooling Z_{s+τ} with the masks: the small tensor moves, Z stays.
    """
    height, width = masks.shape[2:]
    padded = F.pad(masks, (1, 1, 1, 1))
    shifts = [padded[:, :, 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.stack(shifts, dim=2).flatten(3)


def gated_attend(
    feature_map: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gated_heads: int,
    mean: bool = False,
    wants_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """attend, then the gates of its first `gated_heads` heads: the same contract as the fused operator.

    Returns (pooled, lse, logits, mean) as attend does, the scores t [N, K] of all heads (zeros without gate_weight),
    the gates g [N, K'] of the first K' = gated_heads and the gated features g ⊙ P [N, K', ...] in the map's dtype.
    """
    pooled, lse, logits, average = attend(feature_map, mask_weight, mask_bias, mean, wants_lse)
    if gate_weight is None:
        scores = pooled.new_zeros(pooled.shape[:2])
    else:
        scores = (pooled * gate_weight.to(pooled.dtype).reshape(pooled.shape[1:])).flatten(2).sum(dim=2)
        if gate_bias is not None:
            scores = scores + gate_bias.to(pooled.dtype)
    gates = torch.softmax(torch.tanh(scores[:, :gated_heads]), dim=1)
    shape = gates.shape + (1,) * (pooled.dim() - 2)
    features = (gates.view(shape) * pooled[:, :gated_heads]).to(feature_map.dtype)
    return pooled, lse, logits, scores, gates, features, average


def rectify(hypotheses: Tensor, scores: Tensor, mix: str, gating: str | None) -> Tensor:
    """The rectified output [N, L] from hypotheses [N, D+1, L] and scores [N, D+1]; mixes as in reference.rectify."""
    dtype = accumulator_dtype(hypotheses.dtype)
    scores, values = scores.to(dtype), hypotheses.to(dtype)
    gates = global_gates(scores, gating)
    if mix == "logit":
        return torch.einsum("nd,ndl->nl", gates, values)
    lse = _finite(torch.logsumexp(values, dim=2))
    if mix == "log":
        return torch.einsum("nd,ndl->nl", gates, values) - (gates * lse).sum(dim=1, keepdim=True)
    return torch.logsumexp((log_global_gates(scores, gating) - lse).unsqueeze(2) + values, dim=1)
