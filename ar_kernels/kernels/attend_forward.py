"""The forward sweep: masks, pooled features, gates and gated features in one pass over the feature map.

    ℓ = W_H Z + b_H,  A = softmax over positions of ℓ,  P = A Zᵀ,  lse = log Σ exp ℓ      (online: m, d, P rescaled)
    t_k = W_G[k]·P_k + b_G[k],  g = softmax over heads of tanh t,  x = g ⊙ P

A spatial mean is one more head whose logits are constant: its row of W_H is 0.

Bytes: |Z| read once, O(N·K·C) written. Where all channels of a tile fit on chip (`held`), a tile is read once, used
for both products and dropped. Else it is read twice, the second time from cache, and P grows in L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from .heuristics import MOST_REGISTERS, chip, next_power_of_2, sweep_config
from .tiles import accumulator, aligned, map_strides, matmul_precision, position_count, row_width, tanh, tile_offsets


@triton.jit
def _softmax_step(logit, m, d, heads, real, HEADS: tl.constexpr):  # [S_tile, K_tile], [K_tile], [K_tile]
    """One step of the online softmax: the tile's weights p, and how much the sums so far shrink."""
    logit = tl.where(heads[None, :] < HEADS, logit, 0.0)  # the mean's head, also where the map is not finite
    logit = tl.where(real[:, None], logit, float("-inf"))
    m_new = tl.maximum(m, tl.max(logit, axis=0))
    p = tl.exp(logit - m_new[None, :])
    shrink = tl.exp(m - m_new)
    return p, shrink, m_new, d * shrink + tl.sum(p, axis=0)


@triton.jit
def _gate(t, heads, GATED: tl.constexpr):  # [K_tile] → [K_tile]
    """softmax over the first GATED heads of tanh t; no maximum is needed, tanh is bounded."""
    e = tl.where(heads < GATED, tl.exp(tanh(t)), 0.0)
    return e / tl.sum(e, axis=0)


@triton.jit
def _store_logits(logit, n, s, end, heads, logits, positions, HEADS: tl.constexpr):
    targets = logits + n * HEADS * positions + heads[None, :] * positions + s[:, None]
    tl.store(targets, logit, mask=(s < end)[:, None] & (heads < HEADS)[None, :])


@triton.jit
def _store_head_sums(n, heads, m, d, lse, HEADS: tl.constexpr):
    tl.store(lse + n * HEADS + heads, m + tl.log(d), mask=heads < HEADS)


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
def _store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS: tl.constexpr, GATED: tl.constexpr):
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


