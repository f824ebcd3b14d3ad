"""The sweeps of csrc/cuda, thread for thread in the emulator: against the formulas in float64, and in whole layers."""

import re
import subprocess

import emulator
import pytest
import torch
from layers import LAYOUTS, Layer, assert_within_budget, channels_last

import ar_kernels
from ar_kernels import native

emulated = pytest.mark.skipif(emulator.why_not() is not None, reason=f"the emulator: {emulator.why_not()}")

WRAPPER = """
    #include "attend_backward.h"
    #include "attend_forward.h"
    using namespace ar_kernels;
    constexpr int64_t kRows = 1, kSpread = 2;
    static Kind kind_of(int64_t kind) { return static_cast<Kind>(kind); }
    AR_EXPORT int backward(int64_t kind, int64_t images, int64_t channels, int64_t positions, int64_t heads,
                           void* z, void* upstream, void* dz, int64_t rows, const void* pairs, int64_t mean,
                           const float* b, const float* lse, const float* delta, const float* unscale,
                           const float* grad_logits, float* dw, int64_t* programs, int64_t writes) {
      BackwardSweep a = {};
      const auto map = [&](void* data) {
        const FlatMap last = {data, channels * positions, 1, channels};
        return rows ? FlatMap{data, channels * positions, positions, 1} : last;
      };
      a.kind = kind_of(kind), a.images = images, a.channels = channels, a.positions = positions, a.heads = heads;
      a.z = map(z), a.upstream = map(upstream), a.dz = map(dz);
      a.pairs = pairs, a.mean = mean, a.b = {b, Kind::kFloat};
      a.lse = lse, a.delta = delta, a.unscale = unscale, a.grad_logits = grad_logits, a.dw = dw;
      if (a.kind == Kind::kFloat) {
        if (dz == nullptr) {
          BackwardSweep b = a;
          b.dz = map(&b);  // that there is one
          *programs = can_sweep_backward_floats(b) ? backward_floats_programs(b)
                      : can_sweep_backward_float_images(b) ? backward_float_images_programs(b)
                      : can_sweep_backward_float_rows(b) ? backward_float_rows_programs(b) : 0;
          return *programs < 1;
        }
        if (!writes) a.dz = {};
        return can_sweep_backward_floats(a) ? sweep_backward_floats(a, nullptr)
               : can_sweep_backward_float_images(a) ? sweep_backward_float_images(a, nullptr)
                                                    : sweep_backward_float_rows(a, nullptr);
      }
      if (dz == nullptr) {
        *programs = rows == kRows ? backward_rows_programs(a) : backward_programs(a);
        return 0;
      }
      return rows == kRows ? sweep_backward_rows(a, nullptr) : sweep_backward(a, nullptr);
    }
    AR_EXPORT int backward_of(int64_t images, int64_t channels, int64_t positions, int64_t heads, int64_t gated,
                              void* z, void* upstream, void* dz, const float* b, const float* lse,
                              const float* grad_logits, float* dw, const void* w,
                              const float* score_w, const float* pooled, const float* scores, const float* gates,
                              const void* grad_features, const float* grad_gates, const float* grad_scores,
                              const float* grad_pooled, const float* grad_lse, const float* grad_mean, float* dt) {
      BackwardSweep a = {};
      const auto map = [&](void* data) { return FlatMap{data, channels * positions, 1, channels}; };
      a.kind = Kind::kBFloat16, a.images = images, a.channels = channels, a.positions = positions, a.heads = heads;
      a.z = map(z), a.upstream = map(upstream), a.dz = map(dz), a.mean = grad_mean != nullptr;
      a.b = {b, Kind::kFloat}, a.lse = lse, a.grad_logits = grad_logits, a.dw = dw;
      a.of = {{w, Kind::kBFloat16}, {score_w, Kind::kFloat}, static_cast<int>(gated), pooled, scores, gates,
              grad_features, grad_gates, grad_scores, grad_pooled, grad_lse, grad_mean, dt};
      return sweep_backward(a, nullptr);
    }
    AR_EXPORT int forward(int64_t kind, int64_t images, int64_t channels, int64_t positions, int64_t heads,
                          int64_t gated, void* z, int64_t rows, const void* w, int64_t w_kind, const float* b,
                          const float* score_w, const float* score_b, float* pooled, float* lse, float* logits,
                          float* mean, float* scores, float* gates, void* features, int64_t* splits,
                          int64_t splits_given, float* part_m, float* part_d, float* part_p) {
      ForwardSweep a = {};
      a.kind = kind_of(kind), a.images = images, a.channels = channels, a.positions = positions, a.heads = heads;
      a.gated = gated;
      const bool spread = rows >= kSpread;
      rows %= kSpread;
      a.z = rows ? FlatMap{z, channels * positions, positions, 1} : FlatMap{z, channels * positions, 1, channels};
      a.w = {w, kind_of(w_kind)}, a.b = {b, Kind::kFloat};
      a.score_w = {score_w, Kind::kFloat}, a.score_b = {score_b, Kind::kFloat};
      a.pooled = pooled, a.lse = lse, a.logits = logits, a.mean = mean;
      a.scores = scores, a.gates = gates, a.features = features;
      a.splits = splits_given, a.part_m = part_m, a.part_d = part_d, a.part_p = part_p;
      if (a.kind == Kind::kFloat) {
        if (splits != nullptr) {
          *splits = can_sweep_forward_floats(a) ? forward_floats_splits(a, false)
                    : can_sweep_forward_float_images(a) ? 1
                    : can_sweep_forward_float_rows(a) ? forward_float_rows_splits(a, false) : 0;
          return *splits < 1;
        }
        return can_sweep_forward_floats(a) ? sweep_forward_floats(a, nullptr)
               : can_sweep_forward_float_images(a) ? sweep_forward_float_images(a, nullptr)
                                                   : sweep_forward_float_rows(a, nullptr);
      }
      if (splits != nullptr) {
        *splits = rows == kRows ? 1 : can_sweep_forward(a) ? forward_splits(a, false) : 0;
        return 0;
      }
      if (spread) return sweep_forward_spread(a, nullptr);
      return rows == kRows ? sweep_forward_rows(a, nullptr)
             : channels > 512 ? sweep_forward(a, nullptr) : sweep_forward_spread(a, nullptr);
    }
"""
# What a map's layout is called there: channels_last, or NCHW; forward, spread over clusters, the same.
LAST, ROWS, SPREAD_LAST, SPREAD_ROWS = range(4)

SOURCES = [
    f"csrc/cuda/attend_{direction}{kind}.cu"
    for direction in ("backward", "forward")
    for kind in ("", "_rows", "_floats", "_float_rows", "_float_images")
] + ["csrc/cuda/attend_forward_spread.cu"]
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@pytest.fixture(scope="module")
def kernels():
    return emulator.build(*SOURCES, wrapper=WRAPPER)


def layout(z, rows):
    """[N, C, S] as the kernels read it."""
    return z.contiguous() if rows in (ROWS, SPREAD_ROWS) else z.transpose(1, 2).contiguous()


