"""3×3 heads (docs/math.md): forward two sweeps over the map, backward two more and one write of dZ; no unfold of Z.

All wide work is a plain product of 9·K rows with Z, row tap·K + head. Logits are sums of nine such rows, each shifted
by its tap. Where lines are long enough to be tiles, a program adds up three lines of rows where they stand, and shifts
the sums by one position (line_sums_kernel); else it keeps the rows of some lines in a scratch of its own, in L2, and
adds them from there (tap_sums_kernel). The same kernels make dA of the pooled features' gradients. Pooling shifts the
masks, which are small, and so does dW_H, which pools with dℓ.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend_backward import weight_sums_kernel
from .attend_forward import store_gates
from .heuristics import MOST_REGISTERS, SUMS_OVER_LANES, Chip, chip, next_power_of_2
from .launch import Launch
from .tiles import (
    accumulator,
    aligned,
    finite,
    float32_precision,
    load_tile,
    map_strides,
    matmul_precision,
    origin,
    position_offsets,
    tanh,
    tile_offsets,
)

TAPS = 9


@triton.jit
def _tap_rows(weights, rows, channels, C: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, C] → [R_tile, C_tile], 0 outside."""
    real = (rows < ROWS)[:, None] & (channels < C)[None, :]
    return tl.load(weights + rows[:, None] * C + channels[None, :], mask=real, other=0.0)


