"""The forward sweep: masks, pooled features, gates and gated features in one pass over the feature map.

    ℓ = W_H Z + b_H,  A = softmax over positions of ℓ,  P = A Zᵀ,  lse = log Σ exp ℓ      (online: m, d, P rescaled)
    t_k = W_G[k]·P_k + b_G[k],  g = softmax over heads of tanh t,  x = g ⊙ P

A spatial mean is one more head whose logits are constant: its row of W_H is 0.

Bytes: |Z| read once, O(N·K·C) written. Where all channels of a tile fit on chip (held_kernel), a tile is read once,
used for both products and dropped; wide_kernel does so where all channels leave room for few positions. Else
(chunked_kernel, grouped_kernel for short rows of NCHW) it is read twice, the second time from cache; then P is made in
one go where a tile has all positions of an image, and grows in L2 where it has not.
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
    aligned,
    float32_precision,
    load_head_values,
    load_parts,
    load_rows,
    load_tile,
    map_strides,
    matmul_precision,
    origin,
    part_channels,
    row_group,
    split_bounds,
    tanh,
)


@triton.jit
def _softmax_step(logit, m, d, heads, real, HEADS: tl.constexpr):  # [S_tile, K_tile], [K_tile], [K_tile]
    """One step of the online softmax: the tile's weights p, and how much the sums so far shrink."""
    logit = tl.where(heads[None, :] < HEADS, logit, 0.0)  # the mean's head, also where the map is not finite
    logit = tl.where(real[:, None], logit, float("-inf"))
    m_new = tl.maximum(m, tl.max(logit, axis=0))
    start = origin(m_new)
    p = tl.exp(logit - start[None, :])
    shrink = tl.exp(m - start)
    return p, shrink, m_new, d * shrink + tl.sum(p, axis=0)


@triton.jit
def _gate(t, heads, GATED: tl.constexpr):  # [K_tile] → [K_tile]
    """softmax over the first GATED heads of tanh t; no maximum is needed, tanh is bounded."""
    e = tl.where(heads < GATED, tl.exp(tanh(t)), 0.0)
    total = tl.sum(e, axis=0)
    if e.dtype == tl.float32:  # an only head's gate is exactly 1, and its score's gradient 0
        return tl.div_rn(e, total)
    else:
        return e / total


@triton.jit
def _store_logits(logit, n, s, end, heads, logits, positions, HEADS: tl.constexpr):
    targets = logits + (n * HEADS + heads)[None, :] * positions + s[:, None]
    tl.store(targets, logit, mask=(s < end)[:, None] & (heads < HEADS)[None, :])


@triton.jit
def _store_head_sums(n, heads, m, d, lse, HEADS: tl.constexpr):
    tl.store(lse + n * HEADS + heads, origin(m) + tl.log(d), mask=heads < HEADS)


@triton.jit
def _store_pooled(
    p_tile, n, heads, channels, pooled, mean, score_w,
    C: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip  # p_tile [C_tile, K_tile]; returns its part of the scores [K_tile]
    offsets = heads[None, :] * C + channels[:, None]
    real = (channels < C)[:, None] & (heads < HEADS)[None, :]
    tl.store(pooled + n * (HEADS * C) + offsets, p_tile, mask=real)
    if mean is not None:
        average = tl.sum(tl.where(heads[None, :] == HEADS, p_tile, 0.0), axis=1)
        tl.store(mean + n * C + channels, average, mask=channels < C)
    t = tl.zeros([heads.shape[0]], p_tile.dtype)
    if score_w is not None:
        t += tl.sum(p_tile * tl.load(score_w + offsets, mask=real, other=0.0).to(p_tile.dtype), axis=0)
    return t


@triton.jit
def store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS: tl.constexpr, GATED: tl.constexpr):
    """Scores and gates of one image from t without its bias; returns the gates [K_tile]."""
    if score_b is not None:
        t += tl.load(score_b + heads, mask=heads < HEADS, other=0.0).to(t.dtype)
    tl.store(scores + n * HEADS + heads, t, mask=heads < HEADS)
    g = _gate(t, heads, GATED)
    tl.store(gates + n * GATED + heads, g, mask=heads < GATED)
    return g


