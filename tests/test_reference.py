"""The specification against loops over images, heads, labels and positions, and the traps it must not fall into."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import Layer

from ar_kernels import reference

N, C, H, W, K, L = 2, 3, 3, 4, 2, 5


def looked_at(z, weight, n, y, x):
    """Σ_c Σ_taps weight[c, tap] Z[n, c, (y, x) + tap], zero outside the grid."""
    if weight.dim() == 1:
        return sum(float(weight[c] * z[n, c, y, x]) for c in range(C))
    total = 0.0
    for c in range(C):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if 0 <= y + dy < H and 0 <= x + dx < W:
                    total += float(weight[c, dy + 1, dx + 1] * z[n, c, y + dy, x + dx])
    return total


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_attention_module_in_loops(kernel_size):
    t = Layer(n=N, c=C, h=H, w=W, k=K, labels=L, kernel_size=kernel_size).tensors
    z, places = t["feature_map"], [(y, x) for y in range(H) for x in range(W)]
    # W_O [L, K·C(·9)]: head k's classifier for label l is row l, columns of head k
    output_weight = t["output_weight"].view(L, K, *t["mask_weight"].shape[1:])
    hypothesis, gates, logits = reference.attention_module(
        z,
        *(t[name] for name in ("mask_weight", "output_weight", "gate_weight", "mask_bias", "output_bias", "gate_bias")),
    )
    for n in range(N):
        per_head, scores = [], []
        for k in range(K):
            look = [looked_at(z, t["mask_weight"][k], n, y, x) + float(t["mask_bias"][k]) for y, x in places]
            for s, value in enumerate(look):
                assert math.isclose(value, float(logits[n, k, s]), rel_tol=1e-12, abs_tol=1e-12)
            weights = [math.exp(value) for value in look]
            masks = [weight / sum(weights) for weight in weights]  # over positions, of one head and one image
            per_head.append(
                [
                    sum(
                        a * (looked_at(z, output_weight[label, k], n, y, x) + float(t["output_bias"][k, label]))
                        for a, (y, x) in zip(masks, places)
                    )
                    for label in range(L)
                ]
            )
            scores.append(
                sum(
                    a * (looked_at(z, t["gate_weight"][k], n, y, x) + float(t["gate_bias"][k]))
                    for a, (y, x) in zip(masks, places)
                )
            )
        bounded = [math.exp(math.tanh(score)) for score in scores]
        for k in range(K):
            assert math.isclose(bounded[k] / sum(bounded), float(gates[n, k]), rel_tol=1e-12)
        for label in range(L):
            mixed = sum(bounded[k] / sum(bounded) * per_head[k][label] for k in range(K))
            assert math.isclose(mixed, float(hypothesis[n, label]), rel_tol=1e-11, abs_tol=1e-12)


def test_output_maps_are_head_major():
    """As a convolution, channel k·L + l belongs to head k and label l: not l·K + k."""
    layer = Layer(n=N, c=C, h=H, w=W, k=K, labels=L)
    z, weight = layer.tensors["feature_map"], layer.tensors["output_weight"]
    kernel = torch.empty(K * L, C, 1, 1, dtype=weight.dtype)
    for k in range(K):
        for label in range(L):
            kernel[k * L + label, :, 0, 0] = weight[label, k * C : (k + 1) * C]
    channels = F.conv2d(z, kernel)
    maps = reference.output_maps(z, weight, None, heads=K)
    for k in range(K):
        for label in range(L):
            torch.testing.assert_close(maps[:, k, label], channels[:, k * L + label].flatten(1))


def test_masks_are_softmax_over_positions_and_sums_are_no_means():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(7.0), 0.0]]])  # two heads, two positions
    masks = reference.attention_masks(logits)
    torch.testing.assert_close(masks, torch.tensor([[[0.25, 0.75], [0.875, 0.125]]]))
    maps = torch.tensor([[[[4.0, 8.0]], [[8.0, 16.0]]]])  # one label
    torch.testing.assert_close(reference.head_hypotheses(masks, maps), torch.tensor([[[7.0], [9.0]]]))


def test_gates_are_softmax_over_heads_of_tanh():
    gates = reference.layer_gates(torch.tensor([[100.0, -100.0]]))  # tanh bounds what one head can win
    torch.testing.assert_close(gates[0, 0], torch.tensor(math.e / (math.e + 1 / math.e)))


def test_rectify_by_hand():
    h = torch.tensor([[[0.0, math.log(3.0)], [math.log(3.0), 0.0]]], dtype=torch.float64)  # p: (1/4, 3/4), (3/4, 1/4)
    s = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # softmax: 3/4, 1/4

    def mixed(mix, gating="softmax"):
        return reference.rectify(h, s, mix, gating)[0].tolist()

    log3, log4 = math.log(3.0), math.log(4.0)
    assert mixed("logit") == pytest.approx([0.25 * log3, 0.75 * log3])
    assert mixed("log") == pytest.approx([0.25 * log3 - log4, 0.75 * log3 - log4])
    assert mixed("prob") == pytest.approx([math.log(3 / 8), math.log(5 / 8)])
    assert mixed("prob", None) == pytest.approx([math.log(0.5), math.log(0.5)])
    gate, other = 0.75 / (1.25 + 1e-6), 0.5 / (1.25 + 1e-6)  # σ(log 3) = 3/4, σ(0) = 1/2
    assert mixed("logit", "sigmoid") == pytest.approx([other * log3, gate * log3])
