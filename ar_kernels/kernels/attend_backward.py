"""The backward sweep: one read of the feature map, one write of its gradient; masks are recomputed, never stored.

From the gradients of x = g ⊙ P, g, t and P, image by image, O(N·K·C):
    dg_k = dx_k·P_k,  du = g ⊙ (dg − Σ_j g_j dg_j),  dt = du ⊙ (1 − tanh² t),  dP_k = g_k dx_k + dt_k W_G[k]
then over the positions, with a = exp(ℓ − lse):
    dA = dP·Z,  dℓ = a ⊙ (dA − δ) + direct,  δ_k = dP_k·P_k − dlse_k
    dZ = Σ_k a_k dP_k + Σ_k dℓ_k W_H[k] + upstream,  dW_H = dℓ Zᵀ
A spatial mean is one more head with a = 1/S whose dℓ is dropped. W_H and dP lie side by side, column 2k and 2k+1 of one
tile, and so do dℓ and a: one matrix product makes ℓ and dA, one makes dZ.

Where all channels of a tile fit on chip, held_kernel makes the sweep, else chunked_kernel, which reads each tile a
second time from cache. The first part is pooled_gradient_kernel's, or held_kernel's own where it has registers for it
(`fused`). Weight gradients: every program adds up its share, weight_sums_kernel adds the shares in order: no atomics,
the same bits on every run.

Bytes: |Z| read once, |dZ| written once, O(N·K·C) besides. float16 has too few exponents for gradients that a mean loss
scales by 1/N: dP is scaled per image by a power of two, and what comes of it scaled back.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import float_products, hopper
from .heuristics import MOST_REGISTERS, SUMS_OVER_LANES, chip, next_power_of_2, sweep_config
from .launch import Call, Launch, run
from .tiles import (
    accumulator,
    float32_precision,
    load_head_values,
    load_rows,
    map_strides,
    matmul_precision,
    split_bounds,
    tanh,
    tile_offsets,
)

# ---------------------------------------------------------------------------------------------- pooled features


@triton.jit
def _gate_gradient(
    n, heads, channels, score_w, pooled, scores, gates, grad_features, grad_gates, grad_scores,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g and dt of one image, [K_tile] each."""
    g = tl.zeros([heads.shape[0]], ACC)
    dt = tl.zeros([heads.shape[0]], ACC)
    if GATED > 0:
        g += load_head_values(gates + n * GATED, heads, GATED, ACC)
    if score_w is not None:
        dg = tl.zeros([heads.shape[0]], ACC)
        if grad_features is not None:
            for first in tl.static_range(0, C, channels.shape[0]):
                c = first + channels
                dx = load_rows(grad_features + n * (GATED * C), heads, c, C, GATED).to(ACC)
                dg += tl.sum(dx * load_rows(pooled + n * (HEADS * C), heads, c, C, GATED), axis=0)
        if grad_gates is not None:
            dg += load_head_values(grad_gates + n * GATED, heads, GATED, ACC)
        u = tanh(load_head_values(scores + n * HEADS, heads, HEADS, ACC))
        dt += g * (dg - tl.sum(g * dg, axis=0)) * (1.0 - u * u)
        if grad_scores is not None:
            dt += load_head_values(grad_scores + n * HEADS, heads, HEADS, ACC)
    return g, dt


