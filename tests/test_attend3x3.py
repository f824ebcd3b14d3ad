"""3×3 heads: every implementation against the reference, the operators as PyTorch sees them, what they hold."""

import pytest
import torch
from layers import BUDGETS, LAYOUTS, Layer, assert_within_budget, channels_last

import ar_kernels
from ar_kernels import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {
    "small": {},
    "one position": {"n": 2, "c": 16, "h": 1, "w": 1, "k": 1},
    "one row": {"n": 2, "c": 6, "h": 1, "w": 37, "mean": False, "tap": False},
    "one column": {"n": 2, "c": 6, "h": 21, "w": 1, "k": 3},
    "global heads": {"n": 3, "c": 20, "h": 5, "w": 7, "k": 4, "globals": 3},
    "split over positions": {"n": 1, "c": 40, "h": 17, "w": 19, "k": 3},
    "bands": {"n": 2, "c": 16, "h": 30, "w": 20, "k": 2},
    "a band of each line": {"n": 1, "c": 4, "h": 3, "w": 260, "k": 1},
    "more images than programs": {"n": 10, "c": 8, "h": 3, "w": 3},
    "channels in chunks": {"n": 2, "c": 200, "h": 3, "w": 5, "k": 4},
    "sums over channels by several programs": {"n": 2, "c": 264, "h": 2, "w": 3, "k": 2},
    "many heads": {"n": 2, "c": 24, "h": 4, "w": 5, "k": 28},
    "ungated, no biases": {"n": 2, "c": 12, "h": 4, "w": 4, "gated": False, "bias": False},
    "ungated beside global heads": {"n": 2, "c": 12, "h": 4, "w": 4, "gated": False, "globals": 2},
}


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_reference(shape, implementation, device):
    layer = Layer(**SHAPES[shape], kernel_size=3, device=device)
    got, exact = layer.run(implementation), layer.run("reference")
    assert got.keys() == exact.keys()
    for name, truth in exact.items():
        assert (got[name] - truth).abs().max().item() <= 1e-12 * max(1.0, truth.abs().max().item()), name


@pytest.mark.parametrize(("layout", "dtype"), BUDGETS, ids=str)
@pytest.mark.parametrize("shape", ["global heads", "split over positions", "channels in chunks"])
def test_error_budget(shape, layout, dtype, fused, device):
    draws = []
    for seed in range(3):
        layer = Layer(**SHAPES[shape], kernel_size=3, dtype=dtype, device=device, seed=seed)
        runs = layer.run(fused, layout=LAYOUTS[layout]), layer.run("eager", layout=LAYOUTS[layout])
        draws.append((*runs, layer.run("reference", exact=True)))
    assert_within_budget(draws, dtype)


LINES = {
    "a line each": {"n": 2, "c": 72, "h": 3, "w": 36, "k": 3},
    "lines of several images": {"n": 3, "c": 16, "h": 9, "w": 40, "k": 4, "globals": 1},
    "one long line": {"n": 2, "c": 8, "h": 1, "w": 70, "k": 2},
    "lines with all their channels": {"n": 3, "c": 136, "h": 4, "w": 34, "k": 3},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LINES)
def test_error_budget_of_lines_that_are_tiles(shape, dtype, fused, device, monkeypatch):
    launched = set()
    if fused == "triton":
        from ar_kernels.kernels import attend3x3
        from ar_kernels.kernels.launch import Launch

        monkeypatch.setattr(attend3x3, "LEAST_LINES", 1)
        monkeypatch.setattr(attend3x3, "LEAST_BUSY", 0.0)
        monkeypatch.setattr(attend3x3, "MOST_BANDWIDTH", float("inf"))
        launch = Launch.__call__

        def recorded(self, *tensors):
            launched.add(self.kernel.__name__)
            launch(self, *tensors)

        monkeypatch.setattr(Launch, "__call__", recorded)
    draws = []
    for seed in range(3):
        layer = Layer(**LINES[shape], kernel_size=3, dtype=dtype, device=device, seed=seed)
        runs = layer.run(fused, layout=channels_last), layer.run("eager", layout=channels_last)
        draws.append((*runs, layer.run("reference", exact=True)))
    assert_within_budget(draws, dtype)
    if fused == "triton" and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9):
        assert "tap_sums_kernel" not in launched
        whole = shape == "lines with all their channels"
        assert ("line_pool_kernel" in launched) == whole != ("pool_kernel" in launched)
        whole = whole and dtype == torch.bfloat16
        assert ("line_gradients_kernel" in launched) == whole != ("mask_weight_gradient_kernel" in launched)


