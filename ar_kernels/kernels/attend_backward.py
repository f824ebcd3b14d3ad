"""The backward sweep: one read of the feature map, one write of its gradient; masks are recomputed, never stored.

From the gradients of x = g ⊙ P, g, t and P, image by image (pooled_gradient_kernel, O(N·K·C)):
    dg_k = dx_k·P_k,  du = g ⊙ (dg − Σ_j g_j dg_j),  dt = du ⊙ (1 − tanh² t),  dP_k = g_k dx_k + dt_k W_G[k]
then over the positions, with a = exp(ℓ − lse) (attend_backward_kernel):
    dA = dP·Z,  dℓ = a ⊙ (dA − δ) + direct,  δ_k = dP_k·P_k − dlse_k
    dZ = Σ_k a_k dP_k + Σ_k dℓ_k W_H[k] + upstream,  dW_H = dℓ Zᵀ
A spatial mean is one more head with a = 1/S whose dℓ is dropped.

Weight gradients: every program adds up its share, weighted_sum_kernel adds the shares in order: no atomics, the same
bits on every run. Bytes: |Z| read once, |dZ| written once, O(N·K·C) besides. float16 has too few exponents for
gradients that a mean loss scales by 1/N: dP is scaled per image by a power of two, and what comes of it scaled back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heuristics import MOST_REGISTERS, chip, next_power_of_2, sweep_config
from .tiles import accumulator, aligned, map_strides, matmul_precision, position_count, row_width, tanh, tile_offsets


@triton.jit
def _pooled_gradient(
    n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP of some channels, the mean's row at index HEADS: [C_tile, K_tile]."""
    real = (c < C)[:, None] & (heads < HEADS)[None, :]
    offsets = heads[None, :] * C + c[:, None]
    dp = tl.zeros([c.shape[0], heads.shape[0]], ACC)
    if grad_features is not None:
        gated = (c < C)[:, None] & (heads < GATED)[None, :]
        dp += g[None, :] * tl.load(grad_features + n * (GATED * C) + offsets, mask=gated, other=0.0).to(ACC)
    if score_w is not None:
        dp += dt[None, :] * tl.load(score_w + offsets, mask=real, other=0.0).to(ACC)
    if grad_pooled is not None:
        dp += tl.load(grad_pooled + n * (HEADS * C) + offsets, mask=real, other=0.0)
    if grad_mean is not None:
        average = tl.load(grad_mean + n * C + c, mask=c < C, other=0.0)
        dp += tl.where(heads[None, :] == HEADS, average[:, None], 0.0)
    return dp