@triton.jit
def _store_features(p_tile, g, n, heads, channels, features, C: tl.constexpr, GATED: tl.constexpr):
    offsets = heads[None, :] * C + channels[:, None]
    real = (channels < C)[:, None] & (heads < GATED)[None, :]
    tl.store(features + n * (GATED * C) + offsets, (p_tile * g[None, :]).to(features.dtype.element_ty), mask=real)


SIZES = ("positions", "width", "stride_n", "stride_c", "stride_h", "stride_w", "splits", "split_length")
"""What changes with resolution, batch and strides, and must not compile anew."""


@triton.jit(do_not_specialize=SIZES)
def held_kernel(
    z, w, b, score_w, score_b,
    pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
    positions, width, stride_n, stride_c, stride_h, stride_w, splits, split_length,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one image, or one of its splits (then merge_kernel finishes). A tile's channels are PARTS tiles."""
    row = tl.program_id(0).to(tl.int64)
    n, begin, end = split_bounds(row, positions, splits, split_length, S_TILE, UNIT, VECTOR)
    z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    bias = load_head_values(b, heads, HEADS, ACC)
    m = tl.full([K_TILE], float("-inf"), ACC)
    d = tl.zeros([K_TILE], ACC)
    # On the older, eight-wide matrix instructions a product that is added to another waits for it, step by step. Zeros
    # that Triton cannot tell to be zeros keep each part's product apart until it is done.
    nothing = tl.zeros([S_TILE, K_TILE], ACC) + tl.minimum(positions, 0).to(ACC)
    w_tiles = ()
    p_sums = ()
    for i in tl.static_range(PARTS):
        w_tiles = w_tiles + (load_rows(w, heads, i * C_TILE + channels, C, HEADS).to(kind),)
        p_sums = p_sums + (tl.zeros([C_TILE, K_TILE], ACC),)
    for start in range(begin, end, S_TILE):
        s = start + tl.arange(0, S_TILE)
        logit = tl.zeros([S_TILE, K_TILE], ACC) + bias[None, :]
        z_tiles = ()
        for i in tl.static_range(PARTS):
            c = i * C_TILE + channels
            z_tile = load_tile(z_n, s, end, c, width, stride_c, stride_h, stride_w, C, UNIT, VECTOR, FLAT, WIDE)
            if i == 0 or K_TILE > 8:
                logit = tl.dot(z_tile, w_tiles[i], logit, input_precision=PRECISION, out_dtype=ACC)
            else:
                logit += tl.dot(z_tile, w_tiles[i], nothing, input_precision=PRECISION, out_dtype=ACC)
            z_tiles = z_tiles + (z_tile,)
        if logits is not None:
            _store_logits(logit, n, s, end, heads, logits, positions, HEADS)
        p, shrink, m, d = _softmax_step(logit, m, d, heads, s < end, HEADS)
        p = p.to(kind)
        grown = ()
        for i in tl.static_range(PARTS):
            before = p_sums[i] * shrink[None, :]
            grown = grown + (tl.dot(tl.trans(z_tiles[i]), p, before, input_precision=PRECISION, out_dtype=ACC),)
        p_sums = grown
    if splits == 1:  # at run time: another batch size does not compile anew
        _store_head_sums(n, heads, m, d, lse, HEADS)
        t = tl.zeros([K_TILE], ACC)
        for i in tl.static_range(PARTS):
            c = i * C_TILE + channels
            t += _store_pooled(p_sums[i] / d[None, :], n, heads, c, pooled, mean, score_w, C, HEADS)
        if features is not None:
            g = store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
            for i in tl.static_range(PARTS):
                _store_features(p_sums[i] / d[None, :], g, n, heads, i * C_TILE + channels, features, C, GATED)
    else:
        for i in tl.static_range(PARTS):
            c = i * C_TILE + channels
            sums = part_p + row * (ROWS * C) + heads[None, :] * C + c[:, None]
            tl.store(sums, p_sums[i], mask=(c < C)[:, None] & (heads < ROWS)[None, :])
        _store_part(row, heads, m, d, part_m, part_d, ROWS)


@triton.jit(do_not_specialize=SIZES)
def wide_kernel(
    z, w, b, score_w, score_b,
    pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
    positions, width, stride_n, stride_c, stride_h, stride_w, splits, split_length,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """held_kernel for so many channels that a tile has few positions: there all warps would make the same logits. Here
    each makes those of its own channels, and the warps' sums are added."""
    row = tl.program_id(0).to(tl.int64)
    n, begin, end = split_bounds(row, positions, splits, split_length, S_TILE, UNIT, VECTOR)
    z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
    heads = tl.arange(0, K_TILE)
    parted = part_channels(PARTS, C_TILE)
    channels = tl.arange(0, PARTS * C_TILE)
    kind = z.dtype.element_ty
    bias = load_head_values(b, heads, HEADS, ACC)
    m = tl.full([K_TILE], float("-inf"), ACC)
    d = tl.zeros([K_TILE], ACC)
    real = (parted < C)[:, :, None] & (heads < HEADS)[None, None, :]
    w_tile = tl.load(w + heads[None, None, :] * C + parted[:, :, None], mask=real, other=0.0).to(kind)
    p_sums = tl.zeros([PARTS, C_TILE, K_TILE], ACC)
    for start in range(begin, end, S_TILE):
        s = start + tl.arange(0, S_TILE)
        z_tile = load_parts(z_n, s, end, parted, width, stride_c, stride_h, stride_w, C, UNIT, VECTOR, FLAT, WIDE)
        logit = tl.dot(tl.permute(z_tile, (0, 2, 1)), w_tile, input_precision=PRECISION, out_dtype=ACC)
        logit = tl.sum(logit, axis=0) + bias[None, :]
        if logits is not None:
            _store_logits(logit, n, s, end, heads, logits, positions, HEADS)
        p, shrink, m, d = _softmax_step(logit, m, d, heads, s < end, HEADS)
        p = tl.broadcast_to(p.to(kind)[None, :, :], [PARTS, S_TILE, K_TILE])
        before = p_sums * shrink[None, None, :]
        p_sums = tl.dot(z_tile, p, before, input_precision=PRECISION, out_dtype=ACC)
    sums = tl.reshape(p_sums, [PARTS * C_TILE, K_TILE])
    if splits == 1:  # at run time: another batch size does not compile anew
        _store_head_sums(n, heads, m, d, lse, HEADS)
        p_tile = sums / d[None, :]
        t = _store_pooled(p_tile, n, heads, channels, pooled, mean, score_w, C, HEADS)
        if features is not None:
            g = store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
            _store_features(p_tile, g, n, heads, channels, features, C, GATED)
    else:
        targets = part_p + row * (ROWS * C) + heads[None, :] * C + channels[:, None]
        tl.store(targets, sums, mask=(channels < C)[:, None] & (heads < ROWS)[None, :])
        _store_part(row, heads, m, d, part_m, part_d, ROWS)


@triton.jit
def _store_part(row, heads, m, d, part_m, part_d, ROWS: tl.constexpr):
    tl.store(part_m + row * ROWS + heads, m, mask=heads < ROWS)
    tl.store(part_d + row * ROWS + heads, d, mask=heads < ROWS)


@triton.jit
def _store_features_of_pooled(
    pooled, g, n, heads, features,
    C: tl.constexpr, C_TILE: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gated features from pooled ones that this program has just written."""
    tl.debug_barrier()  # pooled is written
    for first in range(0, C, C_TILE):
        c = first + tl.arange(0, C_TILE)
        p_tile = load_rows(pooled + n * (HEADS * C), heads, c, C, HEADS)
        _store_features(p_tile, g, n, heads, c, features, C, GATED)


@triton.jit(do_not_specialize=SIZES)
def chunked_kernel(
    z, w, b, score_w, score_b,
    pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
    positions, width, stride_n, stride_c, stride_h, stride_w, splits, split_length,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one image of at most S_TILE positions; or any image or split of one, then merge_kernel finishes."""
    row = tl.program_id(0).to(tl.int64)
    n, begin, end = split_bounds(row, positions, splits, split_length, S_TILE, UNIT, VECTOR)
    z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    bias = load_head_values(b, heads, HEADS, ACC)
    m = tl.full([K_TILE], float("-inf"), ACC)
    d = tl.zeros([K_TILE], ACC)
    t = tl.zeros([K_TILE], ACC)
    for start in range(begin, end, S_TILE):
        s = start + tl.arange(0, S_TILE)
        logit = tl.zeros([S_TILE, K_TILE], ACC)
        for first in range(0, C, C_TILE):
            c = first + channels
            z_tile = load_tile(z_n, s, end, c, width, stride_c, stride_h, stride_w, C, UNIT, VECTOR, FLAT, WIDE)
            w_tile = load_rows(w, heads, c, C, HEADS).to(kind)
            logit = tl.dot(z_tile, w_tile, logit, input_precision=PRECISION, out_dtype=ACC)
        logit += bias[None, :]
        if logits is not None:
            _store_logits(logit, n, s, end, heads, logits, positions, HEADS)
        p, shrink, m, d = _softmax_step(logit, m, d, heads, s < end, HEADS)
        p = p.to(kind)
        if part_p is not None:
            tl.debug_barrier()  # the sums of the tile before are written
        for step in range(0, C, C_TILE):
            c = (C - 1) // C_TILE * C_TILE - step + channels  # backwards: what was read last is still in L2
            z_tile = load_tile(z_n, s, end, c, width, stride_c, stride_h, stride_w, C, UNIT, VECTOR, FLAT, WIDE)
            if part_p is None:
                p_tile = tl.dot(tl.trans(z_tile), p, input_precision=PRECISION, out_dtype=ACC) / d[None, :]
                t += _store_pooled(p_tile, n, heads, c, pooled, mean, score_w, C, HEADS)
            else:
                sums = part_p + row * (ROWS * C) + heads[None, :] * C + c[:, None]
                real = (c < C)[:, None] & (heads < ROWS)[None, :]
                before = tl.load(sums, mask=real & (start > begin), other=0.0) * shrink[None, :]
                after = tl.dot(tl.trans(z_tile), p, before, input_precision=PRECISION, out_dtype=ACC)
                tl.store(sums, after, mask=real)
    if part_p is None:
        _store_head_sums(n, heads, m, d, lse, HEADS)
        if features is not None:
            g = store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
            _store_features_of_pooled(pooled, g, n, heads, features, C, C_TILE, HEADS, GATED)
    else:
        _store_part(row, heads, m, d, part_m, part_d, ROWS)


@triton.jit
def _own_channel(full, channel, G: tl.constexpr):  # [F_tile, K_tile · G] → [F_tile, K_tile]
    """Of a position's products with all G channels' weights the one with its own channel's."""
    full = tl.reshape(full, [full.shape[0], full.shape[1] // G, G])
    own = channel[:, None, None] == tl.arange(0, G)[None, None, :]
    return tl.sum(tl.where(own, full, 0.0), axis=2)


@triton.jit
def _sum_channels(part, channel, s, positions, f, G: tl.constexpr):  # [F_tile, K_tile]
    """Adds what the G channels of a row have of the same position; both of a pair add the same two numbers, so all G
    copies are equal to the last bit."""
    inside = channel < G
    for i in tl.static_range(3):
        if G > 1 << i:
            other = tl.where(inside, s + (channel ^ (1 << i)) * positions, f)
            part += tl.gather(part, tl.broadcast_to(other[:, None], part.shape), 0)
    return part


@triton.jit
def _spread(p, channel, G: tl.constexpr):  # [F_tile, K_tile] → [F_tile, K_tile · G], 0 but for the own channel
    own = channel[:, None, None] == tl.arange(0, G)[None, None, :]
    spread = tl.where(own, tl.broadcast_to(p[:, :, None], [p.shape[0], p.shape[1], G]), 0.0)
    return tl.reshape(spread, [p.shape[0], p.shape[1] * G])


@triton.jit
def _store_rows(p_tile, d, n, heads, first, pooled, score_w, C: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr):
    """Pooled features of the rows from `first` on, [C_tile, K_tile · G]; returns their part of the scores [K_tile]."""
    p_tile = tl.permute(tl.reshape(p_tile, [p_tile.shape[0], p_tile.shape[1] // G, G]), (0, 2, 1))
    p_tile = tl.reshape(p_tile, [p_tile.shape[0] * G, p_tile.shape[2]]) / d[None, :]
    channels = first * G + tl.arange(0, p_tile.shape[0])
    return _store_pooled(p_tile, n, heads, channels, pooled, None, score_w, C, HEADS)


@triton.jit(do_not_specialize=SIZES)
def grouped_kernel(
    z, w, b, score_w, score_b,
    pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
    positions, width, stride_n, stride_c, stride_h, stride_w, splits, split_length,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """chunked_kernel for NCHW whose rows are of no whole 16 bytes. One program: one image. Its parameters are the other
    sweeps', so that one launch does for all: it makes no mean, and leaves splits and strides inside an image unused.

    GROUP channels are one row of GROUP · positions elements, aligned, and a tile is [S_tile, C_tile] of such rows.
    Head k has GROUP columns, column k · GROUP + j for the j-th channel of each row; where a column meets an element of
    another channel, a logit is left out, and a weight of the pool is 0. So nothing has to be moved.
    """
    n = tl.program_id(0).to(tl.int64)
    z_n = z + n * (stride_n.to(tl.int64) * (VECTOR * GROUP))
    ROW_COUNT: tl.constexpr = C // GROUP
    length = aligned(positions * GROUP, VECTOR * GROUP)
    f = tl.arange(0, S_TILE)
    channel = f // positions
    s = f - channel * positions
    heads = tl.arange(0, K_TILE)
    column = tl.arange(0, K_TILE * GROUP)
    row_tile = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    logit = tl.zeros([S_TILE, K_TILE * GROUP], ACC)
    for first in range(0, ROW_COUNT, C_TILE):
        r = first + row_tile
        real = (f < length)[:, None] & (r < ROW_COUNT)[None, :]
        z_tile = tl.load(z_n + f[:, None] + (r * length)[None, :], mask=real, other=0.0)
        offsets = (column // GROUP * C + column % GROUP)[None, :] + (r * GROUP)[:, None]
        real = (column // GROUP < HEADS)[None, :] & (r < ROW_COUNT)[:, None]
        w_tile = tl.load(w + offsets, mask=real, other=0.0).to(kind)
        logit = tl.dot(z_tile, w_tile, logit, input_precision=PRECISION, out_dtype=ACC)
    logit = _sum_channels(_own_channel(logit, channel, GROUP), channel, s, positions, f, GROUP)
    logit += load_head_values(b, heads, HEADS, ACC)[None, :]
    if logits is not None:
        _store_logits(logit, n, f, positions, heads, logits, positions, HEADS)
    m = tl.full([K_TILE], float("-inf"), ACC)
    p, _, m, d = _softmax_step(logit, m, tl.zeros([K_TILE], ACC), heads, f < length, HEADS)
    d /= GROUP  # a power of two
    p = _spread(p, channel, GROUP).to(kind)
    t = tl.zeros([K_TILE], ACC)
    if tl.sum(tl.where((f < length)[:, None] & (heads < HEADS)[None, :], logit - logit, 0.0)) == 0:
        for step in range(0, ROW_COUNT, C_TILE):
            first = (ROW_COUNT - 1) // C_TILE * C_TILE - step  # backwards: what was read last is still in L2
            real = (f < length)[:, None] & (first + row_tile < ROW_COUNT)[None, :]
            z_tile = tl.load(z_n + f[:, None] + ((first + row_tile) * length)[None, :], mask=real, other=0.0)
            p_tile = tl.dot(tl.trans(z_tile), p, input_precision=PRECISION, out_dtype=ACC)
            t += _store_rows(p_tile, d, n, heads, first, pooled, score_w, C, HEADS, GROUP)
    else:  # an infinite element times another channel's 0 must not make NaN of that channel
        few = tl.arange(0, 16)  # rows, for registers' sake
        for first in range(0, ROW_COUNT, 16):
            real = (f < length)[:, None] & (first + few < ROW_COUNT)[None, :]
            z_tile = tl.load(z_n + f[:, None] + ((first + few) * length)[None, :], mask=real, other=0.0)
            p_tile = tl.zeros([16, K_TILE * GROUP], ACC)
            for j in range(GROUP):
                own = tl.where((channel == j)[:, None], z_tile, 0.0)
                share = tl.dot(tl.trans(own), p, input_precision=PRECISION, out_dtype=ACC)
                p_tile = tl.where((column % GROUP == j)[None, :], share, p_tile)
            t += _store_rows(p_tile, d, n, heads, first, pooled, score_w, C, HEADS, GROUP)
    _store_head_sums(n, heads, m, d, lse, HEADS)
    if features is not None:
        g = store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
        _store_features_of_pooled(pooled, g, n, heads, features, C, C_TILE * GROUP, HEADS, GATED)


@triton.jit
def _split_sums(j, splits, row, heads, c, start, part_m, part_p, C: tl.constexpr, ROWS: tl.constexpr):
    """[C_tile, K_tile] of split j, rescaled; 0 from j = splits on. A function, so that Triton reads it once for all."""
    inside = (heads < ROWS) & (j < splits)
    part = tl.load(part_m + (row + j) * ROWS + heads, mask=inside, other=float("-inf"))
    offsets = (row + j) * (ROWS * C) + heads[None, :] * C + c[:, None]
    sums = tl.load(part_p + offsets, mask=(c < C)[:, None] & inside[None, :], other=0.0)
    return sums * tl.exp(part - start)[None, :]


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    score_w, score_b, pooled, lse, mean, scores, gates, features, part_m, part_d, part_p, splits,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, J_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image. Adds its splits' sums in order, each rescaled to the common maximum, then the gates."""
    n = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, K_TILE)
    row = n * splits
    real = (heads < ROWS)[None, :]
    m = tl.full([K_TILE], float("-inf"), ACC)
    for first in range(0, splits, J_TILE):
        j = first + tl.arange(0, J_TILE)[:, None]
        part = tl.load(part_m + (row + j) * ROWS + heads[None, :], mask=(j < splits) & real, other=float("-inf"))
        m = tl.maximum(m, tl.max(part, axis=0))
    m = tl.where(heads < ROWS, m, 0.0)
    start = origin(m)
    d = tl.zeros([K_TILE], ACC)
    for first in range(0, splits, J_TILE):
        j = first + tl.arange(0, J_TILE)[:, None]
        offsets = (row + j) * ROWS + heads[None, :]
        part = tl.load(part_m + offsets, mask=(j < splits) & real, other=float("-inf"))
        d += tl.sum(
            tl.exp(part - start[None, :]) * tl.load(part_d + offsets, mask=(j < splits) & real, other=0.0), axis=0
        )
    d = tl.where(heads < ROWS, d, 1.0)
    _store_head_sums(n, heads, m, d, lse, HEADS)
    t = tl.zeros([K_TILE], ACC)
    for first in range(0, C, C_TILE):
        c = first + tl.arange(0, C_TILE)
        p_tile = tl.zeros([C_TILE, K_TILE], ACC)
        for begin in range(0, splits, 8):
            for u in tl.static_range(8):  # loads that don't wait for each other
                p_tile += _split_sums(begin + u, splits, row, heads, c, start, part_m, part_p, C, ROWS)
        t += _store_pooled(p_tile / d[None, :], n, heads, c, pooled, mean, score_w, C, HEADS)
    if features is not None:
        g = store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
        _store_features_of_pooled(pooled, g, n, heads, features, C, C_TILE, HEADS, GATED)


class _Plan(NamedTuple):
    """What is launched for maps of one shape, strides and dtype."""

    sweep: Launch | None  # None: `native` does it, or without one PyTorch's products
    native: Any  # an operator of the library built from csrc
    merge: Launch | None  # None: no batch of such maps needs one; after `native`, this one does not
    rows: int  # (image, split), where the sweep writes parts that are to be merged; else 0
    gets_parts: bool  # or the kernel is compiled without
    larger: Launch | None = None  # the sweep of larger batches of such maps, where `native` takes few images alone


@functools.lru_cache(maxsize=1024)
def _plan(
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    heads: int,
    gated: int,
    mean: bool,
    precision: str,
    alike: bool,
    native: bool,
    products: bool,
) -> _Plan:
    images, channels = sizes[:2]
    positions = math.prod(sizes[2:])
    rows = heads + mean
    z = map_strides(sizes, strides, dtype.itemsize)
    operator, parts, spread = None, 0, False
    if native:
        operator, parts = hopper.forward_sweep(z, sizes, strides, heads, dtype.itemsize, alike, chip(device))
        spread = hopper.spreads_few(z, sizes, heads, dtype.itemsize, alike, chip(device))
    config = sweep_config(
        images, channels, positions, rows, dtype.itemsize, z.vector, z.unit == "c", chip(device), alike=alike,
        group=1 if mean else row_group(z, channels, positions, dtype.itemsize),  # grouped_kernel makes no mean
    )  # fmt: skip
    constants = {
        "C": channels,
        "HEADS": heads,
        "GATED": gated,
        "ROWS": rows,
        "K_TILE": config.head_tile,
        "ACC": accumulator(dtype),
    }
    kernel, own = chunked_kernel, {}
    if config.held:
        kernel, own = wide_kernel if config.wide else held_kernel, {"PARTS": config.parts}
    elif config.group > 1:
        kernel, own = grouped_kernel, {"GROUP": config.group}
    if operator is not None and not spread:
        merges = parts > 1
        merge = _merge(images, parts, constants) if merges else None
        return _Plan(None, operator, merge, images * parts if merges else 0, False)
    if products:
        return _Plan(None, None, _merge(images, 1, constants | {"ROWS": heads}), images, False)
    sweep = Launch(
        kernel,
        (images * config.splits,),
        (positions, sizes[-1], z.n // config.group, z.c, z.h, z.w, config.splits, config.split_length),
        **constants, **own, C_TILE=config.channel_tile, S_TILE=config.position_tile,
        UNIT=z.unit, VECTOR=z.vector, FLAT=z.flat, WIDE=z.wide,
        PRECISION=matmul_precision(dtype, precision, config.head_tile, chip(device)),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
    )  # fmt: skip
    whole = not config.held and config.position_tile >= positions
    if operator is not None:
        return _Plan(None, operator, None, 0, not whole, sweep)
    merges = config.splits > 1 or not (config.held or whole)
    # Where few images are spread, no smaller batch of such maps is split.
    once = config.position_tile >= positions or (spread and not merges)
    merge = None if once else _merge(images, config.splits, constants)
    return _Plan(sweep, None, merge, images * config.splits if merges else 0, not whole)


def _merge(images: int, splits: int, constants: dict[str, Any]) -> Launch:
    tile = min(next_power_of_2(constants["C"]), max(16, 2048 // constants["K_TILE"]))
    return Launch(
        merge_kernel, (images,), (splits,), **constants, C_TILE=tile, J_TILE=32,
        num_warps=4, maxnreg=MOST_REGISTERS, **SUMS_OVER_LANES,
    )  # fmt: skip


def attend_forward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    mean: Tensor | None,
    scores: Tensor | None,
    gates: Tensor | None,
    features: Tensor | None,
    alike: bool,
) -> None:
    """Launches the sweep (and the merge, where one is needed) into outputs that ops.py allocated; alike as there."""
    heads, channels = w.shape
    plan = _plan(
        z.shape, z.stride(), z.dtype, z.get_device(), heads,
        0 if gates is None else gates.shape[1], mean is not None, float32_precision(z.dtype), alike,
        hopper.can_read(z, w, score_w), float_products.are_faster(z, heads, alike),
    )  # fmt: skip
    # Not to compile anew for a batch that needs no merge, a held sweep always gets pointers; these it does not follow.
    parts = (lse, lse, lse) if plan.gets_parts else (None, None, None)
    by_products = plan.sweep is None and plan.native is None
    if plan.rows:
        rows = heads + (mean is not None and not by_products)
        parts = tuple(lse.new_empty(plan.rows, rows, *more) for more in ((), (), (channels,)))
    outputs = (pooled, lse, logits, mean, scores, gates, features)
    tensors = (z, w, b, score_w, score_b, *outputs, *parts)
    calls: list[Call]
    besides: list[Call] = []  # another batch of such maps is not to wait for a compiler
    if by_products:
        calls, mean = float_products.forward_calls(z, w, b, logits, mean, *parts), None
    elif plan.larger is not None:
        calls, besides = [(plan.native, (*tensors[:-3], None, None, None))], [(plan.larger, tensors)]
    elif plan.native is not None:
        score_w = hopper.score_weights(score_w, gates, w)
        calls = [(plan.native, (z, w, b, score_w, score_b, *outputs, *parts))]
    else:
        calls = [(plan.sweep, tensors)]
    if plan.merge is not None:
        besides.append((plan.merge, (score_w, score_b, pooled, lse, mean, scores, gates, features, *parts)))
    run(calls + besides if plan.rows else calls, besides)
