"""The specification: gated attention as "Attend and Rectify" (ECCV 2018, arXiv 1807.07320) writes it, in convolutions.

Read it beside the paper. Nothing here is fast: the output head alone makes K·L maps as large as the feature map.
Every other path of the package is tested against these functions.

Shapes: feature map Z [N, C, H, W] (or [N, C, S], taken as a map of one row), K attention heads, L labels.
Head weights are [K, C] for 1×1 heads and [K, C, 3, 3] for 3×3 heads (zero padding 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_convolution(feature_map: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One output map per row of weight: [N, C, H, W] * [O, C] or [O, C, 3, 3] → [N, O, H, W]."""
    if feature_map.dim() == 3:
        feature_map = feature_map.unsqueeze(2)
    kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
    bias = None if bias is None else bias.to(feature_map.dtype)
    return F.conv2d(feature_map, kernel.to(feature_map.dtype), bias, padding=kernel.shape[-1] // 2)


def mask_logits(feature_map: Tensor, mask_weight: Tensor, mask_bias: Tensor | None = None) -> Tensor:
    """ℓ_k = W_H[k] * Z (paper, eq. 1, before its softmax): [N, K, S] in the accumulator's dtype."""
    logits = head_convolution(feature_map, mask_weight, mask_bias)
    return logits.flatten(2).to(accumulator_dtype(feature_map.dtype))


def attention_masks(logits: Tensor) -> Tensor:
    """A_k = spatial softmax of ℓ_k: over positions, never over channels or heads. [N, K, S] → [N, K, S]."""
    return torch.softmax(logits, dim=2)


def output_maps(feature_map: Tensor, output_weight: Tensor, output_bias: Tensor | None, heads: int) -> Tensor:
    """O_k = W_O[k] * Z (paper, eq. 2): class scores at every position, [N, K, L, S].

    output_weight is stored as a Linear over concatenated heads stores it, [L, K·C] (3×3: [L, K·C·9], taps last).
    As a convolution its output channel for head k and label l is k·L + l (head-major).
    """
    labels, channels = output_weight.shape[0], feature_map.shape[1]
    side = 1 if output_weight.shape[1] == heads * channels else 3
    kernel = output_weight.view(labels, heads, channels, side, side).transpose(0, 1)
    kernel = kernel.reshape(heads * labels, channels, side, side)
    bias = None if output_bias is None else output_bias.reshape(heads * labels)
    return head_convolution(feature_map, kernel, bias).unflatten(1, (heads, labels)).flatten(3)


def head_hypotheses(masks: Tensor, maps: Tensor) -> Tensor:
    """o_k = Σ_s A_k ⊙ O_k (paper, eq. 3): a sum over positions, not a mean. [N, K, S], [N, K, L, S] → [N, K, L]."""
    return torch.einsum("nks,nkls->nkl", masks, maps.to(masks.dtype))


def gate_scores(feature_map: Tensor, masks: Tensor, gate_weight: Tensor, gate_bias: Tensor | None = None) -> Tensor:
    """t_k = Σ_s A_k ⊙ (W_G[k] * Z): what the gates are made of, before tanh. [N, K]."""
    maps = head_convolution(feature_map, gate_weight, gate_bias).flatten(2)
    return (masks * maps.to(masks.dtype)).sum(dim=2)


def layer_gates(scores: Tensor) -> Tensor:
    """g = softmax over heads of tanh(t) (paper, eq. 4). [N, K] → [N, K]."""
    return torch.softmax(torch.tanh(scores), dim=1)


def attend(
    feature_map: Tensor, mask_weight: Tensor, mask_bias: Tensor | None = None, mean: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pooled features P_k = Σ_s A_ks Z_s, log-sum-exp of the logits, the logits, and the spatial mean if asked for.

    Returns P [N, K, C] (3×3: [N, K, C, 9], tap 3(dy+1) + (dx+1) pooling Z_{s+(dy,dx)}, zero outside the grid),
    lse [N, K], ℓ [N, K, S], mean [N, C] or None, all in the accumulator's dtype.
    """
    logits = mask_logits(feature_map, mask_weight, mask_bias)
    masks = attention_masks(logits)
    maps = feature_map.to(masks.dtype)
    if mask_weight.dim() == 4:
        taps = F.unfold(maps, kernel_size=3, padding=1).unflatten(1, (feature_map.shape[1], 9))  # [N, C, 9, S]
        pooled = torch.einsum("nks,ncts->nkct", masks, taps)
    else:
        pooled = torch.einsum("nks,ncs->nkc", masks, maps.flatten(2))
    return pooled, torch.logsumexp(logits, dim=2), logits, maps.flatten(2).mean(dim=2) if mean else None


def attention_module(
    feature_map: Tensor,
    mask_weight: Tensor,
    output_weight: Tensor,
    gate_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One attended layer: o = Σ_k g_k o_k (paper, eq. 5). Without gate_weight every head counts alike, g_k = 1/K.

    Returns the hypothesis o [N, L] in the feature map's dtype, the gates [N, K] and the mask logits [N, K, S].
    """
    heads = mask_weight.shape[0]
    logits = mask_logits(feature_map, mask_weight, mask_bias)
    masks = attention_masks(logits)
    hypotheses = head_hypotheses(masks, output_maps(feature_map, output_weight, output_bias, heads))
    if gate_weight is None:
        gates = torch.full_like(masks[:, :, 0], 1.0 / heads)
    else:
        gates = layer_gates(gate_scores(feature_map, masks, gate_weight, gate_bias))
    hypothesis = torch.einsum("nk,nkl->nl", gates, hypotheses)
    return hypothesis.to(feature_map.dtype), gates, logits


def global_scores(
    feature_map: Tensor,
    mask_weight: Tensor,
    gate_weight: Tensor,
    mask_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """tanh(t) of the global gates (paper, section 3.4): an attention head of D+1 masks on the LAST attended map.

    mask_weight and gate_weight are [D+1, C] (3×3: [D+1, C, 3, 3]); returns [N, D+1], what rectify takes as scores.
    """
    masks = attention_masks(mask_logits(feature_map, mask_weight, mask_bias))
    return torch.tanh(gate_scores(feature_map, masks, gate_weight, gate_bias))


def global_gates(scores: Tensor, gating: str | None) -> Tensor:
    """γ over the D+1 hypotheses: softmax(scores), σ(scores) / (1e-6 + Σ σ(scores)), or 1/(D+1) each. [N, D+1]."""
    if gating == "softmax":
        return torch.softmax(scores, dim=1)
    if gating == "sigmoid":
        gates = torch.sigmoid(scores)
        return gates / (1e-6 + gates.sum(dim=1, keepdim=True))
    return torch.full_like(scores, 1.0 / scores.shape[1])


def log_global_gates(scores: Tensor, gating: str | None) -> Tensor:
    """log γ, finite where γ is too small for its dtype. [N, D+1]."""
    if gating == "softmax":
        return torch.log_softmax(scores, dim=1)
    if gating == "sigmoid":
        return F.logsigmoid(scores) - torch.log(1e-6 + torch.sigmoid(scores).sum(dim=1, keepdim=True))
    return torch.full_like(scores, -math.log(scores.shape[1]))


def rectify(hypotheses: Tensor, scores: Tensor, mix: str = "logit", gating: str | None = "softmax") -> Tensor:
    """The network's rectified output from its D+1 hypotheses [N, D+1, L] and their scores [N, D+1] → [N, L].

    mix="logit": Σ γ_i h_i (the paper), "log": Σ γ_i log softmax(h_i) (the official code),
    "prob": log Σ γ_i softmax(h_i).
    """
    dtype = accumulator_dtype(hypotheses.dtype)
    scores, values = scores.to(dtype), hypotheses.to(dtype)
    gates = global_gates(scores, gating).unsqueeze(2)
    if mix == "logit":
        return (gates * values).sum(dim=1)
    log_probabilities = torch.log_softmax(values, dim=2)
    if mix == "log":
        return (gates * log_probabilities).sum(dim=1)
    return torch.logsumexp(log_global_gates(scores, gating).unsqueeze(2) + log_probabilities, dim=1)