def shares(kernels, sizes, maps, rows, processors=2):
    """What every program's share of dW_H goes to, NaN as yet."""
    programs = torch.zeros(1, dtype=torch.int64)
    kernels.backward(*sizes, *maps, None, rows, *([None, 0] + [None] * 6), programs, True, processors=processors)
    return torch.full((int(programs), sizes[4], sizes[2]), torch.nan)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "mean", "tapped", "direct"),
    [
        (LAST, 3, 64, 9, 4, False, False, False),
        (LAST, 2, 128, 49, 4, True, False, False),
        (LAST, 2, 640, 70, 3, True, True, True),
        (LAST, 1, 1280, 33, 1, False, True, False),
        (ROWS, 3, 128, 49, 4, False, False, False),
        (ROWS, 2, 256, 36, 4, True, False, True),
        (ROWS, 2, 256, 196, 3, True, False, False),
        (ROWS, 1, 128, 16, 1, False, False, False),
        (ROWS, 2, 1664, 196, 4, True, False, False),  # more chunks than slots
        (ROWS, 3, 1024, 49, 2, False, False, True),  # chunks of 256 channels
        (ROWS, 2, 256, 9, 4, True, False, False),  # one tile
        (ROWS, 2, 256, 62, 4, True, False, True),  # some rows touch a tile less than others
        (ROWS, 2, 128, 43, 3, False, False, False),
        (ROWS, 6, 512, 36, 4, False, False, False),  # images that follow each other in a cluster
        (ROWS, 5, 1152, 49, 2, True, False, True),  # the same, and a block's threads have several pairs of channels
        (ROWS, 2, 384, 196, 4, False, False, False),  # an odd number of chunks a block
        (ROWS, 2, 256, 17, 2, True, False, True),
    ],
)
def test_backward(kernels, dtype, rows, images, channels, positions, heads, mean, tapped, direct):
    torch.manual_seed(0)
    z = torch.randn(images, channels, positions).to(dtype)
    w = (torch.randn(heads, channels) / channels**0.5).to(dtype)
    dp = torch.randn(images, heads + mean, channels).to(dtype)
    b, lse, delta = torch.randn(heads), torch.randn(images, heads) + 4, torch.randn(images, heads)
    unscale = 2.0 ** torch.randint(-3, 3, (images,)) if dtype == torch.float16 else None
    grad_logits = torch.randn(images, heads, positions) if direct else None
    upstream = torch.randn(images, channels, positions).to(dtype) if tapped else None
    pairs = torch.zeros(images, heads + mean, 2, channels, dtype=dtype)
    pairs[:, :heads, 0], pairs[:, :, 1] = w, dp

    programs = torch.zeros(1, dtype=torch.int64)
    sizes = (KINDS[dtype], images, channels, positions, heads)
    maps = [None if x is None else layout(x, rows) for x in (z, upstream)]
    dw = shares(kernels, sizes, maps, rows)
    dz = torch.full_like(maps[0], torch.nan)
    kernels.backward(
        *sizes, *maps, dz, rows, pairs, mean, b, lse, delta, unscale, grad_logits, dw, programs, True, processors=2
    )

    z, w, dp = z.double(), w.double(), dp.double()
    scale = 1 if unscale is None else 1 / unscale[:, None, None].double()
    a = torch.exp(torch.einsum("kc,ncs->nks", w, z) + (b - lse)[:, :, None].double())
    dl = a * (torch.einsum("nkc,ncs->nks", dp[:, :heads], z) - delta[:, :, None].double())
    if direct:
        dl = dl + scale * grad_logits.double()
    a, dl = a.to(dtype).double(), dl.to(dtype).double()

    def products(a, dl, z, w, dp):
        dz = torch.einsum("nks,nkc->ncs", a, dp[:, :heads]) + torch.einsum("nks,kc->ncs", dl, w)
        dz = (dz + dp[:, heads:].sum(1)[:, :, None] / positions) / scale
        return dz, torch.einsum("nks,ncs->kc", dl / scale, z)

    expected, expected_dw = products(a, dl, z, w, dp)
    if tapped:
        expected = expected + upstream.double()
    # a and dl may be rounded the other way, as their float32 values differ from float64's in the last bits.
    allowed, allowed_dw = products(*[value.abs() for value in (a, dl, z, w, dp)])
    eps = torch.finfo(dtype).eps
    dz = (dz if rows else dz.transpose(1, 2)).double()
    assert ((dz - expected).abs() <= eps * (expected.abs() + allowed)).all()
    assert ((dw.sum(0) - expected_dw).abs() <= eps * allowed_dw).all()


@emulated
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("images", "channels", "positions", "heads", "gated"),
    [
        (3, 64, 40, 4, 4),
        (7, 64, 40, 4, 4),  # a program has an image
        (3, 512, 70, 2, 0),  # or its tiles of several
        (3, 1024, 50, 3, 2),
        (2, 2048, 20, 1, 0),
    ],
)
def test_backward_from_the_gradients_of_what_came_out(kernels, images, channels, positions, heads, gated, everything):
    torch.manual_seed(0)
    dtype = torch.bfloat16
    z = torch.randn(images, channels, positions).to(dtype)
    w = (torch.randn(heads, channels) / channels**0.5).to(dtype)
    lse, pooled = torch.randn(images, heads) + 4, torch.randn(images, heads, channels)
    score_w = torch.randn(heads, channels) if gated else None
    scores, gates = torch.randn(images, heads), torch.rand(images, gated)
    grad_features = torch.randn(images, gated, channels).to(dtype) if gated else None
    given = {
        "gates": torch.randn(images, gated) if gated else None,
        "scores": torch.randn(images, heads) if gated else None,
        "pooled": torch.randn(images, heads, channels),
        "lse": torch.randn(images, heads),
        "mean": torch.randn(images, channels),
    }
    if not everything:
        given = dict.fromkeys(given, None) | ({} if gated else {"pooled": given["pooled"]})
    laid = layout(z, LAST)
    dz, dt = torch.full_like(laid, torch.nan), torch.full((images, heads), torch.nan)
    sizes = (KINDS[dtype], images, channels, positions, heads)
    dw = shares(kernels, sizes, (laid, None), LAST)
    kernels.backward_of(
        *sizes[1:], gated, laid, None, dz, None, lse, None, dw, w, score_w, pooled, scores if gated else None,
        gates if gated else None, grad_features, *given.values(), dt, processors=2,
    )  # fmt: skip

    z, w, pooled = z.double(), w.double(), pooled.double()
    nothing = torch.zeros(1)
    expected_dt, dp = torch.zeros(images, heads).double(), torch.zeros(images, heads, channels).double()
    if gated:
        dx, g = grad_features.double(), gates.double()
        dg = (dx * pooled[:, :gated]).sum(2) + (nothing if given["gates"] is None else given["gates"])
        du = g * (dg - (g * dg).sum(1, keepdim=True))
        expected_dt[:, :gated] = du * (1 - scores[:, :gated].double().tanh() ** 2)
        expected_dt += nothing if given["scores"] is None else given["scores"]
        dp[:, :gated] = g[:, :, None] * dx
        dp += expected_dt[:, :, None] * score_w.double()
        assert ((dt - expected_dt).abs() <= 1e-4 * (1 + expected_dt.abs())).all()
    dp += nothing if given["pooled"] is None else given["pooled"]
    dp = dp.float().to(dtype).double()
    delta = (dp * pooled).sum(2) - (nothing if given["lse"] is None else given["lse"])
    a = torch.exp(torch.einsum("kc,ncs->nks", w, z) - lse[:, :, None].double())
    dl = a * (torch.einsum("nkc,ncs->nks", dp, z) - delta[:, :, None])

    def products(a, dl, z, w, dp, mean):
        dz = torch.einsum("nks,nkc->ncs", a, dp) + torch.einsum("nks,kc->ncs", dl, w) + mean[:, :, None] / positions
        return dz, torch.einsum("nks,ncs->kc", dl, z)

    mean = torch.zeros(images, channels).double() if given["mean"] is None else given["mean"].to(dtype).double()
    expected, expected_dw = products(a.to(dtype).double(), dl.to(dtype).double(), z, w, dp, mean)
    # Some of dP are rounded the other way, and with it what is summed up of them.
    sizes_of = [
        value.abs() for value in (a, a * (torch.einsum("nkc,ncs->nks", dp.abs(), z.abs()) + delta.abs()[:, :, None]))
    ]
    allowed, allowed_dw = products(*sizes_of, z.abs(), w.abs(), dp.abs(), mean.abs())
    eps = torch.finfo(dtype).eps
    dz = dz.transpose(1, 2).double()
    assert ((dz - expected).abs() <= eps * (expected.abs() + allowed)).all()
    assert ((dw.sum(0) - expected_dw).abs() <= eps * allowed_dw).all()


