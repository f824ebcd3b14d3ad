"""Values at the edge, and maps of unusual sizes: the same class of result (NaN, ∞, -∞, finite) as the reference has.

The reference computes in float64, and its results are then rounded to the dtype they are compared in: what float16
holds must not overflow on the way. NaN where it has NaN, and nowhere else.
"""

import pytest
import torch

import ar_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INF, NAN = float("inf"), float("nan")


def inputs(taps: int, shape: tuple[int, ...] = (3, 8, 4, 4)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    kernel, channels = ((3, 3) if taps == 9 else ()), shape[1]
    return {
        "feature_map": draw(*shape),
        "mask_weight": draw(2, channels, *kernel) / 3,
        "output_weight": draw(5, 2 * channels * taps) / 3,
        "gate_weight": draw(2, channels, *kernel) / 3,
        "mask_bias": draw(2),
    }


def run(tensors: dict, implementation: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Outputs and gradients of attention_module, of attend and of its lse alone."""
    t = {name: value.to(device, dtype).requires_grad_() for name, value in tensors.items()}
    module = ar_kernels.attention_module(**t, masks=True, mean=True, tap=True, implementation=implementation)
    names = ("feature_map", "mask_weight", "mask_bias")
    attended = ar_kernels.attend(*(t[name] for name in names), logits=True, implementation=implementation)
    results = {}
    for prefix, outputs, wanted in (
        ("module", module._asdict(), list(t)),
        ("attend", attended._asdict(), names),
        ("lse", {"lse": attended.lse}, names),
    ):
        outputs = {name: value for name, value in outputs.items() if value is not None}
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(value.shape, generator=generator).to(value) for value in outputs.values()]
        received = torch.autograd.grad(
            list(outputs.values()), [t[name] for name in wanted], grads, allow_unused=True, retain_graph=True
        )
        results |= {f"{prefix}.{name}": value.detach() for name, value in outputs.items()}
        results |= {f"{prefix}.d_{name}": value for name, value in zip(wanted, received) if value is not None}
    return results


def classes(value: torch.Tensor) -> torch.Tensor:
    """0 where finite, 1 for ∞, 2 for -∞, 3 for NaN."""
    return value.isposinf() + 2 * value.isneginf() + 3 * value.isnan()


def assert_same_classes(got: dict, exact: dict) -> None:
    """Two exceptions where not all is finite. The gradient of a mask bias: it cancels in the masks, and what the
    reference sums to NaN the formulas in use leave out (docs/math.md). And of lse alone: δ has P in it, though times 0.
    """
    assert got.keys() >= exact.keys()
    finite = all(truth.isfinite().all() for truth in exact.values())
    for name, truth in exact.items():
        if finite or not (name.startswith("lse.d_") or name.endswith("d_mask_bias")):
            assert torch.equal(classes(got[name]), classes(truth.to(got[name].dtype))), name


def plant(name: str, index: tuple, value: float):
    def planted(tensors: dict) -> None:
        tensors[name][index] = value

    return planted


def collapse(tensors: dict) -> None:
    """A head's masks on one pixel, its logits some thousands there."""
    weight = tensors["mask_weight"]
    centre = weight if weight.dim() == 2 else weight[:, :, 1, 1]
    tensors["feature_map"][:, :, 2, 1] = 1e3 * centre[0].sign()


def scaled(**factors: float):
    def planted(tensors: dict) -> None:
        for name, factor in factors.items():
            tensors[name] *= factor

    return planted


def constant(tensors: dict) -> None:
    tensors["feature_map"] = torch.full_like(tensors["feature_map"], 0.7)


PLANTED = {
    "NaN": plant("feature_map", (1, 2, 1, 1), NAN),
    "NaN in the last position": plant("feature_map", (1, 2, 3, 3), NAN),
    "∞": plant("feature_map", (1, 2, 1, 1), INF),
    "-∞": plant("feature_map", (1, 2, 1, 1), -INF),
    "a row of ∞": plant("feature_map", (1, 2, 1), INF),
    "a row of -∞": plant("feature_map", (1, slice(None), 1), -INF),
    "an image of ∞": plant("feature_map", (1,), INF),
    "NaN and ∞": lambda t: (PLANTED["NaN"](t), PLANTED["∞"](t)),
    "logits of a head NaN": plant("mask_bias", (0,), NAN),
    "logits of a head ∞": plant("mask_bias", (0,), INF),
    "logits of a head -∞": plant("mask_bias", (0,), -INF),
    "a mask weight NaN": plant("mask_weight", (0, 1), NAN),
    "a mask weight ∞": plant("mask_weight", (0, 1), INF),
    "a gate weight NaN": plant("gate_weight", (0, 1), NAN),
    "an output weight NaN": plant("output_weight", (0, 1), NAN),
    "logits of 1e4": scaled(mask_weight=1e4),
    "logits beyond float16": scaled(mask_weight=2e4, feature_map=8),
    "denormals": scaled(feature_map=2e-40),
    "float16's smallest": scaled(feature_map=6e-8),
    "masks on one pixel": collapse,
    "a constant map": constant,
}


IN_BFLOAT16 = {"NaN", "∞", "a row of -∞", "an image of ∞", "logits of a head -∞", "logits of 1e4", "masks on one pixel"}
"""What the interpreter runs of 3×3 heads in bfloat16, which has float32's range and float16's path."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [1, 9])
def test_classes_of_results(taps, dtype, implementation, device):
    slow = implementation == "triton" and taps == 9 and device.type == "cpu"
    for name, planted in PLANTED.items():
        if taps == 9 and name == "a mask weight ∞":
            continue  # times the padding's zeros: NaN or not, as the convolution's algorithm has it
        if slow and dtype == torch.bfloat16 and name not in IN_BFLOAT16:
            continue
        tensors = inputs(taps, shape=(2, 8, 4, 4))
        planted(tensors)
        tensors = {key: value.to(dtype).double() for key, value in tensors.items()}
        exact = run(tensors, "reference", torch.float64, device)
        try:
            assert_same_classes(run(tensors, implementation, dtype, device), exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_classes_where_programs_share_an_image(value, implementation, device):
    """Parts of the sums that are not finite, or have nothing to count from, meet parts that are."""
    for where in (plant("feature_map", (0, 2, 20, 3), value), plant("mask_bias", (0,), value)):
        tensors = inputs(1, shape=(1, 8, 24, 23))
        where(tensors)
        exact = run(tensors, "reference", torch.float64, device)
        assert_same_classes(run(tensors, implementation, torch.float32, device), exact)


@pytest.mark.parametrize("taps", [1, 9])
def test_other_images_are_untouched(taps, implementation, device):
    """What is not finite stays in its image, and one channel's in that channel's mean."""
    clean, broken = inputs(taps), inputs(taps)
    broken["feature_map"][1, 2, 1, 1] = NAN
    one, other = (run(t, implementation, torch.float32, device) for t in (clean, broken))
    for name in ("pooled", "lse", "logits"):
        assert torch.equal(one[f"attend.{name}"][[0, 2]], other[f"attend.{name}"][[0, 2]]), name
    assert torch.equal(one["module.mean"].isnan().nonzero(), torch.zeros(0, 2, dtype=torch.long, device=device))
    assert other["module.mean"].isnan().nonzero().tolist() == [[1, 2]]


def term_unit(implementation: str, device: torch.device, dtype: torch.dtype) -> float:
    """By which share of itself a term of a product may be off: a rounding of the dtype, at most. On a GPU the Triton
    kernels make three TF32 products of one in float32, which keep 21 bits (docs/numerics.md): one unit of the 21st."""
    splits = implementation == "triton" and device.type == "cuda" and dtype == torch.float32
    return 2.0**-20 if splits else torch.finfo(dtype).eps


def assert_product_by_one(got: torch.Tensor, truth: torch.Tensor, unit: float) -> None:
    """Sums of one value times 1 and zeros: the same bits, unless products are made of shorter ones."""
    slack = unit * truth.abs() if unit > torch.finfo(truth.dtype).eps else torch.zeros_like(truth)
    assert ((got - truth).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks_that_collapse_to_one_pixel(dtype, implementation, device):
    """The mask is 1 there and 0 elsewhere, the pooled features are that pixel, and its gradient goes nowhere else."""
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    z[:, 0] = 0
    z[0, 0, 1, 2], z[1, 0, 0, 0] = 1.0, 1.0
    z.requires_grad_()
    w = torch.zeros(1, 4, device=device, dtype=dtype)
    w[0, 0] = 1e4
    out = ar_kernels.attend(z, w.requires_grad_(), masks=True, implementation=implementation)
    assert out.masks.flatten(1).argmax(dim=1).tolist() == [5, 0]
    assert torch.equal(out.masks.flatten(1).sort(dim=1).values[0].cpu(), torch.tensor([0.0] * 8 + [1.0], dtype=dtype))
    pixels = torch.stack([z[0, :, 1, 2], z[1, :, 0, 0]]).detach()
    unit = term_unit(implementation, device, dtype)
    assert_product_by_one(out.pooled[:, 0], pixels, unit)
    dz, dw = torch.autograd.grad(out.pooled.sum(), (z, w))
    expected = torch.zeros_like(z)
    expected[0, :, 1, 2], expected[1, :, 0, 0] = 1, 1
    # dℓ = Σ_c Z_c - Σ_c P_c is 0, where both sums have the same terms. If not, a term is off in Z and in P, by a unit
    # each, and four additions of each sum round by less than another; a last unit is the product's that dℓ goes into.
    slack = 4 * unit * pixels.abs().sum(dim=1) if unit > torch.finfo(dtype).eps else pixels.new_zeros(2)
    assert ((dz - expected).abs() <= expected * (slack[:, None] * w.abs())[..., None, None]).all()
    assert (dw.abs() <= slack @ pixels.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_constant_map(dtype, implementation, device):
    """Masks are 1/S, pooled features the constant, and the attention weights get no gradient but rounding."""
    z = torch.full((2, 6, 5, 5), 0.75, dtype=dtype, device=device).requires_grad_()
    w = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    out = ar_kernels.attend(z, w, masks=True, mean=True, implementation=implementation)
    torch.testing.assert_close(out.masks, torch.full_like(out.masks, 1 / 25), rtol=1e-6, atol=0)
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}  # of the masks, which meet Z in its dtype, and their sum
    torch.testing.assert_close(out.pooled, torch.full_like(out.pooled, 0.75), **rounding)
    torch.testing.assert_close(out.mean, torch.full_like(out.mean, 0.75))
    (dw,) = torch.autograd.grad(out.pooled.sum(), w)
    assert dw.abs().max() <= 6 * 4 * torch.finfo(dtype).eps  # 2·C·|dP|·|Z|·|Z| roundings of half an ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_position(dtype, implementation, device):
    """S = 1: the only mask is 1 whatever its logit, pooled features and mean are the map."""
    z = torch.randn(3, 5, 1, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    w = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    out = ar_kernels.attend(z, w, masks=True, mean=True, implementation=implementation)
    torch.testing.assert_close(out.masks, torch.ones_like(out.masks))
    unit = term_unit(implementation, device, dtype)
    torch.testing.assert_close(out.pooled, z.mT.expand(3, 2, 5))
    assert_product_by_one(out.mean, z[:, :, 0].detach(), unit)
    dz, dw = torch.autograd.grad(out.pooled.sum(), (z, w))
    # A sum of five terms is off by 3 units of what their sizes add up to: one of the terms, half of one for each of
    # four additions. So are ℓ in both directions, whose difference the backward's masks are the exponential of (and its
    # own rounding is less than 4 units), and dA and δ, where P is off by a unit more: dℓ = A (dA - δ) should be 0.
    sizes, weights = z.detach()[:, :, 0].abs(), w.detach().abs()
    masks = unit * (6 * sizes @ weights.T + 4)
    logits = unit * 8 * sizes.sum(dim=1)  # 7 units, and one of the product that dℓ goes into
    slack = masks.sum(dim=1)[:, None] + logits[:, None] * weights.sum(dim=0) + unit * 4  # of dZ's own sum
    assert ((dz[:, :, 0] - 2).abs() <= slack).all()
    assert (dw.abs() <= logits @ sizes).all()


@pytest.mark.parametrize("taps", [1, 9])
def test_no_images(taps, implementation, device):
    results = run(inputs(taps, (0, 8, 4, 4)), implementation, torch.float32, device)
    expected = run(inputs(taps, (0, 8, 4, 4)), "reference", torch.float32, device)
    for name, truth in expected.items():
        assert results[name].shape == truth.shape and torch.equal(results[name], truth), name


@pytest.mark.parametrize("taps", [1, 9])
def test_nothing_is_contiguous(taps, implementation, device):
    """The map, every weight and bias, and a map that is one pixel expanded over images and positions."""

    def strided(value: torch.Tensor) -> torch.Tensor:
        wide = torch.stack([value, torch.full_like(value, NAN)], dim=-1).transpose(0, -2).contiguous()
        return wide.transpose(0, -2)[..., 0]

    tensors = inputs(taps)
    maps = [strided(tensors["feature_map"]), tensors["feature_map"][:1, :, :1, :1].expand(3, 8, 4, 4)]
    weights = {name: strided(value) for name, value in tensors.items() if name != "feature_map"}
    assert not any(value.is_contiguous() for value in (*maps, *weights.values()))
    for feature_map in maps:
        given = {"feature_map": feature_map} | weights
        dense = {name: value.contiguous() for name, value in given.items()}
        got, want = run(given, implementation, torch.float64, device), run(dense, "reference", torch.float64, device)
        for name, truth in want.items():
            torch.testing.assert_close(got[name], truth, rtol=1e-11, atol=1e-11, msg=name)


def test_masks_of_one_position(implementation, device):
    """Logits so far apart that a mask is 1 at one position and the weights have no gradient: what is left of it, by
    kernels on a GPU alone, is of the roundings of dA and δ, which they make of different sums (docs/numerics.md)."""
    generator = torch.Generator().manual_seed(0)
    z = (1000 * torch.randn(4, 32, 7, 7, generator=generator)).to(device).requires_grad_()
    w = torch.randn(4, 32, generator=generator).to(device).requires_grad_()
    grad = (torch.randn(4, 4, 32, generator=generator) / 1000).to(device)
    attended = ar_kernels.attend(z, w, masks=True, implementation=implementation)
    assert attended.masks.flatten(2).amax(2).min() == 1
    dz, dw = torch.autograd.grad(attended.pooled, (z, w), grad)
    largest = z.abs().amax((2, 3)).detach()
    of_da = torch.finfo(torch.float32).eps * torch.einsum("nkc,nc->nk", grad.abs(), largest)
    assert (dw.abs() <= (1 if implementation == "triton" else 1e-6) * torch.einsum("nk,nc->kc", of_da, largest)).all()
    exact = torch.einsum("nkhw,nkc->nchw", attended.masks.detach(), grad)
    assert (
        (dz - exact).abs() <= 1e-6 * exact.abs() + torch.einsum("nk,kc->nc", of_da, w.abs())[:, :, None, None]
    ).all()


# ---------------------------------------------------------------------------------------------- rectify

HYPOTHESES = {
    "NaN": lambda h: h[1, 1].__setitem__(2, NAN),
    "-∞": lambda h: h[1, 1].__setitem__(2, -INF),
    "a hypothesis of -∞": lambda h: h[1, 1].fill_(-INF),
    "a hypothesis of ∞": lambda h: h[1, 1].fill_(INF),
    "1e4": lambda h: h.mul_(1e4),
    "constant": lambda h: h.fill_(3.0),
    "denormals": lambda h: h.mul_(1e-40),
}


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("mix", ["logit", "log", "prob"])
def test_classes_of_rectify(mix, gating, implementation, device):
    for name, planted in HYPOTHESES.items():
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
        s = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        planted(h)
        results = []
        for which, dtype in (("reference", torch.float64), (implementation, torch.float32)):
            values = [h.to(device, dtype).requires_grad_(), s.to(device, dtype).requires_grad_()]
            y = ar_kernels.rectify(*values, mix=mix, gating=gating, implementation=which)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            received = torch.autograd.grad(y, values, grad, allow_unused=True)
            results.append([y] + [torch.zeros_like(v) if g is None else g for v, g in zip(values, received)])
        for what, exact, got in zip(("output", "d_hypotheses", "d_scores"), *results):
            assert torch.equal(classes(got), classes(exact.float())), f"{name}: {what}"


@pytest.mark.parametrize("mix", ["log", "prob"])
def test_labels_that_are_out_of_the_question(mix, implementation, device):
    """So many one after another that a kernel's first tile of labels has no other."""
    h = torch.randn(2, 3, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h[:, 1, :2000] = -INF
    s = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for which in ("reference", implementation):
        values = [value.to(device).requires_grad_() for value in (h, s)]
        y = ar_kernels.rectify(*values, mix=mix, implementation=which)
        seen = y[y > -INF].sum() if mix == "log" else y.sum()
        results.append([y, *torch.autograd.grad(seen, values)])
    for exact, got in zip(*results):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("mix", ["log", "prob"])
def test_an_infinite_hypothesis_is_seen(mix, implementation, device):
    """A softmax over +∞ is NaN, and is not made finite on the way."""
    h = torch.zeros(2, 3, 5, device=device)
    h[1, 1, 2] = INF
    y = ar_kernels.rectify(h, torch.zeros(2, 3, device=device), mix=mix, implementation=implementation)
    assert y[0].isfinite().all() and y[1].isnan().all()


# ---------------------------------------------------------------------------------------------- large


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_beyond_two_to_the_31_elements(layout, taps, device):
    """Forward and backward, with a tap and a mean, checked in the first and the last image."""
    n, c, side = 44, 64, 896  # 2.26e9 elements, 4.5 GB
    kernel = (3, 3) if taps == 9 else ()
    w = (torch.randn(4, c, *kernel, device=device) / (8 * taps**0.5)).bfloat16()
    z = torch.empty(n, c, side, side, dtype=torch.bfloat16, device=device, memory_format=layout).normal_()
    z.requires_grad_()
    out = ar_kernels.attend(z, w, mean=True, tap=True, implementation="triton")
    (grad,) = torch.autograd.grad(
        [out.pooled, out.mean, out.feature_map],
        z,
        [torch.ones_like(v) for v in (out.pooled, out.mean, out.feature_map)],
    )
    for image in (0, n - 1):
        alone = z[image : image + 1].detach().float().requires_grad_()
        want = ar_kernels.attend(alone, w.float(), mean=True, tap=True, implementation="eager")
        outputs = (want.pooled, want.mean, want.feature_map)
        (want_grad,) = torch.autograd.grad(outputs, alone, [torch.ones_like(v) for v in outputs])
        torch.testing.assert_close(out.pooled[image : image + 1], want.pooled, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(out.mean[image : image + 1], want.mean, rtol=1e-2, atol=1e-4)
        assert (grad[image : image + 1].float() - want_grad).norm() <= 1e-2 * want_grad.norm()


def test_strides_beyond_two_to_the_31_of_an_expanded_map(fused, device):
    """Images 2³⁰ elements apart, of which each touches a few: virtual memory."""
    storage = torch.empty(2**31 + 2**30 + 64, dtype=torch.bfloat16, device=device)
    z = storage.as_strided((4, 2, 3, 3), (2**30, 9, 3, 1))
    z.copy_(torch.randn(z.shape, generator=torch.Generator().manual_seed(0)))
    w = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for value in (z, z.contiguous()):
        leaf = value.detach().requires_grad_()
        pooled = ar_kernels.attend(leaf, w, implementation=fused).pooled
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), leaf)))
    for far, near in zip(*results):
        assert torch.equal(far, near)