@triton.jit
def _pooled_gradient(
    n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP of some channels, the mean's row at index HEADS: [C_tile, K_tile]."""
    dp = tl.zeros([c.shape[0], heads.shape[0]], ACC)
    if grad_features is not None:
        dp += g[None, :] * load_rows(grad_features + n * (GATED * C), heads, c, C, GATED).to(ACC)
    if score_w is not None:
        dp += dt[None, :] * load_rows(score_w, heads, c, C, HEADS).to(ACC)
    if grad_pooled is not None:
        dp += load_rows(grad_pooled + n * (HEADS * C), heads, c, C, HEADS)
    if grad_mean is not None:
        average = tl.load(grad_mean + n * C + c, mask=c < C, other=0.0)
        dp += tl.where(heads[None, :] == HEADS, average[:, None], 0.0)
    return dp


@triton.jit
def _scale(
    n, heads, channels, g, dt, score_w, grad_features, grad_pooled, grad_lse, grad_mean, grad_logits, positions,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The power of two that brings one image's largest gradient near 1."""
    largest = tl.zeros([heads.shape[0]], ACC)
    for first in tl.static_range(0, C, channels.shape[0]):
        c = first + channels
        dp = _pooled_gradient(n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean, C, HEADS, GATED, ACC)
        largest = tl.maximum(largest, tl.max(tl.abs(dp), axis=0))
    if grad_logits is not None:
        for start in range(0, positions, channels.shape[0]):
            s = start + channels
            direct = tl.load(
                grad_logits + (n * HEADS + heads)[None, :] * positions + s[:, None],
                mask=(s < positions)[:, None] & (heads < HEADS)[None, :],
                other=0.0,
            )
            largest = tl.maximum(largest, tl.max(tl.abs(direct), axis=0))
    if grad_lse is not None:
        largest = tl.maximum(largest, tl.abs(load_head_values(grad_lse + n * HEADS, heads, HEADS, ACC)))
    top = tl.max(largest, axis=0)
    usable = (top > 0) & (top < float("inf"))
    power = tl.ceil(tl.log2(tl.where(usable, top, 1.0)))
    return tl.exp2(-tl.minimum(tl.maximum(power, -40.0), 40.0))  # sums of scaled shares stay in float32's range


@triton.jit(do_not_specialize=["positions"])
def pooled_gradient_kernel(
    score_w, pooled, scores, gates,
    grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, grad_logits,
    w, pairs, delta, dt_out, unscale, positions,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image. Writes pairs W_H, dP [ROWS, 2, C] in the map's dtype, δ [HEADS], dt [HEADS], 1/scale."""
    n = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    g, dt = _gate_gradient(
        n, heads, channels, score_w, pooled, scores, gates, grad_features, grad_gates, grad_scores, C, HEADS, GATED, ACC
    )
    if dt_out is not None:
        tl.store(dt_out + n * HEADS + heads, dt, mask=heads < HEADS)
    scale = 1.0
    if unscale is not None:
        scale = _scale(
            n, heads, channels, g, dt, score_w, grad_features, grad_pooled, grad_lse, grad_mean, grad_logits, positions,
            C, HEADS, GATED, ACC,
        )  # fmt: skip
        tl.store(unscale + n, 1.0 / scale)
    if pairs is not None:
        kind = pairs.dtype.element_ty
        # δ is made of dP as it was rounded, so that Σ_s dℓ stays 0 however much of dA all positions share.
        sums = tl.zeros([K_TILE], ACC)
        for first in range(0, C, C_TILE):
            c = first + channels
            dp = _pooled_gradient(
                n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean, C, HEADS, GATED, ACC
            )
            rounded = (dp * scale).to(kind)
            targets = pairs + n * (2 * ROWS * C) + 2 * C * heads[None, :] + c[:, None]
            inside = (c < C)[:, None] & (heads < ROWS)[None, :]
            tl.store(targets, load_rows(w, heads, c, C, HEADS).to(kind), mask=inside)
            tl.store(targets + C, rounded, mask=inside)
            sums += tl.sum(rounded.to(ACC) * load_rows(pooled + n * (HEADS * C), heads, c, C, HEADS), axis=0)
        if grad_lse is not None:
            sums -= scale * load_head_values(grad_lse + n * HEADS, heads, HEADS, ACC)
        tl.store(delta + n * HEADS + heads, sums, mask=heads < HEADS)


# ---------------------------------------------------------------------------------------------- the sweep


@triton.jit
def _pair(even, odd):
    """[R, K_tile] twice → [R, 2 K_tile], column by column in turn: neighbours share a thread, so nothing moves. Triton
    fails to compile some matrix products straight from this: callers have a cast or a mask in between."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _even(pair):
    """[R, 2 K_tile] → [R, K_tile]"""
    even, _ = tl.split(tl.reshape(pair, [pair.shape[0], pair.shape[1] // 2, 2]))
    return even


@triton.jit
def _mask_gradient(
    both, shift, delta, s, end, n, heads, grad_logits, scale, positions,
    HEADS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dℓ and a of one tile as a pair, from both = W_H Z and dP Z as a pair; [S_tile, 2 K_tile]. shift: lse − b_H."""
    logit, da = tl.split(tl.reshape(both, [both.shape[0], both.shape[1] // 2, 2]))
    attends = (heads < HEADS)[None, :]
    a = tl.where(attends, tl.exp(logit - shift[None, :]), 0.0)
    dl = a * (da - delta[None, :])
    if grad_logits is not None:
        offsets = (n * HEADS + heads)[None, :] * positions + s[:, None]
        dl += scale * tl.load(grad_logits + offsets, mask=(s < end)[:, None] & attends, other=0.0)
    if ROWS > HEADS:
        a = tl.where((heads == HEADS)[None, :], 1.0 / positions.to(ACC), a)
    return tl.where((s < end)[:, None], _pair(tl.where(attends, dl, 0.0), a), 0.0)


@triton.jit
def _store_map_gradient(
    dl_a, w_dp, inverse, n, s, end, c, width, upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
    C: tl.constexpr, UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ = dℓ W_H + a dP, out of the image's scale, + upstream: one tile, [S_tile, C_tile]."""
    dz_tile = tl.dot(dl_a, tl.trans(w_dp), input_precision=PRECISION, out_dtype=ACC)
    dz_tile *= inverse
    real = (s < end)[:, None] & (c < C)[None, :]
    if upstream is not None:
        offsets = tile_offsets(s, c, width, up_c, up_h, up_w, UP_UNIT, UP_VECTOR, UP_FLAT, WIDE)
        dz_tile += tl.load(upstream + n * (up_n.to(tl.int64) * UP_VECTOR) + offsets, mask=real, other=0.0).to(
            dz_tile.dtype
        )
    offsets = tile_offsets(s, c, width, dz_c, 0, dz_s, DZ_UNIT, DZ_VECTOR, True, WIDE)
    tl.store(dz + n * (dz_n.to(tl.int64) * DZ_VECTOR) + offsets, dz_tile.to(dz.dtype.element_ty), mask=real)


SIZES = (
    *("rows", "positions", "width", "splits", "split_length", "stride_n", "stride_c", "stride_h", "stride_w"),
    *("up_n", "up_c", "up_h", "up_w", "dz_n", "dz_c", "dz_s"),
)
"""What changes with resolution, batch and strides, and must not compile anew."""


@triton.jit(do_not_specialize=SIZES)
def held_kernel(
    z, w, b, score_w, pooled, lse, scores, gates,
    grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, grad_logits, upstream, dz, dw, dt_out,
    pairs, delta, unscale,
    rows, positions, width, splits, split_length,
    stride_n, stride_c, stride_h, stride_w, up_n, up_c, up_h, up_w, dz_n, dz_c, dz_s,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
    PARTS: tl.constexpr, C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr,
    UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th (image, split). Its share of dW_H goes to its own slice of dw, dt to dt_out.

    pairs, delta, unscale: what pooled_gradient_kernel wrote, or None to make them here.
    """
    program = tl.program_id(0)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    bias = load_head_values(b, heads, HEADS, ACC)
    dw_sums = ()  # dW_H in even columns; a Zᵀ in odd ones is not used, but Hopper's matrix units start at 16 columns
    for _ in tl.static_range(PARTS):
        dw_sums = dw_sums + (tl.zeros([C_TILE, 2 * K_TILE], ACC),)
    scale = 1.0
    inverse = 1.0
    for row in range(program, rows, tl.num_programs(0)):
        n, begin, end = split_bounds(row, positions, splits, split_length, S_TILE, UNIT, VECTOR)
        z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
        previous = inverse
        if pairs is None:
            g, dt = _gate_gradient(
                n, heads, channels, score_w, pooled, scores, gates, grad_features, grad_gates, grad_scores,
                C, HEADS, GATED, ACC,
            )  # fmt: skip
            if dt_out is not None:
                tl.store(dt_out + n * HEADS + heads, dt, mask=(heads < HEADS) & (row % splits == 0))
            if SCALED:
                scale = _scale(
                    n, heads, channels, g, dt, score_w, grad_features, grad_pooled, grad_lse, grad_mean, grad_logits,
                    positions, C, HEADS, GATED, ACC,
                )  # fmt: skip
            center = tl.zeros([K_TILE], ACC)
            if grad_lse is not None:
                center -= scale * load_head_values(grad_lse + n * HEADS, heads, HEADS, ACC)
        else:
            if SCALED:
                scale = 1.0 / tl.load(unscale + n)
            center = load_head_values(delta + n * HEADS, heads, HEADS, ACC)
        w_dp = ()
        for i in tl.static_range(PARTS):
            c = i * C_TILE + channels
            if pairs is None:
                dp = _pooled_gradient(
                    n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean, C, HEADS, GATED, ACC
                )
                dp = (dp * scale).to(kind).to(ACC)  # δ is made of dP as it is rounded, as in pooled_gradient_kernel
                center += tl.sum(dp * load_rows(pooled + n * (HEADS * C), heads, c, C, HEADS), axis=0)
                w_dp = w_dp + (_pair(load_rows(w, heads, c, C, HEADS).to(ACC), dp).to(kind),)
            else:
                w_dp = w_dp + (load_rows(pairs + n * (2 * ROWS * C), tl.arange(0, 2 * K_TILE), c, C, 2 * ROWS),)
        if SCALED:
            inverse = 1.0 / scale
            rescaled = ()
            for i in tl.static_range(PARTS):  # out of the last image's scale, into this one's
                rescaled = rescaled + (dw_sums[i] * (previous * scale),)
            dw_sums = rescaled
        shift = load_head_values(lse + n * HEADS, heads, HEADS, ACC) - bias
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            both = tl.zeros([S_TILE, 2 * K_TILE], ACC)
            z_tiles = ()
            for i in tl.static_range(PARTS):
                c = i * C_TILE + channels
                offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                both = tl.dot(z_tile, w_dp[i], both, input_precision=PRECISION, out_dtype=ACC)
                z_tiles = z_tiles + (z_tile,)
            dl_a = _mask_gradient(
                both, shift, center, s, end, n, heads, grad_logits, scale, positions, HEADS, ROWS, ACC
            ).to(kind)
            if dw is not None:
                grown = ()
                for i in tl.static_range(PARTS):
                    share = tl.dot(tl.trans(z_tiles[i]), dl_a, dw_sums[i], input_precision=PRECISION, out_dtype=ACC)
                    grown = grown + (share,)
                dw_sums = grown
            if dz is not None:
                for i in tl.static_range(PARTS):
                    _store_map_gradient(
                        dl_a, w_dp[i], inverse, n, s, end, i * C_TILE + channels, width,
                        upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
                        C, UP_UNIT, UP_VECTOR, UP_FLAT, DZ_UNIT, DZ_VECTOR, WIDE, ACC, PRECISION,
                    )  # fmt: skip
    if dw is not None:
        dw += program.to(tl.int64) * (HEADS * C)
        for i in tl.static_range(PARTS):
            c = i * C_TILE + channels
            inside = (c < C)[:, None] & (heads < HEADS)[None, :]
            tl.store(dw + heads[None, :] * C + c[:, None], _even(dw_sums[i]) * inverse, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def chunked_kernel(
    z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, dw,
    rows, positions, width, splits, split_length,
    stride_n, stride_c, stride_h, stride_w, up_n, up_c, up_h, up_w, dz_n, dz_c, dz_s,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr,
    UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th (image, split); its share of dW_H goes to its own slice of dw."""
    program = tl.program_id(0)
    heads = tl.arange(0, K_TILE)
    paired = tl.arange(0, 2 * K_TILE)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    bias = load_head_values(b, heads, HEADS, ACC)
    if dw is not None:
        dw += program.to(tl.int64) * (HEADS * C)
    scale = 1.0
    inverse = 1.0
    for row in range(program, rows, tl.num_programs(0)):
        n, begin, end = split_bounds(row, positions, splits, split_length, S_TILE, UNIT, VECTOR)
        z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
        pairs_n = pairs + n * (2 * ROWS * C)
        if unscale is not None:
            inverse = tl.load(unscale + n)
            scale = 1.0 / inverse
        center = load_head_values(delta + n * HEADS, heads, HEADS, ACC)
        shift = load_head_values(lse + n * HEADS, heads, HEADS, ACC) - bias
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            both = tl.zeros([S_TILE, 2 * K_TILE], ACC)
            for first in range(0, C, C_TILE):
                c = first + channels
                offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                w_dp = load_rows(pairs_n, paired, c, C, 2 * ROWS)
                both = tl.dot(z_tile, w_dp, both, input_precision=PRECISION, out_dtype=ACC)
            dl_a = _mask_gradient(
                both, shift, center, s, end, n, heads, grad_logits, scale, positions, HEADS, ROWS, ACC
            ).to(kind)
            fresh = (row == program) & (start == begin)
            tl.debug_barrier()  # this program's earlier sums in dw are written
            for first in range(0, C, C_TILE):
                c = first + channels
                if dw is not None:
                    offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                    z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                    share = tl.dot(tl.trans(z_tile), dl_a, input_precision=PRECISION, out_dtype=ACC)
                    sums = dw + heads[None, :] * C + c[:, None]
                    inside = (c < C)[:, None] & (heads < HEADS)[None, :]
                    before = tl.load(sums, mask=inside & (fresh == 0), other=0.0)
                    tl.store(sums, before + _even(share) * inverse, mask=inside)
                if dz is not None:
                    _store_map_gradient(
                        dl_a, load_rows(pairs_n, paired, c, C, 2 * ROWS), inverse, n, s, end, c, width,
                        upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
                        C, UP_UNIT, UP_VECTOR, UP_FLAT, DZ_UNIT, DZ_VECTOR, WIDE, ACC, PRECISION,
                    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- weights


@triton.jit
def _sum_rows(
    rows, weight, count, row, c, C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, R_TILE: tl.constexpr
):
    """Of row tap·K + k among ROWS: Σ_r weight[r, k] rows[r, tap, k, c] (weight None: 1) and Σ_r weight[r, k], always in
    the same order."""
    sums = tl.zeros([c.shape[0]], rows.dtype.element_ty)
    weights = tl.zeros([R_TILE], rows.dtype.element_ty)
    for first in range(0, count, R_TILE):
        r = (first + tl.arange(0, R_TILE)).to(tl.int64)
        offsets = (r * ROWS + row)[:, None] * C + c[None, :]
        tile = tl.load(rows + offsets, mask=(r < count)[:, None] & (c < C)[None, :], other=0.0)
        if weight is not None:
            row_weight = tl.load(weight + r * HEADS + row % HEADS, mask=r < count, other=0.0)
            tile *= row_weight[:, None]
            weights += row_weight
        sums += tl.sum(tile, axis=0)
    return sums, tl.sum(weights, axis=0)


@triton.jit(do_not_specialize=["programs", "images"])
def weight_sums_kernel(
    shares, pooled, dt, dw, dscore_w, dscore_b, programs, images,
    C: tl.constexpr, HEADS: tl.constexpr, TAPS: tl.constexpr, BOTH: tl.constexpr, C_TILE: tl.constexpr,
    R_TILE: tl.constexpr,
):  # fmt: skip
    """dW_H [K, C, TAPS] = Σ shares [programs, TAPS, K, C]; dW_G = Σ_n dt ⊙ P, db_G = Σ_n dt. BOTH: shares are
    [programs, 2·TAPS, K, C], the second half of them dW_G's. One program: some c of one row tap·K + k."""
    row = tl.program_id(0)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    ROWS: tl.constexpr = TAPS * HEADS
    SHARED: tl.constexpr = 2 * ROWS if BOTH else ROWS
    if shares is not None:
        if row < ROWS:
            sums, _ = _sum_rows(shares, None, programs, row, c, C, HEADS, SHARED, R_TILE)
            at = (row % HEADS * C + c) * TAPS + row // HEADS
            tl.store(dw + at, sums.to(dw.dtype.element_ty), mask=c < C)
        row -= ROWS
    if dt is not None:
        if row >= 0:
            if BOTH:
                sums, _ = _sum_rows(shares, None, programs, ROWS + row, c, C, HEADS, SHARED, R_TILE)
                # db_G: dt itself is what is summed, as rows of one channel.
                _, weights = _sum_rows(dt, dt, images, row % HEADS, c, 1, HEADS, HEADS, R_TILE)
            else:
                sums, weights = _sum_rows(pooled, dt, images, row, c, C, HEADS, ROWS, R_TILE)
            at = (row % HEADS * C + c) * TAPS + row // HEADS
            tl.store(dscore_w + at, sums.to(dscore_w.dtype.element_ty), mask=c < C)
            tl.store(dscore_b + row, weights, mask=(row < HEADS) & (tl.program_id(1) == 0))


# ---------------------------------------------------------------------------------------------- launching


class _Plan(NamedTuple):
    """What is launched for maps of one shape, strides and dtype."""

    pooled: Launch | None  # None: the sweep does it
    sweep: Launch | None
    native: Any  # in place of sweep: an operator of the library built from csrc
    products: bool  # or PyTorch's products
    sums: Launch | None
    programs: int  # of the sweep, each with its share of dW_H


@functools.lru_cache(maxsize=1024)
def _plan(
    sizes: torch.Size,
    strides: tuple[int, ...],
    up_strides: tuple[int, ...] | None,
    dz_strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: int,
    heads: int,
    gated: int,
    mean: bool,
    has_dw: bool,
    has_dt: bool,
    precision: str,
    native: bool,
    products: bool,
) -> _Plan:
    images, channels = sizes[:2]
    positions = math.prod(sizes[2:])
    rows = heads + mean
    z = map_strides(sizes, strides, dtype.itemsize)
    up = z if up_strides is None else map_strides(sizes, up_strides, dtype.itemsize)
    dz = z if dz_strides is None else map_strides(sizes, dz_strides, dtype.itemsize)
    constants = {"C": channels, "HEADS": heads, "ROWS": rows, "ACC": accumulator(dtype)}
    of_pooled = constants | {"GATED": gated}
    processors = chip(device).processors
    config = sweep_config(
        images, channels, positions, rows, dtype.itemsize, z.vector, z.unit == "c", chip(device),
        backward=True, tapped=up_strides is not None,
    )  # fmt: skip
    sweep, operator, programs = None, None, 0
    sweeps = has_dw or dz_strides is not None
    if native and sweeps:
        operator, programs = hopper.backward_sweep(
            z, sizes, strides, up_strides, dz_strides, heads, dtype.itemsize, chip(device)
        )
    products = products and sweeps and operator is None
    if products:
        programs = images
    elif operator is None and sweeps:
        items = images * config.splits
        programs = min(items, config.per_processor * processors)
        own = {"PARTS": config.parts, "SCALED": dtype == torch.float16} | of_pooled if config.held else constants
        sweep = Launch(
            held_kernel if config.held else chunked_kernel,
            (programs,),
            (
                items, positions, sizes[-1], config.splits, config.split_length,
                z.n, z.c, z.h, z.w, up.n, up.c, up.h, up.w, dz.n, dz.c, dz.w,
            ),
            **own, C_TILE=config.channel_tile, K_TILE=config.head_tile, S_TILE=config.position_tile,
            UNIT=z.unit, VECTOR=z.vector, FLAT=z.flat, UP_UNIT=up.unit, UP_VECTOR=up.vector, UP_FLAT=up.flat,
            DZ_UNIT=dz.unit, DZ_VECTOR=dz.vector, WIDE=z.wide or up.wide or dz.wide,
            PRECISION=matmul_precision(dtype, precision, config.head_tile, chip(device)),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
        )  # fmt: skip
    pooled = None
    fused = hopper.makes_pooled_gradient(z, dtype) if operator is not None else sweep is not None and config.fused
    if not fused:
        head_tile = next_power_of_2(rows)
        tile = min(next_power_of_2(channels), max(16, 4096 // head_tile))
        pooled = Launch(
            pooled_gradient_kernel, (images,), (positions,), **of_pooled, C_TILE=tile, K_TILE=head_tile,
            num_warps=4 if head_tile < 64 else 8, maxnreg=MOST_REGISTERS, **SUMS_OVER_LANES,
        )  # fmt: skip
    sums = None
    if has_dw or has_dt:
        tile = min(16, next_power_of_2(channels))
        sums = Launch(
            weight_sums_kernel, (heads * (has_dw + has_dt), -(-channels // tile)), (programs, images),
            C=channels, HEADS=heads, TAPS=1, BOTH=False, C_TILE=tile, R_TILE=256, num_warps=4,
        )  # fmt: skip
    return _Plan(pooled, sweep, operator, products, sums, programs)


def attend_backward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    scores: Tensor | None,
    gates: Tensor | None,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    grad_features: Tensor | None,
    grad_mean: Tensor | None,
    upstream: Tensor | None,
    dz: Tensor | None,
    dw: Tensor | None,
    dscore_w: Tensor | None,
    dscore_b: Tensor | None,
    alike: bool,
) -> None:
    """Launches the sweep and the sums into dz (z's shape, contiguous or channels_last), dw and dscore_w [K, C] and
    dscore_b [K] (float32, float64 for a float64 map); what is None is not computed, the two scores' go together.
    alike: an image's dz does not depend on its batch."""
    (images, channels), heads, has_mean = z.shape[:2], w.shape[0], grad_mean is not None
    upstream = hopper.upstream_as_read(z, w, score_w, upstream, dz)
    plan = _plan(
        z.shape, z.stride(),
        None if upstream is None else upstream.stride(), None if dz is None else dz.stride(),
        z.dtype, z.get_device(), heads, 0 if gates is None else gates.shape[1], has_mean,
        dw is not None, dscore_w is not None, float32_precision(z.dtype),
        hopper.can_read(z, w, score_w, upstream, dz), float_products.are_faster(z, heads, alike),
    )  # fmt: skip
    received = (grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, grad_logits)
    dt = None if dscore_w is None else lse.new_empty(images, heads)
    shares = None if dw is None else lse.new_empty(plan.programs, heads, channels)
    pairs = delta = unscale = None
    if plan.pooled is not None and (plan.sweep is not None or plan.native is not None or plan.products):
        pairs = z.new_empty(images, heads + has_mean, 2, channels)
        delta = lse.new_empty(images, heads)
        unscale = lse.new_empty(images) if z.dtype == torch.float16 else None
    calls: list[Call] = []
    if plan.pooled is not None:
        calls.append((plan.pooled, (score_w, pooled, scores, gates, *received, w, pairs, delta, dt, unscale)))
    if plan.native is not None:
        of_pooled: tuple[Tensor | None, ...] = (None,) * 12
        if plan.pooled is None:
            of_scores = hopper.score_weights(score_w, gates, w)
            of_pooled = (w, of_scores, *map(hopper.aligned, (pooled, scores, gates, *received[:-1])), dt)
        calls.append((plan.native, (z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, shares, *of_pooled)))
    if plan.sweep is not None:
        if plan.sweep.kernel is held_kernel:
            tensors = (
                z, w, b, score_w, pooled, lse, scores, gates, *received, upstream, dz, shares, dt,
                pairs, delta, unscale,
            )  # fmt: skip
        else:
            tensors = (z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, shares)
        calls.append((plan.sweep, tensors))
    if plan.products:
        calls += float_products.backward_calls(z, b, lse, pairs, grad_lse, grad_logits, upstream, dz, shares)
    if plan.sums is not None:
        calls.append((plan.sums, (shares, pooled, dt, dw, dscore_w, dscore_b)))
    run(calls)
