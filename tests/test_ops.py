"""The operators as PyTorch sees them: derivatives, opcheck, compile, functorch, what Inductor puts in front of them."""

import pytest
import torch
from layers import Layer, channels_last

import ar_kernels
from ar_kernels import functional

MIXES = ["logit", "log", "prob"]
GATINGS = ["softmax", "sigmoid", None]
NAMESPACES = {"triton": "ar_kernels", "native": "ar_kernels_native"}


def _layer_function(layer: Layer, implementation: str):
    """attention_module with every output, as a function of its tensors; and those tensors."""
    names = list(layer.tensors)

    def function(*values):
        out = ar_kernels.attention_module(
            **dict(zip(names, values)), masks=True, mean=layer.mean, tap=layer.tap, implementation=implementation
        )
        return tuple(value for value in out if value is not None and value.requires_grad)

    return function, [value.requires_grad_() for value in layer.tensors.values()]


TINY = {"n": 2, "c": 3, "h": 2, "w": 3, "k": 2, "labels": 2}


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("extra", [{"globals": 2}, {"gated": False, "mean": False, "tap": False}])
def test_gradcheck(extra, kernel_size, implementation, device):
    function, values = _layer_function(Layer(**TINY, **extra, kernel_size=kernel_size, device=device), implementation)
    assert torch.autograd.gradcheck(function, values, fast_mode=device.type == "cpu")


def test_gradcheck_of_the_reference(device):
    function, values = _layer_function(Layer(**TINY, globals=2, device=device), "reference")
    assert torch.autograd.gradcheck(function, values)


def test_gradcheck_of_attend(implementation, device):
    layer = Layer(**TINY, device=device)
    values = [layer.tensors[name].requires_grad_() for name in ("feature_map", "mask_weight", "mask_bias")]

    def function(*values):
        out = ar_kernels.attend(*values, logits=True, masks=True, mean=True, tap=True, implementation=implementation)
        return tuple(out)

    assert torch.autograd.gradcheck(function, values, fast_mode=device.type == "cpu")


def test_gradgradcheck(implementation, device):
    function, values = _layer_function(Layer(**TINY, globals=2, device=device), implementation)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("mix", MIXES)
def test_rectify(mix, gating, implementation, device):
    """Forward against the reference, gradcheck and gradgradcheck of every mix and gating."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    s = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    def function(h, s):
        return ar_kernels.rectify(h, s, mix=mix, gating=gating, implementation=implementation)

    want = ar_kernels.rectify(h, s, mix=mix, gating=gating, implementation="reference")
    torch.testing.assert_close(function(h, s), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, (h, s), fast_mode=device.type == "cpu")
    assert torch.autograd.gradgradcheck(function, (h, s), fast_mode=True)


def test_gradients_of_each_hypothesis_are_contiguous(fused, device):
    """And lie one after another, aligned where 8 images are: the layers' backwards read them."""
    h = [torch.randn(8, 5, device=device).bfloat16().requires_grad_() for _ in range(3)]
    mixed = ar_kernels.rectify(h, torch.zeros(8, 3, device=device), implementation=fused)
    grads = torch.autograd.grad(mixed.sum(), h)
    assert all(grad.is_contiguous() for grad in grads)
    assert [grad.storage_offset() for grad in grads] == [0, 40, 80]
    assert all(grad.data_ptr() % 16 == 0 for grad in grads)


