"""The sweeps of csrc/cuda, thread for thread in the emulator, against the formulas in float64."""

import pytest
import torch

import emulator

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="there is no C++ compiler for csrc/cuda's emulator")

WRAPPER = """
    #include "attend_backward.h"
    #include "attend_forward.h"
    using namespace ar_kernels;
    static Kind kind_of(int64_t kind) { return static_cast<Kind>(kind); }
    AR_EXPORT int backward(int64_t kind, int64_t images, int64_t channels, int64_t positions, int64_t heads,
                           void* z, void* upstream, void* dz, int64_t rows, const void* pairs, int64_t mean,
                           const float* b, const float* lse, const float* delta, const float* unscale,
                           const float* grad_logits, float* dw, int64_t* programs) {
      BackwardSweep a = {};
      const auto map = [&](void* data) {
        return rows ? Map{data, channels * positions, positions, 1} : Map{data, channels * positions, 1, channels};
      };
      a.kind = kind_of(kind), a.images = images, a.channels = channels, a.positions = positions, a.heads = heads;
      a.z = map(z), a.upstream = map(upstream), a.dz = map(dz);
      a.pairs = pairs, a.mean = mean, a.b = {b, Kind::kFloat};
      a.lse = lse, a.delta = delta, a.unscale = unscale, a.grad_logits = grad_logits, a.dw = dw;
      if (dz == nullptr) {
        *programs = rows ? backward_rows_programs(a) : backward_programs(a);
        return 0;
      }
      return rows ? sweep_backward_rows(a, nullptr) : sweep_backward(a, nullptr);
    }
    AR_EXPORT int forward(int64_t kind, int64_t images, int64_t channels, int64_t positions, int64_t heads,
                          int64_t gated, void* z, int64_t rows, const void* w, int64_t w_kind, const float* b,
                          const float* score_w, const float* score_b, float* pooled, float* lse, float* logits,
                          float* mean, float* scores, float* gates, void* features) {
      ForwardSweep a = {};
      a.kind = kind_of(kind), a.images = images, a.channels = channels, a.positions = positions, a.heads = heads;
      a.gated = gated;
      a.z = rows ? Map{z, channels * positions, positions, 1} : Map{z, channels * positions, 1, channels};
      a.w = {w, kind_of(w_kind)}, a.b = {b, Kind::kFloat};
      a.score_w = {score_w, Kind::kFloat}, a.score_b = {score_b, Kind::kFloat};
      a.pooled = pooled, a.lse = lse, a.logits = logits, a.mean = mean;
      a.scores = scores, a.gates = gates, a.features = features;
      return rows ? sweep_forward_rows(a, nullptr) : sweep_forward(a, nullptr);
    }
"""
SOURCES = [f"csrc/cuda/attend_{name}.cu" for name in ("backward", "backward_rows", "forward", "forward_rows")]
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@pytest.fixture(scope="module")
def kernels():
    return emulator.build(*SOURCES, wrapper=WRAPPER)


def layout(z, rows):
    """[N, C, S] as the kernels read it."""
    return z.contiguous() if rows else z.transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "mean", "tapped", "direct"),
    [
        (False, 3, 64, 9, 4, False, False, False),
        (False, 2, 128, 49, 4, True, False, False),
        (False, 2, 640, 70, 3, True, True, True),
        (False, 1, 1280, 33, 1, False, True, False),
        (True, 3, 128, 49, 4, False, False, False),
        (True, 2, 256, 36, 4, True, False, True),
        (True, 2, 256, 196, 3, True, False, False),
        (True, 1, 128, 16, 1, False, False, False),
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
    kernels.backward(*sizes, *maps, None, rows, *([None, 0] + [None] * 6), programs, processors=2)
    dw = torch.full((int(programs), heads, channels), torch.nan)
    dz = torch.full_like(maps[0], torch.nan)
    kernels.backward(
        *sizes, *maps, dz, rows, pairs, mean, b, lse, delta, unscale, grad_logits, dw, programs, processors=2
    )

    z, w, dp = z.double(), w.double(), dp.double()
    scale = 1 if unscale is None else 1 / unscale[:, None, None].double()
    a = torch.exp(torch.einsum("kc,ncs->nks", w, z) + (b - lse)[:, :, None].double())
    dl = a * (torch.einsum("nkc,ncs->nks", dp[:, :heads], z) - delta[:, :, None].double())
    if direct:
        dl = dl + scale * grad_logits.double()
    a, dl = a.to(dtype).double(), dl.to(dtype).double()
    expected = torch.einsum("nks,nkc->ncs", a, dp[:, :heads]) + torch.einsum("nks,kc->ncs", dl, w)
    if mean:
        expected = expected + dp[:, heads, :, None] / positions
    expected = expected / scale
    if tapped:
        expected = expected + upstream.double()
    expected_dw = torch.einsum("nks,ncs->kc", dl / scale, z)
    dz = dz if rows else dz.transpose(1, 2)
    torch.testing.assert_close(dz.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=4e-2 * dz.abs().max().item() * torch.finfo(dtype).eps * 8)
    torch.testing.assert_close(dw.sum(0).double(), expected_dw, rtol=1e-2, atol=1e-2 * expected_dw.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "images", "channels", "positions", "heads", "gated", "mean", "logits"),
    [
        (False, 3, 64, 9, 4, 4, False, True),
        (False, 2, 128, 49, 4, 0, True, False),
        (False, 2, 640, 70, 3, 2, True, True),
        (False, 1, 1280, 33, 1, 1, False, False),
        (True, 3, 128, 49, 4, 4, False, True),
        (True, 2, 256, 36, 4, 0, True, False),
        (True, 2, 256, 196, 3, 2, True, True),
        (True, 1, 128, 16, 1, 1, False, False),
    ],
)
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
        b, score_w if gated else None, score_b, pooled, lse, all_logits, average, scores, gates, features, processors=2,
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
