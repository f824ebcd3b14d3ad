"""Rectification: D+1 hypotheses [N, D+1, L] mixed by global gates, without a log-softmax in memory.

    γ = softmax(s), σ(s) / (1e-6 + Σ σ(s)) or 1/(D+1);  log p_i = h_i − lse_i
    logit: y = Σ γ_i h_i          dγ_i = Σ_l dy h_i                    dh_i = γ_i dy
    log:   y = Σ γ_i log p_i      dγ_i = Σ_l dy log p_i                dh_i = γ_i (dy − p_i Σ_l dy)
    prob:  y = log Σ γ_i p_i      γ_i dγ_i = Σ_l dy ρ_i                dh_i = dy ρ_i − p_i γ_i dγ_i
    ds = γ ⊙ dγ − γ Σ γ dγ for softmax gates, (1 − σ) times that for sigmoid ones

ρ_i = γ_i p_i / e^y = exp(log γ_i + log p_i − y) is at most 1, however small γ and however far apart the hypotheses.

Bytes: hypotheses read once (twice for log and prob, the second time from cache) and their gradient written once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heuristics import next_power_of_2
from .launch import Launch
from .tiles import accumulator, finite, origin


@triton.jit
def _global_gates(scores, n, i, D: tl.constexpr, GATING: tl.constexpr, ACC: tl.constexpr):
    """γ, log γ and σ(s) of one image, [D_tile]; the last for sigmoid gates."""
    s = tl.load(scores + n * D + i, mask=i < D, other=0.0).to(ACC)
    if GATING == "softmax":
        s = tl.where(i < D, s, float("-inf"))
        log_e = s - tl.max(s, axis=0)
        e = tl.exp(log_e)
        total = tl.sum(e, axis=0)
    elif GATING == "sigmoid":
        log_e = tl.minimum(s, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(s)))
        e = tl.where(i < D, 1.0 / (1.0 + tl.exp(-s)), 0.0)
        total = 1e-6 + tl.sum(e, axis=0)
    else:
        log_e = tl.zeros_like(s)
        e = tl.where(i < D, 1.0, 0.0).to(ACC)
        total = tl.sum(e, axis=0)
    return e / total, log_e - tl.log(total), e


@triton.jit
def _hypotheses(h, n, i, l, D: tl.constexpr, L: tl.constexpr, ACC: tl.constexpr):  # [D_tile, L_tile]
    real = (i < D)[:, None] & (l < L)[None, :]
    tile = tl.load(h + n * (D * L) + i[:, None] * L + l[None, :], mask=real, other=float("-inf")).to(ACC)
    return tile, real


@triton.jit
def rectify_forward_kernel(
    h, scores, y, lse,
    D: tl.constexpr, L: tl.constexpr, D_TILE: tl.constexpr, L_TILE: tl.constexpr,
    MIX: tl.constexpr, GATING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D_TILE)
    gates, log_gates, _ = _global_gates(scores, n, i, D, GATING, ACC)
    shift = tl.zeros([D_TILE], ACC)
    if MIX != "logit":
        m = tl.full([D_TILE], float("-inf"), ACC)
        d = tl.zeros([D_TILE], ACC)
        for first in range(0, L, L_TILE):
            tile, real = _hypotheses(h, n, i, first + tl.arange(0, L_TILE), D, L, ACC)
            tile = tl.where((i < D)[:, None], tile, 0.0)  # rows beyond D stay finite
            m_new = tl.maximum(m, tl.max(tile, axis=1))
            start = origin(m_new)
            d = d * tl.exp(m - start) + tl.sum(tl.exp(tile - start[:, None]), axis=1)
            m = m_new
        shift += finite(origin(m) + tl.log(d))
        tl.store(lse + n * D + i, shift, mask=i < D)
    for first in range(0, L, L_TILE):
        l = first + tl.arange(0, L_TILE)
        tile, real = _hypotheses(h, n, i, l, D, L, ACC)
        if MIX == "prob":
            tile = tl.where(real, tile - shift[:, None] + log_gates[:, None], tile)
            top = tl.max(tile, axis=0)
            top = tl.where(top == float("-inf"), 0.0, top)  # labels that no hypothesis allows, and the tile's padding
            mixed = top + tl.log(tl.sum(tl.exp(tile - top[None, :]), axis=0))
        else:
            mixed = tl.sum(tl.where(real, gates[:, None] * (tile - shift[:, None]), 0.0), axis=0)
        tl.store(y + n * L + l, mixed, mask=l < L)


@triton.jit
def rectify_backward_kernel(
    grad, h, scores, y, lse, dh, dscores,
    D: tl.constexpr, L: tl.constexpr, D_TILE: tl.constexpr, L_TILE: tl.constexpr,
    MIX: tl.constexpr, GATING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D_TILE)
    gates, log_gates, sigma = _global_gates(scores, n, i, D, GATING, ACC)
    shift = tl.zeros([D_TILE], ACC)
    if MIX != "logit":
        shift += tl.load(lse + n * D + i, mask=i < D, other=0.0)
    dgates = tl.zeros([D_TILE], ACC)
    dy_sum = tl.sum(tl.zeros([L_TILE], ACC), axis=0)
    for first in range(0, L, L_TILE):
        l = first + tl.arange(0, L_TILE)
        tile, real = _hypotheses(h, n, i, l, D, L, ACC)
        dy = tl.load(grad + n * L + l, mask=l < L, other=0.0)
        if MIX == "prob":
            mixed = tl.load(y + n * L + l, mask=l < L, other=0.0)
            share = tl.exp(tile - shift[:, None] + log_gates[:, None] - mixed[None, :])
            dgates += tl.sum(tl.where(real, dy[None, :] * share, 0.0), axis=1)
        else:
            dgates += tl.sum(tl.where(real, dy[None, :] * (tile - shift[:, None]), 0.0), axis=1)
            dy_sum += tl.sum(dy, axis=0)
    if MIX != "prob":
        dgates = tl.where(i < D, gates * dgates, 0.0)  # γ dγ, as the shares' sum is already
    for first in range(0, L, L_TILE):
        l = first + tl.arange(0, L_TILE)
        tile, real = _hypotheses(h, n, i, l, D, L, ACC)
        dy = tl.load(grad + n * L + l, mask=l < L, other=0.0)
        if MIX == "logit":
            slope = gates[:, None] * dy[None, :]
        elif MIX == "log":
            slope = gates[:, None] * (dy[None, :] - tl.exp(tile - shift[:, None]) * dy_sum)
        else:
            mixed = tl.load(y + n * L + l, mask=l < L, other=0.0)
            log_p = tile - shift[:, None]
            slope = dy[None, :] * tl.exp(log_p + log_gates[:, None] - mixed[None, :]) - tl.exp(log_p) * dgates[:, None]
        rows = i[:, None] * tl.num_programs(0).to(tl.int64) + n
        tl.store(dh + rows * L + l[None, :], slope.to(dh.dtype.element_ty), mask=real)
    ds = dgates - gates * tl.sum(dgates, axis=0)
    if GATING == "sigmoid":
        ds = (1.0 - sigma) * ds
    elif GATING == "none":
        ds = tl.zeros_like(ds)
    tl.store(dscores + n * D + i, ds.to(dscores.dtype.element_ty), mask=i < D)


@functools.lru_cache(maxsize=1024)
def _plan(sizes: torch.Size, dtype: torch.dtype, mix: str, gating: str | None) -> tuple[Launch, Launch]:
    images, count, labels = sizes
    rows = next_power_of_2(count)
    constants = {
        "D": count,
        "L": labels,
        "D_TILE": rows,
        "L_TILE": max(1, min(next_power_of_2(labels), 4096 // rows)),
        "MIX": mix,
        "GATING": gating or "none",
        "ACC": accumulator(dtype),
    }
    grid = (images,)
    return Launch(rectify_forward_kernel, grid, (), **constants), Launch(rectify_backward_kernel, grid, (), **constants)


def rectify_forward(hypotheses: Tensor, scores: Tensor, mix: str, gating: str | None, y: Tensor, lse: Tensor) -> None:
    """Launches into y [N, L] and lse [N, D+1] (left unwritten for the logit mix)."""
    _plan(hypotheses.shape, hypotheses.dtype, mix, gating)[0](hypotheses, scores, y, lse)


def rectify_backward(
    grad: Tensor,
    hypotheses: Tensor,
    scores: Tensor,
    y: Tensor,
    lse: Tensor,
    mix: str,
    gating: str | None,
    dh: Tensor,
    dscores: Tensor,
) -> None:
    """Launches into dh [D+1, N, L] and dscores [N, D+1]."""
    _plan(hypotheses.shape, hypotheses.dtype, mix, gating)[1](grad, hypotheses, scores, y, lse, dh, dscores)