@pytest.mark.parametrize("mix", MIXES)
def test_rectify_many_labels_in_half_precision(mix, poisoned_memory, fused, device):
    """More labels than a tile holds, bf16 hypotheses, rows of large and small scores, a list as input."""
    generator = torch.Generator().manual_seed(0)
    h = (4 * torch.randn(2, 3, 3001, generator=generator)).bfloat16().to(device)
    s = torch.tanh(torch.randn(2, 3, generator=generator)).to(device)
    got = ar_kernels.rectify(list(h.unbind(1)), s, mix=mix, implementation=fused)
    exact = ar_kernels.rectify(h.double(), s.double(), mix=mix, implementation="reference")
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()
    parts = [h.detach().requires_grad_(), s.detach().requires_grad_()]
    grad = torch.randn(got.shape, generator=generator).to(device)
    results = {}
    for name, dtype in ((fused, None), ("reference", torch.float64)):
        values = [p.to(dtype) if dtype else p for p in parts]
        out = ar_kernels.rectify(*values, mix=mix, implementation=name)
        results[name] = torch.autograd.grad(out, parts, grad.to(out.dtype))
    for mine, truth in zip(results[fused], results["reference"]):
        assert (mine.double() - truth.double()).norm() <= 2**-8 * truth.double().norm()


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.parametrize(("heads", "height", "width"), [(3, 5, 4), (1, 1, 7), (5, 6, 1), (2, 1, 1)])
def test_masks_and_their_regulariser(heads, height, width, implementation, device):
    """Triton's kernels against the formulas of the eager path: odd sides, axes of size 1, heads without masks."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    generator = torch.Generator().manual_seed(0)
    size = 2, heads + 2, height * width
    logits, cotangent = torch.randn(2, *size, generator=generator, dtype=torch.float64).to(device)
    lse = torch.logsumexp(logits, dim=2)

    def function(logits, lse, implementation):
        with ar_kernels.use_implementation(implementation):
            make = functional._masks(implementation, logits, lse, heads).unflatten(2, (height, width))
            return make, ar_kernels.mask_regulariser(make)

    results = []
    for name in (implementation, "eager"):
        inputs = logits.clone().requires_grad_(), lse.clone().requires_grad_()
        masks, penalty = function(*inputs, name)
        loss = 1e3 * penalty + (masks.flatten(2) * cotangent[:, :heads]).sum()
        results.append((masks, penalty, *torch.autograd.grad(loss, inputs)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    inputs = logits.requires_grad_(), lse.requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: function(*v, implementation), inputs, fast_mode=device.type == "cpu")
    assert torch.autograd.gradgradcheck(lambda *v: function(*v, implementation), inputs, fast_mode=True)


@pytest.mark.parametrize("implementation", ["triton"])
def test_masks_regulariser_of_samples(implementation, device):
    """torch.func.vmap of the fused regulariser's gradient."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    masks = torch.rand(2, 1, 3, 4, 4, dtype=torch.float64, device=device)
    with ar_kernels.use_implementation(implementation):
        got = torch.func.vmap(torch.func.grad(ar_kernels.mask_regulariser))(masks)
        assert ar_kernels.mask_regulariser(masks[:0, 0]).isnan()
    with ar_kernels.use_implementation("eager"):
        want = torch.stack([torch.func.grad(ar_kernels.mask_regulariser)(sample) for sample in masks])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_log_mix_with_nll_loss_is_the_gated_sum_of_cross_entropies(implementation, device):
    h = torch.randn(5, 3, 7, dtype=torch.float64, device=device)
    s = torch.randn(5, 3, dtype=torch.float64, device=device)
    target = torch.tensor([0, 3, 6, 2, 2], device=device)
    mixed = ar_kernels.rectify(h, s, mix="log", implementation=implementation)
    losses = torch.stack([torch.nn.functional.cross_entropy(h[:, i], target, reduction="none") for i in range(3)], 1)
    expected = (torch.softmax(s, dim=1) * losses).sum(dim=1).mean()
    torch.testing.assert_close(torch.nn.functional.nll_loss(mixed, target), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, fused, device):
    operators = getattr(torch.ops, NAMESPACES[fused])
    layer = Layer(n=2, c=6, h=3, w=4, k=3, globals=2, dtype=dtype, device=device)
    t = layer.tensors
    z, w = t["feature_map"], torch.cat([t["mask_weight"], t["global_mask_weight"]])
    score_w = torch.cat([t["gate_weight"], t["global_gate_weight"]])
    for arguments in (
        (z, w, None, score_w, None, 3, True, True),
        (channels_last(z), w, w[:, 0], None, None, 0, False, False),
    ):
        torch.library.opcheck(operators.gated_attend, arguments)
    outputs = operators.gated_attend(z, w, None, score_w, None, 3, True, True)
    pooled, lse, logits, scores, gates, features, mean = outputs
    lse_of_heads = lse
    saved = (z, w, None, score_w, pooled, lse, scores, gates)
    grads = (pooled, lse, logits, scores, gates, features, mean, z)
    torch.library.opcheck(operators.gated_attend_backward, (*saved, *grads, True, True, True, True))
    none = (None,) * 7
    torch.library.opcheck(operators.gated_attend_backward, (*saved, pooled, *none, True, False, False, False))
    output_w, options = torch.randn(5, 18, device=device).to(dtype), (False, False)
    for arguments in (
        (z, w, None, score_w, None, output_w, 3, True, True, *options),
        (channels_last(z), w, w[:, 0], None, None, None, 0, False, False, *options),
    ):
        torch.library.opcheck(operators.layer, arguments)
    grad = operators.layer(z, w, None, score_w, None, output_w, 3, False, False, *options)[-1]
    saved = (z, w, None, score_w, output_w, pooled, lse, None, scores, gates, features)
    needs = (*[True] * 6, False)
    torch.library.opcheck(operators.layer_backward, (*saved, *[None] * 7, grad, None, *needs))
    torch.library.opcheck(operators.layer_backward, (*saved, *grads[:-1], grad, z, *needs))
    needs = (True, *[False] * 6)
    torch.library.opcheck(operators.layer_backward, (*saved[:4], None, *saved[5:], pooled, *none, None, *needs))
    h, s = torch.randn(2, 3, 5, device=device).to(dtype), torch.randn(2, 3, device=device)
    for mix in MIXES:
        torch.library.opcheck(operators.rectify, (h, s, mix, "softmax"))
        y, lse = operators.rectify(h, s, mix, "softmax")
        torch.library.opcheck(operators.rectify_backward, (y, h, s, y, lse, mix, "softmax"))
    if fused == "native":
        torch.library.opcheck(operators.product, (h[0], h[1].mT.contiguous()))
    if fused == "triton":
        features, output_w = gates.new_ones(4, 6).bfloat16(), gates.new_ones(5, 6)
        torch.library.opcheck(operators.hypothesis, (features, output_w))
        grad = operators.hypothesis(features, output_w)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(operators.hypothesis_backward, (grad, features, output_w, *needs))
        torch.library.opcheck(operators.attention_masks, (logits, lse_of_heads, 2))
        masks = operators.attention_masks(logits, lse_of_heads, 2)
        torch.library.opcheck(operators.attention_masks_backward, (masks, masks, 5))
        maps = masks.unflatten(2, z.shape[2:])
        torch.library.opcheck(operators.mask_overlap, (maps,))
        torch.library.opcheck(operators.mask_overlap_backward, (scores[0, 0], maps, operators.mask_overlap(maps)[1]))