@triton.jit(do_not_specialize=["positions"])
def pooled_gradient_kernel(
    score_w, pooled, scores, gates,
    grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, grad_logits,
    dp_out, delta, dt_out, unscale, positions,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image. Writes dP [ROWS, C] in the map's dtype, δ [HEADS], dt [HEADS] and 1/scale."""
    n = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    g = tl.zeros([K_TILE], ACC)
    dt = tl.zeros([K_TILE], ACC)
    if GATED > 0:
        g += tl.load(gates + n * GATED + heads, mask=heads < GATED, other=0.0)
    if score_w is not None:
        dg = tl.zeros([K_TILE], ACC)
        if grad_features is not None:
            for first in range(0, C, C_TILE):
                c = first + channels
                gated = (c < C)[:, None] & (heads < GATED)[None, :]
                offsets = heads[None, :] * C + c[:, None]
                dx = tl.load(grad_features + n * (GATED * C) + offsets, mask=gated, other=0.0).to(ACC)
                dg += tl.sum(dx * tl.load(pooled + n * (HEADS * C) + offsets, mask=gated, other=0.0), axis=0)
        if grad_gates is not None:
            dg += tl.load(grad_gates + n * GATED + heads, mask=heads < GATED, other=0.0)
        u = tanh(tl.load(scores + n * HEADS + heads, mask=heads < HEADS, other=0.0))
        dt += g * (dg - tl.sum(g * dg, axis=0))
        dt *= 1.0 - u * u
        if grad_scores is not None:
            dt += tl.load(grad_scores + n * HEADS + heads, mask=heads < HEADS, other=0.0)
        tl.store(dt_out + n * HEADS + heads, dt, mask=heads < HEADS)
    kind = dp_out.dtype.element_ty
    scale = 1.0
    if unscale is not None:
        largest = tl.zeros([K_TILE], ACC)
        for first in range(0, C, C_TILE):
            c = first + channels
            dp = _pooled_gradient(
                n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean, C, HEADS, GATED, ACC
            )
            largest = tl.maximum(largest, tl.max(tl.abs(dp), axis=0))
        if grad_logits is not None:
            for start in range(0, positions, C_TILE):
                s = start + channels
                direct = tl.load(
                    grad_logits + n * HEADS * positions + heads[None, :] * positions + s[:, None],
                    mask=(s < positions)[:, None] & (heads < HEADS)[None, :],
                    other=0.0,
                )
                largest = tl.maximum(largest, tl.max(tl.abs(direct), axis=0))
        if grad_lse is not None:
            direct = tl.load(grad_lse + n * HEADS + heads, mask=heads < HEADS, other=0.0)
            largest = tl.maximum(largest, tl.abs(direct))
        top = tl.max(largest, axis=0)
        usable = (top > 0) & (top < float("inf"))
        power = tl.ceil(tl.log2(tl.where(usable, top, 1.0)))
        scale = tl.exp2(-tl.minimum(tl.maximum(power, -40.0), 40.0))  # sums of scaled shares stay in float32's range
        tl.store(unscale + n, 1.0 / scale)
    # δ is made of dP as it was rounded, so that Σ_s dℓ stays 0 however much of dA all positions share.
    sums = tl.zeros([K_TILE], ACC)
    for first in range(0, C, C_TILE):
        c = first + channels
        offsets = heads[None, :] * C + c[:, None]
        dp = _pooled_gradient(n, c, heads, g, dt, score_w, grad_features, grad_pooled, grad_mean, C, HEADS, GATED, ACC)
        rounded = (dp * scale).to(kind)
        tl.store(dp_out + n * (ROWS * C) + offsets, rounded, mask=(c < C)[:, None] & (heads < ROWS)[None, :])
        real = (c < C)[:, None] & (heads < HEADS)[None, :]
        sums += tl.sum(rounded.to(ACC) * tl.load(pooled + n * (HEADS * C) + offsets, mask=real, other=0.0), axis=0)
    if grad_lse is not None:
        sums -= scale * tl.load(grad_lse + n * HEADS + heads, mask=heads < HEADS, other=0.0)
    tl.store(delta + n * HEADS + heads, sums, mask=heads < HEADS)


@triton.jit
def _mask_gradient(
    logit, da, s, end, n, heads, bias, lse, delta, grad_logits, scale, positions,
    HEADS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """a and dℓ of one tile, [S_tile, K_tile] each, from W_H Z and dP Z."""
    shift = tl.load(lse + n * HEADS + heads, mask=heads < HEADS, other=0.0)
    center = tl.load(delta + n * HEADS + heads, mask=heads < HEADS, other=0.0)
    real = (s < end)[:, None] & (heads < HEADS)[None, :]
    a = tl.where(real, tl.exp(logit + (bias - shift)[None, :]), 0.0)
    dl = a * (da - center[None, :])
    if grad_logits is not None:
        offsets = n * HEADS * positions + heads[None, :] * positions + s[:, None]
        dl += scale * tl.load(grad_logits + offsets, mask=real, other=0.0)
    if ROWS > HEADS:
        a = tl.where((s < end)[:, None] & (heads == HEADS)[None, :], 1.0 / positions.to(ACC), a)
    return a, tl.where(real, dl, 0.0)


@triton.jit
def _store_map_gradient(
    a, dl, dp_tile, w_tile, inverse, n, s, end, c, width, upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
    C: tl.constexpr, UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ = a dPᵀ + dℓ W_H, out of the image's scale, + upstream: one tile, [S_tile, C_tile]."""
    dz_tile = tl.dot(a, tl.trans(dp_tile), input_precision=PRECISION, out_dtype=ACC)
    dz_tile = tl.dot(dl, tl.trans(w_tile), dz_tile, input_precision=PRECISION, out_dtype=ACC)
    dz_tile *= inverse
    real = (s < end)[:, None] & (c < C)[None, :]
    if upstream is not None:
        offsets = tile_offsets(s, c, width, up_c, up_h, up_w, UP_UNIT, UP_VECTOR, UP_FLAT, WIDE)
        dz_tile += tl.load(upstream + n * (up_n.to(tl.int64) * UP_VECTOR) + offsets, mask=real, other=0.0).to(
            dz_tile.dtype
        )
    offsets = tile_offsets(s, c, width, dz_c, 0, dz_s, DZ_UNIT, DZ_VECTOR, True, WIDE)
    tl.store(dz + n * (dz_n.to(tl.int64) * DZ_VECTOR) + offsets, dz_tile.to(dz.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=[
        "rows",
        "positions",
        "width",
        "splits",
        "split_length",
        "stride_n",
        "stride_c",
        "stride_h",
        "stride_w",
        "up_n",
        "up_c",
        "up_h",
        "up_w",
        "dz_n",
        "dz_c",
        "dz_s",
    ]
)
def attend_backward_kernel(
    z, w, b, lse, dp, delta, unscale, grad_logits, upstream, dz, dw,
    rows, positions, width, splits, split_length,
    stride_n, stride_c, stride_h, stride_w, up_n, up_c, up_h, up_w, dz_n, dz_c, dz_s,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    C_TILE: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr, HELD: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr,
    UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th (image, split); its share of dW_H goes to its own slice of dw."""
    program = tl.program_id(0)
    heads = tl.arange(0, K_TILE)
    channels = tl.arange(0, C_TILE)
    kind = z.dtype.element_ty
    bias = tl.zeros([K_TILE], ACC)
    if b is not None:
        bias += tl.load(b + heads, mask=heads < HEADS, other=0.0).to(ACC)
    if dw is not None:
        dw += program.to(tl.int64) * (HEADS * C)
    if HELD:
        columns = heads[None, :] * C + channels[:, None]
        inside = (channels < C)[:, None] & (heads < HEADS)[None, :]
        w_tile = tl.load(w + columns, mask=inside, other=0.0).to(kind)  # [C_tile, K_tile]
        dw_sum = tl.zeros([C_TILE, K_TILE], ACC)
    scale = 1.0
    inverse = 1.0
    for row in range(program, rows, tl.num_programs(0)):
        n = (row // splits).to(tl.int64)
        begin = (row % splits) * split_length
        end = tl.minimum(begin + split_length, positions)
        if UNIT == "s":
            begin = aligned(begin, S_TILE)
            end = aligned(end, VECTOR)
        z_n = z + n * (stride_n.to(tl.int64) * VECTOR)
        if unscale is not None:
            if HELD:
                dw_sum *= inverse  # out of the last image's scale, into this one's
            inverse = tl.load(unscale + n)
            scale = 1.0 / inverse
            if HELD:
                dw_sum *= scale
        if HELD:
            dp_tile = tl.load(
                dp + n * (ROWS * C) + columns, mask=(channels < C)[:, None] & (heads < ROWS)[None, :], other=0.0
            )
            for start in range(begin, end, S_TILE):
                s = start + tl.arange(0, S_TILE)
                offsets = tile_offsets(s, channels, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (channels < C)[None, :], other=0.0)
                logit = tl.dot(z_tile, w_tile, input_precision=PRECISION, out_dtype=ACC)
                da = tl.dot(z_tile, dp_tile, input_precision=PRECISION, out_dtype=ACC)
                a, dl = _mask_gradient(
                    logit, da, s, end, n, heads, bias, lse, delta, grad_logits, scale, positions, HEADS, ROWS, ACC
                )
                dl = dl.to(kind)
                if dw is not None:
                    dw_sum = tl.dot(tl.trans(z_tile), dl, dw_sum, input_precision=PRECISION, out_dtype=ACC)
                if dz is not None:
                    _store_map_gradient(
                        a.to(kind), dl, dp_tile, w_tile, inverse, n, s, end, channels, width,
                        upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
                        C, UP_UNIT, UP_VECTOR, UP_FLAT, DZ_UNIT, DZ_VECTOR, WIDE, ACC, PRECISION,
                    )  # fmt: skip
        else:
            for start in range(begin, end, S_TILE):
                s = start + tl.arange(0, S_TILE)
                logit = tl.zeros([S_TILE, K_TILE], ACC)
                da = tl.zeros([S_TILE, K_TILE], ACC)
                for first in range(0, C, C_TILE):
                    c = first + channels
                    offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                    z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                    columns = heads[None, :] * C + c[:, None]
                    inside = (c < C)[:, None] & (heads < HEADS)[None, :]
                    with_mean = (c < C)[:, None] & (heads < ROWS)[None, :]
                    w_tile = tl.load(w + columns, mask=inside, other=0.0).to(kind)
                    dp_tile = tl.load(dp + n * (ROWS * C) + columns, mask=with_mean, other=0.0)
                    logit = tl.dot(z_tile, w_tile, logit, input_precision=PRECISION, out_dtype=ACC)
                    da = tl.dot(z_tile, dp_tile, da, input_precision=PRECISION, out_dtype=ACC)
                a, dl = _mask_gradient(
                    logit, da, s, end, n, heads, bias, lse, delta, grad_logits, scale, positions, HEADS, ROWS, ACC
                )
                a = a.to(kind)
                dl = dl.to(kind)
                fresh = (row == program) & (start == begin)
                tl.debug_barrier()  # this program's earlier sums in dw are written
                for first in range(0, C, C_TILE):
                    c = first + channels
                    columns = heads[None, :] * C + c[:, None]
                    inside = (c < C)[:, None] & (heads < HEADS)[None, :]
                    if dw is not None:
                        offsets = tile_offsets(s, c, width, stride_c, stride_h, stride_w, UNIT, VECTOR, FLAT, WIDE)
                        z_tile = tl.load(z_n + offsets, mask=(s < end)[:, None] & (c < C)[None, :], other=0.0)
                        share = tl.dot(tl.trans(z_tile), dl, input_precision=PRECISION, out_dtype=ACC) * inverse
                        before = tl.load(dw + columns, mask=inside & (fresh == 0), other=0.0)
                        tl.store(dw + columns, before + share, mask=inside)
                    if dz is not None:
                        with_mean = (c < C)[:, None] & (heads < ROWS)[None, :]
                        w_tile = tl.load(w + columns, mask=inside, other=0.0).to(kind)
                        dp_tile = tl.load(dp + n * (ROWS * C) + columns, mask=with_mean, other=0.0)
                        _store_map_gradient(
                            a, dl, dp_tile, w_tile, inverse, n, s, end, c, width,
                            upstream, up_n, up_c, up_h, up_w, dz, dz_n, dz_c, dz_s,
                            C, UP_UNIT, UP_VECTOR, UP_FLAT, DZ_UNIT, DZ_VECTOR, WIDE, ACC, PRECISION,
                        )  # fmt: skip
    if HELD:
        if dw is not None:
            tl.store(dw + columns, dw_sum * inverse, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def weighted_sum_kernel(
    shares, weight, total, rows,
    C: tl.constexpr, HEADS: tl.constexpr, C_TILE: tl.constexpr, R_TILE: tl.constexpr,
):  # fmt: skip
    """total[k, c] = Σ_r weight[r, k] shares[r, k, c], rows in order (weight None: 1). One program: some c of one k."""
    k = tl.program_id(0)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    sums = tl.zeros([C_TILE], shares.dtype.element_ty)
    for first in range(0, rows, R_TILE):
        r = (first + tl.arange(0, R_TILE)).to(tl.int64)
        tile = tl.load(
            shares + (r * HEADS + k)[:, None] * C + c[None, :], mask=(r < rows)[:, None] & (c < C)[None, :], other=0.0
        )
        if weight is not None:
            tile *= tl.load(weight + r * HEADS + k, mask=r < rows, other=0.0)[:, None]
        sums += tl.sum(tile, axis=0)
    tl.store(total + k * C + c, sums.to(total.dtype.element_ty), mask=c < C)


def weighted_sum(shares: Tensor, weight: Tensor | None, total: Tensor) -> None:
    """total [K, C] = Σ_r weight [R, K] ⊙ shares [R, K, C], always added in the same order."""
    rows, heads, channels = shares.shape
    tile = min(64, next_power_of_2(channels))
    weighted_sum_kernel[(heads, -(-channels // tile))](
        shares, weight, total, rows, C=channels, HEADS=heads, C_TILE=tile, R_TILE=32
    )


def pooled_gradient(
    z: Tensor,
    score_w: Tensor | None,
    pooled: Tensor,
    scores: Tensor | None,
    gates: Tensor | None,
    grad_features: Tensor | None,
    grad_gates: Tensor | None,
    grad_scores: Tensor | None,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_mean: Tensor | None,
    grad_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dP [N, K (+1 for the mean), C] in z's dtype, δ [N, K], dt [N, K] (with score_w) and 1/scale [N] (float16)."""
    images, heads, channels = pooled.shape
    rows = heads + (grad_mean is not None)
    dp = z.new_empty((images, rows, channels))
    delta = pooled.new_empty((images, heads))
    dt = None if score_w is None else pooled.new_empty((images, heads))
    unscale = pooled.new_empty(images) if z.dtype == torch.float16 else None
    head_tile = next_power_of_2(rows)
    pooled_gradient_kernel[(images,)](
        score_w, pooled, scores, gates,
        grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, grad_logits,
        dp, delta, dt, unscale, position_count(z),
        C=channels, HEADS=heads, GATED=0 if gates is None else gates.shape[1], ROWS=rows,
        C_TILE=min(next_power_of_2(channels), max(16, 1024 // head_tile)), K_TILE=head_tile,
        ACC=accumulator(z.dtype),
        num_warps=4 if head_tile < 64 else 8, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return dp, delta, dt, unscale


def attend_backward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    lse: Tensor,
    dp: Tensor,
    delta: Tensor,
    unscale: Tensor | None,
    grad_logits: Tensor | None,
    upstream: Tensor | None,
    dz: Tensor | None,
    dw: Tensor | None,
) -> None:
    """Launches the sweep into dz (z's shape, contiguous or channels_last) and dw [K, C]; either may be None."""
    images, channels = z.shape[:2]
    heads, rows = w.shape[0], dp.shape[1]
    positions, strides = position_count(z), map_strides(z)
    device = chip(z.get_device())
    config = sweep_config(
        images, channels, positions, rows, z.element_size(), strides.vector, device,
        backward=True, tapped=upstream is not None,
    )  # fmt: skip
    items = images * config.splits
    programs = min(items, 2 * device.processors)
    shares = None if dw is None else lse.new_empty((programs, heads, channels))
    up = strides if upstream is None else map_strides(upstream)
    out = strides if dz is None else map_strides(dz)
    attend_backward_kernel[(programs,)](
        z, w, b, lse, dp, delta, unscale, grad_logits, upstream, dz, shares,
        items, positions, row_width(z), config.splits, config.split_length,
        strides.n, strides.c, strides.h, strides.w, up.n, up.c, up.h, up.w, out.n, out.c, out.w,
        C=channels, HEADS=heads, ROWS=rows,
        C_TILE=config.channel_tile, K_TILE=config.head_tile, S_TILE=config.position_tile, HELD=config.held,
        UNIT=strides.unit, VECTOR=strides.vector, FLAT=strides.flat,
        UP_UNIT=up.unit, UP_VECTOR=up.vector, UP_FLAT=up.flat, DZ_UNIT=out.unit, DZ_VECTOR=out.vector,
        WIDE=strides.wide or up.wide or out.wide, ACC=accumulator(z.dtype),
        PRECISION=matmul_precision(z.dtype, config.head_tile),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
    )  # fmt: skip
    if dw is not None:
        weighted_sum(shares, None, dw)