@triton.jit(do_not_specialize=["w_k", "w_c", "w_h", "w_w", "score_k", "score_c", "score_h", "score_w"])
def rows_kernel(
    of_masks, of_scores, mask_rows, score_rows, w_k, w_c, w_h, w_w, score_k, score_c, score_h, score_w,
    C: tl.constexpr, HEADS: tl.constexpr, C_TILE: tl.constexpr,
):  # fmt: skip
    """W_H and W_G [K, C, 3, 3] of any strides → rows [9, K, C] in the rows' dtypes. One program: some c of one row."""
    row = tl.program_id(0)
    tap, k = row // HEADS, row % HEADS
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    weight = tl.load(of_masks + k * w_k + tap // 3 * w_h + tap % 3 * w_w + c * w_c, mask=c < C)
    tl.store(mask_rows + row * C + c, weight.to(mask_rows.dtype.element_ty), mask=c < C)
    if of_scores is not None:
        at = of_scores + k * score_k + tap // 3 * score_h + tap % 3 * score_w + c * score_c
        tl.store(score_rows + row * C + c, tl.load(at, mask=c < C), mask=c < C)


@triton.jit
def _framed(s, width):
    """Position s in a map with a frame of zeros, one wide."""
    return (s // width + 1) * (width + 2) + s % width + 1


@triton.jit
def _shifted(maps, rows, s, height, width, HEADS: tl.constexpr, PITCH: tl.constexpr):
    """Row tap·K + k: head k's framed map at s - tap → [R_tile, S_tile]. A position has PITCH numbers. Rows behind the
    last tap repeat it, positions past the image its last one: no bounds to check, since they meet zeros or are not
    stored."""
    tap, head = tl.minimum(rows // HEADS, 8), rows % HEADS
    shift = (tap // 3 - 1) * (width + 2) + tap % 3 - 1
    at = _framed(tl.minimum(s, height * width - 1), width)
    return tl.load(maps + (head - shift * PITCH)[:, None] + (at * PITCH)[None, :])


@triton.jit
def _tap_row(own, tap, heads, s, y, x, first, end, pitch, height, width, HEADS: tl.constexpr):
    """One tap's rows of a program's scratch, which begins with position `first`: at s + tap, [K_tile, S_tile]."""
    dy, dx = tap // 3 - 1, tap % 3 - 1
    inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & (s < end)
    at = own + (tap * HEADS + heads)[:, None] * pitch + (s + dy * width + dx - first)[None, :]
    return tl.load(at, mask=(heads < HEADS)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _image_shift(delta, grad_lse, n, heads, factor, HEADS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """δ - dlse of an image's heads, [K_tile]; δ comes scaled."""
    shift = tl.zeros([heads.shape[0]], ACC)
    for part in range(PARTS):
        shift += tl.load(delta + (n * PARTS + part) * HEADS + heads, mask=heads < HEADS, other=0.0)
    if grad_lse is not None:
        shift -= tl.load(grad_lse + n * HEADS + heads, mask=heads < HEADS, other=0.0).to(ACC) * factor
    return shift


@triton.jit
def _store_maps(
    total, a, shift, n, heads, s, real, grad_logits, factor, maps, height, width, HEADS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """a and, of dA = total, dℓ = a ⊙ (dA - shift) + direct, [K_tile, S_tile], into maps [N, H+2, W+2, 2K] where they
    are real. Returns dℓ."""
    of_image = maps + n * ((height + 2) * (width + 2) * (2 * HEADS))
    place = heads[:, None] + (_framed(s, width) * (2 * HEADS))[None, :]
    tl.store(of_image + place, a.to(maps.dtype.element_ty), mask=real)
    dl = a * (total - shift[:, None])
    if grad_logits is not None:
        at = (n * HEADS + heads)[:, None] * (height * width) + s[None, :]
        dl += tl.load(grad_logits + at, mask=real, other=0.0).to(ACC) * factor
    tl.store(of_image + HEADS + place, dl.to(maps.dtype.element_ty), mask=real)
    return dl


@triton.jit
def _store_sums(
    total, n, heads, s, real, b, logits, lse, delta, grad_lse, grad_logits, scale, maps, height, width,
    HEADS: tl.constexpr, OF_IMAGE: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What becomes of Σ_τ rows[tap τ] · Z_{s+τ}, [K_tile, S_tile], where s is real. Forward: rows W_H, it is the
    logits. Backward (OF_IMAGE): rows dP of each image, it is dA; a and dℓ = a ⊙ (dA - δ + dlse) + direct, times scale,
    go into maps [N, H+2, W+2, 2K]. dP and δ, whose parts lie in delta [N, PARTS, K], come scaled; where the tile has
    the whole image, δ = Σ_s a dA and delta is None."""
    positions = height * width
    of_head = heads < HEADS
    real = of_head[:, None] & real[None, :]
    row = n * HEADS + heads
    at = row[:, None] * positions + s[None, :]
    if OF_IMAGE:
        factor = 1.0
        if scale is not None:
            factor = tl.load(scale + n)
        log_sum = tl.load(lse + row, mask=of_head, other=0.0)
        a = tl.exp(tl.load(logits + at, mask=real, other=float("-inf")) - log_sum[:, None])
        if delta is None:
            shift = tl.sum(tl.where(real, a * total, 0.0), axis=1)
            if grad_lse is not None:
                shift -= tl.load(grad_lse + row, mask=of_head, other=0.0).to(ACC) * factor
        else:
            shift = _image_shift(delta, grad_lse, n, heads, factor, HEADS, PARTS, ACC)
        _store_maps(total, a, shift, n, heads, s, real, grad_logits, factor, maps, height, width, HEADS, ACC)
    else:
        if b is not None:
            total += tl.load(b + heads, mask=of_head, other=0.0).to(ACC)[:, None]
        tl.store(logits + at, total, mask=real)


@triton.jit
def _store_frame(maps, n, heads, top, bottom, height, width, HEADS: tl.constexpr, S_TILE: tl.constexpr):
    """Zeros around an image's maps: the share of lines top..bottom."""
    frame = (height + 2) * (width + 2)
    begin = tl.where(top == 0, 0, (top + 1) * (width + 2))
    end = tl.where(bottom == height, frame, (bottom + 1) * (width + 2))
    for start in range(begin, end, S_TILE):
        at = start + tl.arange(0, S_TILE)
        y, x = at // (width + 2), at % (width + 2)
        of_frame = ((y == 0) | (y == height + 1) | (x == 0) | (x == width + 1)) & (at < end)
        at = maps + n * frame * (2 * HEADS) + heads[:, None] + (at * (2 * HEADS))[None, :]
        zeros = tl.zeros([heads.shape[0], S_TILE], maps.dtype.element_ty)
        real = (heads < HEADS)[:, None] & of_frame[None, :]
        tl.store(at, zeros, mask=real)
        tl.store(at + HEADS, zeros, mask=real)


@triton.jit(do_not_specialize=["items", "bands", "lines", "pitch"])
def tap_sums_kernel(
    z, weights, b, logits, lse, delta, grad_lse, grad_logits, scale, maps, scratch,
    items, bands, lines, pitch, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, OF_IMAGE: tl.constexpr,
    R_TILE: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr, K_TILE: tl.constexpr, PARTS: tl.constexpr,
    UNROLL: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over taps of the `lines` lines of a band, for _store_sums. One program: one band after the other."""
    positions = height * width
    rows = tl.arange(0, R_TILE)
    heads = tl.arange(0, K_TILE)
    pitch = aligned(pitch, 16)
    own = scratch + tl.program_id(0).to(tl.int64) * (9 * HEADS * pitch)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        n = (item // bands).to(tl.int64)
        line = item % bands * lines
        begin = line * width
        end = tl.minimum(line + lines, height) * width
        first = aligned(tl.maximum(begin - width, 0), 16)
        last = aligned(tl.minimum((end + width + 15) // 16 * 16, positions), VECTOR if UNIT == "s" else 1)
        w_n = weights
        if OF_IMAGE:
            w_n += n * (9 * HEADS * C)
        CHUNKS: tl.constexpr = (C + C_TILE - 1) // C_TILE
        products = tl.zeros([R_TILE, S_TILE], ACC)
        for step in range(0, tl.cdiv(last - first, S_TILE) * CHUNKS):  # one loop: loads run ahead over a tile's end
            of_scratch = step // CHUNKS * S_TILE + tl.arange(0, S_TILE)
            s = first + of_scratch
            c = step % CHUNKS * C_TILE + tl.arange(0, C_TILE)
            z_tile = load_tile(z + n * VECTOR * z_n, s, last, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            w_tile = _tap_rows(w_n, rows, c, C, 9 * HEADS)
            products = tl.dot(w_tile, tl.trans(z_tile), products, input_precision=PRECISION, out_dtype=ACC)
            if step % CHUNKS == CHUNKS - 1:
                # Past the last position are zeros: as many as there is room for go along, in whole vectors.
                real = (rows < 9 * HEADS)[:, None] & (of_scratch < pitch)[None, :]
                tl.store(own + rows[:, None] * pitch + of_scratch[None, :], products, mask=real)
                products = tl.zeros([R_TILE, S_TILE], ACC)
        tl.debug_barrier()  # the other threads' rows are read below
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            y, x = s // width, s % width
            total = tl.zeros([K_TILE, S_TILE], ACC)
            if UNROLL:  # the loads wait together
                for tap in tl.static_range(9):
                    total += _tap_row(own, tap, heads, s, y, x, first, end, pitch, height, width, HEADS)
            else:
                for tap in range(9):
                    total += _tap_row(own, tap, heads, s, y, x, first, end, pitch, height, width, HEADS)
            _store_sums(
                total, n, heads, s, s < end, b, logits, lse, delta, grad_lse, grad_logits, scale, maps, height, width,
                HEADS, OF_IMAGE, PARTS, ACC,
            )  # fmt: skip
        if OF_IMAGE:
            _store_frame(maps, n, heads, line, tl.minimum(line + lines, height), height, width, HEADS, S_TILE)
        tl.debug_barrier()  # before the next item's rows take their place


@triton.jit
def _line_rows(
    weights, line, channels, C: tl.constexpr, HEADS: tl.constexpr, R_TILE: tl.constexpr, K_TILE: tl.constexpr
):
    """The three taps of one line, row column·K_tile + head: [R_tile, C_tile], 0 outside."""
    rows = tl.arange(0, R_TILE)
    column, head = rows // K_TILE, rows % K_TILE
    real = ((column < 3) & (head < HEADS))[:, None] & (channels < C)[None, :]
    at = ((line * 3 + column) * HEADS + head) * C
    return tl.load(weights + at[:, None] + channels[None, :], mask=real, other=0.0)


@triton.jit
def _load_line(
    z, y, there, x, channels, width, z_c, z_h, z_w,
    C: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Line y of an image [S_tile, C_tile], 0 where it is not there. Where it begins is one number: what the positions
    and channels add to it stays the same from line to line, and is made once."""
    z += position_offsets(y * width, width, z_h, z_w, UNIT, VECTOR, FLAT, WIDE)
    end = tl.where(there, width, 0)
    return load_tile(z, x, end, channels, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)


@triton.jit(do_not_specialize=["all_lines", "lines", "height"])
def line_sums_kernel(
    z, weights, b, logits, lse, delta, grad_lse, grad_logits, scale, maps,
    all_lines, lines, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, OF_IMAGE: tl.constexpr,
    R_TILE: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr, K_TILE: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As tap_sums_kernel, of maps whose lines are tiles: no scratch. A line of Z adds to the sums of three lines, where
    its position is theirs; what is left is a shift by one position, of a few numbers. One program: the `lines` lines
    that follow each other, of one image or several."""
    CHUNKS: tl.constexpr = (C + C_TILE - 1) // C_TILE
    heads = tl.arange(0, K_TILE)
    x = tl.arange(0, S_TILE)
    beside = x[:, None] + (tl.arange(0, R_TILE) // K_TILE)[None, :] - 1
    inside = (beside >= 0) & (beside < width)
    beside = tl.minimum(tl.maximum(beside, 0), S_TILE - 1)
    line = tl.program_id(0) * lines
    stop = tl.minimum(line + lines, all_lines)
    while line < stop:
        n = (line // height).to(tl.int64)
        top = line % height
        bottom = tl.minimum(height, top + stop - line)
        z_image = z + n * VECTOR * z_n
        w_n = weights
        if OF_IMAGE:
            w_n += n * (9 * HEADS * C)
        of_last = tl.zeros([S_TILE, R_TILE], ACC)  # the line before y, which y completes
        of_this = tl.zeros([S_TILE, R_TILE], ACC)
        of_next = tl.zeros([S_TILE, R_TILE], ACC)
        for step in range(0, (bottom - top + 2) * CHUNKS):  # one loop: loads run ahead over a line's end
            y = top - 1 + step // CHUNKS
            c = step % CHUNKS * C_TILE + tl.arange(0, C_TILE)
            there = (y >= 0) & (y < height)
            z_tile = _load_line(z_image, y, there, x, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            w_tile = _line_rows(w_n, 2, c, C, HEADS, R_TILE, K_TILE)
            of_last = tl.dot(z_tile, tl.trans(w_tile), of_last, input_precision=PRECISION, out_dtype=ACC)
            w_tile = _line_rows(w_n, 1, c, C, HEADS, R_TILE, K_TILE)
            of_this = tl.dot(z_tile, tl.trans(w_tile), of_this, input_precision=PRECISION, out_dtype=ACC)
            w_tile = _line_rows(w_n, 0, c, C, HEADS, R_TILE, K_TILE)
            of_next = tl.dot(z_tile, tl.trans(w_tile), of_next, input_precision=PRECISION, out_dtype=ACC)
            if step % CHUNKS == CHUNKS - 1:
                shifted = tl.where(inside, tl.gather(of_last, beside, 0), 0.0)
                total = tl.sum(tl.reshape(shifted, [S_TILE, R_TILE // K_TILE, K_TILE]), axis=1)
                _store_sums(
                    tl.trans(total), n, heads, (y - 1) * width + x, (x < width) & (y > top), b, logits, lse, delta,
                    grad_lse, grad_logits, scale, maps, height, width, HEADS, OF_IMAGE, PARTS, ACC,
                )  # fmt: skip
                of_last = of_this
                of_this = of_next
                of_next = tl.zeros([S_TILE, R_TILE], ACC)
        if OF_IMAGE:
            _store_frame(maps, n, heads, top, bottom, height, width, HEADS, S_TILE)
        line += bottom - top


@triton.jit
def _load_logits(logits, n, heads, s, real, positions, HEADS: tl.constexpr):
    """[S_tile, K_tile], -∞ outside."""
    at = logits + (n * HEADS + heads)[None, :] * positions + s[:, None]
    return tl.load(at, mask=real[:, None] & (heads < HEADS)[None, :], other=float("-inf"))


@triton.jit
def masks_kernel(
    logits, lse, masks, height, width,
    HEADS: tl.constexpr, K_TILE: tl.constexpr, S_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one image. lse, and the masks exp(ℓ - lse) in Z's dtype, framed by zeros: [N, H+2, W+2, K]."""
    positions = height * width
    n = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, K_TILE)
    m = tl.full([S_TILE, K_TILE], float("-inf"), ACC)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        m = tl.maximum(m, _load_logits(logits, n, heads, s, s < positions, positions, HEADS))
    first = origin(tl.max(m, axis=0))
    d = tl.zeros([S_TILE, K_TILE], ACC)
    for start in range(0, positions, S_TILE):
        s = start + tl.arange(0, S_TILE)
        d += tl.exp(_load_logits(logits, n, heads, s, s < positions, positions, HEADS) - first[None, :])
    log_sum = first + tl.log(tl.sum(d, axis=0))
    tl.store(lse + n * HEADS + heads, log_sum, mask=heads < HEADS)
    log_sum = finite(log_sum)
    frame = (height + 2) * (width + 2)
    for start in range(0, frame, S_TILE):
        at = start + tl.arange(0, S_TILE)
        y, x = at // (width + 2) - 1, at % (width + 2) - 1
        real = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        a = tl.exp(_load_logits(logits, n, heads, y * width + x, real, positions, HEADS) - log_sum[None, :])
        a = tl.where(real[:, None], a, 0.0)  # a NaN stays inside
        target = masks + (n * frame + at)[:, None] * HEADS + heads[None, :]
        tl.store(target, a.to(masks.dtype.element_ty), mask=(at < frame)[:, None] & (heads < HEADS)[None, :])


@triton.jit
def _pool_tile(
    sums, z, masks, n, s, end, c, mean, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile's share of P, and of the mean's sums, to sums [R_tile, C_tile]."""
    rows = tl.arange(0, sums.shape[0])
    z_tile = load_tile(z + n * VECTOR * z_n, s, end, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
    a = _shifted(masks + n * HEADS * ((height + 2) * (width + 2)), rows, s, height, width, HEADS, HEADS)
    if mean is not None:
        a = tl.where((rows == sums.shape[0] - 1)[:, None], 1.0, a).to(masks.dtype.element_ty)  # past the end Z is 0
    return tl.dot(a, z_tile, sums, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _store_pooled(
    sums, score_w, pooled, mean, parts, row, part, c, positions,
    C: tl.constexpr, HEADS: tl.constexpr, K_TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, sums.shape[0])
    real = (rows < 9 * HEADS)[:, None] & (c < C)[None, :]
    tl.store(pooled + (row * (9 * HEADS) + rows[:, None]) * C + c[None, :], sums, mask=real)
    if parts is not None:
        heads = tl.arange(0, K_TILE)
        weights = _tap_rows(score_w, rows, c, C, 9 * HEADS).to(ACC)
        of_rows = tl.sum(tl.where((rows < 9 * HEADS)[:, None], weights * sums, 0.0), axis=1)
        t = tl.sum(tl.where((rows % HEADS)[:, None] == heads[None, :], of_rows[:, None], 0.0), axis=0)
        tl.store(parts + part * K_TILE + heads, t)
    if mean is not None:
        average = tl.sum(tl.where((rows == sums.shape[0] - 1)[:, None], sums, 0.0), axis=0) / positions
        tl.store(mean + row * C + c, average, mask=c < C)


@triton.jit(do_not_specialize=["images", "splits", "split_length"])
def pool_kernel(
    z, masks, score_w, pooled, mean, parts, images, splits, split_length, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr,
    K_TILE: tl.constexpr, IN_TURN: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one split of one image. P of all taps [splits, N, 9, K, C], the mean's sums
    [splits, N, C], whose row of ones is the last of the tile, and its share of W_G[k]·P_k, parts [N, ..., K_tile].
    IN_TURN: of one image after the other, each of them a tile, so that loads run ahead over an image's end."""
    positions = height * width
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    if IN_TURN:
        s = tl.arange(0, S_TILE)
        end = aligned(positions, VECTOR if UNIT == "s" else 1)
        for item in range(tl.program_id(0), images, tl.num_programs(0)):
            n = (item // splits).to(tl.int64)
            sums = _pool_tile(
                tl.zeros([R_TILE, C_TILE], ACC), z, masks, n, s, end, c, mean, height, width, z_n, z_c, z_h, z_w,
                C, HEADS, UNIT, VECTOR, FLAT, WIDE, ACC, PRECISION,
            )  # fmt: skip
            part = n * tl.num_programs(1) + tl.program_id(1)
            _store_pooled(sums, score_w, pooled, mean, parts, n, part, c, positions, C, HEADS, K_TILE, ACC)
    else:
        split, n = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
        begin = aligned(split * split_length, S_TILE)
        end = aligned(tl.minimum(begin + split_length, positions), VECTOR if UNIT == "s" else 1)
        sums = tl.zeros([R_TILE, C_TILE], ACC)
        for start in range(begin, end, S_TILE):
            sums = _pool_tile(
                sums, z, masks, n, start + tl.arange(0, S_TILE), end, c, mean, height, width, z_n, z_c, z_h, z_w,
                C, HEADS, UNIT, VECTOR, FLAT, WIDE, ACC, PRECISION,
            )  # fmt: skip
        row = split.to(tl.int64) * images + n
        part = (n * splits + split) * tl.num_programs(1) + tl.program_id(1)
        _store_pooled(sums, score_w, pooled, mean, parts, row, part, c, positions, C, HEADS, K_TILE, ACC)


@triton.jit
def _of_head(rows, n, k, c, C: tl.constexpr, HEADS: tl.constexpr):
    """[N, 9, K, C]: image n, head k → [16 taps, C_tile], 0 outside."""
    taps = tl.arange(0, 16)
    real = (taps < 9)[:, None] & (c < C)[None, :]
    return tl.load(rows + ((n * 9 + taps[:, None]) * HEADS + k) * C + c[None, :], mask=real, other=0.0)


@triton.jit
def _taps_last(first, C: tl.constexpr, C_TILE: tl.constexpr):
    """Where the values of channels first + [0, C_tile) lie, taps last, from the first channel's on: offsets, those that
    exist. In whole vectors: one of 64 channels is nine vectors of 64 values, but no power of two."""
    flat = tl.arange(0, 16 * C_TILE)
    UNIT: tl.constexpr = 8 if C % 8 == 0 else 1
    return flat, flat < aligned(tl.minimum(C - first, C_TILE) * 9, UNIT)


@triton.jit
def _load_features(
    features, n, k, first, C: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, TAPS_FIRST: tl.constexpr
):
    """[N, K', C, 9], or [N, K', 9, C]: image n, head k → [16 taps, C_tile], 0 outside and where k is no gated head."""
    if TAPS_FIRST:
        taps, c = tl.arange(0, 16), first + tl.arange(0, C_TILE)
        real = ((taps < 9) & (k < GATED))[:, None] & (c < C)[None, :]
        tile = tl.load(features + ((n * GATED + k) * 9 + taps[:, None]) * C + c[None, :], mask=real, other=0.0)
    else:
        flat, real = _taps_last(first, C, C_TILE)
        values = tl.load(features + ((n * GATED + k) * C + first) * 9 + flat, mask=real & (k < GATED), other=0.0)
        tap, c = flat // C_TILE, flat % C_TILE
        values = tl.where(tap < 9, tl.gather(values, c * 9 + tl.minimum(tap, 8), 0), 0.0)
        tile = tl.reshape(values, [16, C_TILE])
    return tile


@triton.jit
def _store_features(
    features, tile, n, k, first, C: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, TAPS_FIRST: tl.constexpr
):
    """The inverse of _load_features."""
    tile = tile.to(features.dtype.element_ty)
    if TAPS_FIRST:
        taps, c = tl.arange(0, 16), first + tl.arange(0, C_TILE)
        real = (taps < 9)[:, None] & (c < C)[None, :]
        tl.store(features + ((n * GATED + k) * 9 + taps[:, None]) * C + c[None, :], tile, mask=real)
    else:
        flat, real = _taps_last(first, C, C_TILE)
        values = tl.gather(tl.reshape(tile, [16 * C_TILE]), flat % 9 * C_TILE + tl.minimum(flat // 9, C_TILE - 1), 0)
        tl.store(features + ((n * GATED + k) * C + first) * 9 + flat, values, mask=real)


@triton.jit
def taps_first_kernel(features, turned, C: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr):
    """[N, K', C, 9] → [N, K', 9, C]. One program: some channels of one head of one image."""
    n, first, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * C_TILE, tl.program_id(2)
    tile = _load_features(features, n, k, first, C, GATED, C_TILE, False)
    _store_features(turned, tile, n, k, first, C, GATED, C_TILE, True)


@triton.jit
def _one_number(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def _most(tile):
    return tl.max(tl.max(tl.abs(tile), axis=1), axis=0)


@triton.jit
def gate_kernel(
    pooled, score_b, parts, scores, gates, features,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, K_TILE: tl.constexpr,
    PARTS: tl.constexpr, PARTS_TILE: tl.constexpr, TAPS_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one head of one image. t_k = W_G[k]·P_k + b_G[k] of its parts, g = softmax(tanh(t))
    and g ⊙ P. What is of an image every program of it stores, the same."""
    n, first, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * C_TILE, tl.program_id(2)
    heads = tl.arange(0, K_TILE)
    t = tl.zeros([K_TILE], ACC)
    if parts is not None:
        part = tl.arange(0, PARTS_TILE)[:, None]
        at = parts + (n * PARTS + part) * K_TILE + heads[None, :]
        t += tl.sum(tl.load(at, mask=part < PARTS, other=0.0), axis=0)
    g = store_gates(t, n, heads, None, score_b, scores, gates, HEADS, GATED)
    p = _of_head(pooled, n, k, first + tl.arange(0, C_TILE), C, HEADS)
    x = p * tl.sum(tl.where(heads == k, g, 0.0), axis=0)
    _store_features(features, x, n, k, first, C, GATED, C_TILE, TAPS_FIRST)


@triton.jit
def gradient_sums_kernel(
    pooled, score_w, grad_features, grad_pooled, parts,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, TAPS_FIRST: tl.constexpr,
    MOST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one head of one image. parts [N, 4, chunks, K]: dx·P and, if MOST, the largest of
    dx, W_G and the direct gradient."""
    n, chunk, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first = chunk * C_TILE
    c = first + tl.arange(0, C_TILE)
    chunks = tl.num_programs(1)
    at = parts + (n * (4 * chunks) + chunk) * HEADS + k
    if grad_features is not None:
        dx = _load_features(grad_features, n, k, first, C, GATED, C_TILE, TAPS_FIRST).to(ACC)
        tl.store(at, _one_number(dx * _of_head(pooled, n, k, c, C, HEADS)))
        if MOST:
            tl.store(at + chunks * HEADS, _most(dx))
    if MOST and score_w is not None:
        tl.store(at + 2 * chunks * HEADS, _most(_of_head(score_w, 0, k, c, C, HEADS).to(ACC)))
    if MOST and grad_pooled is not None:
        tl.store(at + 3 * chunks * HEADS, _most(_of_head(grad_pooled, n, k, c, C, HEADS).to(ACC)))


@triton.jit
def _of_chunks(parts, n, which, heads, HEADS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_TILE: tl.constexpr):
    """One of gradient_sums_kernel's four numbers: [chunk_tile, K_tile], 0 outside."""
    chunks = tl.arange(0, CHUNK_TILE)[:, None]
    real = (chunks < CHUNKS) & (heads < HEADS)[None, :]
    return tl.load(parts + ((n * 4 + which) * CHUNKS + chunks) * HEADS + heads[None, :], mask=real, other=0.0)


@triton.jit
def _score_gradient(
    of_features, scores, gates, grad_gates, grad_scores, n, heads,
    HEADS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g and dt of an image, [K_tile], where of_features is dx·P; 0 for heads that are not gated."""
    g = tl.zeros([heads.shape[0]], ACC)
    d = tl.zeros([heads.shape[0]], ACC)
    if grad_scores is not None:
        d += tl.load(grad_scores + n * HEADS + heads, mask=heads < HEADS, other=0.0).to(ACC)
    if gates is not None:
        g += tl.load(gates + n * GATED + heads, mask=heads < GATED, other=0.0)
        dg = of_features
        if grad_gates is not None:
            dg += tl.load(grad_gates + n * GATED + heads, mask=heads < GATED, other=0.0).to(ACC)
        hyperbolic = tanh(tl.load(scores + n * HEADS + heads, mask=heads < HEADS, other=0.0))
        d += g * (dg - tl.sum(g * dg, axis=0)) * (1.0 - hyperbolic * hyperbolic)
    return g, d


@triton.jit
def gate_gradient_kernel(
    pooled, score_w, scores, gates, grad_features, grad_gates, grad_scores, grad_pooled, parts, largest_direct,
    dp, delta, dt, scale, unscale,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, K_TILE: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK_TILE: tl.constexpr, TAPS_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one head of one image. dt, dP_k = g_k dx_k + dt_k W_G[k] + direct and, unless the
    sums over taps make it, a part of δ_k = dP_k·P_k, delta [N, chunks, K]. scale: of a float16 image a power of two for
    dP, δ and dℓ: gradients of a mean loss are below what float16 holds; largest_direct [N]: the largest direct |dℓ| and
    |dlse|, which take it too. What is of an image every program of it stores, the same."""
    n, first, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * C_TILE, tl.program_id(2)
    heads = tl.arange(0, K_TILE)
    c = first + tl.arange(0, C_TILE)
    of_features = tl.zeros([K_TILE], ACC)
    if grad_features is not None:
        of_features += tl.sum(_of_chunks(parts, n, 0, heads, HEADS, CHUNKS, CHUNK_TILE), axis=0)
    g, d = _score_gradient(of_features, scores, gates, grad_gates, grad_scores, n, heads, HEADS, GATED, ACC)
    if dt is not None:
        tl.store(dt + n * HEADS + heads, d, mask=heads < HEADS)
    factor = 1.0
    if scale is not None:
        bound = tl.zeros([K_TILE], ACC)
        if grad_features is not None:
            bound += tl.abs(g) * tl.max(_of_chunks(parts, n, 1, heads, HEADS, CHUNKS, CHUNK_TILE), axis=0)
        if score_w is not None:
            bound += tl.abs(d) * tl.max(_of_chunks(parts, n, 2, heads, HEADS, CHUNKS, CHUNK_TILE), axis=0)
        if grad_pooled is not None:
            bound += tl.max(_of_chunks(parts, n, 3, heads, HEADS, CHUNKS, CHUNK_TILE), axis=0)
        most = tl.max(bound, axis=0)
        if largest_direct is not None:
            most = tl.maximum(most, tl.load(largest_direct + n))
        exponent = tl.floor(tl.log2(tl.minimum(tl.maximum(most, 1e-30), 1e30)))
        factor = tl.exp2(-exponent)
        tl.store(scale + n, factor)
        tl.store(unscale + n, tl.exp2(exponent))
    grad = tl.zeros([16, C_TILE], ACC)
    if grad_features is not None:
        dx = _load_features(grad_features, n, k, first, C, GATED, C_TILE, TAPS_FIRST).to(ACC)
        grad += dx * tl.sum(tl.where(heads == k, g, 0.0), axis=0)
    if score_w is not None:
        grad += _of_head(score_w, 0, k, c, C, HEADS).to(ACC) * tl.sum(tl.where(heads == k, d, 0.0), axis=0)
    if grad_pooled is not None:
        grad += _of_head(grad_pooled, n, k, c, C, HEADS).to(ACC)
    taps = tl.arange(0, 16)[:, None]
    rows = dp + ((n * 9 + taps) * HEADS + k) * C + c[None, :]
    rounded = (grad * factor).to(dp.dtype.element_ty)
    tl.store(rows, rounded, mask=(taps < 9) & (c < C)[None, :])
    if delta is not None:
        # Of dP as it was rounded, so that Σ_s dℓ stays 0 however much of dA all positions share.
        part = _one_number(rounded.to(ACC) * _of_head(pooled, n, k, c, C, HEADS))
        tl.store(delta + (n * CHUNKS + tl.program_id(1)) * HEADS + k, part)


@triton.jit
def _sum_taps(products, s, height, width, HEADS: tl.constexpr):
    """Products of rows k·16 + tap with an image that is a tile, each where it belongs: [K, S_tile]."""
    tap = tl.arange(0, 16 * HEADS) % 16
    y, x = (s // width)[None, :] + (tap // 3 - 1)[:, None], (s % width)[None, :] + (tap % 3 - 1)[:, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (tap < 9)[:, None]
    beside = tl.minimum(tl.maximum(y * width + x, 0), products.shape[1] - 1)
    shifted = tl.where(inside, tl.gather(products, beside, 1), 0.0)
    return tl.sum(tl.reshape(shifted, [HEADS, 16, products.shape[1]]), axis=1)


@triton.jit(do_not_specialize=["images"])
def gated_sums_kernel(
    z, score_w, grad_features, logits, lse, scores, gates, grad_gates, grad_scores, grad_lse, grad_logits, dt, maps,
    images, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient_sums_kernel, gate_gradient_kernel and tap_sums_kernel in one, of images that are tiles and reach the
    loss by gates and gated features alone, whose gradient dx is [N, K', 9, C]: with X = Σ_τ dx_τ·Z_{s+τ} and
    Y = Σ_τ W_Gτ·Z_{s+τ}, dA is g X + dt Y and dx·P is Σ_s a X. P is not read, and dP not made. One program: one image
    after the other."""
    heads = tl.arange(0, HEADS)
    k, tap = tl.arange(0, 16 * HEADS) // 16, tl.arange(0, 16 * HEADS) % 16
    s = tl.arange(0, S_TILE)
    positions = height * width
    end = aligned(positions, VECTOR if UNIT == "s" else 1)
    real = tl.broadcast_to((s < positions)[None, :], [HEADS, S_TILE])
    for image in range(tl.program_id(0), images, tl.num_programs(0)):
        n = tl.cast(image, tl.int64)
        of_features = tl.zeros([16 * HEADS, S_TILE], ACC)
        of_scores = tl.zeros([16 * HEADS, S_TILE], ACC)
        for first in range(0, C, C_TILE):
            c = first + tl.arange(0, C_TILE)
            z_tile = load_tile(z + n * VECTOR * z_n, s, end, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            z_tile = tl.trans(z_tile)
            at = grad_features + n * (GATED * 9 * C) + ((k * 9 + tap) * C)[:, None] + c[None, :]
            dx = tl.load(at, mask=((k < GATED) & (tap < 9))[:, None] & (c < C)[None, :], other=0.0)
            of_features = tl.dot(dx, z_tile, of_features, input_precision=PRECISION, out_dtype=ACC)
            at = score_w + ((tap * HEADS + k) * C)[:, None] + c[None, :]
            w_tile = tl.load(at, mask=(tap < 9)[:, None] & (c < C)[None, :], other=0.0)
            w_tile = w_tile.to(z.dtype.element_ty)
            of_scores = tl.dot(w_tile, z_tile, of_scores, input_precision=PRECISION, out_dtype=ACC)
        x = _sum_taps(of_features, s, height, width, HEADS)
        y = _sum_taps(of_scores, s, height, width, HEADS)
        row = n * HEADS + heads
        log_sum = tl.load(lse + row)
        at = row[:, None] * positions + s[None, :]
        a = tl.exp(tl.load(logits + at, mask=real, other=float("-inf")) - log_sum[:, None])
        of_head = tl.sum(tl.where(real, a * x, 0.0), axis=1)
        g, d = _score_gradient(of_head, scores, gates, grad_gates, grad_scores, n, heads, HEADS, GATED, ACC)
        tl.store(dt + row, d)
        shift = g * of_head + d * tl.sum(tl.where(real, a * y, 0.0), axis=1)
        if grad_lse is not None:
            shift -= tl.load(grad_lse + row).to(ACC)
        total = g[:, None] * x + d[:, None] * y
        _store_maps(total, a, shift, n, heads, s, real, grad_logits, 1.0, maps, height, width, HEADS, ACC)
        _store_frame(maps, n, heads, 0, height, height, width, HEADS, S_TILE)


@triton.jit
def _gradient_rows(
    w, dp, score_w, grad_features, gates, dt, n, rows, channels,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Row tap·2K + j, as maps have it: dP of head j, or W_H of head j - K. [R_tile, C_tile], 0 past tap LAST. Where dP
    was not made it is made here, g dx + dt W_G."""
    tap, j = rows // (2 * HEADS), rows % (2 * HEADS)
    real = (tap <= LAST)[:, None] & (channels < C)[None, :]
    of_pooled = (j < HEADS)[:, None]
    at = ((tap * HEADS + j % HEADS) * C)[:, None] + channels[None, :]
    if dp is not None:
        pooled = tl.load(dp + n * (9 * HEADS * C) + at, mask=real & of_pooled, other=0.0)
    else:
        g = tl.load(gates + n * GATED + j, mask=j < GATED, other=0.0)
        d = tl.load(dt + n * HEADS + j, mask=j < HEADS, other=0.0)
        of_features = grad_features + n * (GATED * 9 * C) + ((j * 9 + tap) * C)[:, None] + channels[None, :]
        dx = tl.load(of_features, mask=real & (j < GATED)[:, None], other=0.0)
        of_scores = tl.load(score_w + at, mask=real & of_pooled, other=0.0)
        pooled = (g[:, None] * dx + d[:, None] * of_scores).to(w.dtype.element_ty)
    return pooled + tl.load(w + at, mask=real & ~of_pooled, other=0.0)


@triton.jit(do_not_specialize=["items", "splits", "split_length"])
def map_gradient_kernel(
    w, dp, score_w, grad_features, gates, dt, maps, unscale, grad_mean, upstream, dz,
    items, splits, split_length, height, width, up_n, up_c, up_h, up_w, dz_n, dz_c, dz_w,
    C: tl.constexpr, HEADS: tl.constexpr, GATED: tl.constexpr, R_TILE: tl.constexpr, LAST_TILE: tl.constexpr,
    C_TILE: tl.constexpr, S_TILE: tl.constexpr, UP_UNIT: tl.constexpr, UP_VECTOR: tl.constexpr, UP_FLAT: tl.constexpr,
    DZ_UNIT: tl.constexpr, DZ_VECTOR: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ_s = Σ_k Σ_τ (a_{k,s-τ} dP_kτ + dℓ_{k,s-τ} W_kτ) + upstream + dmean/S. One program: some channels of some
    splits of images, one after the other. Two products: 2K rows of eight taps can be a power of two, of nine never."""
    positions = height * width
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    rows = tl.arange(0, R_TILE)
    last_rows = 16 * HEADS + tl.arange(0, LAST_TILE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        n = (item // splits).to(tl.int64)
        begin = aligned(item % splits * split_length, S_TILE)
        end = aligned(tl.minimum(begin + split_length, positions), DZ_VECTOR if DZ_UNIT == "s" else 1)
        weights = _gradient_rows(w, dp, score_w, grad_features, gates, dt, n, rows, c, C, HEADS, GATED, 7)
        last_weights = _gradient_rows(w, dp, score_w, grad_features, gates, dt, n, last_rows, c, C, HEADS, GATED, 8)
        of_image = maps + n * ((height + 2) * (width + 2) * (2 * HEADS))
        for start in range(begin, end, S_TILE):
            s = start + tl.arange(0, S_TILE)
            both = _shifted(of_image, rows, s, height, width, 2 * HEADS, 2 * HEADS)
            last = _shifted(of_image, last_rows, s, height, width, 2 * HEADS, 2 * HEADS)
            grad = tl.dot(tl.trans(both), weights, input_precision=PRECISION, out_dtype=ACC)
            grad = tl.dot(tl.trans(last), last_weights, grad, input_precision=PRECISION, out_dtype=ACC)
            if unscale is not None:
                grad *= tl.load(unscale + n)
            if grad_mean is not None:
                of_mean = tl.load(grad_mean + n * C + c, mask=c < C, other=0.0).to(ACC) / positions
                grad += of_mean[None, :]
            if upstream is not None:
                up = upstream + n * UP_VECTOR * up_n
                grad += load_tile(up, s, end, c, width, up_c, up_h, up_w, C, UP_UNIT, UP_VECTOR, UP_FLAT, WIDE).to(ACC)
            offsets = tile_offsets(s, c, width, dz_c, 0, dz_w, DZ_UNIT, DZ_VECTOR, True, WIDE)
            real = (s < end)[:, None] & (c < C)[None, :]
            tl.store(dz + n * DZ_VECTOR * dz_n + offsets, grad.to(dz.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["items", "splits", "split_length"])
def mask_weight_gradient_kernel(
    z, maps, unscale, dt, shares,
    items, splits, split_length, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares [programs, 9, K, C] of dW_H = Σ_n Σ_s dℓ_{k,s-τ} Z_s. One program: some channels of some splits of images,
    one after the other. With dt, of images that are one tile: shares [programs, 18, K, C], the second half of
    dW_G = Σ_n Σ_s dt_k a_{k,s-τ} Z_s, which then needs no P."""
    positions = height * width
    rows = tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    share = tl.zeros([R_TILE, C_TILE], ACC)
    own = shares + tl.program_id(0).to(tl.int64) * ((9 if dt is None else 18) * HEADS * C)
    if dt is None:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            n = (item // splits).to(tl.int64)
            begin = aligned(item % splits * split_length, S_TILE)
            end = aligned(tl.minimum(begin + split_length, positions), VECTOR if UNIT == "s" else 1)
            dl = maps + n * ((height + 2) * (width + 2) * (2 * HEADS)) + HEADS
            for start in range(begin, end, S_TILE):
                s = start + tl.arange(0, S_TILE)
                z_tile = load_tile(z + n * VECTOR * z_n, s, end, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
                dl_rows = _shifted(dl, rows, s, height, width, HEADS, 2 * HEADS)
                if unscale is None:
                    share = tl.dot(dl_rows, z_tile, share, input_precision=PRECISION, out_dtype=ACC)
                else:  # images have scales of their own
                    share += tl.dot(dl_rows, z_tile, out_dtype=ACC) * tl.load(unscale + n)
        tl.store(own + rows[:, None] * C + c[None, :], share, mask=(rows < 9 * HEADS)[:, None] & (c < C)[None, :])
    else:
        tap, j = rows // (2 * HEADS), rows % (2 * HEADS)  # a of all heads, then dℓ
        s = tl.arange(0, S_TILE)
        end = aligned(positions, VECTOR if UNIT == "s" else 1)
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            n = (item // splits).to(tl.int64)
            of_image = maps + n * ((height + 2) * (width + 2) * (2 * HEADS))
            z_tile = load_tile(z + n * VECTOR * z_n, s, end, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            both = _shifted(of_image, rows, s, height, width, 2 * HEADS, 2 * HEADS)
            factor = tl.load(dt + n * HEADS + j, mask=j < HEADS, other=1.0)
            both = (both * factor[:, None]).to(maps.dtype.element_ty)
            share = tl.dot(both, z_tile, share, input_precision=PRECISION, out_dtype=ACC)
        at = tl.where(j < HEADS, (9 + tap) * HEADS + j, tap * HEADS + j - HEADS)
        tl.store(own + at[:, None] * C + c[None, :], share, mask=(tap < 9)[:, None] & (c < C)[None, :])


@triton.jit
def _lines_side_by_side(weights, channels, C: tl.constexpr, HEADS: tl.constexpr, K_TILE: tl.constexpr):
    """[9, K, C] → [16·K_tile, C_tile], 0 for the fourth line and column. A row's line stands between the bits of its
    column: there matrix units leave the products of all lines to one thread."""
    rows = tl.arange(0, 16 * K_TILE)
    line, column, head = rows // (2 * K_TILE) % 4, rows // (8 * K_TILE) * 2 + rows // K_TILE % 2, rows % K_TILE
    real = ((line < 3) & (column < 3) & (head < HEADS))[:, None] & (channels < C)[None, :]
    at = ((line * 3 + column) * HEADS + head) * C
    return tl.load(weights + at[:, None] + channels[None, :], mask=real, other=0.0)


@triton.jit
def _split_lines(products, S_TILE: tl.constexpr, K_TILE: tl.constexpr):
    """Products with the rows of _lines_side_by_side: those of each line, [S_tile, 4·K_tile]."""
    by_line = tl.permute(tl.reshape(products, [S_TILE, 2, 4, 2 * K_TILE]), [0, 1, 3, 2])
    even, odd = tl.split(tl.reshape(by_line, [S_TILE, 4 * K_TILE, 2, 2]))
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit
def _sum_columns(sums, S_TILE: tl.constexpr, K_TILE: tl.constexpr, width):
    """A line's sums of three columns and one of zeros [S_tile, 4·K_tile], each where it belongs: [S_tile, K_tile]."""
    beside = tl.arange(0, S_TILE)[:, None] + (tl.arange(0, 4 * K_TILE) // K_TILE)[None, :] - 1
    inside = (beside >= 0) & (beside < width)
    beside = tl.minimum(tl.maximum(beside, 0), S_TILE - 1)
    return tl.sum(tl.reshape(tl.where(inside, tl.gather(sums, beside, 0), 0.0), [S_TILE, 4, K_TILE]), axis=1)


@triton.jit
def _spread_columns(line, S_TILE: tl.constexpr, K_TILE: tl.constexpr, width):
    """A line's numbers [S_tile, K_tile], as the map meets them at each of three columns: [S_tile, 4·K_tile]."""
    column = (tl.arange(0, 4 * K_TILE) // K_TILE)[None, :]
    beside = tl.arange(0, S_TILE)[:, None] + 1 - column
    inside = (beside >= 0) & (beside < width) & (column < 3)
    beside = tl.minimum(tl.maximum(beside, 0), S_TILE - 1)
    columns = tl.reshape(tl.broadcast_to(line[:, None, :], [S_TILE, 4, K_TILE]), [S_TILE, 4 * K_TILE])
    return tl.where(inside, tl.gather(columns, beside, 0), 0.0)


@triton.jit
def _push(four, first, last):
    """The four [..., 2, 2]: first, the old first, the old second, last. In one piece, since Triton does not pipeline a
    loop that hands a value on from one step to the next but one."""
    even, odd = tl.split(four)
    second, _ = tl.split(even)
    third, _ = tl.split(odd)
    return tl.join(tl.join(first, third), tl.join(second, last))


@triton.jit
def _four_of_rows(four, K_TILE: tl.constexpr):
    """[K_tile, 2, 2] → [16·K_tile], the row (column·K_tile + head)·4 + i of the products with four lines."""
    return tl.reshape(tl.broadcast_to(four[None, :, :, :], [4, K_TILE, 2, 2]), [16 * K_TILE])


@triton.jit
def _tap_of_rows(C: tl.constexpr, HEADS: tl.constexpr, K_TILE: tl.constexpr):
    """Where such a row lies in [9, K, C], and whether it does."""
    rows = tl.arange(0, 16 * K_TILE)
    column, head = rows // (4 * K_TILE), rows // 4 % K_TILE
    return ((rows % 4 * 3 + column) * HEADS + head) * C, (rows % 4 < 3) & (column < 3) & (head < HEADS)


@triton.jit(do_not_specialize=["height"])
def line_pool_kernel(
    z, weights, b, score_w, logits, lse, pooled, mean, parts,
    height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr, K_TILE: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """line_sums_kernel, masks_kernel and pool_kernel in one: the map comes from memory once. The products of line y - 1
    complete the logits of line y - 2, the last of three whose masks meet line y - 3: that one comes again, from L2, and
    is pooled beside the products of line y. Both lines are on their way while the masks are made. Masks count from the
    largest logit so far, and the sums of a line of taps from the largest when the masks were made that they had last.
    One program: one image."""
    positions = height * width
    c = tl.arange(0, C_TILE)
    heads = tl.arange(0, K_TILE)
    x = tl.arange(0, S_TILE)
    of_lines = _lines_side_by_side(weights, c, C, HEADS, K_TILE)
    bias = tl.zeros([K_TILE], ACC)
    if b is not None:
        bias += tl.load(b + heads, mask=heads < HEADS, other=0.0).to(ACC)
    of_mean = tl.full([S_TILE, 4 * K_TILE], 0.0 if mean is None else 1.0, ACC).to(z.dtype.element_ty)
    unchanged = tl.full([K_TILE], 1.0, ACC)
    n = tl.program_id(0).to(tl.int64)
    z_image = z + n * VECTOR * z_n
    of_last = tl.zeros([S_TILE, 4 * K_TILE], ACC)  # line y - 2, which the products of line y - 1 complete
    of_this = tl.zeros([S_TILE, 4 * K_TILE], ACC)
    products = tl.zeros([S_TILE, 16 * K_TILE], ACC)
    m = tl.full([K_TILE], float("-inf"), ACC)
    d = tl.zeros([K_TILE, S_TILE], ACC)
    masks = tl.zeros([S_TILE, 4 * K_TILE, 2, 2], z.dtype.element_ty)  # of lines y - 2, y - 3 and y - 4, spread
    factors = tl.full([K_TILE, 2, 2], 1.0, ACC)  # of the sums, when these masks come
    sums = tl.zeros([16 * K_TILE, C_TILE], ACC)
    for y in range(0, height + 3):
        of_next, to_this, to_last = _split_lines(products, S_TILE, K_TILE)
        total = tl.trans(_sum_columns(of_last + to_last, S_TILE, K_TILE, width)) + bias[:, None]
        of_last = of_this + to_this
        of_this = of_next
        real = (heads < HEADS)[:, None] & ((x < width) & (y > 1) & (y < height + 2))[None, :]
        at = (n * HEADS + heads)[:, None] * positions + ((y - 2) * width + x)[None, :]
        tl.store(logits + at, total, mask=real)
        total = tl.where(real, total, float("-inf"))
        most = tl.maximum(m, tl.max(total, axis=1))
        factor = tl.where(m == most, 1.0, tl.exp(m - most))
        m = most
        a = tl.exp(total - origin(m)[:, None])
        d = d * factor[:, None] + a
        masks = _push(masks, _spread_columns(tl.trans(a), S_TILE, K_TILE, width).to(z.dtype.element_ty), of_mean)
        factors = _push(factors, factor, unchanged)
        sums *= _four_of_rows(factors, K_TILE)[:, None]
        mask_rows = tl.trans(tl.reshape(masks, [S_TILE, 16 * K_TILE]))
        z_tile = _load_line(z_image, y, y < height, x, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
        products = tl.dot(z_tile, tl.trans(of_lines), input_precision=PRECISION, out_dtype=ACC)
        z_again = _load_line(z_image, y - 3, y > 2, x, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
        sums = tl.dot(mask_rows, z_again, sums, input_precision=PRECISION, out_dtype=ACC)
    factors = _push(factors, unchanged, unchanged)
    tap, is_tap = _tap_of_rows(C, HEADS, K_TILE)
    rows = tl.arange(0, 16 * K_TILE)
    if mean is not None:
        average = tl.sum(tl.where((rows == 3)[:, None], sums, 0.0), axis=0) / positions
        tl.store(mean + n * C + c, average, mask=c < C)
    total = tl.sum(d, axis=1)
    log_sum = origin(m) + tl.log(total)
    tl.store(lse + n * HEADS + heads, log_sum, mask=heads < HEADS)
    inverse = tl.where(tl.abs(log_sum) == float("inf"), float("nan"), 1.0 / total)  # then there is no softmax
    factors *= inverse[:, None, None]  # the last line of taps has not met the last masks
    sums *= _four_of_rows(factors, K_TILE)[:, None]
    real = is_tap[:, None] & (c < C)[None, :]
    at = tap[:, None] + c[None, :]
    tl.store(pooled + n * (9 * HEADS * C) + at, sums, mask=real)
    if parts is not None:
        of_rows = tl.sum(tl.where(real, tl.load(score_w + at, mask=real, other=0.0).to(ACC) * sums, 0.0), axis=1)
        t = tl.sum(tl.where((rows // 4 % K_TILE)[:, None] == heads[None, :], of_rows[:, None], 0.0), axis=0)
        tl.store(parts + n * K_TILE + heads, t)


@triton.jit(do_not_specialize=["all_lines", "lines", "height"])
def line_gradients_kernel(
    z, dp, logits, lse, delta, grad_lse, grad_logits, maps, shares,
    all_lines, lines, height, width, z_n, z_c, z_h, z_w,
    C: tl.constexpr, HEADS: tl.constexpr, C_TILE: tl.constexpr, S_TILE: tl.constexpr, K_TILE: tl.constexpr,
    PARTS: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """line_sums_kernel of dP and mask_weight_gradient_kernel in one, which reads the map as line_pool_kernel does. One
    program: the `lines` lines of dℓ that follow each other, and their share [9, K, C] of dW_H."""
    c = tl.arange(0, C_TILE)
    heads = tl.arange(0, K_TILE)
    x = tl.arange(0, S_TILE)
    share = tl.zeros([16 * K_TILE, C_TILE], ACC)
    none = tl.zeros([S_TILE, 4 * K_TILE], z.dtype.element_ty)
    line = tl.program_id(0) * lines
    stop = tl.minimum(line + lines, all_lines)
    while line < stop:
        n = (line // height).to(tl.int64)
        top = line % height
        bottom = tl.minimum(height, top + stop - line)
        z_image = z + n * VECTOR * z_n
        of_lines = _lines_side_by_side(dp + n * (9 * HEADS * C), c, C, HEADS, K_TILE)
        log_sum = tl.load(lse + n * HEADS + heads, mask=heads < HEADS, other=0.0)
        shift = _image_shift(delta, grad_lse, n, heads, 1.0, HEADS, PARTS, ACC)
        of_last = tl.zeros([S_TILE, 4 * K_TILE], ACC)  # line y - 2, which the products of line y - 1 complete
        of_this = tl.zeros([S_TILE, 4 * K_TILE], ACC)
        products = tl.zeros([S_TILE, 16 * K_TILE], ACC)
        dl_rows = tl.zeros([S_TILE, 4 * K_TILE, 2, 2], z.dtype.element_ty)  # of lines y - 2, y - 3 and y - 4, spread
        logit = tl.zeros([K_TILE, S_TILE], ACC)
        for y in range(tl.maximum(top - 1, 0), tl.minimum(bottom, height - 1) + 4):
            s = (y - 2) * width + x
            real = (heads < HEADS)[:, None] & ((x < width) & (y > top + 1) & (y < bottom + 2))[None, :]
            of_next, to_this, to_last = _split_lines(products, S_TILE, K_TILE)
            total = tl.trans(_sum_columns(of_last + to_last, S_TILE, K_TILE, width))
            of_last = of_this + to_this
            of_this = of_next
            a = tl.exp(logit - log_sum[:, None])
            dl = _store_maps(total, a, shift, n, heads, s, real, grad_logits, 1.0, maps, height, width, HEADS, ACC)
            dl = _spread_columns(tl.trans(tl.where(real, dl, 0.0)), S_TILE, K_TILE, width)
            dl_rows = _push(dl_rows, dl.to(z.dtype.element_ty), none)
            dl = tl.trans(tl.reshape(dl_rows, [S_TILE, 16 * K_TILE]))
            at = (n * HEADS + heads)[:, None] * (height * width) + (s + width)[None, :]
            real = (heads < HEADS)[:, None] & ((x < width) & (y > top) & (y <= bottom))[None, :]
            logit = tl.load(logits + at, mask=real, other=0.0)  # for the next line
            there = (y < height) & (y <= bottom)
            z_tile = _load_line(z_image, y, there, x, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            products = tl.dot(z_tile, tl.trans(of_lines), input_precision=PRECISION, out_dtype=ACC)
            there = (y > 2) & (y > top + 1)
            z_again = _load_line(z_image, y - 3, there, x, c, width, z_c, z_h, z_w, C, UNIT, VECTOR, FLAT, WIDE)
            share = tl.dot(dl, z_again, share, input_precision=PRECISION, out_dtype=ACC)
        _store_frame(maps, n, heads, top, bottom, height, width, HEADS, S_TILE)
        line += bottom - top
    tap, is_tap = _tap_of_rows(C, HEADS, K_TILE)
    at = tl.program_id(0) * (9 * HEADS * C) + tap[:, None] + c[None, :]
    tl.store(shares + at, share, mask=is_tap[:, None] & (c < C)[None, :])


# ---------------------------------------------------------------------------------------------- launching


def tap_rows(grad_pooled: Tensor) -> Tensor:
    """[N, K, C, 9] → [N, 9, K, C], contiguous."""
    return grad_pooled.movedim(-1, -3).contiguous()


@functools.lru_cache(maxsize=1024)
def _rows_plan(sizes: torch.Size, strides: tuple[int, ...], score_strides: tuple[int, ...] | None) -> Launch:
    heads, channels = sizes[:2]
    tile = min(256, next_power_of_2(channels))
    return Launch(
        rows_kernel, (TAPS * heads, -(-channels // tile)), (*strides, *(score_strides or (0,) * 4)),
        C=channels, HEADS=heads, C_TILE=tile, num_warps=4,
    )  # fmt: skip


def weight_rows(w: Tensor, score_w: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W_H in dtype and W_G in its own [9, K, C], contiguous, as kernels read them."""
    rows = w.new_empty(TAPS, *w.shape[:2], dtype=dtype)
    score_rows = None if score_w is None else score_w.new_empty(rows.shape)
    _rows_plan(w.shape, w.stride(), None if score_w is None else score_w.stride())(w, score_w, rows, score_rows)
    return rows, score_rows


def framed_maps(z: Tensor, count: int) -> Tensor:
    """[N, H+2, W+2, count] in z's dtype: a position's numbers together, so that one load takes several."""
    return z.new_empty(z.shape[0], z.shape[2] + 2, z.shape[3] + 2, count)


class _Cut(NamedTuple):
    """What all kernels for maps of one shape, strides and dtype share."""

    constants: dict
    sizes: tuple[int, ...]  # height, width, the map's strides
    row_tile: int  # of the 9·K rows, and the mean's
    chip: Chip
    itemsize: int

    @property
    def half(self) -> bool:
        return self.itemsize == 2

    @property
    def hopper(self) -> bool:
        return self.chip.capability == 9

    @property
    def stages(self) -> int:
        """Tiles under way at a time, of kernels that read one."""
        return 3 if self.half and self.chip.shared > 2**16 else 2

    @property
    def maxnreg(self) -> int | None:
        return None if self.hopper and self.half else MOST_REGISTERS

    def channel_tile(self, area: int, most: int, rows: int | None = None) -> int:
        """A power of two, so wide that rows (row_tile) times it is at most `area` numbers; fewer of wider elements."""
        elements = area if self.half else area // self.itemsize
        widest = max(16, elements // (rows or self.row_tile))
        return min(most, max(16, next_power_of_2(self.constants["C"])), widest)

    def pooling(self) -> tuple[int, int, int]:
        """Positions and channels of a tile, and warps, of kernels that pool the map with shifted maps."""
        tile = 64 if self.half and self.row_tile <= 128 else 32
        # Where an image is a few tiles, a program waits for its loads: then several of them on each multiprocessor.
        few = self.sizes[0] * self.sizes[1] <= 4 * tile
        small = few and self.half and self.hopper and self.row_tile <= 64 and self.constants["UNIT"] == "c"
        return tile, self.channel_tile(16384, 128 if small else 256), 4 if small else 8

    def splits(self, images: int, chunks: int, tile: int, most: int = 2**31) -> tuple[int, int]:
        """How many programs, at most `most`, share an image's positions, and how many of these each has, a multiple of
        tile."""
        tiles = -(-self.sizes[0] * self.sizes[1] // tile)
        splits = max(1, min(-(-tiles // 2), self.chip.processors // max(images * chunks, 1), most))
        length = -(-tiles // splits)
        return -(-tiles // length), length * tile


def _cut(
    sizes: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: int, heads: int, precision: str
) -> _Cut:
    z = map_strides(sizes, strides, dtype.itemsize)
    gpu = chip(device)
    row_tile = max(16, next_power_of_2(TAPS * heads + 1))
    constants = {
        "C": sizes[1], "HEADS": heads, "R_TILE": row_tile, "UNIT": z.unit, "VECTOR": z.vector, "FLAT": z.flat,
        "WIDE": z.wide, "ACC": accumulator(dtype), "PRECISION": matmul_precision(dtype, precision, row_tile, gpu),
    }  # fmt: skip
    return _Cut(constants, (*sizes[2:], z.n, z.c, z.h, z.w), row_tile, gpu, dtype.itemsize)


class _Sums(NamedTuple):
    """The launch that sums over taps, and the shape of its scratch, if it needs one."""

    launch: Launch
    scratch: tuple[int, int, int] | None
    whole: bool  # a tile has the whole image

    def __call__(self, lse: Tensor, *tensors: Tensor | None) -> None:
        """lse: of the dtype and device that the scratch has; it is gone when this returns."""
        self.launch(*tensors, *(() if self.scratch is None else (lse.new_empty(self.scratch),)))


def _sums(cut: _Cut, images: int, heads: int, of_image: bool, parts: int = 1, alike: bool = False) -> _Sums:
    # Hopper's matrix units take 64 positions: of shorter lines the products take longer than the scratch does.
    tile, rows = next_power_of_2(cut.sizes[1]), max(16, 4 * next_power_of_2(heads))  # three columns, and one of zeros
    if cut.half and cut.hopper and cut.constants["UNIT"] == "c" and tile >= 64 and tile * rows <= 4096:
        return _line_sums(cut, images, heads, of_image, parts, tile, rows)
    return _tap_sums(cut, images, heads, of_image, parts, alike)


def _line_sums(cut: _Cut, images: int, heads: int, of_image: bool, parts: int, tile: int, rows: int) -> _Sums:
    height = cut.sizes[0]
    lines = -(-images * height // (4 * 64 // tile * cut.chip.processors))
    launch = Launch(
        line_sums_kernel, (-(-images * height // lines),), (images * height, lines, *cut.sizes),
        **cut.constants | {"R_TILE": rows}, OF_IMAGE=of_image, C_TILE=64, S_TILE=tile, K_TILE=next_power_of_2(heads),
        PARTS=parts, num_warps=4, num_stages=cut.stages, maxnreg=cut.maxnreg,
    )  # fmt: skip
    return _Sums(launch, None, False)


def _tap_sums(cut: _Cut, images: int, heads: int, of_image: bool, parts: int, alike: bool = False) -> _Sums:
    height, width = cut.sizes[:2]
    most = 128 if cut.hopper else 64
    tile = min(max(32, 8192 // cut.row_tile), most, max(32, next_power_of_2(height * width))) if cut.half else 32
    at_once = 2 * cut.chip.processors  # registers and shared memory of a multiprocessor hold two programs
    channels = cut.constants["C"]
    wide = cut.half and cut.row_tile <= 64 and tile < most and channels % 128 == 0  # few positions, more channels
    channel_tile = (256 if wide else 128) // cut.itemsize

    def cut_into(bands: int) -> tuple[int, int, int]:
        """Lines of a band, programs, and for how many positions each has a scratch."""
        lines = -(-height // bands)
        return lines, min(images * -(-height // lines), at_once), -(-((lines + 2) * width + 32) // 16) * 16

    def work(bands: int) -> int:
        """The busiest program's: for each of its bands the positions, those of the tiles that its lines and the two
        beside them fill, and a tile's while its loads begin."""
        lines = cut_into(bands)[0]
        read = -(-min(lines + 2, height) * width // tile) * tile
        return -(-images * bands // at_once) * (lines * width + read + tile)

    def fits(bands: int) -> bool:
        """The scratch of all is no larger than dZ, which takes its place."""
        _, programs, pitch = cut_into(bands)
        scratch = programs * pitch * TAPS * heads * max(4, cut.itemsize)
        return scratch <= images * channels * height * width * cut.itemsize

    fewest = -(-height // -(-2048 // width))  # larger bands' scratches stay in L2 even less
    lines, programs, pitch = cut_into(min(filter(fits, range(fewest, height + 1)), key=work, default=height))
    bands = -(-height // lines)
    whole = bands == 1 and height * width <= tile and not alike  # the batch decides how many bands there are
    launch = Launch(
        tap_sums_kernel, (programs,), (images * bands, bands, lines, pitch, *cut.sizes), **cut.constants,
        OF_IMAGE=of_image, C_TILE=channel_tile, S_TILE=tile, K_TILE=next_power_of_2(heads), PARTS=parts,
        # The masks of all nine loads would spill AMD's scalar registers, and others' where NCHW's addresses are, too.
        UNROLL=not cut.chip.amd and cut.constants["UNIT"] == "c",
        num_warps=4 if cut.half and cut.row_tile <= 64 else 8, num_stages=cut.stages, maxnreg=cut.maxnreg,
        **(SUMS_OVER_LANES if whole else {}),
    )  # fmt: skip
    return _Sums(launch, (programs, TAPS * heads, pitch), whole)


class _GatedSums(NamedTuple):
    """What takes the place of the gates' kernels and of the sums over taps."""

    turn: Launch | None  # where the features' taps are last
    sums: Launch


def _gated_sums(
    cut: _Cut, images: int, heads: int, gated: int, dtype: torch.dtype, taps_first: bool, sums: _Sums
) -> _GatedSums | None:
    """Where an image is a tile, on Hopper alone. Not in float16, whose images have scales of their own that depend on
    dP, nor where heads are counted by division, which takes dZ's kernel too many registers."""
    channels = cut.constants["C"]
    if not (sums.whole and dtype == torch.bfloat16 and cut.hopper and heads in (1, 2, 4)):
        return None
    turn = None
    if not taps_first:
        tile, chunks = _channel_chunks(channels)
        turn = Launch(
            taps_first_kernel, (images, chunks, gated), (), C=channels, GATED=gated, C_TILE=tile, num_warps=4,
            maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    constants = {name: value for name, value in cut.constants.items() if name != "R_TILE"}
    launch = Launch(
        gated_sums_kernel, (min(images, 2 * cut.chip.processors),), (images, *cut.sizes), **constants, GATED=gated,
        C_TILE=64, S_TILE=sums.launch.constants["S_TILE"], num_warps=4, num_stages=cut.stages, maxnreg=cut.maxnreg,
        **SUMS_OVER_LANES,
    )  # fmt: skip
    return _GatedSums(turn, launch)


LEAST_LINES = 24
"""Of a program that makes dA and dW_H at once: it reads two lines more than it stores."""

LEAST_BUSY = 0.9
"""A program that pools at once has a whole image: how much of the rounds of all multiprocessors a batch must fill."""


MOST_BANDWIDTH = 4e12
"""Bytes a second of a memory whose reads are worth saving. Sums over taps and pooling as one kernel each way wait for
more than memory: they take 492 µs at 256 × 56² on an H100 (3.35e12), where a layer takes 736 so and 884 with three
kernels. On an H200 (4.9e12) the three take 472."""


def _whole_lines(cut: _Cut, heads: int) -> dict | None:
    """Constants of the kernels that sum over taps and pool at once, where a line with all its channels is a tile."""
    fits = 32 < cut.sizes[1] <= 64 and 128 < cut.constants["C"] <= 256 and next_power_of_2(heads) == 4
    slow = cut.hopper and cut.chip.bandwidth < MOST_BANDWIDTH
    if not (fits and slow and cut.half and cut.constants["UNIT"] == "c"):
        return None
    constants = {name: value for name, value in cut.constants.items() if name != "R_TILE"}
    constants |= {"C_TILE": 256, "S_TILE": 64, "K_TILE": 4}
    return constants | {"num_warps": 8, "num_stages": 2, "maxnreg": cut.maxnreg}  # a third does not fit


def _line_pool(cut: _Cut, images: int, heads: int) -> Launch | None:
    constants, processors = _whole_lines(cut, heads), cut.chip.processors
    if constants is None or images < LEAST_BUSY * -(-images // processors) * processors:
        return None
    return Launch(line_pool_kernel, (images,), cut.sizes, **constants)


def _line_gradients(cut: _Cut, images: int, dtype: torch.dtype, heads: int, parts: int) -> Launch | None:
    """Not in float16, whose images have scales of their own."""
    constants, all_lines = _whole_lines(cut, heads), images * cut.sizes[0]
    lines = -(-all_lines // cut.chip.processors)
    if constants is None or dtype != torch.bfloat16 or lines < LEAST_LINES:
        return None
    grid = (-(-all_lines // lines),)
    return Launch(line_gradients_kernel, grid, (all_lines, lines, *cut.sizes), **constants, PARTS=parts)


def _channel_chunks(channels: int) -> tuple[int, int]:
    """Channels of a program among those of one head and image, and how many such programs there are."""
    tile = min(256, max(16, next_power_of_2(channels)))
    return tile, -(-channels // tile)


LEAST_POOLED = 2**25
"""Bytes of P that L2 no longer holds until it is read again. From there on, where an image is a tile, programs pool one
image after the other, and dW_G is summed with dW_H."""


def _pooled_bytes(cut: _Cut, images: int, heads: int) -> int:
    return images * TAPS * heads * cut.constants["C"] * max(4, cut.itemsize)


class _Forward(NamedTuple):
    sums: _Sums
    masks: Launch
    pool: Launch
    at_once: Launch | None  # in place of these three
    splits: int
    parts: tuple[int, ...]  # of the scores
    gates: Launch | None


@functools.lru_cache(maxsize=1024)
def _forward_plan(
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    heads: int,
    gated: int,
    precision: str,
    alike: bool,
    taps_first: bool,
) -> _Forward:
    cut = _cut(sizes, strides, dtype, device, heads, precision)
    images, channels = sizes[:2]
    positions = math.prod(sizes[2:])
    head_tile, acc = next_power_of_2(heads), accumulator(dtype)
    masks = Launch(
        masks_kernel, (images,), tuple(sizes[2:]), HEADS=heads, K_TILE=head_tile,
        S_TILE=min(max(16, 4096 // head_tile), next_power_of_2(positions)), ACC=acc, num_warps=8,
    )  # fmt: skip
    tile, channel_tile, warps = cut.pooling()
    chunks = -(-channels // channel_tile)
    # An image's sums are added in the same order in whatever batch it comes: not split at all, torch.sum has its own.
    splits, length = (1, positions) if alike else cut.splits(images, chunks, tile)
    # Hopper's matrix units, for which loads run ahead, take 64 rows; registers of a multiprocessor hold two programs.
    in_turn = warps == 4 and cut.row_tile == 64 and positions <= tile
    in_turn = in_turn and _pooled_bytes(cut, images, heads) >= LEAST_POOLED
    programs = min(images, max(1, 2 * cut.chip.processors // chunks)) if in_turn else images * splits
    pool = Launch(
        pool_kernel, (programs, chunks), (images, splits, length, *cut.sizes), **cut.constants,
        C_TILE=channel_tile, S_TILE=tile, K_TILE=head_tile, IN_TURN=in_turn,
        num_warps=warps, num_stages=cut.stages, maxnreg=cut.maxnreg,
    )  # fmt: skip
    # The batch decides it, and it adds an image's sums in another order.
    at_once = None if alike else _line_pool(cut, images, heads)
    gates, parts = None, splits * chunks if at_once is None else 1
    if gated:
        channel_tile, chunks = _channel_chunks(channels)
        gates = Launch(
            gate_kernel, (images, chunks, gated), (), C=channels, HEADS=heads, GATED=gated, C_TILE=channel_tile,
            K_TILE=head_tile, PARTS=parts, PARTS_TILE=next_power_of_2(parts), TAPS_FIRST=taps_first, ACC=acc,
            num_warps=4, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    sums = _sums(cut, images, heads, False)
    return _Forward(sums, masks, pool, at_once, splits, (images, parts, head_tile), gates)


def attend3x3_forward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor,
    mean: Tensor | None,
    scores: Tensor | None,
    gates: Tensor | None,
    features: Tensor | None,
    alike: bool,
    taps_first: bool,
) -> None:
    """Launches into outputs that ops.py allocated; pooled is [N, 9, K, C]; alike, taps_first as there."""
    heads = w.shape[0]
    plan = _forward_plan(
        z.shape, z.stride(), z.dtype, z.get_device(), heads, 0 if gates is None else gates.shape[1],
        float32_precision(z.dtype), alike, taps_first,
    )  # fmt: skip
    rows, score_rows = weight_rows(w, None if plan.gates is None else score_w, z.dtype)
    parts = None if score_rows is None else lse.new_empty(plan.parts)
    if plan.at_once is not None:
        plan.at_once(z, rows, b, score_rows, logits, lse, pooled, mean, parts)
    else:
        plan.sums(lse, z, rows, b, logits, None, None, None, None, None, None)
        masks = framed_maps(z, heads)
        plan.masks(logits, lse, masks)
        sums, means = pooled, mean
        if plan.splits > 1:
            sums = pooled.new_empty(plan.splits, *pooled.shape)
            means = None if mean is None else mean.new_empty(plan.splits, *mean.shape)
        plan.pool(z, masks, score_rows, sums, means, parts)
        if plan.splits > 1:
            torch.sum(sums, dim=0, out=pooled)
            if mean is not None:
                torch.sum(means, dim=0, out=mean)
    if plan.gates is not None:
        plan.gates(pooled, score_b, parts, scores, gates, features)


def _map_gradient(
    cut: _Cut,
    sizes: torch.Size,
    up_strides: tuple[int, ...] | None,
    dz_strides: tuple[int, ...],
    dtype: torch.dtype,
    heads: int,
    gated: int,
    precision: str,
) -> Launch:
    """gated: 0 where dP was made."""
    images, channels = sizes[:2]
    dz = map_strides(sizes, dz_strides, dtype.itemsize)
    up = dz if up_strides is None else map_strides(sizes, up_strides, dtype.itemsize)
    row_tile = max(16, next_power_of_2(16 * heads))
    tile = 64 if cut.half and row_tile <= 128 else 32 if cut.half else 16
    # Registers hold the sums of 256 channels on Hopper, half as many elsewhere, beside a tile of another gradient,
    # where dZ is not stored as its sums lie, and where heads are counted by division.
    divided = heads != next_power_of_2(heads)
    most = 256 >> (not cut.hopper) + (up_strides is not None) + (dz.unit != "c") + divided
    channel_tile = cut.channel_tile(64 * most, most, row_tile)
    chunks = -(-channels // channel_tile)
    splits, length = cut.splits(images, chunks, tile)
    return Launch(
        map_gradient_kernel, (min(images * splits, max(1, 2 * cut.chip.processors // chunks)), chunks),
        (images * splits, splits, length, *sizes[2:], up.n, up.c, up.h, up.w, dz.n, dz.c, dz.w),
        C=channels, HEADS=heads, GATED=gated, R_TILE=row_tile, LAST_TILE=max(16, next_power_of_2(2 * heads)),
        C_TILE=channel_tile, S_TILE=tile, UP_UNIT=up.unit, UP_VECTOR=up.vector, UP_FLAT=up.flat, DZ_UNIT=dz.unit,
        DZ_VECTOR=dz.vector, WIDE=up.wide or dz.wide, ACC=accumulator(dtype),
        PRECISION=matmul_precision(dtype, precision, row_tile, cut.chip),
        num_warps=4 if cut.hopper and cut.half and row_tile <= 64 else 8, num_stages=cut.stages, maxnreg=cut.maxnreg,
    )  # fmt: skip


def _sums_both_weights(cut: _Cut, images: int, dtype: torch.dtype, heads: int) -> bool:
    """Not in float16, whose images have scales of their own."""
    tile, positions = cut.pooling()[0], cut.sizes[0] * cut.sizes[1]
    fits = positions <= tile and 64 < 18 * heads <= 128 and cut.constants["UNIT"] == "c"
    large = _pooled_bytes(cut, images, heads) >= LEAST_POOLED
    return fits and large and dtype == torch.bfloat16 and cut.hopper


def _mask_weights(cut: _Cut, sizes: torch.Size, heads: int, both: bool) -> Launch:
    """Programs of its first axis each have a share of dW_H; both: of dW_G too."""
    images, channels = sizes[:2]
    if both:
        chunks = -(-channels // 128)
        programs = min(images, max(1, 2 * cut.chip.processors // chunks))
        return Launch(
            mask_weight_gradient_kernel, (programs, chunks), (images, 1, cut.sizes[0] * cut.sizes[1], *cut.sizes),
            **cut.constants | {"R_TILE": 128}, C_TILE=128, S_TILE=64, num_warps=8, num_stages=cut.stages,
            maxnreg=cut.maxnreg,
        )  # fmt: skip
    tile, channel_tile, warps = cut.pooling()
    chunks = -(-channels // channel_tile)
    splits, length = cut.splits(images, chunks, tile)
    share = TAPS * heads * channels * max(4, cut.itemsize)
    most = sizes.numel() * cut.itemsize // 8 // share
    if images * splits > max(images, most):
        # Shares are memory, more than an eighth of dZ: fewer of them, and of fewer channels at a time.
        splits, length = cut.splits(images, chunks, tile, max(1, most // images))
        while channel_tile > 16 and 2 * images * splits * chunks <= cut.chip.processors:
            channel_tile //= 2
            chunks = -(-channels // channel_tile)
    at_once = cut.chip.processors * (1 if cut.half and warps == 8 else 2)
    return Launch(
        mask_weight_gradient_kernel, (min(images * splits, max(1, at_once // chunks)), chunks),
        (images * splits, splits, length, *cut.sizes), **cut.constants, C_TILE=channel_tile, S_TILE=tile,
        num_warps=warps, num_stages=cut.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


class _Backward(NamedTuple):
    gate_sums: Launch
    parts: tuple[int, ...]
    deltas: tuple[int, ...] | None  # None: the sums over taps need none from outside
    gates: Launch
    sums: _Sums | None
    gated_sums: _GatedSums | None  # in place of these three, and of dP
    mask_weights: Launch | None
    both: bool  # it sums dW_G too
    at_once: Launch | None  # in place of these two
    gradient: Launch | None
    weights: Launch | None


@functools.lru_cache(maxsize=1024)
def _backward_plan(
    sizes: torch.Size,
    strides: tuple[int, ...],
    up_strides: tuple[int, ...] | None,
    dz_strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: int,
    heads: int,
    gated: int,
    has_dw: bool,
    has_dt: bool,
    precision: str,
    taps_first: bool,
    alike: bool,
    gated_alone: bool,
) -> _Backward:
    cut = _cut(sizes, strides, dtype, device, heads, precision)
    images, channels = sizes[:2]
    acc = accumulator(dtype)
    tile, chunks = _channel_chunks(channels)
    parts = images, 4, chunks, heads
    constants = {"C": channels, "HEADS": heads, "GATED": gated, "C_TILE": tile, "TAPS_FIRST": taps_first, "ACC": acc}
    constants |= {"num_warps": 4, "maxnreg": MOST_REGISTERS}
    gate_sums = Launch(gradient_sums_kernel, (images, chunks, heads), (), MOST=dtype == torch.float16, **constants)
    gates = Launch(
        gate_gradient_kernel, (images, chunks, heads), (), K_TILE=next_power_of_2(heads), CHUNKS=chunks,
        CHUNK_TILE=next_power_of_2(chunks), **constants,
    )  # fmt: skip
    sums = gated_sums = mask_weights = at_once = gradient = weights = None
    if has_dw and not alike:  # the batch decides it
        at_once = _line_gradients(cut, images, dtype, heads, chunks)
    if at_once is None and (has_dw or dz_strides is not None):
        sums = _sums(cut, images, heads, True, chunks, alike)
        if gated_alone:
            gated_sums = _gated_sums(cut, images, heads, gated, dtype, taps_first, sums)
    both = has_dw and has_dt and at_once is None and _sums_both_weights(cut, images, dtype, heads)
    if at_once is None and has_dw:
        mask_weights = _mask_weights(cut, sizes, heads, both)
    if dz_strides is not None:
        of_gates = 0 if gated_sums is None else gated
        gradient = _map_gradient(cut, sizes, up_strides, dz_strides, dtype, heads, of_gates, precision)
    if has_dw or has_dt:
        tile = min(64, next_power_of_2(channels))
        of_shares = at_once or mask_weights
        weights = Launch(
            weight_sums_kernel, (TAPS * heads * (has_dw + has_dt), -(-channels // tile)),
            (0 if of_shares is None else of_shares.grid[0], images),
            C=channels, HEADS=heads, TAPS=TAPS, BOTH=both, C_TILE=tile, R_TILE=64, num_warps=4,
        )  # fmt: skip
    deltas = None if sums is not None and sums.whole else (images, chunks, heads)
    return _Backward(
        gate_sums, parts, deltas, gates, sums, gated_sums, mask_weights, both, at_once, gradient, weights
    )  # fmt: skip


def attend3x3_backward(
    z: Tensor,
    w: Tensor,
    score_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor,
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
    dz_strides: tuple[int, ...] | None,
    dw: Tensor | None,
    dscore_w: Tensor | None,
    dscore_b: Tensor | None,
    taps_first: bool,
    alike: bool,
) -> Tensor | None:
    """Launches into dw and dscore_w [K, C, 3, 3] and dscore_b [K]; returns dz with the strides asked for, contiguous or
    channels_last. What is None is not computed, the two scores' go together. pooled is [N, 9, K, C], grad_pooled
    [N, K, C, 9]."""
    (images, channels), heads = z.shape[:2], w.shape[0]
    gated_alone = grad_pooled is None and all(each is not None for each in (gates, score_w, grad_features))
    plan = _backward_plan(
        z.shape, z.stride(), None if upstream is None else upstream.stride(), dz_strides,
        z.dtype, z.get_device(), heads, 0 if gates is None else gates.shape[1], dw is not None, dscore_w is not None,
        float32_precision(z.dtype), taps_first, alike, gated_alone,
    )  # fmt: skip
    rows, score_rows = weight_rows(w, score_w, z.dtype)
    dp = delta = scale = unscale = maps = shares = None
    of_gates = (None,) * 4
    dt = None if dscore_w is None and plan.gated_sums is None else lse.new_empty(images, heads)
    if plan.sums is not None or plan.at_once is not None:
        maps = framed_maps(z, 2 * heads)
    of_shares = plan.at_once or plan.mask_weights
    if of_shares is not None:
        shares = lse.new_empty(of_shares.grid[0], TAPS * (1 + plan.both), heads, channels)
    if plan.gated_sums is not None:
        dx = grad_features
        if plan.gated_sums.turn is not None:
            dx = grad_features.new_empty(grad_features.shape)
            plan.gated_sums.turn(grad_features, dx)
        plan.gated_sums.sums(
            z, score_rows, dx, logits, lse, scores, gates, grad_gates, grad_scores, grad_lse, grad_logits, dt, maps
        )
        of_gates = score_rows, dx, gates, dt
    else:
        largest_direct = None
        if z.dtype == torch.float16:
            scale, unscale = lse.new_empty(images), lse.new_empty(images)
            found = [grad.abs().flatten(1).amax(dim=1) for grad in (grad_lse, grad_logits) if grad is not None]
            largest_direct = torch.stack(found).amax(dim=0) if found else None
        dp = z.new_empty(images, TAPS, heads, channels)
        delta = None if plan.deltas is None else lse.new_empty(plan.deltas)
        direct = None if grad_pooled is None else tap_rows(grad_pooled)
        parts = lse.new_empty(plan.parts)
        plan.gate_sums(pooled, score_rows, grad_features, direct, parts)
        plan.gates(
            pooled, score_rows, scores, gates, grad_features, grad_gates, grad_scores, direct, parts, largest_direct,
            dp, delta, dt, scale, unscale,
        )  # fmt: skip
        if plan.at_once is not None:
            plan.at_once(z, dp, logits, lse, delta, grad_lse, grad_logits, maps, shares)
        if plan.sums is not None:
            plan.sums(lse, z, dp, None, logits, lse, delta, grad_lse, grad_logits, scale, maps)
    if plan.mask_weights is not None:
        plan.mask_weights(z, maps, unscale, dt if plan.both else None, shares)
    if plan.weights is not None:
        of_scores = None if dscore_w is None else dt
        plan.weights(shares, None if plan.both else pooled, of_scores, dw, dscore_w, dscore_b)
    if plan.gradient is None:
        return None
    del shares
    dz = z.new_empty_strided(z.shape, dz_strides)
    plan.gradient(rows, dp, *of_gates, maps, unscale, grad_mean, upstream, dz)
    return dz