@pytest.mark.parametrize("channels", [6, 16])
def test_operators_under_autocast(channels, fused, device):
    """As graphs call them that were exported: outputs have the map's dtype all the same, as their fakes have."""
    operators = getattr(torch.ops, NAMESPACES[fused])
    layer = Layer(n=3, c=channels, h=3, w=4, k=2, bias=False, labels=5, dtype=torch.float32, device=device)
    names = ("feature_map", "mask_weight", "gate_weight", "output_weight")
    z, w, score_w, output_w = (layer.tensors[name] for name in names)
    output_w = output_w.transpose(0, 1).flatten(1) if output_w.dim() == 3 else output_w
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            made = operators.layer(z, w, None, score_w, None, output_w, 2, False, False, False, False)
            pooled, lse, _, scores, gates, features, _, hypothesis = made
            saved = (z, w, None, score_w, output_w, pooled, lse, None, scores, gates, features)
            grads = (None, None, None, None, None, features, None, hypothesis, None)
            needs = (True, True, True, False, True, False, False)
            results.append((*made, *operators.layer_backward(*saved, *grads, *needs)))
    for one, other in zip(*results):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_gradients_of_features_and_of_their_product_add_up(fused, device):
    """An operator may be given both."""
    operators = getattr(torch.ops, NAMESPACES[fused])
    layer = Layer(n=3, c=6, h=3, w=4, k=2, bias=False, labels=5, device=device)
    z, w, score_w = (layer.tensors[name] for name in ("feature_map", "mask_weight", "gate_weight"))
    output_w = torch.randn(5, 12, dtype=z.dtype, device=device)
    made = operators.layer(z, w, None, score_w, None, output_w, 2, False, False, False, False)
    pooled, lse, _, scores, gates, features, _, grad = made
    saved = (z, w, None, score_w, output_w, pooled, lse, None, scores, gates, features)
    needs = (True, True, True, False, True, False, False)
    got = operators.layer_backward(*saved, *[None] * 5, features, None, grad, None, *needs)
    alone = operators.layer_backward(*saved, *[None] * 5, features + grad @ output_w, *[None] * 3, *needs)
    for one, other in zip(got[:3], alone[:3]):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[4], grad.t() @ features, rtol=1e-12, atol=1e-12)


