"""The gated cross-entropies and the mask regulariser: their formulas in loops, their derivatives, what they keep."""

import pytest
import torch
import torch.nn.functional as F

import ar_kernels
from ar_kernels import gated_binary_cross_entropy, gated_cross_entropy, mask_regulariser

GATINGS = ("softmax", "sigmoid", None)
N, D, L = 5, 3, 7


def draw(device, dtype=torch.float64, seed=0):
    """hypotheses [N, D, L], scores [N, D], classes [N], several labels [N, L]."""
    generator = torch.Generator().manual_seed(seed)
    hypotheses = (3 * torch.randn(N, D, L, generator=generator, dtype=torch.float64)).to(device, dtype)
    scores = torch.randn(N, D, generator=generator, dtype=torch.float64).tanh().to(device)
    classes = torch.randint(0, L, (N,), generator=generator).to(device)
    labels = torch.rand(N, L, generator=generator, dtype=torch.float64).to(device)
    return hypotheses, scores, classes, labels


def gates_of(scores, gating):
    if gating is None:
        return torch.full_like(scores, 1 / scores.shape[1])
    if gating == "softmax":
        return torch.softmax(scores, 1)
    return torch.sigmoid(scores) / (1e-6 + torch.sigmoid(scores).sum(1, keepdim=True))


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gated_cross_entropy_is_the_nll_loss_of_the_log_mix(gating, reduction, device):
    hypotheses, scores, classes, _ = draw(device)
    results = []
    for form in ("gated", "mixed"):
        h, s = hypotheses.clone().requires_grad_(), scores.clone().requires_grad_()
        if form == "gated":
            loss = gated_cross_entropy(h, s, classes, gating=gating, reduction=reduction)
        else:
            mix = ar_kernels.rectify(h, s, mix="log", gating=gating, implementation="reference")
            loss = F.nll_loss(mix, classes, reduction=reduction)
        weight = torch.linspace(1, 2, loss.numel(), device=device, dtype=loss.dtype).view_as(loss)
        grads = torch.autograd.grad((loss * weight).sum(), (h, s), allow_unused=True, materialize_grads=True)
        results.append((loss, *grads))
    for got, truth in zip(*results):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gated_binary_cross_entropy_is_the_gated_sum_over_hypotheses(gating, reduction, device):
    """Label by label in a loop, and gradients of hypotheses, scores and targets from autograd of that loop."""
    hypotheses, scores, _, labels = draw(device)
    results = []
    for form in ("gated", "loop"):
        h, s, y = (value.clone().requires_grad_() for value in (hypotheses, scores, labels))
        if form == "gated":
            loss = gated_binary_cross_entropy(h, s, y, gating=gating, reduction=reduction)
        else:
            gates, rows = gates_of(s, gating), []
            for n in range(N):
                row = 0
                for i in range(D):
                    p = torch.sigmoid(h[n, i])
                    row = row - gates[n, i] * (y[n] * p.log() + (1 - y[n]) * (1 - p).log())
                rows.append(row)
            loss = torch.stack(rows)
            loss = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
        weight = torch.linspace(1, 2, loss.numel(), device=device, dtype=loss.dtype).view_as(loss)
        grads = torch.autograd.grad((loss * weight).sum(), (h, s, y), allow_unused=True, materialize_grads=True)
        results.append((loss, *grads))
    for got, truth in zip(*results):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gating", GATINGS)