@pytest.mark.parametrize("heads", [3, 4])
def test_error_budget_of_both_weights_from_one_kernel(heads, fused, device, monkeypatch):
    if fused == "triton":
        from ar_kernels.kernels import attend3x3

        monkeypatch.setattr(attend3x3, "LEAST_POOLED", 0)
        sums_both, found = attend3x3._sums_both_weights, []
        monkeypatch.setattr(attend3x3, "_sums_both_weights", lambda *cut: found.append(sums_both(*cut)) or found[-1])
    draws = []
    for seed in range(3):
        layer = Layer(
            n=5, c=136, h=3, w=7, k=heads, globals=1, kernel_size=3, dtype=torch.bfloat16, device=device, seed=seed
        )
        runs = layer.run(fused, layout=channels_last), layer.run("eager", layout=channels_last)
        draws.append((*runs, layer.run("reference", exact=True)))
    assert_within_budget(draws, torch.bfloat16)
    if fused == "triton" and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9):
        assert any(found)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"c": 152, "h": 3, "w": 7, "k": 4},
        {"c": 164, "h": 9, "w": 1, "k": 2, "mean": False, "tap": False},
        {"c": 64, "h": 1, "w": 2, "k": 1, "bias": False},
        {"c": 72, "h": 9, "w": 8, "k": 2},
    ],
    ids=lambda shape: f"{shape['k']} of {shape['c']}x{shape['h']}x{shape['w']}",
)
def test_error_budget_of_sums_that_need_neither_p_nor_dp(shape, by_head, fused, device, monkeypatch):
    launched = set()
    if fused == "triton":
        from ar_kernels.kernels import attend3x3
        from ar_kernels.kernels.launch import Launch

        small = attend3x3.chip(-1 if device.type == "cpu" else 0)._replace(processors=2)  # nor are images cut up
        monkeypatch.setattr(attend3x3, "chip", lambda index: small)
        launch = Launch.__call__
        monkeypatch.setattr(
            Launch, "__call__", lambda self, *tensors: launched.add(self.kernel.__name__) or launch(self, *tensors)
        )
    draws = []
    for seed in range(3):
        layer = Layer(**shape, n=8, kernel_size=3, dtype=torch.bfloat16, device=device, seed=seed)
        if by_head:  # as a network's channels_last weights lie
            weight = layer.tensors["output_weight"].view(layer.labels, layer.k, layer.c, 3, 3).transpose(0, 1)
            layer.tensors["output_weight"] = weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        runs = layer.run(fused, layout=channels_last), layer.run("eager", layout=channels_last)
        draws.append((*runs, layer.run("reference", exact=True)))
    assert_within_budget(draws, torch.bfloat16)
    if fused == "triton" and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9):
        assert "gated_sums_kernel" in launched and ("taps_first_kernel" in launched) != by_head


