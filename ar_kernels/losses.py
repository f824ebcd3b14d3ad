"""Losses: the gated cross-entropies, which are those of rectify's mix "log", and the regulariser of the masks.

The cross-entropies are made of PyTorch's operations on every device, so use_implementation does not concern them; the
regulariser has Triton kernels. What each keeps for backward is small or given: no log-softmax [N, D+1, L] outlives
forward (docs/math.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, ops
from .functional import _check_float, _check_tensor, _choose, _gated_hypotheses, _shape
from .ops import _apply, autocast_off
from .reference import accumulator_dtype, global_gates

_REDUCTIONS = ("mean", "sum", "none")


# ---------------------------------------------------------------------------------------------- cross-entropies


def gated_cross_entropy(
    hypotheses: Tensor | Sequence[Tensor],
    scores: Tensor,
    target: Tensor,
    *,
    gating: str | None = "softmax",
    reduction: str = "mean",
) -> Tensor:
    """The gated sum of the hypotheses' own cross-entropies, ℒ_n = Σ_i γ_i CE(h_i, target): what nll_loss makes of
    rectify(..., mix="log"), without a log-softmax [N, D+1, L] kept for backward.

    hypotheses, scores, gating: as rectify takes them. target: class indices [N], int64, each below L.
    reduction: "mean" over images, "sum", or "none" for ℒ [N].

    Returns float32 for half hypotheses, else their dtype; differentiable in hypotheses and scores, twice too.
    Raises TypeError and ValueError naming the argument (on a GPU, a class out of range stops the kernel instead).
    """
    hypotheses, gates = _gated(hypotheses, scores, gating, reduction)
    _check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.dim() != 1 or target.shape[0] != hypotheses.shape[0]:
        raise ValueError(f"target must be [N] = [{hypotheses.shape[0]}] to match hypotheses, got {_shape(target)}")
    _check_device("target", target, hypotheses)
    with autocast_off(hypotheses):
        try:
            losses = _apply(_GatedCrossEntropy, hypotheses, gates, target)[0]
        except RuntimeError as error:  # a CPU looks at each class as it gathers; a GPU stops its kernel later
            if "out of bounds" not in str(error):
                raise
            labels = hypotheses.shape[2]
            raise ValueError(f"target must hold classes from 0 to {labels - 1}, got others: {error}") from error
        return _reduced(losses, reduction)


def gated_binary_cross_entropy(
    hypotheses: Tensor | Sequence[Tensor],
    scores: Tensor,
    target: Tensor,
    *,
    gating: str | None = "softmax",
    reduction: str = "mean",
) -> Tensor:
    """The gated cross-entropy where an image may have several labels: ℒ_nl = Σ_i γ_i BCE(σ(h_il), target_nl).

    Each label is a yes or no of its own, so hypotheses meet a sigmoid, not a softmax over labels, and the gates mix
    the losses of hypotheses, not their scores: binary_cross_entropy_with_logits of rectify(..., mix="log") would take
    log-probabilities of exclusive labels for logits.

    hypotheses, scores, gating: as rectify takes them. target: probabilities [N, L], of any floating dtype.
    reduction: "mean" over images and labels, "sum", or "none" for ℒ [N, L].

    Returns float32 for half hypotheses, else their dtype; differentiable in hypotheses, scores and target, twice too.
    Raises TypeError and ValueError naming the argument.
    """
    hypotheses, gates = _gated(hypotheses, scores, gating, reduction)
    _check_float("target", target)
    expected = hypotheses.shape[0], hypotheses.shape[2]
    if tuple(target.shape) != expected:
        raise ValueError(f"target must be [N, L] = {list(expected)} to match hypotheses, got {_shape(target)}")
    _check_device("target", target, hypotheses)
    with autocast_off(hypotheses):
        return _reduced(_apply(_GatedBinaryCrossEntropy, hypotheses, gates, target.to(gates.dtype)), reduction)


def _gated(
    hypotheses: Tensor | Sequence[Tensor], scores: Tensor, gating: str | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Hypotheses as one tensor [N, D+1, L] and γ [N, D+1] in the dtype that sums are kept in."""
    hypotheses = _gated_hypotheses(hypotheses, scores, gating)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    return hypotheses, global_gates(scores.to(accumulator_dtype(hypotheses.dtype)), gating)