FLOAT_EPS = torch.finfo(torch.float32).eps


def check_float(found, exact, size):
    """`size` bounds what rounding errors are relative to: sums of absolute values."""
    error = (found.double() - exact).abs()
    assert (error <= 4 * FLOAT_EPS * size).all(), (error / size).max() / FLOAT_EPS


@emulated
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "mean", "tapped", "direct", "processors"),
    [
        (False, 3, 32, 9, 4, False, False, False, 2),
        (False, 2, 96, 330, 4, True, False, False, 2),  # more tiles than slots
        (False, 3, 160, 300, 3, True, True, True, 2),
        (False, 5, 320, 64, 1, False, True, False, 2),  # images that follow each other in a block
        (False, 2, 100, 50, 2, False, False, True, 3),  # channels in no whole 32s
        (False, 2, 1024, 49, 4, True, True, True, 2),
        (False, 1, 2048, 49, 4, False, False, False, 1),
        (True, 3, 24, 12, 4, False, False, False, 2),
        (True, 2, 96, 1200, 4, True, False, False, 2),  # more chunks than slots
        (True, 3, 168, 196, 3, True, True, True, 2),
        (True, 5, 328, 64, 1, False, True, False, 2),
        (True, 2, 648, 36, 2, False, False, True, 3),
        (True, 2, 1016, 52, 4, True, False, True, 1),
        (True, 3, 256, 49, 4, False, True, True, 2),  # rows of any length
        (True, 2, 128, 169, 3, True, False, False, 2),
        (True, 1, 32, 255, 1, False, False, False, 1),
        (True, 3, 96, 143, 2, True, True, False, 2),
        (True, 3, 896, 63, 1, True, False, True, 4),  # in two blocks, one of which has no head
        (True, 5, 384, 149, 3, False, True, True, 4),  # in two blocks
        (True, 3, 512, 196, 4, True, True, True, 4),
        (True, 3, 1024, 196, 2, True, False, True, 8),  # in four, two of which have no head
        (True, 2, 2048, 196, 3, True, False, False, 8),  # in eight, and more chunks than slots
    ],
)
def test_float_backward(kernels, rows, images, channels, positions, heads, mean, tapped, direct, processors):
    torch.manual_seed(0)
    z = torch.randn(images, channels, positions)
    w = torch.randn(heads, channels) / channels**0.5
    dp = torch.randn(images, heads + mean, channels)
    b, lse, delta = torch.randn(heads), torch.randn(images, heads) + 4, torch.randn(images, heads)
    grad_logits = torch.randn(images, heads, positions) if direct else None
    upstream = torch.randn(images, channels, positions) if tapped else None
    pairs = torch.zeros(images, heads + mean, 2, channels)
    pairs[:, :heads, 0], pairs[:, :, 1] = w, dp
    programs = torch.zeros(1, dtype=torch.int64)
    sizes = (KINDS[torch.float32], images, channels, positions, heads)
    maps = [None if x is None else layout(x, rows) for x in (z, upstream)]
    kernels.backward(*sizes, *maps, None, rows, *([None, 0] + [None] * 6), programs, True, processors=processors)
    shares = [torch.full((int(programs), heads, channels), torch.nan) for _ in range(2)]
    dzs = [torch.full_like(maps[0], torch.nan) for _ in range(2)]
    for dz, dw in ((0, 0), (1, None), (None, 1)):
        writes, dz, dw = dz is not None, dzs[dz or 0], None if dw is None else shares[dw]
        given = (dz, rows, pairs, mean, b, lse, delta, None, grad_logits, dw, programs, writes)
        kernels.backward(*sizes, *maps, *given, processors=processors)
    assert torch.equal(*dzs) and torch.equal(*shares)
    dz, shares = dzs[0], shares[0]

    z, w, dp, lse, delta = (x.double() for x in (z, w, dp, lse, delta))
    dp, average = dp[:, :heads], dp[:, heads:].sum(1) / positions
    shift, direct = lse - b.double(), 0 if grad_logits is None else grad_logits.double()
    logits, da = torch.einsum("kc,ncs->nks", w, z), torch.einsum("nkc,ncs->nks", dp, z)
    a = torch.exp(logits - shift[:, :, None])
    dl = a * (da - delta[:, :, None]) + direct
    expected = torch.einsum("nks,nkc->ncs", a, dp) + torch.einsum("nks,kc->ncs", dl, w) + average[:, :, None]
    # An error of the logits is one of a's digits.
    of_a = a * (1 + torch.einsum("kc,ncs->nks", w.abs(), z.abs()) + lse.abs()[:, :, None] + b.abs()[:, None])
    of_da = torch.einsum("nkc,ncs->nks", dp.abs(), z.abs()) + delta.abs()[:, :, None]
    of_dl = of_a * of_da + (0 if grad_logits is None else direct.abs())
    size = torch.einsum("nks,nkc->ncs", of_a, dp.abs()) + torch.einsum("nks,kc->ncs", of_dl, w.abs())
    size += average.abs()[:, :, None]
    if tapped:
        expected, size = expected + upstream.double(), size + upstream.double().abs()
    check_float(dz if rows else dz.transpose(1, 2), expected, size)
    check_float(shares.double().sum(0), torch.einsum("nks,ncs->kc", dl, z), torch.einsum("nks,ncs->kc", of_dl, z.abs()))


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "gated", "mean", "logits"),
    [
        (LAST, 3, 576, 9, 4, 4, False, True),
        (LAST, 2, 832, 49, 4, 0, True, False),
        (LAST, 2, 640, 70, 3, 2, True, True),
        (LAST, 1, 1280, 33, 1, 1, False, False),
        (LAST, 1, 2048, 20, 2, 2, True, True),
        (ROWS, 3, 128, 49, 4, 4, False, True),
        (ROWS, 2, 256, 36, 4, 0, True, False),
        (ROWS, 2, 256, 196, 3, 2, True, True),
        (ROWS, 1, 128, 16, 1, 1, False, False),
        (ROWS, 2, 1664, 196, 4, 4, True, False),  # more chunks than slots
        (ROWS, 1, 1152, 49, 4, 4, True, False),  # a block's threads have several pairs of channels
        (ROWS, 6, 512, 84, 4, 4, True, True),  # images that follow each other in a cluster
        (ROWS, 4, 1024, 49, 4, 3, True, True),  # in chunks of 256 channels
        (ROWS, 2, 384, 196, 4, 4, True, False),  # an odd number of chunks a block
        (ROWS, 2, 256, 9, 2, 2, False, False),  # one tile
        (ROWS, 2, 256, 17, 4, 0, True, False),
        (ROWS, 2, 256, 62, 4, 4, True, False),  # some rows touch a tile less than others
        (ROWS, 2, 128, 43, 3, 3, True, True),
        (ROWS, 5, 1152, 49, 2, 2, True, False),  # several pairs, and images that follow each other
        (LAST, 7, 576, 40, 3, 2, True, True),  # images that follow each other in a block
        (LAST, 3, 768, 49, 4, 4, True, True),
        *((rows, *sizes) for rows in (SPREAD_LAST, SPREAD_ROWS) for sizes in [
            (1, 64, 600, 4, 4, False, True),  # over two blocks
            (1, 128, 1608, 3, 3, True, False),  # over fifteen
            (2, 96, 520, 3, 2, True, True),  # no whole planes of channels; the last block has fewer positions
            (3, 256, 208, 4, 0, True, False),  # over four
            (3, 40, 64, 2, 2, False, False),  # over one
            (17, 384, 104, 4, 4, False, True),
            (20, 264, 1416, 1, 1, True, False),  # more tiles than stages
            (1, 512, 784, 4, 3, True, True),  # over thirteen
        ]),
    ],
)  # fmt: skip
def test_forward(kernels, dtype, rows, images, channels, positions, heads, gated, mean, logits):
    torch.manual_seed(0)
    z = torch.randn(images, channels, positions).to(dtype)
    w = torch.randn(heads, channels) * 3 / channels**0.5
    if heads != 3:
        w = w.to(dtype)
    b, score_w, score_b = torch.randn(heads), torch.randn(heads, channels) / 8, torch.randn(heads)
    empty = lambda *sizes, kind=torch.float32: torch.full(sizes, torch.nan, dtype=kind)  # noqa: E731
    pooled, lse = empty(images, heads, channels), empty(images, heads)
    all_logits = empty(images, heads, positions) if logits else None
    average = empty(images, channels) if mean else None
    scores, gates, features = empty(images, heads), empty(images, gated), empty(images, gated, channels, kind=dtype)
    kernels.forward(
        KINDS[dtype], images, channels, positions, heads, gated, layout(z, rows), rows, w, KINDS[w.dtype],
        b, score_w if gated else None, score_b, pooled, lse, all_logits, average, scores, gates, features,
        None, 0, None, None, None, processors=40 if rows in (SPREAD_LAST, SPREAD_ROWS) else 2,
    )  # fmt: skip

    z, w = z.double(), w.to(dtype).double()
    expected_logits = torch.einsum("kc,ncs->nks", w, z) + b[:, None].double()
    expected = torch.einsum("nks,ncs->nkc", expected_logits.softmax(2), z)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), expected_logits.logsumexp(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled.double(), expected, rtol=eps, atol=eps)
    if logits:
        torch.testing.assert_close(all_logits.double(), expected_logits, rtol=1e-5, atol=1e-5)
    if mean:
        torch.testing.assert_close(average.double(), z.mean(2), rtol=1e-5, atol=1e-5)
    if gated:
        t = (pooled.double() * score_w.double()).sum(2) + score_b.double()
        torch.testing.assert_close(scores.double(), t, rtol=1e-5, atol=1e-5)
        g = t[:, :gated].tanh().softmax(1)
        torch.testing.assert_close(gates.double(), g, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.double(), g[:, :, None] * pooled[:, :gated].double(), rtol=eps, atol=eps)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "channels"), [(LAST, 576), (ROWS, 128), (SPREAD_LAST, 64), (SPREAD_ROWS, 384)])