def test_derivatives(gating, device):
    hypotheses, scores, classes, labels = draw(device)
    classes = classes[:2] % 4
    h, s, y = (v.clone().requires_grad_() for v in (hypotheses[:2, :2, :4], scores[:2, :2], labels[:2, :4]))
    for function, inputs in (
        (lambda h, s: gated_cross_entropy(h, s, classes, gating=gating), (h, s)),
        (lambda h, s, y: gated_binary_cross_entropy(h, s, y, gating=gating), (h, s, y)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_derivatives_of_the_regulariser(device):
    masks = torch.rand(2, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(mask_regulariser, masks)
    assert torch.autograd.gradgradcheck(mask_regulariser, masks)


def test_functorch(device):
    """torch.func.grad, and vmap of it, against autograd sample by sample."""
    hypotheses, scores, classes, labels = draw(device)
    masks = torch.rand(N, 1, 3, 4, 4, dtype=torch.float64, device=device)
    for function, values in (
        (lambda h, s, t: gated_cross_entropy(h[None], s[None], t[None]), (hypotheses, scores, classes)),
        (lambda h, s, y: gated_binary_cross_entropy(h[None], s[None], y[None]), (hypotheses, scores, labels)),
        (mask_regulariser, (masks,)),
    ):
        got = torch.func.vmap(torch.func.grad(function))(*values)
        for n in range(N):
            first = values[0][n].clone().requires_grad_()
            (truth,) = torch.autograd.grad(function(first, *(value[n] for value in values[1:])), first)
            torch.testing.assert_close(got[n], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype, device):
    """Losses are made in float32: as close to float64 as float32 sums are. Gradients are rounded to the dtype once."""
    hypotheses, scores, classes, labels = draw(device, dtype)
    for function, target in ((gated_cross_entropy, classes), (gated_binary_cross_entropy, labels)):
        results = {}
        for exact in (True, False):
            h = hypotheses.to(torch.float64 if exact else dtype).requires_grad_()
            s = scores.to(torch.float64 if exact else torch.float32).requires_grad_()
            loss = function(h, s, target)
            results[exact] = loss.double(), *torch.autograd.grad(loss, (h, s))
            if not exact:
                assert loss.dtype == torch.float32 and results[exact][1].dtype == dtype
        # a sum of D·L terms of a few operations each, of the size of what is summed
        float32 = 64 * torch.finfo(torch.float32).eps
        scale = hypotheses.abs().max().item()
        assert abs(results[False][0] - results[True][0]) < float32 * scale
        assert (results[False][2].double() - results[True][2]).abs().max() < float32 * scale
        spread = results[True][1].abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        assert ((results[False][1].double() - results[True][1]).abs() <= spread + float32 / N).all()


@pytest.mark.parametrize("function", [gated_cross_entropy, gated_binary_cross_entropy])
def test_no_log_softmax_is_kept(function, device):
    """For backward: the hypotheses themselves, and nothing else as large as they are."""
    hypotheses, scores, classes, labels = draw(device)
    hypotheses.requires_grad_(), scores.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        loss = function(hypotheses, scores, classes if function is gated_cross_entropy else labels)
    large = [value for value in kept if value.numel() >= hypotheses.numel()]
    assert large and all(value.data_ptr() == hypotheses.data_ptr() for value in large)
    loss.backward()


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 6), (5, 1), (1, 1), (2, 2)])
def test_mask_regulariser_equals_its_formula(height, width, device):
    """In loops over images, heads and positions; an axis of size 1 is not pooled, an odd last row or column dropped."""
    images, heads = 2, 3
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(images, heads, height * width, generator=generator, dtype=torch.float64)
    masks = torch.softmax(logits, 2).view(images, heads, height, width)
    down, across = min(height, 2), min(width, 2)
    total = 0.0
    for n in range(images):
        pooled = torch.zeros(heads, height // down, width // across, dtype=torch.float64)
        for k in range(heads):
            for y in range(height // down):
                for x in range(width // across):
                    patch = masks[n, k, y * down : (y + 1) * down, x * across : (x + 1) * across]
                    pooled[k, y, x] = patch.sum() / (down * across)
        for k in range(heads):
            for j in range(heads):
                if j != k:
                    total += (pooled[k] * pooled[j]).sum().item() ** 2
    torch.testing.assert_close(
        mask_regulariser(masks.to(device)).item(), total / (images * heads**2), rtol=1e-13, atol=0
    )


def test_autocast_changes_nothing(device):
    masks = torch.softmax(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)), 2).view(2, 3, 4, 4)
    hypotheses, scores, classes, labels = draw(device, torch.float32)
    results = []
    for enabled in (False, True):
        m, h = masks.to(device).requires_grad_(), hypotheses.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled):
            losses = [mask_regulariser(m), gated_cross_entropy(h, scores, classes)]
            losses.append(gated_binary_cross_entropy(h, scores, labels))
            assert all(loss.dtype == torch.float32 for loss in losses)
            results.append([*losses, *torch.autograd.grad(sum(losses), (m, h))])
    for plain, cast in zip(*results):
        assert torch.equal(plain, cast)