def _check_device(name: str, value: Tensor, hypotheses: Tensor) -> None:
    if value.device != hypotheses.device:
        raise ValueError(f"{name} must be on {hypotheses.device} like hypotheses, got {value.device}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


class _GatedCrossEntropy(torch.autograd.Function):
    """(h [N, D+1, L], γ [N, D+1], target [N]) → Σ_i γ_i CE_i [N]; lse [N, D+1], not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hypotheses: Tensor, gates: Tensor, target: Tensor) -> Any:
        values = hypotheses.to(gates.dtype)
        lse = torch.logsumexp(values, dim=2)
        return (gates * (lse - _at(values, target))).sum(dim=1), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hypotheses, gates, target, lse = ctx.saved_tensors
        with autocast_off(hypotheses):
            values = hypotheses.to(gates.dtype)
            if torch.is_grad_enabled():  # differentiated once more: lse as a function of the hypotheses
                lse = torch.logsumexp(values, dim=2)
            dgates = grad.unsqueeze(1) * (lse - _at(values, target))
            weight = (gates * grad.unsqueeze(1)).unsqueeze(2)
            slope = weight * torch.exp(values - lse.unsqueeze(2))
            slope = slope.scatter_add(2, _index(values, target), -weight)  # softmax(h_i) − onehot
            return slope.to(hypotheses.dtype), dgates, None


class _GatedBinaryCrossEntropy(torch.autograd.Function):
    """(h [N, D+1, L], γ [N, D+1], target [N, L]) → Σ_i γ_i BCE_i [N, L]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hypotheses: Tensor, gates: Tensor, target: Tensor) -> Any:
        return torch.einsum("nd,ndl->nl", gates, _binary(hypotheses.to(gates.dtype), target))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hypotheses, gates, target = ctx.saved_tensors
        with autocast_off(hypotheses):
            values = hypotheses.to(gates.dtype)
            dgates = torch.einsum("nl,ndl->nd", grad, _binary(values, target))
            slope = gates.unsqueeze(2) * grad.unsqueeze(1) * (torch.sigmoid(values) - target.unsqueeze(1))
            dtarget = -grad * torch.einsum("nd,ndl->nl", gates, values) if ctx.needs_input_grad[2] else None
            return slope.to(hypotheses.dtype), dgates, dtarget


def _index(values: Tensor, target: Tensor) -> Tensor:
    return target.view(-1, 1, 1).expand(-1, values.shape[1], 1)


def _at(values: Tensor, target: Tensor) -> Tensor:
    """The target's score in each hypothesis: [N, D+1]."""
    return values.gather(2, _index(values, target)).squeeze(2)


def _binary(values: Tensor, target: Tensor) -> Tensor:
    """BCE(σ(h_il), target_l): [N, D+1, L]."""
    return F.binary_cross_entropy_with_logits(values, target.unsqueeze(1).expand_as(values), reduction="none")


# ---------------------------------------------------------------------------------------------- masks


def mask_regulariser(masks: Tensor) -> Tensor:
    """How much the heads of a layer look at the same places: mean over N·K·K entries of E², where E is the Gram matrix
    of the 2×2 average-pooled masks without its diagonal, E_kj = Σ_s M_ks M_js for k ≠ j, 0 for k = j.

    masks: A [N, K, H, W] as attend and attention_module return them. An odd last row or column is dropped; an axis of
        size 1 is not pooled.
    Returns a scalar, float32 for half masks; differentiable, twice too. NaN where N = 0, as any mean of nothing.
    Raises TypeError and ValueError naming the argument, ImplementationUnavailable as attend does.
    """
    _check_float("masks", masks)
    if masks.dim() != 4 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be [N, K, H, W] with K, H and W of at least 1, got {_shape(masks)}")
    return mask_penalty(masks)


def mask_penalty(masks: Tensor, weight: float = 1.0) -> Tensor:
    """weight times mask_regulariser(masks), unchecked."""
    masks = masks.to(accumulator_dtype(masks.dtype))
    with autocast_off(masks):
        if _choose(None, masks, None) == "triton":
            return ops.mask_penalty(masks, weight)
        return _apply(_GramPenalty, eager.pooled_masks(masks), weight)[0]


class _GramPenalty(torch.autograd.Function):
    """(M [N, K, S], w) → w Σ E² / (N·K·K), then E [N, K, K], not differentiable. dM = 4 w / (N·K·K) E M."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pooled: Tensor, weight: float) -> Any:
        gram = eager.off_diagonal_gram(pooled)
        return torch.mean(gram * gram) * weight, gram

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pooled, weight = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(pooled, output[1])
        ctx.factor = 4 * weight / max(output[1].numel(), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        pooled, gram = ctx.saved_tensors
        with autocast_off(pooled):
            if torch.is_grad_enabled():  # differentiated once more: E as a function of M
                gram = eager.off_diagonal_gram(pooled)
            return torch.bmm(gram * (grad * ctx.factor), pooled), None