def test_logits_that_grow_from_tile_to_tile(kernels, dtype, rows, channels):
    """Up to 150 for one head and -150 for another, so that nothing is counted from the first maximum for long."""
    torch.manual_seed(0)
    images, positions, heads = 1, 200 if rows == ROWS else 712, 3
    z = torch.randn(images, channels, positions)
    z[:, 0] = torch.linspace(0, 15, positions)
    w = torch.randn(heads, channels) / channels**0.5
    w[:, 0] = torch.tensor([10.0, -10.0, 0.0])
    z, w = z.to(dtype), w.to(dtype)
    pooled, lse = torch.full((images, heads, channels), torch.nan), torch.full((images, heads), torch.nan)
    kernels.forward(
        KINDS[dtype], images, channels, positions, heads, 0, layout(z, rows), rows, w, KINDS[dtype],
        *[None] * 3, pooled, lse, *[None] * 5, None, 0, None, None, None, processors=1,
    )  # fmt: skip
    logits = torch.einsum("kc,ncs->nks", w.double(), z.double())
    torch.testing.assert_close(lse.double(), logits.logsumexp(2), rtol=1e-5, atol=1e-5)
    expected = torch.einsum("nks,ncs->nkc", logits.softmax(2), z.double())
    size = torch.einsum("nks,ncs->nkc", logits.softmax(2), z.double().abs())
    assert ((pooled - expected).abs() <= torch.finfo(dtype).eps * (expected.abs() + size)).all()


def merged(part_m, part_d, part_p):
    """m, d, P of [N, splits, ...], as merge_kernel of attend_forward.py makes them, in float64."""
    m, d, p = part_m.double(), part_d.double(), part_p.double()
    most = m.amax(1, keepdim=True)
    scale = (m - most).exp()
    return most.squeeze(1), (d * scale).sum(1), (p * scale[..., None]).sum(1)


@emulated
@pytest.mark.parametrize("mean", [False, True])
def test_few_images_are_split(kernels, mean):
    torch.manual_seed(0)
    images, channels, positions, heads = 2, 576, 200, 3
    z = torch.randn(images, channels, positions).bfloat16()
    w, b = torch.randn(heads, channels).bfloat16() / 8, torch.randn(heads)
    splits, logits = torch.zeros(1, dtype=torch.int64), torch.full((images, heads, positions), torch.nan)

    def call(*splits_and_parts):
        kernels.forward(
            1, images, channels, positions, heads, 0, layout(z, LAST), LAST, w, 1, b, None, None, None, None, logits,
            z if mean else None, None, None, None, *splits_and_parts, processors=9,
        )  # fmt: skip

    call(splits, 0, None, None, None)
    assert int(splits) > 2
    parts = [torch.full((images, int(splits), heads + mean, *more), torch.nan) for more in ((), (), (channels,))]
    call(None, int(splits), *parts)
    m, d, p = merged(*parts)
    expected_logits = torch.einsum("kc,ncs->nks", w.double(), z.double()) + b[:, None].double()
    torch.testing.assert_close(logits.double(), expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((m + d.log())[:, :heads], expected_logits.logsumexp(2), rtol=1e-5, atol=1e-5)
    expected = torch.einsum("nks,ncs->nkc", expected_logits.softmax(2), z.double())
    eps = torch.finfo(z.dtype).eps
    torch.testing.assert_close((p / d[..., None])[:, :heads], expected, rtol=eps, atol=eps)
    if mean:
        torch.testing.assert_close((p / d[..., None])[:, heads], z.double().mean(2), rtol=1e-5, atol=1e-5)


@emulated
@pytest.mark.parametrize(
    ("rows", "images", "channels", "side", "expected"),
    [
        *((rows, 1, 256, 56, 32) for rows in (False, True)),  # 96 KB each
        *((rows, 1, 64, 14, 1) for rows in (False, True)),
        *((rows, 140, 256, 56, 1) for rows in (False, True)),  # more images than multiprocessors
        (False, 8, 512, 28, 16),  # of 132 multiprocessors
        (True, 8, 512, 28, 13),  # a tile each
    ],
)
def test_into_how_many_splits_float_images_are_cut(kernels, rows, images, channels, side, expected):
    splits, z = torch.zeros(1, dtype=torch.int64), torch.empty(1)  # which is not read
    kernels.forward(
        KINDS[z.dtype], images, channels, side * side, 4, 0, z, rows, z, KINDS[z.dtype], *[None] * 10, splits, 0,
        None, None, None, processors=132,
    )  # fmt: skip
    assert int(splits) == expected


@emulated
@pytest.mark.parametrize("rows", [LAST, ROWS])
def test_weights_of_another_half_precision_are_refused(kernels, rows):
    """They would be read as the map's."""
    z, w = torch.zeros(2, 640, 49).bfloat16(), torch.zeros(4, 640)
    pooled, lse = torch.zeros(2, 4, 640), torch.zeros(2, 4)

    def call(w):
        kernels.forward(
            KINDS[z.dtype], 2, 640, 49, 4, 0, layout(z, rows), rows, w, KINDS[w.dtype], *[None] * 3, pooled, lse,
            *[None] * 5, None, 0, None, None, None, processors=2,
        )  # fmt: skip

    call(w.bfloat16())
    with pytest.raises(RuntimeError, match="forward returned"):
        call(w.half())


@emulated
@pytest.mark.parametrize("at", [70, 64, 103])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [SPREAD_LAST, SPREAD_ROWS])
def test_what_is_not_finite_of_a_spread_image(kernels, rows, value, at):
    """In one of the two blocks that share it, whose tiles both have position 64."""
    torch.manual_seed(0)
    images, channels, positions, heads = 2, 256, 104, 4
    z, w = torch.randn(images, channels, positions).bfloat16(), torch.randn(heads, channels).bfloat16() / 16
    z[1, 100, at] = value
    pooled, lse = torch.full((images, heads, channels), torch.nan), torch.full((images, heads), torch.nan)
    mean = torch.full((images, channels), torch.nan)
    kernels.forward(
        1, images, channels, positions, heads, 0, layout(z, rows), rows, w, 1, *[None] * 3, pooled, lse, None, mean,
        *[None] * 3, None, 0, None, None, None, processors=8,
    )  # fmt: skip
    expected = torch.einsum("nks,ncs->nkc", torch.einsum("kc,ncs->nks", w.float(), z.float()).softmax(2), z.float())
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert pooled[0].isfinite().all() and lse[0].isfinite().all() and not pooled[1].isfinite().all()
    torch.testing.assert_close(mean, z.float().mean(2), rtol=1e-5, atol=1e-5, equal_nan=True)