@pytest.mark.parametrize(("channels", "gated"), [(24, True), (264, True), (264, False)])  # 264: in several programs
def test_float16_gradients_of_a_mean_loss(channels, gated, fused, device):
    """Far below what float16 holds: their images' powers of two bring them back."""
    layer = Layer(n=4, c=channels, h=5, w=6, k=3, kernel_size=3, dtype=torch.float16, device=device)
    grads = {}
    for implementation, dtype in ((fused, torch.float16), ("eager", torch.float64)):
        t = {name: value.to(dtype).requires_grad_() for name, value in layer.tensors.items()}
        if not gated:
            t = {name: value for name, value in t.items() if not name.startswith("gate_")}
        learned = [t[name] for name in ("mask_weight", "gate_weight") if name in t]
        output = ar_kernels.attention_module(**t, implementation=implementation).hypothesis
        weights = torch.linspace(1e-7, 3e-5, 4, device=device, dtype=torch.float64)[:, None]  # of each image its own
        loss = (output.double() * weights).sum()
        grads[implementation] = torch.autograd.grad(loss, learned)
    for mine, truth in zip(grads[fused], grads["eager"]):
        assert (mine.double() - truth).abs().max() <= 0.02 * truth.abs().max() + 2**-24


def test_programs_keep_their_sums_over_taps_apart(device, monkeypatch):
    """Run one after another, as the interpreter does, they could share a scratch and no result would show it."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from ar_kernels.kernels import attend3x3
    from ar_kernels.kernels.launch import Launch

    launch, scratches = Launch.__call__, []

    def recorded(self, *tensors):
        launch(self, *tensors)
        if self.kernel is attend3x3.tap_sums_kernel:
            scratches.append((self.grid[0], tensors[self.kernel.arg_names.index("scratch")]))

    monkeypatch.setattr(Launch, "__call__", recorded)
    monkeypatch.setattr(ops, "_rehearse_backward", lambda *arguments: None)  # it launches nothing, with stand-ins
    layer = Layer(n=3, c=64, h=4, w=4, k=2, kernel_size=3, dtype=torch.float32, device=device)
    z, w = layer.tensors["feature_map"].requires_grad_(), layer.tensors["mask_weight"]
    ar_kernels.attend(z, w, implementation="triton").pooled.sum().backward()
    assert len(scratches) == 2
    for programs, scratch in scratches:
        assert len(scratch) == programs > 1 and scratch.isfinite().flatten(1).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, fused, device):
    layer = Layer(n=2, c=6, h=3, w=4, k=3, globals=2, kernel_size=3, dtype=dtype, device=device)
    t = layer.tensors
    z, w = t["feature_map"], torch.cat([t["mask_weight"], t["global_mask_weight"]])
    score_w = torch.cat([t["gate_weight"], t["global_gate_weight"]])
    operators = ops._operators(fused)
    for arguments in ((z, w, None, score_w, None, 3, True), (channels_last(z), w, w[:, 0, 0, 0], None, None, 0, False)):
        torch.library.opcheck(operators.gated_attend3x3, arguments)
    saved = operators.gated_attend3x3(z, w, None, score_w, None, 3, True)
    pooled, lse, logits, scores, gates, features, mean = saved
    saved = (z, w, score_w, pooled, lse, logits, scores, gates)
    grads = (pooled, lse, logits, scores, gates, features, mean, z)
    torch.library.opcheck(operators.gated_attend3x3_backward, (*saved, *grads, True, True, True, True))
    none = (None,) * 7
    torch.library.opcheck(operators.gated_attend3x3_backward, (*saved, pooled, *none, True, False, False, False))


def test_compile_fullgraph_with_a_dynamic_batch(fused, device):
    from torch._dynamo.backends.common import aot_autograd

    layer = Layer(n=4, c=6, h=3, w=4, k=3, globals=2, kernel_size=3, dtype=torch.float64, device=device)
    names = [name for name in layer.tensors if name != "feature_map"]
    weights = [layer.tensors[name].requires_grad_() for name in names]
    graphs = []

    def step(z, *values):
        out = ar_kernels.attention_module(
            z, **dict(zip(names, values)), masks=True, mean=True, tap=True, implementation=fused
        )
        return out.hypothesis.sum() + out.masks.square().sum() + out.mean.sum() + (out.feature_map**2).sum()

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=counting))
    for n in (2, 3):
        z = torch.randn(n, 6, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
        torch._dynamo.mark_dynamic(z, 0)
        got = torch.autograd.grad(compiled(z, *weights), [z, *weights], allow_unused=True)
        want = torch.autograd.grad(step(z, *weights), [z, *weights], allow_unused=True)
        for name, mine, truth in zip(["feature_map", *names], got, want):
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10, msg=name)
    assert len(graphs) == 2, "another batch size recompiled"


def test_double_backward(fused, device):
    bias = fused == "native"  # each input more costs the interpreter seconds
    layer = Layer(n=1, c=2, h=2, w=2, k=2, labels=2, bias=bias, kernel_size=3, device=device)
    names = list(layer.tensors)

    def function(*values):
        out = ar_kernels.attention_module(**dict(zip(names, values)), masks=True, mean=True, implementation=fused)
        return out.hypothesis, out.masks, out.mean

    values = [value.requires_grad_() for value in layer.tensors.values()]
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_functorch(fused, device):
    layer = Layer(n=1, c=3, h=2, w=3, k=2, kernel_size=3, device=device)
    w = layer.tensors["mask_weight"]
    maps = torch.randn(3, 1, 3, 2, 3, dtype=torch.float64, device=device)

    def loss(z, implementation):
        return ar_kernels.attend(z, w, implementation=implementation).pooled.square().sum()

    got = torch.func.vmap(torch.func.grad(lambda z: loss(z, fused)))(maps)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(lambda z: loss(z, "eager"))(z) for z in maps]))


def test_no_images(fused, device):
    z = torch.randn(0, 4, 5, 6, device=device, requires_grad=True)
    w = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    attended = ar_kernels.attend(z, w, mean=True, masks=True, implementation=fused)
    assert attended.pooled.shape == (0, 2, 4, 9) and attended.masks.shape == (0, 2, 5, 6)
    dz, dw = torch.autograd.grad(attended.pooled.sum() + attended.mean.sum(), (z, w))
    assert dz.shape == z.shape and dw.count_nonzero() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_again(layout, fused, device):
    sizes = {"n": 3, "c": 24, "h": 9, "w": 8, "k": 4}
    if fused == "triton" and device.type == "cpu":  # the interpreter has one order of programs
        sizes = {"n": 1, "c": 8, "h": 3, "w": 4, "k": 2}
    layer = Layer(**sizes, kernel_size=3, dtype=torch.bfloat16, device=device)
    runs = [layer.run(fused, layout=LAYOUTS[layout]) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_the_backward_allocates_one_gradient_of_the_map(fused, device):
    """And no other memory of that size: where maps are large, it is all that the backward needs."""
    if device.type != "cpu":
        pytest.skip("test_peak_memory measures a GPU's")
    z = torch.randn(2, 16, 8, 8, device=device, requires_grad=True)
    attended = ar_kernels.attend(z, torch.randn(1, 16, 3, 3), implementation=fused)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.autograd.grad(attended.pooled.sum(), z)
    sizes = [event.self_cpu_memory_usage for event in profiled.events()]
    assert sizes.count(z.nbytes) == 1, sizes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n, c, side, labels",
    [(128, 160, 32, 100), (256, 256, 56, 1000), (256, 2048, 7, 1000), (1, 256, 56, 1000), (8, 512, 28, 200)],
)
def test_peak_memory(n, c, side, labels, device):
    """Above inputs, weights and their gradients: at most |dZ| + 0.3 |Z| + 3 P of nine taps in float32."""
    z = torch.randn(n, c, side, side, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
    shapes = (4, c, 3, 3), (labels, 4 * c * 9), (4, c, 3, 3)
    weights = [(torch.randn(shape, device=device) / c**0.5).bfloat16().requires_grad_() for shape in shapes]
    z.requires_grad_()

    def step():
        hypothesis = ar_kernels.attention_module(z, *weights, implementation="triton").hypothesis
        return torch.autograd.grad(hypothesis.float().square().sum(), (z, *weights))

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(weight.nbytes for weight in weights)
    assert peak <= 1.3 * z.nbytes + 3 * (n * 4 * c * 9 * 4)