def test_compile_fullgraph_with_a_dynamic_batch(implementation, device):
    """Forward and backward in one graph, equal to eager mode, and no recompilation for another batch size."""
    layer = Layer(n=4, c=6, h=3, w=4, k=3, globals=2, dtype=torch.float64, device=device)
    names = [name for name in layer.tensors if name != "feature_map"]
    weights = [layer.tensors[name].requires_grad_() for name in names]
    graphs = []

    def step(z, *values):
        out = ar_kernels.attention_module(
            z, **dict(zip(names, values)), masks=True, mean=True, tap=True, implementation=implementation
        )
        mixed = ar_kernels.rectify(
            [out.hypothesis, 2 * out.hypothesis], out.global_scores, mix="log", implementation=implementation
        )
        return mixed.sum() + out.masks.square().sum() + out.mean.sum() + (out.feature_map**2).sum()

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=counting))
    for n in (9, 13, 11):
        z = torch.randn(n, 6, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
        torch._dynamo.mark_dynamic(z, 0)
        got = torch.autograd.grad(compiled(z, *weights), [z, *weights], allow_unused=True)
        want = torch.autograd.grad(step(z, *weights), [z, *weights], allow_unused=True)
        for name, mine, truth in zip(["feature_map", *names], got, want):
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10, msg=name)
    forward_and_backward = 2
    assert len(graphs) == forward_and_backward, "another batch size recompiled"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_backward_reads_gradients_as_they_come(layout, frozen, fused, device):
    """A trainable bias, a tap, nothing else asked for; the traced graphs hold no copy of anything of the map's size."""
    from torch._dynamo.backends.common import aot_autograd

    layer = Layer(n=9, c=6, h=3, w=4, k=3, device=device)
    z = layer.tensors["feature_map"].contiguous(memory_format=layout).requires_grad_(not frozen)
    w, b = layer.tensors["mask_weight"].requires_grad_(), layer.tensors["mask_bias"].requires_grad_()
    inputs = [w, b] if frozen else [z, w, b]
    graphs = []

    def step(z, w, b):
        out = ar_kernels.attend(2 * z if not frozen else z, w, b, tap=True, implementation=fused)
        return out.pooled.square().sum() + out.lse.sum() + (out.feature_map**3).sum()

    def keep(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    got = torch.autograd.grad(compiled(z, w, b), inputs)
    want = torch.autograd.grad(step(z, w, b), inputs)
    for mine, truth in zip(got, want):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 2
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if "clone" in str(node.target) or "copy" in str(node.target):
            assert node.meta["val"].numel() < z.numel(), node.format_node()


def test_a_compiled_backward_has_no_gradients_of_what_was_not_asked_for(fused, device):
    """A hypothesis alone, as in training: neither P nor lse nor the scores get zeros that are made, saved and read."""
    from torch._dynamo.backends.common import aot_autograd

    layer = Layer(n=2, c=6, h=3, w=4, k=3, bias=False, device=device)
    names = ("feature_map", "mask_weight", "output_weight", "gate_weight")
    values = [layer.tensors[name].requires_grad_() for name in names]
    graphs = []

    def step(*values):
        return ar_kernels.attention_module(*values, implementation=fused).hypothesis.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=lambda g, _: graphs.append(g) or g))
    got, want = torch.autograd.grad(compiled(*values), values), torch.autograd.grad(step(*values), values)
    for mine, truth in zip(got, want):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    (node,) = [node for node in graphs[1].graph.nodes if "layer_backward" in str(node.target)]
    pooled, lse, logits, scores, gates, features, mean, hypothesis, upstream = node.args[11:20]
    assert [pooled, lse, logits, scores, features, mean, upstream] == [None] * 7
    assert hypothesis is not None and gates is not None  # gates are always returned