@emulated
@pytest.mark.parametrize("rows", [SPREAD_LAST, SPREAD_ROWS])
def test_gates_without_weights_of_scores(kernels, rows):
    """Where heads count alike the sweep of few images is told of none."""
    torch.manual_seed(0)
    images, channels, positions, heads, gated = 2, 256, 104, 4, 3
    z, w = torch.randn(images, channels, positions).bfloat16(), torch.randn(heads, channels).bfloat16() / 16
    score_b = torch.randn(heads)
    pooled, lse, scores, gates, features = (
        torch.full(sizes, torch.nan, dtype=dtype)
        for sizes, dtype in [
            ((images, heads, channels), torch.float32),
            ((images, heads), torch.float32),
            ((images, heads), torch.float32),
            ((images, gated), torch.float32),
            ((images, gated, channels), torch.bfloat16),
        ]
    )
    kernels.forward(
        1, images, channels, positions, heads, gated, layout(z, rows), rows, w, 1, None, None, score_b, pooled, lse,
        None, None, scores, gates, features, None, 0, None, None, None, processors=8,
    )  # fmt: skip
    assert torch.equal(scores, score_b.expand(images, heads))
    expected = score_b[:gated].tanh().softmax(0).expand(images, gated)
    torch.testing.assert_close(gates, expected, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(features.float(), expected[:, :, None] * pooled[:, :gated], rtol=eps, atol=eps)


@pytest.mark.parametrize(
    ("shape", "view", "taken"),
    [
        ((4, 256, 28, 28), lambda z: z, True),
        ((4, 256, 28, 28), channels_last, True),
        ((4, 100, 28, 28), lambda z: z, False),  # no whole 8s of channels
        ((4, 104, 28, 28), lambda z: channels_last(z)[:, :100], False),
        ((4, 96, 32, 64), lambda z: z[:, :, :, :48], False),  # rows apart
        ((4, 256, 20, 10), lambda z: z.flatten(2)[:, :, :193], False),  # rows of odd length
        ((4, 520, 28, 28), lambda z: z, False),
        ((4, 64, 8, 8), lambda z: z, False),  # 8 KB
        ((4, 256, 256, 256), lambda z: z, False),  # 32 MB
        ((4, 256, 14, 14), lambda z: z, False),
        ((4, 256, 14, 14), channels_last, True),
    ],
)
def test_which_maps_are_spread(shape, view, taken):
    """Python's rule is of no map that the library would cut alike, or give to another kernel."""
    hopper = pytest.importorskip("ar_kernels.kernels.hopper", reason="the triton package is not installed")
    from ar_kernels.kernels.heuristics import Chip
    from ar_kernels.kernels.tiles import map_strides

    z = view(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    strides, chip = map_strides(z.shape, z.stride(), 2), Chip(132, 9, 227 * 1024)
    assert hopper.spreads_few(strides, z.shape, 4, 2, False, chip) == taken
    assert not hopper.spreads_few(strides, z.shape, 4, 2, True, chip)
    assert not hopper.spreads_few(strides, z.shape, 5, 2, False, chip)


@pytest.mark.parametrize(
    ("view", "splits"),
    [
        (lambda z: z, [1, 0]),
        (channels_last, [1, 0]),
        (lambda z: z.flatten(2)[:, :, :783], [0, 0]),  # rows of odd length are to be dense
    ],
)
def test_the_library_spreads_no_map_that_is_to_be_cut_alike(view, splits):
    hopper = pytest.importorskip("ar_kernels.kernels.hopper", reason="the triton package is not installed")
    if hopper._operators() is None:
        pytest.skip(native.why_not("cuda") or "the native library has no kernels for Hopper")
    z = view(torch.empty(4, 256, 28, 28, dtype=torch.bfloat16, device="meta"))
    asked = torch.ops.ar_kernels_native.sweep_forward_splits
    assert [asked(z.shape, z.stride(), 4, 2, alike) for alike in (False, True)] == splits


@emulated
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [LAST, ROWS])
def test_what_is_not_finite_stays_in_its_image(kernels, rows, value):
    """P as PyTorch makes it, NaN where it has NaN; of dZ and dW_H, that other images have nothing of it."""
    torch.manual_seed(0)
    images, channels, positions, heads = 3, 640, 49, 4
    z = torch.randn(images, channels, positions).bfloat16()
    z[1, 100, 48] = value
    w = torch.randn(heads, channels).bfloat16() / 25
    pooled, lse = torch.full((images, heads, channels), torch.nan), torch.full((images, heads), torch.nan)
    kernels.forward(
        1, images, channels, positions, heads, 0, layout(z, rows), rows, w, 1, *[None] * 3, pooled, lse, *[None] * 5,
        None, 0, None, None, None, processors=1,
    )  # fmt: skip
    expected = torch.einsum("nks,ncs->nkc", torch.einsum("kc,ncs->nks", w.float(), z.float()).softmax(2), z.float())
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert pooled[[0, 2]].isfinite().all() and not pooled[1].isfinite().all()

    pairs = torch.zeros(images, heads, 2, channels, dtype=torch.bfloat16)
    pairs[:, :, 0], pairs[:, :, 1] = w, torch.randn(images, heads, channels)
    dz = torch.full_like(layout(z, rows), torch.nan)
    sizes = (1, images, channels, positions, heads)
    dw = shares(kernels, sizes, (layout(z, rows), None), rows, processors=1)
    kernels.backward(
        *sizes, layout(z, rows), None, dz, rows, pairs, 0, None, lse,
        torch.zeros(images, heads), None, None, dw, torch.zeros(1, dtype=torch.int64), True, processors=1,
    )  # fmt: skip
    assert dz[[0, 2]].isfinite().all() and not dz[1].isfinite().all()
    assert not dw.isfinite().all()


@emulated
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "gated", "mean", "logits", "processors"),
    [
        (False, 3, 32, 9, 4, 4, False, True, 2),  # most groups have nothing to do
        (False, 3, 96, 130, 4, 4, True, False, 2),
        (False, 2, 160, 300, 4, 0, True, True, 2),
        (False, 5, 320, 64, 3, 2, True, True, 2),  # images that follow each other in a block
        (False, 2, 100, 50, 2, 2, False, False, 2),  # channels in no whole 32s
        (False, 2, 1024, 49, 4, 3, True, True, 2),
        (False, 1, 2048, 49, 1, 1, False, False, 1),
        (False, 2, 96, 900, 3, 3, True, True, 7),  # split: 96 KB each, at least
        (False, 1, 256, 249, 4, 0, False, False, 9),
        (True, 3, 24, 12, 4, 4, False, True, 2),
        (True, 2, 104, 132, 4, 4, True, False, 2),
        (True, 3, 168, 196, 3, 2, True, True, 2),
        (True, 5, 328, 64, 1, 1, False, True, 2),
        (True, 2, 648, 36, 2, 0, True, False, 2),
        (True, 1, 1016, 52, 4, 3, False, False, 1),
        (True, 2, 104, 748, 3, 3, True, True, 7),  # split
        (True, 1, 256, 300, 4, 0, False, False, 9),
        (True, 3, 256, 49, 4, 4, True, True, 2),  # rows of any length
        (True, 2, 128, 169, 3, 3, False, True, 2),
        (True, 1, 32, 255, 1, 1, True, False, 1),
        (True, 3, 96, 143, 2, 1, True, True, 2),
        (True, 3, 896, 63, 1, 1, True, True, 2),  # in two blocks, one of which has no head
        (True, 5, 384, 149, 3, 2, False, False, 2),  # in two blocks
        (True, 4, 512, 196, 4, 4, True, True, 2),
        (True, 3, 1024, 196, 2, 2, True, False, 2),  # in four, two of which have no head
        (True, 2, 2048, 196, 3, 0, True, True, 2),  # in eight, and more chunks than slots
    ],
)
def test_float_forward(kernels, rows, images, channels, positions, heads, gated, mean, logits, processors):
    torch.manual_seed(0)
    z = torch.randn(images, channels, positions)
    w = torch.randn(heads, channels) * 3 / channels**0.5
    b, score_w, score_b = torch.randn(heads), torch.randn(heads, channels) / 8, torch.randn(heads)
    empty = lambda *sizes: torch.full(sizes, torch.nan)  # noqa: E731
    pooled, lse = empty(images, heads, channels), empty(images, heads)
    all_logits = empty(images, heads, positions) if logits else None
    average = empty(images, channels) if mean else None
    scores, gates, features = empty(images, heads), empty(images, gated), empty(images, gated, channels)
    splits = torch.zeros(1, dtype=torch.int64)

    def call(*splits_and_parts):
        kernels.forward(
            KINDS[torch.float32], images, channels, positions, heads, gated, layout(z, rows), rows, w, KINDS[w.dtype],
            b, score_w if gated else None, score_b, pooled, lse, all_logits, average, scores, gates, features,
            *splits_and_parts, processors=processors,
        )  # fmt: skip

    call(splits, 0, None, None, None)
    parts = [empty(images, int(splits), heads + mean, *more) for more in ((), (), (channels,))]
    call(None, int(splits), *parts)
    z, w = z.double(), w.double()
    expected_logits = torch.einsum("kc,ncs->nks", w, z) + b[:, None].double()
    expected = torch.einsum("nks,ncs->nkc", expected_logits.softmax(2), z)
    if int(splits) > 1:
        assert processors > 2
        m, d, p = merged(*parts)
        lse, pooled = (m + d.log())[:, :heads], (p / d[..., None])[:, :heads]
        average = (p / d[..., None])[:, heads] if mean else None
    else:
        assert processors <= 2

    # Of sums of products by their absolute values, half of a unit in the last place for each of the few roundings.
    of_logits = torch.einsum("kc,ncs->nks", w.abs(), z.abs()) + b.abs()[:, None].double()
    most = of_logits.amax(2)
    check_float(lse, expected_logits.logsumexp(2), most)
    of_pooled = torch.einsum("nks,ncs->nkc", expected_logits.softmax(2), z.abs()) * (1 + most[:, :, None])
    check_float(pooled, expected, of_pooled)
    if logits:
        check_float(all_logits, expected_logits, of_logits)
    if mean:
        check_float(average, z.mean(2), z.abs().mean(2))
    if gated and int(splits) == 1:
        t = (pooled.double() * score_w.double()).sum(2) + score_b.double()
        check_float(scores, t, (pooled.double() * score_w.double()).abs().sum(2) + score_b.abs().double())
        g = t[:, :gated].tanh().softmax(1)
        check_float(gates, g, torch.full_like(g, 2))
        check_float(features, g[:, :, None] * pooled[:, :gated].double(), 2 * pooled[:, :gated].abs().double())