def test_compiled_in_one_graph(device):
    torch._dynamo.reset()
    hypotheses, scores, classes, labels = draw(device)
    masks = torch.softmax(torch.randn(2, 3, 16, dtype=torch.float64), 2).view(2, 3, 4, 4).to(device)

    def losses(h, s, m):
        loss = gated_cross_entropy(h, s, classes) + gated_binary_cross_entropy([h[:, 0], h[:, 1]], s[:, :2], labels)
        return loss + mask_regulariser(m)

    results = []
    for function in (losses, torch.compile(losses, backend="aot_eager", fullgraph=True)):
        inputs = [value.clone().requires_grad_() for value in (hypotheses, scores, masks)]
        loss = function(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for got, truth in zip(*results):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


CLASSES, LABELS = torch.zeros(N, dtype=torch.int64), torch.zeros(N, L)


@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [
        (gated_cross_entropy, {"target": CLASSES.int()}, TypeError, "target must be int64, got torch.int32"),
        (gated_cross_entropy, {"target": CLASSES[:2]}, ValueError, r"target must be \[N\] = \[5\] .*, got \[2\]"),
        (gated_cross_entropy, {"target": [0]}, TypeError, "target must be a torch.Tensor, got list"),
        (gated_cross_entropy, {"target": CLASSES.to("meta")}, ValueError, "target must be on cpu .*, got meta"),
        (gated_cross_entropy, {"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
        (
            gated_cross_entropy,
            {"gating": "tanh"},
            ValueError,
            "gating must be 'softmax', 'sigmoid' or None, got 'tanh'",
        ),
        (
            gated_cross_entropy,
            {"scores": torch.zeros(N, 2)},
            ValueError,
            r"scores must be \[N, D\+1\] .*, got \[5, 2\]",
        ),
        (gated_cross_entropy, {"hypotheses": []}, ValueError, "hypotheses must hold at least one tensor"),
        (gated_binary_cross_entropy, {"target": CLASSES}, TypeError, "target must be float16, .*, got torch.int64"),
        (
            gated_binary_cross_entropy,
            {"target": LABELS[:, :2]},
            ValueError,
            r"target must be \[N, L\] = \[5, 7\] .*2\]",
        ),
        (gated_binary_cross_entropy, {"hypotheses": None}, TypeError, "hypotheses must be a tensor or a list or tuple"),
    ],
)
def test_errors(function, change, error, message):
    target = CLASSES if function is gated_cross_entropy else LABELS
    arguments = {"hypotheses": torch.zeros(N, D, L), "scores": torch.zeros(N, D), "target": target} | change
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (torch.zeros(2, 3, 4), ValueError, r"masks must be \[N, K, H, W\] with .*, got \[2, 3, 4\]"),
        (torch.zeros(2, 0, 4, 4), ValueError, r"masks must be \[N, K, H, W\] with K, .*, got \[2, 0, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4).int(), TypeError, "masks must be float16, .*, got torch.int32"),
        (None, TypeError, "masks must be a torch.Tensor, got NoneType"),
    ],
)
def test_errors_of_the_regulariser(masks, error, message):
    with pytest.raises(error, match=message):
        mask_regulariser(masks)
