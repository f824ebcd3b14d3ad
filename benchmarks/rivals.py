"""The same layer as others would write it: each the strongest form of its kind, so that beating it says something.

A rival computes o = Σ_k g_k o_k [N, L] from Z [N, C, H, W] and its own parameters. `store` turns the weights W_H
[K, C], W_O [L, K·C], W_G [K, C] (3×3: [K, C, 3, 3], [L, K, C, 3, 3], [K, C, 3, 3]) into these parameters, once and
outside of what is timed, so that no rival pays for a copy or a permutation of weights. It only permutes, so it turns
gradients too. All weights have the map's dtype; products are in that dtype too, with sums as cuBLAS and cuDNN keep
them (float32).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rival:
    name: str
    function: Callable[..., Tensor]
    """(z, *parameters) → hypothesis [N, L]; its docstring says why it is the strongest of its kind."""
    store: Callable[[Weights, torch.memory_format], tuple[Tensor, ...]]
    """(W_H, W_O, W_G), the map's memory format → parameters."""
    taps: int = 1
    """9 where the heads are 3×3."""


def _is_channels_last(z: Tensor) -> bool:
    return z.stride(1) == 1 and z.stride(3) != 1


def convolutions(z: Tensor, heads_and_gates: Tensor, output: Tensor) -> Tensor:
    """The paper's convolutions (1×1 kernels) or the official code's (3×3, padding 1, no bias).

    heads_and_gates: W_H over W_G as one kernel [2K, C, k, k], so that logits and scores read Z once. output: W_O
    [K·L, C, k, k], head-major. The sums over positions are batched products, which make no product map as large as the
    K·L maps. channels_last maps lie as [N, S, K, L], where one product with the gated masks sums over heads as well;
    any other way of summing would copy them.
    """
    padding = output.shape[-1] // 2
    heads = heads_and_gates.shape[0] // 2
    logits, scores = F.conv2d(z, heads_and_gates, padding=padding).flatten(2).chunk(2, dim=1)
    masks = torch.softmax(logits, dim=2)  # [N, K, S]
    gates = torch.softmax(torch.tanh((masks * scores).sum(dim=2)), dim=1)  # [N, K]
    maps = F.conv2d(z, output, padding=padding)
    if _is_channels_last(z):
        images, positions = z.shape[0], z.shape[2] * z.shape[3]
        rows = maps.permute(0, 2, 3, 1).reshape(images, positions * heads, -1)  # [N, S·K, L], a view
        gated = (gates.unsqueeze(2) * masks).mT.reshape(images, 1, positions * heads)
        return torch.bmm(gated, rows).squeeze(1)
    rows = maps.flatten(2).view(-1, maps.shape[1] // heads, masks.shape[2])  # [N·K, L, S]
    hypotheses = torch.bmm(rows, masks.reshape(-1, masks.shape[2], 1)).view(z.shape[0], heads, -1)
    return torch.bmm(gates.unsqueeze(1), hypotheses).squeeze(1)


def _store_convolutions(weights: Weights, layout: torch.memory_format) -> tuple[Tensor, ...]:
    mask, output, gate = weights
    heads, channels = mask.shape[:2]
    size = mask.shape[2:] if mask.dim() == 4 else (1, 1)
    kernel = output.reshape(output.shape[0], heads, channels, *size).transpose(0, 1).reshape(-1, channels, *size)
    both = torch.cat([mask, gate]).reshape(2 * heads, channels, *size)
    return both.contiguous(memory_format=layout), kernel.contiguous(memory_format=layout)


def matmul(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """Re-associated: the labels meet pooled features, not positions, as matrix products.

    Both products over positions read Z where it lies: as rows of C for channels_last (one plain GEMM for the logits),
    as columns for NCHW (batched, the weight with a batch stride of 0: torch.matmul would copy Z to fold it).
    W_O is [L, K·C].
    """
    positions = z.flatten(2)  # [N, C, S]
    if _is_channels_last(z):
        masks = torch.softmax(F.linear(positions.mT, mask), dim=1).mT
    else:
        masks = torch.softmax(torch.bmm(mask.expand(z.shape[0], -1, -1), positions), dim=2)
    return _gated(torch.bmm(masks, positions.mT), output, gate)


def sdpa(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """Re-associated, with PyTorch's fused attention: queries W_H, keys and values Z's positions, scale 1.

    For channels_last the keys are a view. NCHW needs one copy: every fused backend asks for channels that are adjacent,
    and the unfused one, which does not, is slower than copy and fused together. W_O is [L, K·C].
    """
    keys = z.flatten(2).mT.contiguous().unsqueeze(1)  # [N, 1, S, C]
    queries = mask.expand(z.shape[0], 1, -1, -1)
    pooled = F.scaled_dot_product_attention(queries, keys, keys, scale=1.0)
    return _gated(pooled.squeeze(1), output, gate)


def _gated(pooled: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """Gates and output head on pooled features [N, K, C]; one GEMM against W_O as it is stored."""
    gates = torch.softmax(torch.tanh((pooled * gate).sum(dim=2)), dim=1)
    return F.linear((gates.unsqueeze(2) * pooled).flatten(1), output)


def matmul3x3(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """3×3 heads re-associated: one convolution for the logits, and the masks, not the map, shifted by the nine taps.

    The nine shifted masks are batched products' rows; W_O is [L, K·9·C] and W_G [K, 9, C], taps before channels, as the
    products come out, so that nothing as large as the pooled features is transposed.
    """
    logits = F.conv2d(z, mask, padding=1)
    masks = torch.softmax(logits.flatten(2), dim=2).view_as(logits)
    height, width = z.shape[2:]
    padded = F.pad(masks, (1, 1, 1, 1))
    shifts = [padded[:, :, 2 - y : 2 - y + height, 2 - x : 2 - x + width] for y in range(3) for x in range(3)]
    rows = torch.stack(shifts, dim=2).flatten(3).flatten(1, 2)  # [N, K·9, S]
    pooled = torch.bmm(rows, z.flatten(2).mT).unflatten(1, (-1, 9)).flatten(2)  # [N, K, 9·C]
    return _gated(pooled, output, gate)


def _store_matmul3x3(weights: Weights, layout: torch.memory_format) -> tuple[Tensor, ...]:
    mask, output, gate = weights
    labels, heads, channels = output.shape[:3]
    taps_first = output.reshape(labels, heads, channels, 9).mT.reshape(labels, -1)
    gate = gate.reshape(heads, channels, 9).mT.reshape(heads, -1)
    return mask.contiguous(memory_format=layout), taps_first.contiguous(), gate.contiguous()


def _as_they_are(weights: Weights, layout: torch.memory_format) -> tuple[Tensor, ...]:
    return weights


RIVALS = (
    Rival("matmul", matmul, _as_they_are),
    Rival("sdpa", sdpa, _as_they_are),
    Rival("convolutions", convolutions, _store_convolutions),
    Rival("convolutions-3x3", convolutions, _store_convolutions, taps=9),
)
"""The fastest kinds first: where time runs out, the last are the ones that matter least."""

RIVALS_3X3 = (Rival("matmul-3x3", matmul3x3, _store_matmul3x3, taps=9), RIVALS[3])
"""Of the layer with 3×3 heads."""