@emulated
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "channels", "positions"),
    [
        (False, 160, 1024),  # 16 groups of one warp
        (False, 512, 150),  # of four warps
        (True, 160, 500),
        (True, 1016, 100),  # a slot more than a tile has chunks
        (True, 512, 49),
        (True, 1024, 101),  # in two blocks
    ],
)
def test_float_warps_may_be_far_apart(kernels, rows, channels, positions, seed, monkeypatch):
    """Many more tiles than slots, and warps in a random order of which some go ahead as far as they can."""
    monkeypatch.setenv("AR_EMULATOR_SEED", str(seed))
    test_float_forward(kernels, rows, 2, channels, positions, 4, 4, True, False, 1)
    test_float_backward(kernels, rows, 2, channels, positions, 4, True, False, False, 1)


@pytest.mark.parametrize("rows", [False, True])
def test_float_maps_that_are_promised_fit(kernels, rows, monkeypatch):
    """native.sweeps_float32 knows no kernel, but none may refuse a map that it names."""
    monkeypatch.setattr(native, "has_sweeps", lambda: True)
    something, count = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    promised = 0
    for channels in (4, 8, 96, 100, 104, 128, 384, 1016, 1024, 1032, 1280, 2048, 2176, 2556, 2560, 2564):
        for positions in (1, 4, 36, 49, 64, 100, 196, 225, 231, 256, 3136):
            z = torch.empty(2, channels, positions, device="meta")
            z = z if rows else z.transpose(1, 2).contiguous().transpose(1, 2)
            if not native.sweeps_float32(z, 4):
                continue
            promised += 1
            sizes = (KINDS[torch.float32], 2, channels, positions, 4)
            for upstream in (None, something):
                kernels.backward(*sizes, something, upstream, None, rows, *([None, 0] + [None] * 6), count, True)
            kernels.forward(
                *sizes, 0, something, rows, None, KINDS[torch.float32], *[None] * 10, count, 0, None, None, None
            )
    assert promised > 50