@pytest.mark.parametrize("of", ["a layer", "the eager formulas of a layer head by head", "head_hypotheses", "rectify"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad"])
def test_functorch_within_compile_is_right_or_refused(transform, of, fused, device):
    """Dynamo leaves out the derivatives of Functions there, which once made gradients zero, with a warning."""
    layer = Layer(n=2, c=6, h=3, w=4, k=3, bias=False, labels=5, dtype=torch.float32, device=device)
    names = ("feature_map", "mask_weight", "output_weight", "gate_weight")
    z, w, output, gate = (layer.tensors[name] for name in names)
    by_head = output.unflatten(1, (3, -1)).transpose(0, 1).contiguous()
    halves = [value.bfloat16() for value in (z, w, gate)]  # so that the weight is rounded to their dtype

    def loss(weight):
        if of == "a layer":
            made = ar_kernels.attention_module(z, w, weight, gate, implementation=fused).hypothesis
        elif of == "head_hypotheses":
            made = functional.head_hypotheses(halves[0].flatten(2)[:, :3, :6], weight)
        elif of == "rectify":
            made = ar_kernels.rectify(weight[None], z[:1, :5, 0, 0], mix="prob", implementation=fused)
        else:
            made = ar_kernels.attention_module(*halves[:2], weight, halves[2], implementation="eager").hypothesis
        return made.float().square().sum()

    weight = output if of in ("a layer", "rectify") else by_head
    gradient = torch.func.grad(loss)
    call, argument = {
        "grad": (gradient, weight),
        "vmap": (torch.vmap(loss), torch.stack([weight, 2 * weight])),
        "vmap of grad": (torch.vmap(gradient), torch.stack([weight, 2 * weight])),
    }[transform]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x), backend="aot_eager")
    torch.testing.assert_close(compiled(argument), call(argument), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="derivatives of torch.func"):
        torch.compile(lambda x: call(x), backend="aot_eager", fullgraph=True)(argument)


@pytest.mark.parametrize("inside", [True, False])
def test_forward_mode_of_a_compiled_layer_raises(inside, fused, device):
    """As it does without torch.compile; the tangent is not lost."""
    layer = Layer(n=2, c=6, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]

    def pooled(z):
        return ar_kernels.attend(z, w, implementation=fused).pooled

    def tangent(z):
        return torch.func.jvp(pooled, (z,), (z,))[1]

    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="jvp"):
        if inside:
            torch.compile(tangent, backend="aot_eager")(z)
        else:
            with torch.autograd.forward_ad.dual_level():
                torch.compile(pooled, backend="aot_eager")(torch.autograd.forward_ad.make_dual(z, z))


