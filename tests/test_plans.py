"""Plans: what the native library repeats of a Triton launcher's call, when it may, and that results have the same bits."""

import threading

import pytest
import torch
from layers import Layer, channels_last

import ar_kernels
from ar_kernels import ops, plans

planned = pytest.mark.skipif(not torch.cuda.is_available() or plans.why_not() is not None, reason="no plans here")


@pytest.fixture
def ordinary(monkeypatch):
    """A function that calls another one with plans switched off."""

    def call(function, *arguments):
        with monkeypatch.context() as context:
            context.setattr(plans, "are_used", lambda data: False)
            return function(*arguments)

    return call


@pytest.fixture
def closed(monkeypatch):
    """A function that calls another one, which must go by plans alone: a launcher's Python fails."""

    def fail(*arguments):
        pytest.fail("went through Python")

    def call(function, *arguments):
        with monkeypatch.context() as context:
            context.setattr(ops, "_planned_forward", fail)
            context.setattr(ops, "_planned_backward", fail)
            return function(*arguments)

    return call


def equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def step(z, weights, implementation="triton", **options):
    """One layer's hypothesis and gradients."""
    tensors = [value.detach().requires_grad_() for value in (z, *weights)]
    output = ar_kernels.attention_module(*tensors, implementation=implementation, **options)
    grads = torch.autograd.grad(output.hypothesis.float().square().sum(), tensors)
    return dict(enumerate((output.hypothesis.detach(), *grads)))


def drawn(device, dtype=torch.bfloat16, shape=(2, 64, 7, 7), heads=4, labels=10, taps=(), seed=0):
    torch.manual_seed(seed)
    channels = shape[1]
    z = torch.randn(shape, device=device, dtype=dtype)
    sizes = (heads, channels, *taps), (labels, heads * channels * (9 if taps else 1)), (heads, channels, *taps)
    return z, [torch.randn(size, device=device, dtype=dtype) / channels**0.5 for size in sizes]


@planned
@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, globals, tap", [(1, 0, True), (4, 3, True), (16, 0, False)])
def test_same_bits(kernel_size, layout, dtype, heads, globals, tap, device, ordinary):
    """All outputs and gradients of a layer and of attend: launched by Python, recorded, repeated."""
    layer = Layer(
        n=2, c=64, h=7, w=9, k=heads, globals=globals, tap=tap, mean=tap, kernel_size=kernel_size, dtype=dtype,
        device=device,
    )  # fmt: skip
    want = ordinary(layer.run, "triton", False, layout)
    for _ in range(2):
        equal(layer.run("triton", layout=layout), want)


@planned
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (64, 160, 16, 16), (1, 256, 56, 56)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_second_call_needs_no_python(shape, weight_dtype, device, ordinary, closed):
    """Float32 weights, of autocast, are converted by the plan."""
    for seed in range(2):
        z, weights = drawn(device, shape=shape, seed=seed)
        weights = [weight.to(weight_dtype) for weight in weights]
        found = (closed if seed else lambda call, *arguments: call(*arguments))(step, z, weights)
        equal(found, ordinary(step, z, weights))


@planned
@pytest.mark.gpu
def test_the_second_call_of_3x3_heads_needs_no_python(device, ordinary, closed):
    """Where no image is split: the splits' sums are PyTorch's."""
    for seed in range(2):
        z, weights = drawn(device, taps=(3, 3), seed=seed)
        found = (closed if seed else lambda call, *arguments: call(*arguments))(step, z, weights)
        equal(found, ordinary(step, z, weights))


@planned
@pytest.mark.gpu
def test_what_a_plan_is_not_for_goes_the_ordinary_way(device, ordinary):
    """Unaligned tensors, tensors in one place, weights that must be copied; each again when it is as usual."""
    z, weights = drawn(device)
    step(z, weights)
    wide = torch.randn(z.numel() + 1, device=device, dtype=z.dtype)
    unaligned = wide[1:].view_as(z)
    mask, output, gate = weights
    turned = mask.t().contiguous().t()
    for arguments in ((unaligned, weights), (z, [mask, output, mask]), (z, [turned, output, gate]), (z, weights)):
        for _ in range(2):
            equal(step(*arguments), ordinary(step, *arguments))


@planned
@pytest.mark.gpu
def test_an_empty_batch(device):
    z, weights = drawn(device, shape=(0, 64, 7, 7))
    for _ in range(2):
        assert step(z, weights)[0].shape == (0, 10)


@planned
@pytest.mark.gpu
def test_streams_threads_and_graphs(device, ordinary, closed):
    z, weights = drawn(device)
    step(z, weights)
    want = ordinary(step, z, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        z2 = z * 1
        found = closed(step, z2, weights)
    stream.synchronize()
    equal(found, want)

    found = {}
    thread = threading.Thread(target=lambda: found.update(closed(step, z, weights)))
    thread.start()
    thread.join()
    equal(found, want)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = closed(step, z, weights)
    for value in found.values():
        value.zero_()
    graph.replay()
    equal(found, want)


@planned
@pytest.mark.gpu
def test_hooks_of_triton_see_every_launch(device):
    import triton

    z, weights = drawn(device)
    step(z, weights)
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        step(z, weights)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) >= 3


@planned
@pytest.mark.gpu
def test_another_device(device, ordinary, closed):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = {}
    for name in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        z, weights = drawn(name)
        want[name] = ordinary(step, z, weights)
        equal(step(z, weights), want[name])
        equal(closed(step, z, weights), want[name])
    assert torch.cuda.current_device() == 0


@planned
@pytest.mark.gpu
def test_options_find_their_own_plan(device, ordinary):
    """Deterministic mode, TF32, no gradients, a frozen map: each is another plan, or none."""
    z, weights = drawn(device, torch.float32, shape=(2, 64, 40, 40))
    for _ in range(2):
        equal(step(z, weights), ordinary(step, z, weights))
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            equal(step(z, weights), ordinary(step, z, weights))
        finally:
            torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = True
        equal(step(z, weights), ordinary(step, z, weights))
        torch.backends.cuda.matmul.allow_tf32 = False
        tensors = [value.detach().requires_grad_(i > 0) for i, value in enumerate((z, *weights))]

        def frozen(tensors=tensors):
            output = ar_kernels.attention_module(*tensors, implementation="triton")
            return dict(enumerate(torch.autograd.grad(output.hypothesis.sum(), tensors[1:])))

        equal(frozen(), ordinary(frozen))