def test_a_block_has_no_more_warps_than_registers_are_for(kernels):
    """With 16 blocks of 16 channels a warp has room in a block of 8 warps: 2304 channels would take 9."""
    something, count = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for channels, taken in ((768, True), (2048, True), (2304, False), (2560, False), (3328, False), (4096, False)):
        kernels.forward(
            KINDS[torch.bfloat16], 2, channels, 49, 4, 0, something, LAST, None, KINDS[torch.bfloat16],
            *[None] * 10, count, 0, None, None, None,
        )  # fmt: skip
        assert (int(count) > 0) == taken, channels


class Operators:
    """ar_kernels_native's sweeps as the emulator runs them."""

    def __init__(self, kernels, processors):
        self.kernels = kernels
        self.processors = processors
        self.called = []

    def forward_sweep(self, z, sizes, strides, heads, itemsize, alike, chip):
        if itemsize == 2:  # images alone are split, and these are not few for what processors there are
            return self.forward, 1
        splits = torch.zeros(1, dtype=torch.int64)
        self.kernels.forward(
            KINDS[torch.float32], sizes[0], sizes[1], sizes[2] * sizes[3], heads, 0, None, z.unit == "s", None,
            KINDS[torch.float32], *[None] * 10, splits, 0, None, None, None, processors=self.processors,
        )  # fmt: skip
        return self.forward, int(splits)

    def backward_sweep(self, z, sizes, strides, up_strides, dz_strides, heads, itemsize, chip):
        positions = sizes[2] * sizes[3]
        programs = torch.zeros(1, dtype=torch.int64)
        upstream = None if up_strides is None else programs  # that there is one
        empty = [None, upstream, None, z.unit == "s", None, 0, *[None] * 6]
        kind = KINDS[torch.float32 if itemsize == 4 else torch.float16]
        self.kernels.backward(
            kind, sizes[0], sizes[1], positions, heads, *empty, programs, True, processors=self.processors
        )
        return self.backward, int(programs)

    def forward(self, z, w, b, score_w, score_b, pooled, lse, logits, mean, scores, gates, features, *parts):
        self.called.append("forward")
        splits = 0 if parts[0] is None else parts[0].shape[0] // z.shape[0]
        images, channels, height, width = z.shape
        heads, gated = w.shape[0], 0 if gates is None else gates.shape[1]
        self.kernels.forward(
            KINDS[z.dtype], images, channels, height * width, heads, gated, z, z.stride(3) == 1, w, KINDS[w.dtype],
            *[None if value is None else value.float() for value in (b, score_w, score_b)],
            pooled, lse, logits, mean, scores, gates, features, None, splits, *parts, processors=self.processors,
        )  # fmt: skip

    def backward(self, z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, dw, *of_pooled):
        self.called.append("backward")
        images, channels, height, width = z.shape
        heads = lse.shape[1]
        if pairs is None:
            w, score_w, pooled, scores, gates, *others = of_pooled
            self.kernels.backward_of(
                images, channels, height * width, heads, gates.shape[1], z, upstream, dz,
                None if b is None else b.float(), lse, grad_logits, dw, w, score_w.float(), pooled, scores, gates,
                *others, processors=self.processors,
            )  # fmt: skip
            return
        self.kernels.backward(
            KINDS[z.dtype], images, channels, height * width, heads, z, upstream, dz, z.stride(3) == 1, pairs,
            pairs.shape[1] > heads, None if b is None else b.float(), lse, delta, unscale, grad_logits, dw,
            torch.zeros(1, dtype=torch.int64), True,
            processors=self.processors,
        )  # fmt: skip


@emulated
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout_of", [channels_last, torch.Tensor.contiguous])
def test_layers_take_them(kernels, layout_of, dtype, gated, monkeypatch, device):
    """A layer's outputs and gradients, sweep by sweep from the emulator, as close to float64's as Triton's are."""
    if device.type != "cpu":
        pytest.skip("Triton's kernels beside the emulator's run in its interpreter: run without --device")
    hopper = pytest.importorskip("ar_kernels.kernels.hopper", reason="the triton package is not installed")
    torch.manual_seed(0)
    tap = layout_of is channels_last
    side = 10 if dtype == torch.float32 else 7
    z = layout_of(torch.randn(3, 256, side, side).to(dtype))
    attention = ar_kernels.AttentionModule(256, 10, heads=4, gated=gated).to(dtype)
    grads = torch.randn(3, 10), torch.randn(3, 4, side, side), layout_of(torch.randn(3, 256, side, side))

    def step(module, z):
        z = z.detach().requires_grad_()
        layer = module(z, masks=True, tap=tap)
        wanted = (layer.hypothesis, layer.masks, layer.feature_map)[: 2 + tap]
        parameters = dict(module.named_parameters())
        given = [grad.to(value) for grad, value in zip(grads, wanted)]
        return [*wanted[:2], *torch.autograd.grad(wanted, [z, *parameters.values()], given)]

    with ar_kernels.use_implementation("reference"):
        expected = step(attention.double(), z.double())
    attention = attention.to(dtype)
    with ar_kernels.use_implementation("triton"):
        plain = step(attention, z)
        operators = Operators(kernels, processors=7 if dtype == torch.float32 else 2)  # splits of float32 images
        monkeypatch.setattr(hopper, "can_read", lambda *maps: True)
        monkeypatch.setattr(hopper, "forward_sweep", operators.forward_sweep)
        monkeypatch.setattr(hopper, "backward_sweep", operators.backward_sweep)
        from ar_kernels.kernels import attend_backward, attend_forward

        for module in (attend_forward, attend_backward):
            module._plan.cache_clear()
        found = step(attention, z)
        for module in (attend_forward, attend_backward):
            module._plan.cache_clear()
    assert operators.called == ["forward", "backward"]
    for i, (value, other, exact) in enumerate(zip(found, plain, expected, strict=True)):
        error, allowed = [(one.detach().double() - exact.detach()).abs().max() for one in (value, other)]
        assert error <= 1.5 * allowed + 1e-6, i


def test_registers_suffice():
    """Of what was compiled: no kernel spills."""
    triton = pytest.importorskip("triton", reason="the triton package, which brings cuobjdump, is not installed")
    if "CUDA" not in native.build_note():
        pytest.skip(f"the native library is {native.build_note()}")
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(native.PATH)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\n *REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) >= 32
    assert [name for name, _, stack, local in kernels if stack != "0" or local != "0"] == []


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_graph_tells_float32_maps_apart(layout, monkeypatch):
    """Of any batch and resolution, without a break or another compilation."""
    monkeypatch.setattr(native, "SWEEPS_FLOAT32", True)
    compiled = torch.compile(lambda z: z + native.sweeps_float32(z, 4), fullgraph=True, dynamic=True, backend="eager")
    for index, (n, h, w) in enumerate([(2, 8, 6), (3, 12, 10), (5, 16, 9)]):
        z = torch.zeros(n, 64, h, w)
        z = z if LAYOUTS[layout] is None else LAYOUTS[layout](z)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert compiled(z).eq(native.sweeps_float32(z, 4)).all()
        assert native.sweeps_float32(z, 4) == native.has_sweeps()


# ---------------------------------------------------------------------------------------------- on a GPU