def test_double_backward_under_compiled_autograd_is_no_wrong_number(fused, device):
    """It traces an eager layer's backward, whose derivative the operators alone do not have."""
    layer = Layer(n=2, c=6, bias=False, device=device)
    z, w = layer.tensors["feature_map"].requires_grad_(), layer.tensors["mask_weight"].requires_grad_()

    def penalised():
        loss = ar_kernels.attend(z, w, implementation=fused).pooled.square().sum()
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        (loss + grad.square().sum()).backward()

    torch._dynamo.reset()
    compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))
    reasons = "has no attribute|double backward|must be Tensor, not NoneType"
    with compiled, pytest.raises((AttributeError, RuntimeError, TypeError), match=reasons):
        penalised()


def test_strides_beyond_two_to_the_31(fused, device):
    """Offsets inside one image pass 2³¹: virtual memory, of which two rows are touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    z = storage.as_strided((1, 2, 64), (8, 2**31, 1))
    z.copy_(torch.randn(1, 2, 64))
    z.requires_grad_()
    w = torch.randn(3, 2, device=device)
    pooled = ar_kernels.attend(z, w, implementation=fused).pooled
    (grad,) = torch.autograd.grad(pooled.square().sum(), z)
    dense = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    want = ar_kernels.attend(dense, w, implementation=fused).pooled
    (want_grad,) = torch.autograd.grad(want.square().sum(), dense)
    assert torch.equal(pooled, want) and torch.equal(grad, want_grad)


def test_double_backward_under_autocast_keeps_float32(fused, device):
    """A gradient penalty inside autocast is computed in the map's dtype, as the first backward is."""
    layer = Layer(n=2, c=16, h=4, w=4, k=3, bias=False, dtype=torch.float32, device=device)
    results = []
    for name, dtype in ((fused, torch.float32), ("reference", torch.float64)):
        z, w = (layer.tensors[n].detach().to(dtype).requires_grad_() for n in ("feature_map", "mask_weight"))
        with torch.autocast(device.type, torch.bfloat16, enabled=name == fused):
            value = ar_kernels.attend(z, w, implementation=name).pooled.square().sum()
            (grad,) = torch.autograd.grad(value, z, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), w)[0].double())
    assert (results[0] - results[1]).norm() <= 1e-4 * results[1].norm()


def test_float32_precision_set_by_the_newer_switch(device):
    """Nothing reads the legacy switch, which may raise once torch.backends.cuda.matmul.fp32_precision is set."""
    layer = Layer(n=2, c=16, k=3, dtype=torch.float32, device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            ar_kernels.attend(layer.tensors["feature_map"], layer.tensors["mask_weight"], implementation="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_prob_mix_of_a_label_that_no_hypothesis_allows(implementation, device):
    h = torch.randn(2, 3, 5, device=device)
    h[:, :, 4] = float("-inf")
    mixed = ar_kernels.rectify(h, torch.zeros(2, 3, device=device), mix="prob", implementation=implementation)
    assert (mixed[:, 4] == float("-inf")).all() and mixed[:, :4].isfinite().all()


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("apart", [90.0, 300.0])
def test_prob_mix_of_gates_too_small_for_their_dtype(apart, gating, implementation, device):
    """A gate that underflows still decides a label that the other hypotheses all but exclude."""
    h = torch.tensor([[[0.0, -apart - 10, 3.0], [-apart, 5.0, 0.0]]], dtype=torch.float64)
    scores = torch.tensor([[-apart, 0.0]], dtype=torch.float64)
    grad, results = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), []
    for name, dtype in (("reference", torch.float64), (implementation, torch.float32)):
        values = [h.to(device, dtype).requires_grad_(), scores.to(device, dtype).requires_grad_()]
        y = ar_kernels.rectify(*values, mix="prob", gating=gating, implementation=name)
        results.append([y, *torch.autograd.grad(y, values, grad.to(y))])
    for exact, found in zip(*results):
        torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=1e-6)


def test_double_backward_of_a_compiled_layer_raises(fused, device):
    layer = Layer(n=2, c=6, device=device)
    z, w = layer.tensors["feature_map"].requires_grad_(), layer.tensors["mask_weight"].requires_grad_()
    compiled = torch.compile(
        lambda z, w: ar_kernels.attend(z, w, implementation=fused).pooled.square().sum(), backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(z, w), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), w)