@triton.jit(
    do_not_specialize=[
        "positions",
        "width",
        "stride_n",
        "stride_c",
        "stride_h",
        "stride_w",
        "splits",
        "split_length",
    ]
)
def attend_forward_kernel(
    z, w, b, score_w, score_b,
    pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
    positions, width, stride_n, stride_c, stride_h, stride_w, splits, split_length,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr, HELD: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one image, or one of its splits (then, and if not HELD, merge_kernel finishes)."""
    row = tl.program_id(0).to(tl.int64)  # one (image, split)
    n = row // splits
    begin = (row % splits).to(tl.int32) * split_length
    end = tl.minimum(begin + split_length, positions)
    if UNIT == "s":
        begin = aligned(begin, S_TILE)
        end = aligned(end, VECTOR)
    z += n * (stride_n.to(tl.int64) * VECTOR)
    heads = tl.arange(0, K_TILE)
    bias = tl.zeros([K_TILE], ACC)
    if b is not None:
        bias += tl.load(b + heads, mask=heads < HEADS, other=0.0).to(ACC)
    m = tl.full([K_TILE], float("-inf"), ACC)
    d = tl.zeros([K_TILE], ACC)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    if HELD:
        w_tile = tl.load(
            w + heads[None, :] * C + channels[:, None],
            mask=(channels < C)[:, None] & (heads < HEADS)[None, :],
            other=0.0,
        ).to(kind)  # [C_tile, K_tile]
        p_sum = tl.zeros([C_TILE, K_TILE], ACC)
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            offsets = tile_offsets(s, channels, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
            z_tile = tl.load(z + offsets, mask=(s < end)[:, None] & (channels < C)[None, :], other=0.0)
            logit = tl.dot(z_tile, w_tile, input_precision=PRECISION, out_dtype=ACC) + bias[None, :]  # [S_tile, K_tile]
            if logits is not None:
                _store_logits(logit, n, s, end, heads, logits, positions, HEADS)
            p, shrink, m, d = _softmax_step(logit, m, d, heads, s < end, HEADS)
            p_sum = tl.dot(
                tl.trans(z_tile), p.to(kind), p_sum * shrink[None, :], input_precision=PRECISION, out_dtype=ACC
            )
        if part_p is None:
            p_sum = p_sum / d[None, :]
            _store_head_sums(n, heads, m, d, lse, HEADS)
            t = _store_pooled(p_sum, n, heads, channels, pooled, mean, score_w, C, HEADS)
            if features is not None:
                g = _store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
                _store_features(p_sum, g, n, heads, channels, features, C, GATED)
        else:
            tl.store(
                part_p + row * (ROWS * C) + heads[None, :] * C + channels[:, None],
                p_sum,
                mask=(channels < C)[:, None] & (heads < ROWS)[None, :],
            )
    else:
        part_p += row * (ROWS * C)
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            logit = tl.zeros([S_TILE, K_TILE], ACC)
            for first in range(0, C, C_TILE):
                c = first + channels
                offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                z_tile = tl.load(z + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                w_tile = tl.load(
                    w + heads[None, :] * C + c[:, None], mask=(c < C)[:, None] & (heads < HEADS)[None, :], other=0.0
                )
                logit = tl.dot(z_tile, w_tile.to(kind), logit, input_precision=PRECISION, out_dtype=ACC)
            logit += bias[None, :]
            if logits is not None:
                _store_logits(logit, n, s, end, heads, logits, positions, HEADS)
            p, shrink, m, d = _softmax_step(logit, m, d, heads, s < end, HEADS)
            p = p.to(kind)
            tl.debug_barrier()  # the sums of the tile before are written
            for first in range(0, C, C_TILE):
                c = first + channels
                offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                z_tile = tl.load(z + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                sums = part_p + heads[None, :] * C + c[:, None]
                real = (c < C)[:, None] & (heads < ROWS)[None, :]
                before = tl.load(sums, mask=real & (start > begin), other=0.0) * shrink[None, :]
                after = tl.dot(tl.trans(z_tile), p, before, input_precision=PRECISION, out_dtype=ACC)
                tl.store(sums, after, mask=real)
    if part_p is not None:
        tl.store(part_m + row * ROWS + heads, m, mask=heads < ROWS)
        tl.store(part_d + row * ROWS + heads, d, mask=heads < ROWS)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    score_w, score_b, pooled, lse, mean, scores, gates, features, part_m, part_d, part_p, splits,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image. Adds its splits' sums in order, each rescaled to the common maximum, then the gates."""
    n = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, K_TILE)
    row = n * splits
    m = tl.full([K_TILE], float("-inf"), ACC)
    for j in range(splits):
        m = tl.maximum(m, tl.load(part_m + (row + j) * ROWS + heads, mask=heads < ROWS, other=0.0))
    d = tl.zeros([K_TILE], ACC)
    for j in range(splits):
        part = tl.load(part_m + (row + j) * ROWS + heads, mask=heads < ROWS, other=0.0)
        d += tl.exp(part - m) * tl.load(part_d + (row + j) * ROWS + heads, mask=heads < ROWS, other=1.0)
    _store_head_sums(n, heads, m, d, lse, HEADS)
    t = tl.zeros([K_TILE], ACC)
    for first in range(0, C, C_TILE):
        c = first + tl.arange(0, C_TILE)
        p_tile = tl.zeros([C_TILE, K_TILE], ACC)
        for j in range(splits):
            part = tl.load(part_m + (row + j) * ROWS + heads, mask=heads < ROWS, other=0.0)
            sums = tl.load(
                part_p + (row + j) * (ROWS * C) + heads[None, :] * C + c[:, None],
                mask=(c < C)[:, None] & (heads < ROWS)[None, :],
                other=0.0,
            )
            p_tile += sums * tl.exp(part - m)[None, :]
        t += _store_pooled(p_tile / d[None, :], n, heads, c, pooled, mean, score_w, C, HEADS)
    if features is not None:
        g = _store_gates(t, n, heads, score_w, score_b, scores, gates, HEADS, GATED)
        tl.debug_barrier()  # pooled is written
        for first in range(0, C, C_TILE):
            c = first + tl.arange(0, C_TILE)
            p_tile = tl.load(
                pooled + n * (HEADS * C) + heads[None, :] * C + c[:, None],
                mask=(c < C)[:, None] & (heads < HEADS)[None, :],
                other=0.0,
            )
            _store_features(p_tile, g, n, heads, c, features, C, GATED)


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
) -> None:
    """Launches the sweep (and the merge, where one is needed) into outputs that ops.py allocated."""
    images, channels = z.shape[:2]
    heads = w.shape[0]
    rows = heads + (mean is not None)
    positions, strides = position_count(z), map_strides(z)
    device = chip(z.get_device())
    config = sweep_config(images, channels, positions, rows, z.element_size(), strides.vector, device)
    part_m = part_d = part_p = None
    merge = config.splits > 1 or not config.held
    if merge:
        part_m = lse.new_empty((images * config.splits, rows))
        part_d = lse.new_empty((images * config.splits, rows))
        part_p = lse.new_empty((images * config.splits, rows, channels))
    sizes = {
        "C": channels,
        "HEADS": heads,
        "GATED": 0 if gates is None else gates.shape[1],
        "ROWS": rows,
        "C_TILE": config.channel_tile,
        "K_TILE": config.head_tile,
        "ACC": accumulator(z.dtype),
    }
    attend_forward_kernel[(images * config.splits,)](
        z, w, b, score_w, score_b,
        pooled, lse, logits, mean, scores, gates, features, part_m, part_d, part_p,
        positions, row_width(z), strides.n, strides.c, strides.h, strides.w, config.splits, config.split_length,
        **sizes, S_TILE=config.position_tile, HELD=config.held,
        UNIT=strides.unit, VECTOR=strides.vector, FLAT=strides.flat, WIDE=strides.wide,
        PRECISION=matmul_precision(z.dtype, config.head_tile),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
    )  # fmt: skip
    if merge:
        sizes["C_TILE"] = min(next_power_of_2(channels), max(16, 2048 // config.head_tile))
        merge_kernel[(images,)](
            score_w, score_b, pooled, lse, mean, scores, gates, features, part_m, part_d, part_p, config.splits,
            **sizes, num_warps=4, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