OF_ANY_DTYPE = [
    ("channels_last", 5, 1024, 14, 14, 4, True),
    ("channels_last", 300, 2048, 7, 7, 4, False),
    ("channels_last", 140, 768, 3, 5, 3, True),
    ("channels_last", 2, 64, 3, 5, 1, False),
    ("channels_last", 3, 1152, 5, 7, 4, True),
    ("channels_last", 2, 256, 40, 30, 4, True),
    ("channels_last", 2, 768, 20, 15, 4, True),  # split
    ("contiguous", 5, 1024, 14, 14, 4, False),
    ("contiguous", 300, 2048, 7, 7, 4, False),
    ("contiguous", 140, 384, 6, 6, 3, False),
    ("contiguous", 3, 128, 7, 7, 4, False),
    ("contiguous", 2, 128, 14, 14, 1, False),
]
OF_FLOAT32 = [
    ("contiguous", 140, 320, 16, 16, 4, True),
    ("contiguous", 2, 32, 4, 4, 1, True),
    ("contiguous", 2, 256, 40, 30, 4, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "n", "c", "h", "w", "k", "tap", "dtype"),
    [
        *((*sizes, dtype) for sizes in OF_ANY_DTYPE for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((*sizes, torch.float32) for sizes in OF_FLOAT32),
    ],
)
def test_within_the_error_budget_on_a_gpu(native_sweeps, layout, n, c, h, w, k, tap, dtype, device):
    """As tests/test_attend.py asks of every implementation; the second and third draw repeat plans of the first."""
    draws = []
    for seed in range(3):
        layer = Layer(n=n, c=c, h=h, w=w, k=k, tap=tap, dtype=dtype, device=device, seed=seed)
        layouts = {"layout": LAYOUTS[layout], "tap_layout": LAYOUTS[layout]}
        results = [layer.run(name, **layouts) for name in ("triton", "eager")]
        draws.append((*results, layer.run("reference", exact=True, **layouts)))
    assert {name for name, found in native_sweeps if found} == {"forward_sweep", "backward_sweep"}
    assert_within_budget(draws, dtype)


@pytest.fixture
def forward_sweeps(monkeypatch):
    """What the library was asked for forward, and gave, where it is the faster one."""
    from ar_kernels.kernels import attend_forward, hopper

    found = []

    def sweep(*arguments, plain=hopper.forward_sweep):
        found.append(plain(*arguments))
        return found[-1]

    monkeypatch.setattr(hopper, "forward_sweep", sweep)
    attend_forward._plan.cache_clear()
    yield found
    attend_forward._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 1, "c": 256, "h": 56, "w": 56, "k": 4},
        {"n": 5, "c": 96, "h": 28, "w": 28, "k": 2, "globals": 2},
        {"n": 66, "c": 512, "h": 8, "w": 8, "k": 4, "mean": False},
        {"n": 2, "c": 136, "h": 12, "w": 20, "k": 1},
        {"n": 3, "c": 384, "h": 16, "w": 13, "k": 2, "gated": False, "bias": False},
        {"n": 1, "c": 40, "h": 200, "w": 200, "k": 4},
        {"n": 16, "c": 256, "h": 28, "w": 28, "k": 4},
    ],
    ids=str,
)
def test_few_images_are_spread_on_a_gpu(forward_sweeps, sizes, layout, dtype, device):
    draws = []
    for seed in range(3):
        layer = Layer(**sizes, dtype=dtype, device=device, seed=seed)
        results = [layer.run(name, layout=LAYOUTS[layout]) for name in ("triton", "eager")]
        draws.append((*results, layer.run("reference", exact=True, layout=LAYOUTS[layout])))
    assert forward_sweeps and all(operator is not None and splits == 1 for operator, splits in forward_sweeps)
    assert_within_budget(draws, dtype)
    again = layer.run("triton", layout=LAYOUTS[layout])
    assert all(torch.equal(again[name], value) for name, value in results[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_larger_batch_finds_its_kernels_compiled_on_a_gpu(forward_sweeps, layout, monkeypatch, device):
    sizes = {"c": 104, "h": 24, "w": 24, "k": 3, "dtype": torch.bfloat16, "device": device}
    Layer(n=2, **sizes).run("triton", layout=LAYOUTS[layout])
    assert forward_sweeps[-1][0] is not None

    compiled = []
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["fn"].name))
    for images, is_spread in ((70, False), (300, False), (1, True)):
        forward_sweeps.clear()
        Layer(n=images, **sizes).run("triton", layout=LAYOUTS[layout])
        assert (forward_sweeps[0][0] is not None) == is_spread
    assert not [name for name in compiled if "attend" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_heads_that_count_alike_on_a_gpu(native_sweeps, layout, dtype, device):
    """Gates without weights of scores: the sweeps get zeros."""
    draws = []
    for seed in range(3):
        layer = Layer(n=5, c=1024, h=7, w=7, k=4, gated=False, tap=False, dtype=dtype, device=device, seed=seed)
        results = [layer.run(name, layout=LAYOUTS[layout]) for name in ("triton", "eager")]
        draws.append((*results, layer.run("reference", exact=True, layout=LAYOUTS[layout])))
    assert {name for name, found in native_sweeps if found} == {"forward_sweep", "backward_sweep"}
    assert_within_budget(draws, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_same_bits_on_every_run_on_a_gpu(native_sweeps, layout, dtype, device):
    layer = Layer(n=150, c=1024, h=7, w=7, k=4, tap=False, dtype=dtype, device=device)
    first = layer.run("triton", layout=LAYOUTS[layout])
    for _ in range(4):
        again = layer.run("triton", layout=LAYOUTS[layout])
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_at_any_address_on_a_gpu(native_sweeps, dtype, device):
    """The sweeps read several at once; where these begin elsewhere, Triton's kernels take over."""
    draws = []
    for seed in range(3):
        layer = Layer(n=3, c=1024, h=7, w=7, k=4, dtype=dtype, device=device, seed=seed)
        for name in ("mask_weight", "gate_weight"):
            moved = layer.tensors[name].new_empty(layer.tensors[name].numel() + 1)[1:].view_as(layer.tensors[name])
            layer.tensors[name] = moved.copy_(layer.tensors[name])
        draws.append((layer.run("triton"), layer.run("eager"), layer.run("reference", exact=True)))
    assert_within_budget(draws, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "n", "c", "side", "dtype"),
    [
        ("channels_last", 128, 192, 32, torch.bfloat16),
        ("channels_last", 128, 192, 32, torch.float16),
        ("channels_last", 128, 160, 32, torch.float32),
        ("channels_last", 128, 1024, 14, torch.bfloat16),
        ("channels_last", 128, 1024, 14, torch.float16),
        ("channels_last", 128, 1024, 14, torch.float32),
        ("contiguous", 128, 1024, 14, torch.bfloat16),
        ("contiguous", 256, 512, 7, torch.bfloat16),
        ("contiguous", 256, 512, 7, torch.float16),
        ("contiguous", 256, 512, 7, torch.float32),
        ("contiguous", 128, 160, 32, torch.float32),
    ],
)
def test_many_launches_back_to_back_on_a_gpu(native_sweeps, layout, n, c, side, dtype, device):
    """Nothing is waited for between them, so that blocks of one begin while the last of another end."""
    tensors = Layer(n=n, c=c, h=side, w=side, k=4, dtype=dtype, device=device).tensors
    tensors["feature_map"] = (LAYOUTS[layout] or torch.Tensor.contiguous)(tensors["feature_map"])
    tensors = {name: value.requires_grad_() for name, value in tensors.items()}

    def step():
        output = ar_kernels.attention_module(**tensors, mean=True, implementation="triton")
        outputs = [value for value in output if value is not None]
        grads = torch.autograd.grad(outputs, list(tensors.values()), [value.detach() for value in outputs])
        return [value.detach() for value in (*outputs, *grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = [step() for _ in range(2)][0]  # plans are made outside of the graph
    assert {name for name, found in native_sweeps if found} == {"forward_sweep", "backward_sweep"}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [step() for _ in range(10)]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, first, strict=True))