def test_third_derivatives(fused, device):
    """The double backward is differentiable again."""
    layer = Layer(n=1, c=3, h=2, w=2, k=2, device=device)
    z, w = layer.tensors["feature_map"].requires_grad_(), layer.tensors["mask_weight"].requires_grad_()
    results = []
    for name in (fused, "reference"):
        value = ar_kernels.attend(z, w, implementation=name).pooled.pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, w, create_graph=True)
            value = grad.square().sum()
        results.append(value.detach())
    torch.testing.assert_close(results[0], results[1])


def test_functorch_grad_and_vmap(implementation, device):
    layer = Layer(n=3, c=4, h=2, w=3, k=2, bias=False, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"]

    def loss(w, z):
        return ar_kernels.attend(z, w, implementation=implementation).pooled.square().sum()

    leaf = w.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, z), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(w, z), expected)
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, z.unsqueeze(1))
    assert samples.shape == (3, *w.shape)
    torch.testing.assert_close(samples.sum(dim=0), expected)
    for i in range(3):
        alone = w.clone().requires_grad_()
        torch.testing.assert_close(samples[i], torch.autograd.grad(loss(alone, z[i : i + 1]), alone)[0])
    weights = torch.stack([w, 2 * w])
    mapped = torch.func.vmap(lambda w: ar_kernels.attend(z, w, implementation=implementation).pooled)(weights)
    torch.testing.assert_close(mapped[1], ar_kernels.attend(z, 2 * w, implementation="reference").pooled)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(w, z)
    with ar_kernels.use_implementation("reference"):
        expected = torch.func.jacrev(torch.func.jacrev(lambda w: ar_kernels.attend(z, w).pooled.square().sum()))(w)
    torch.testing.assert_close(hessian, expected)


def test_export(fused, device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ar_kernels.AttentionModule(6, 5, heads=2)

        def forward(self, z):
            with ar_kernels.use_implementation(fused):
                return self.attention(z).hypothesis

    net = Net().to(device)
    z = torch.randn(4, 6, 3, 4, device=device)
    program = torch.export.export(net, (z,), dynamic_shapes={"z": {0: torch.export.Dim.DYNAMIC}})
    assert f"{NAMESPACES[fused]}.layer.default" in {str(node.target) for node in program.graph.nodes}
    other = torch.randn(9, 6, 3, 4, device=device)
    torch.testing.assert_close(program.module()(other), net(other))


def test_no_cast_of_float32_weights_under_autocast(fused, device):
    """The kernels round float32 weights themselves: no conversion runs in front of them."""
    layer = Layer(n=2, c=6, bias=False, dtype=torch.bfloat16, weight_dtype=torch.float32, device=device)
    z, w = layer.tensors["feature_map"], layer.tensors["mask_weight"].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.profiler.profile() as profile:
        ar_kernels.attend(z, w, implementation=fused).pooled.sum().backward()
    names = {event.name for event in profile.events()}
    # A plan, and csrc/node, call no operator by name.
    assert {f"{NAMESPACES[fused]}::layer", "ar_kernels::gated_attend", "_WantedGatedAttend"} & names
    assert not names & {"aten::to", "aten::_to_copy"}, names
    assert w.grad.dtype == torch.float32


def test_inductor_puts_no_copy_of_the_map_in_front(fused, device):
    """A compiled NCHW network: the operator reads the convolution's own output, whatever layout that got."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 16, 3, padding=1).to(device)
    attention = ar_kernels.AttentionModule(16, 5, heads=2).to(device)
    after = torch.nn.Conv2d(16, 8, 3).to(device)

    def net(x):
        z = torch.relu(conv(x))
        with ar_kernels.use_implementation(fused):
            out = attention(z, tap=True)
        return out.hypothesis.sum() + after(out.feature_map).sum()

    x = torch.randn(2, 3, 10, 12, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)

    def step():
        loss = compiled(x)
        loss.backward()
        return loss

    loss, codes = run_and_get_code(step)
    torch.testing.assert_close(loss, net(x), rtol=1e-4, atol=1e-4)
    code = "\n".join(codes)
    for name in ("layer", "layer_backward"):
        assert f"{NAMESPACES[fused]}.{name}.default(" in code
    buffers = [
        line.split("=")[0].strip()
        for line in code.splitlines()
        if "(2, 16, 10, 12)" in line and "empty_strided" in line
    ]
    # ReLU's output forward; ReLU's gradient backward: nothing else of the map's size is written outside our operators.
    assert len(buffers) <= 2, code


def _attended_layer(**sizes):
    layer = Layer(n=2, c=6, h=3, w=2, labels=3, mean=False, tap=False, **sizes)
    return {name: value.requires_grad_() for name, value in layer.tensors.items()}


def test_a_batch_of_gradients(fused, device):
    """is_grads_batched: vmap over the backward where nothing records a second one."""
    tensors = _attended_layer(device=device)
    grads = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    results = []
    for name in (fused, "reference"):
        out = ar_kernels.attention_module(**tensors, implementation=name).hypothesis
        inputs = list(tensors.values())
        results.append(torch.autograd.grad(out, inputs, grads, is_grads_batched=True, allow_unused=True))
    for mine, truth in zip(*results):
        torch.testing.assert_close(mine, truth)


def test_only_the_output_weight_is_trained(monkeypatch, device):
    """The gradient of W_O needs nothing of the map: no backward kernel runs."""
    from ar_kernels.kernels import attend_backward

    monkeypatch.setattr(attend_backward, "attend_backward", lambda *arguments: pytest.fail("launched"))
    tensors = {name: value.detach() for name, value in _attended_layer(device=device).items()}
    weight = tensors["output_weight"].requires_grad_()
    results = []
    for name in ("triton", "reference"):
        loss = ar_kernels.attention_module(**tensors, implementation=name).hypothesis.square().sum()
        results.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_raises(recording, fused, device):
    """Forward-mode derivatives are not there: they raise, and are not dropped where no graph is recorded either."""
    tensors = _attended_layer(device=device)
    z = tensors.pop("feature_map").detach()
    with torch.set_grad_enabled(recording), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        with pytest.raises(NotImplementedError, match="jvp"):
            ar_kernels.attention_module(dual, **tensors, implementation=fused)


def test_dispatch_modes_see_the_operators(fused, device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.add(str(operator))
            return operator(*arguments, **(options or {}))

    with Watch():
        out = ar_kernels.attention_module(**_attended_layer(device=device), implementation=fused)
        out.hypothesis.sum().backward()
    assert {f"{NAMESPACES[fused]}.{name}.default" for name in ("layer", "layer_backward")} <= seen


def test_a_tensor_that_outlived_its_transform(fused, device):
    """A wrapper that torch.func.grad left behind is the tensor it wraps, with a graph and without."""
    tensors = _attended_layer(device=device)
    left = []

    def keep(z):
        left.append(2 * z)
        return z.sum()

    z = tensors.pop("feature_map").detach()
    torch.func.grad(keep)(z)
    want = ar_kernels.attention_module(2 * z, **tensors, implementation=fused).hypothesis
    got = ar_kernels.attention_module(left[0], **tensors, implementation=fused).hypothesis
    got.sum().backward()
    with torch.no_grad():
        plain = ar_kernels.attention_module(left[0], **tensors, implementation=fused).hypothesis
    assert torch.equal(got, want) and torch.equal(plain, want)
    h, scores = torch.randn(2, 3, 5, device=device), torch.randn(2, 3, device=device)
    torch.func.grad(keep)(h)
    with torch.no_grad():
        mixed = ar_kernels.rectify(left[1], scores, implementation=fused)
        assert torch.equal(mixed, ar_kernels.rectify(2 * h, scores, implementation=fused))
