"""Autograd's node in C++ (csrc/node): the same as Python's, and out of everybody's way.

Every eager call of the native library on a CPU, and of plans on a GPU, goes by it where it was built: all other tests
are of it too.
"""

import gc
import itertools
import json
import subprocess
import sys
import weakref

import pytest
import torch
from layers import EPS, Layer, channels_last
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ar_kernels
from ar_kernels import functional, native, node, ops, plans

built = pytest.mark.skipif(node.why_not() is not None, reason=f"no node: {node.why_not()}")


@pytest.fixture
def name(device):
    """The implementation that the node serves here."""
    name = "native" if device.type == "cpu" else "triton"
    if device.type == "cuda" and plans.why_not() is not None:
        pytest.skip(f"no plans: {plans.why_not()}")
    return name


@pytest.fixture
def dtype(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def drawn(device, dtype, n=3, c=32, h=5, w=4, k=2, labels=6, layout=None):
    """z and the weights of masks, output and gates."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, c, h, w), (k, c), (labels, k * c), (k, c)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) / 4 for shape in shapes]
    tensors[0] = tensors[0] if layout is None else layout(tensors[0])
    return [tensor.requires_grad_() for tensor in tensors]


def is_by_node(tensor):
    return "CppFunction" in type(tensor.grad_fn).__name__ or "CppNode" in tensor.grad_fn.name()


@pytest.mark.skipif(not node.PATH.exists(), reason=f"there is no {node.PATH.name}")
def test_what_was_built_can_be_used():
    assert node.why_not() is None


@built
def test_a_layer_goes_by_it(name, device, dtype, monkeypatch):
    z, w, o, g = drawn(device, dtype)

    def made():
        return ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis

    assert is_by_node(made()) and is_by_node(made())
    monkeypatch.setattr(node, "wanted", False)
    assert not is_by_node(made()) and node.why_not() == "AR_KERNELS_NODE=0 turns it off"


@built
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"c": 32, "n": 4, "labels": 16},
        {"globals": 2},
        {"bias": False},
        {"gated": False},
        {"tap": False, "mean": False},
        {"kernel_size": 3},
        {"kernel_size": 3, "globals": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "weight_dtype": torch.float32},
        {"dtype": torch.float32},
        {"n": 0},
    ],
    ids=str,
)
def test_it_does_what_python_does(sizes, layout, name, device, monkeypatch):
    """To the bit: outputs and gradients of attention_module and of attend."""
    if device.type == "cuda":
        sizes = {"dtype": torch.bfloat16} | sizes  # what has plans
    layer = Layer(**sizes, device=device)
    applied, apply = [], ops._by_node

    def by_node(*arguments):
        applied.append(apply(*arguments))
        return applied[-1]

    monkeypatch.setattr(ops, "_by_node", by_node)
    found = [layer.run(name, layout=layout) for _ in range(2)]  # on a GPU the first records a plan
    assert len(applied) == 4 and None not in applied
    monkeypatch.setattr(node, "wanted", False)
    expected = layer.run(name, layout=layout)
    assert applied[4:] == [None, None]
    for results in found:
        assert results.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(results[key], value), key
            assert results[key].dtype == value.dtype and results[key].stride() == value.stride(), key


@built
def test_only_what_is_needed(name, device, dtype, monkeypatch):
    """Whichever inputs require a gradient, whichever outputs receive one."""
    tensors = drawn(device, dtype)
    outputs = ("hypothesis", "gates", "masks", "mean", "feature_map")

    def gradients(needed, received):
        given = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(tensors, needed)]
        made = ar_kernels.attention_module(*given, masks=True, mean=True, tap=True, implementation=name)
        losses = [getattr(made, output).float().square().sum() for output in received]
        losses = [loss for loss in losses if loss.requires_grad]
        asked = [tensor for tensor in given if tensor.requires_grad]
        if not losses or not asked:
            return []
        return torch.autograd.grad(sum(losses), asked, allow_unused=True)

    for needed in itertools.product((True, False), repeat=4):
        for received in [(output,) for output in outputs] + [outputs]:
            monkeypatch.setattr(node, "wanted", True)
            found = gradients(needed, received)
            monkeypatch.setattr(node, "wanted", False)
            for one, other in zip(found, gradients(needed, received), strict=True):
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@built
def test_double_backward(name, device, dtype, monkeypatch):
    tensors = drawn(device, torch.float64 if device.type == "cpu" else dtype)

    def second():
        made = ar_kernels.attention_module(*tensors, tap=True, implementation=name)
        loss = made.hypothesis.square().sum() + made.feature_map.pow(3).sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)

    found = second()
    monkeypatch.setattr(node, "wanted", False)
    for one, other in zip(found, second()):
        assert torch.equal(one, other)
    if device.type == "cpu":
        monkeypatch.setattr(node, "wanted", True)
        few = drawn(device, torch.float64, n=2, c=3, h=2, w=2, labels=3)
        assert torch.autograd.gradgradcheck(
            lambda *given: ar_kernels.attention_module(*given, implementation=name).hypothesis, few
        )


@built
def test_a_batch_of_gradients(name, device, dtype):
    z, w, o, g = drawn(device, dtype)
    made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    grads = torch.randn(3, *made.shape, device=device, dtype=dtype)
    together = torch.autograd.grad(made, (z, w), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for one, other in zip(together, torch.autograd.grad(made, (z, w), grad, retain_graph=True)):
            torch.testing.assert_close(one[i], other, rtol=8 * EPS[dtype], atol=8 * EPS[dtype])


@built
def test_torch_func_and_forward_mode(name, device):
    """Transformations see operators that they know, by Python."""
    z, w, o, g = (tensor.detach() for tensor in drawn(device, torch.float32))

    def loss(z, w):
        return ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis.square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(z, w)
    expected = torch.autograd.grad(loss(z.requires_grad_(), w.requires_grad_()), (z, w))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    with pytest.raises(Exception, match="forward mode|jvp"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), torch.ones_like(z))
        ar_kernels.attention_module(dual, w, o, g, implementation=name)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@built
def test_a_dispatch_mode_sees_the_operators(name, device, dtype):
    """In the forward; and in the backward of what was made without it."""
    z, w, o, g = drawn(device, dtype)
    made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    assert is_by_node(made)
    expected = torch.autograd.grad(made.sum(), (z, w, o, g), retain_graph=True)
    with Watch() as watch:
        found = torch.autograd.grad(made.sum(), (z, w, o, g))
    assert any("layer_backward" in operator for operator in watch.seen)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
    with Watch() as watch:
        ar_kernels.attention_module(z, w, o, g, implementation=name)
    assert any(".layer." in operator for operator in watch.seen)


@built
def test_a_subclass_sees_the_operators(name, device, dtype):
    from torch.testing._internal.two_tensor import TwoTensor

    z, w, o, g = (tensor.detach() for tensor in drawn(device, dtype))
    both = TwoTensor(z, 2 * z)
    weights = [TwoTensor(weight, weight) for weight in (w, o, g)]
    made = ar_kernels.attention_module(both, *weights, implementation=name).hypothesis
    for half, one in (("a", z), ("b", 2 * z)):
        expected = ar_kernels.attention_module(one, w, o, g, implementation=name).hypothesis
        torch.testing.assert_close(getattr(made, half), expected, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@built
def test_tensors_whose_memory_is_not_their_values(name, device, monkeypatch):
    """Negated views, and gradients that come as such, or as no memory at all: with the node and without."""
    if device.type == "cuda":
        pytest.skip("float32 maps of this size have no plan on a GPU")
    z, w, o, g = (tensor.detach() for tensor in drawn(device, torch.float32))

    def negated(tensor):
        return torch.complex(tensor, -tensor).conj().imag  # the values of tensor

    def results(is_odd, tap):
        inputs = [tensor.clone().requires_grad_() for tensor in (z, w, o, g)]
        given = [negated(tensor) if odd else tensor for tensor, odd in zip(inputs, is_odd)]
        made = ar_kernels.attention_module(*given, tap=True, implementation=name)
        grads = [torch.ones_like(made.hypothesis), tap(made.feature_map)]
        return made.hypothesis, *torch.autograd.grad((made.hypothesis, made.feature_map), inputs, grads)

    def zero(tensor):
        return torch._efficientzerotensor(tensor.shape)

    taps = [
        (torch.ones_like, torch.ones_like),
        (lambda tensor: negated(torch.ones_like(tensor)), torch.ones_like),
        (zero, torch.zeros_like),
    ]
    for wanted in (True, False):
        monkeypatch.setattr(node, "wanted", wanted)
        for is_odd in itertools.product((False, True), repeat=4):
            for tap, same in taps:
                for one, other in zip(results(is_odd, tap), results((False,) * 4, same)):
                    torch.testing.assert_close(one, other)


class Named(torch.Tensor):
    """Sees functions, and keeps its class; operators are those of any tensor."""


@built
def test_a_subclass_among_the_weights_sees_functions(name, device, dtype):
    z, w, o, g = (tensor.detach() for tensor in drawn(device, dtype))
    made = ar_kernels.attention_module(z, w.as_subclass(Named), o, g, implementation=name).hypothesis
    expected = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    assert type(made) is Named and type(expected) is torch.Tensor
    torch.testing.assert_close(made.as_subclass(torch.Tensor), expected, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@built
def test_jit_trace(name, device, dtype):
    """A trace under no_grad has the operators, and so the results of other inputs."""
    module = ar_kernels.AttentionModule(8, 3, heads=2).to(device, dtype).requires_grad_(False)
    z, other = (torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in (0, 1))

    class Hypothesis(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, z):
            with ar_kernels.use_implementation(name):
                return self.module(z).hypothesis

    with torch.no_grad():
        traced = torch.jit.trace(Hypothesis(), z)
        assert "::layer(" in str(traced.inlined_graph)
        for each in (z, other):
            torch.testing.assert_close(traced(each), Hypothesis()(each), rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@built
def test_hooks_of_saved_tensors(name, device, dtype):
    """They may return a copy, or other strides."""
    z, w, o, g = drawn(device, dtype)
    made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    expected = torch.autograd.grad(made.sum(), (z, w, o, g))

    def gaps(tensor):
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    for pack, unpack in ((lambda t: t.detach().cpu(), lambda t: t.to(device)), (lambda t: t.detach(), gaps)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
        assert is_by_node(made)
        for one, other in zip(torch.autograd.grad(made.sum(), (z, w, o, g)), expected):
            torch.testing.assert_close(one, other, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@built
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, name, device, dtype):
    z, w, o, g = drawn(device, dtype)

    def layer(*tensors):
        return ar_kernels.attention_module(*tensors, implementation=name).hypothesis

    expected = torch.autograd.grad(layer(z, w, o, g).sum(), (z, w, o, g))
    checkpoint(layer, z, w, o, g, use_reentrant=reentrant).sum().backward()
    for tensor, grad in zip((z, w, o, g), expected):
        assert torch.equal(tensor.grad, grad)


@built
def test_graphs_end_as_pytorchs_do(name, device, dtype):
    z, w, o, g = drawn(device, dtype)
    made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    made.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        made.sum().backward()
    other = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


@built
def test_changing_the_tapped_map_in_place_raises(name, device, dtype):
    z, w, o, g = drawn(device, dtype)
    tapped = ar_kernels.attention_module(z.relu(), w, o, g, tap=True, implementation=name).feature_map
    with pytest.raises(RuntimeError, match="view|in-?place"):
        tapped.add_(1)


@built
def test_nothing_is_kept(name, device, dtype):
    """When a graph is gone so is what it saved, whether its backward ran or not."""
    _, w, o, g = drawn(device, dtype)
    for runs in (False, True):
        z = drawn(device, dtype)[0]
        made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
        if runs:
            made.sum().backward()
        seen = weakref.ref(z)
        del z, made
        gc.collect()
        assert seen() is None


@built
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_an_error_in_python_arrives_as_it_is(part, name, device, monkeypatch):
    """As do the library's own, as RuntimeError."""

    class Odd(Exception):
        pass

    def fail(*arguments):
        raise Odd("as it is")

    module = node.module()
    z, w, o, g = drawn(device, torch.float32 if device.type == "cpu" else torch.bfloat16, n=7, c=24)
    try:
        if part == "forward":
            call = module.make_call(*[native.address("ar_kernels_replay"), -1] * 2, (2, 0, 0, 0, name, 0), (7,))
            if plans.why_not() is not None:
                with pytest.raises(RuntimeError, match="taps_first must be false on a CPU, got true"):
                    layer = native.address("ar_kernels_layer")
                    wrong = module.make_call(*[layer, None] * 2, (2, 0, 0, 0, name, 1), (7,))
                    module.apply(wrong, z, w, None, g, None, o)
            module.set_python(fail, *node.python[1:])
            with pytest.raises(Odd, match="as it is"):  # no plan has such a number
                module.apply(call, z, w, None, g, None, o)
        else:
            module.set_python(node.python[0], fail, node.python[2])
            made = ar_kernels.attention_module(z, w, o, g, implementation=name).hypothesis
            with pytest.raises(Odd, match="as it is"):
                torch.autograd.grad(made.sum(), (z, w), create_graph=True)
    finally:
        module.set_python(*node.python)


@built
def test_bad_calls():
    module, z = node.module(), torch.ones(1, 2, 3)
    with pytest.raises(TypeError, match="apply takes 7 arguments, got 1"):
        module.apply(z)
    with pytest.raises(ValueError, match="PyCapsule"):
        module.apply(z, z, z, z, z, z, z)
    with pytest.raises(TypeError, match="fits takes 7 arguments, got 0"):
        module.fits()
    with pytest.raises(ValueError, match="wanted must be below 9, got 9"):
        module.make_call(1, None, 1, None, (1, 0, 0, 0, "native", 0), (9,))
    with pytest.raises(ValueError, match="an operator must have an address, got 0"):
        module.make_call(0, None, 1, None, (1, 0, 0, 0, "native", 0), (1,))
    with pytest.raises(ValueError, match="options must be 6, got 2"):
        module.make_call(1, None, 1, None, (1, 0), (1,))
    with pytest.raises(TypeError):
        module.make_call(1, "a plan", 1, None, (1, 0, 0, 0, "native", 0), (1,))
    call = module.make_call(1, None, 1, None, (1, 0, 0, 0, "native", 0), (1,))
    assert module.apply(call, None, z, z, z, z, z) is None and module.apply(call, z, 3, z, z, z, z) is None


# ---------------------------------------------------------------------------------------------- checks of arguments


def values(*shapes, dtype=torch.float32):
    return [None if shape is None else torch.zeros(shape, dtype=dtype) for shape in shapes]


FITTING = values((2, 4, 3, 5), (3, 4), (3,), (3, 4), (3,), (6, 12), (3, 6))
"""feature_map, mask_weight, mask_bias, gate_weight, gate_bias, output_weight, output_bias."""

ODD = [
    3, "a word", torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(4), torch.zeros(3, 4), torch.zeros(4, 3),
    torch.zeros(2, 4, 3), torch.zeros(2, 4, 0, 5), torch.zeros(0, 4, 3, 5), torch.zeros(2, 0, 3, 5), torch.zeros(0, 4),
    torch.zeros(2, 4, 3, 5, 1), torch.zeros(3, 4, 3, 3), torch.zeros(6, 12), torch.zeros(0, 12), torch.zeros(3, 6, 4),
    torch.zeros(3, 6), torch.zeros(3, 7), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(2, 4, 3, 5).char(),
    torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4).to_sparse(),
    torch.zeros(2, 4, 3, 5).bfloat16(), torch.zeros(3, 4, device="meta"), torch.zeros(2, 4, 3, 5, device="meta"),
    None,
]  # fmt: skip


@built
def test_what_fits_is_what_python_checks():
    """Whatever it lets pass Python's checks let pass; and of what they let pass, only unusual things go by them."""
    assert ops.fits(*FITTING)
    by_head = 0
    for place in range(len(FITTING)):
        for odd in ODD:
            given = [*FITTING[:place], odd, *FITTING[place + 1 :]]
            try:
                functional._check_layer(*given)
                passes = True
            except (TypeError, ValueError):
                passes = False
            if passes and not ops.fits(*given):
                by_head += 1
                assert place == 5 and odd.shape == (3, 6, 4), "W_O head by head"
            assert passes or not ops.fits(*given), (place, odd)
    assert by_head == 1


@built
@pytest.mark.parametrize(
    "given",
    [
        values((2, 4, 7), (3, 4), None, None, None, (6, 12), None),
        values((2, 4, 3, 5), (3, 4, 3, 3), (3,), (3, 4, 3, 3), None, (6, 108), None),
        values((0, 4, 3, 5), (3, 4), None, None, None, (6, 12), None, dtype=torch.float64),
        values((2, 4, 3, 5), (3, 4), None, None, None, (6, 12), None, dtype=torch.float16),
        [*values((2, 4, 3, 5), dtype=torch.bfloat16), *FITTING[1:]],
    ],
)
def test_the_usual_fits(given):
    functional._check_layer(*given)
    assert ops.fits(*given)


# ---------------------------------------------------------------------------------------------- without it


def _python(code, **variables):
    import os

    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def test_the_variable_turns_it_off():
    code = "from ar_kernels import env, node; print(node.why_not()); print(node.module())"
    run = _python(code, AR_KERNELS_NODE="0")
    assert run.stdout.splitlines() == ["AR_KERNELS_NODE=0 turns it off", "None"], run.stderr


def test_one_of_another_torch_is_not_loaded(tmp_path, monkeypatch):
    other = tmp_path / f"_node-1.0.0{node.SUFFIX}"
    other.write_bytes(b"not to be read")
    monkeypatch.setattr(node, "PATH", tmp_path / node.PATH.name)
    node._load.cache_clear()
    try:
        assert node.why_not() == f"there is no {node.PATH.name}, only {other.name}" and node.module() is None
        other.rename(node.PATH)
        node._load.cache_clear()
        if native.why_not("cpu") is None:
            assert f"{node.PATH.name} cannot be loaded" in node.why_not()
        layer = Layer(n=2)
        if native.why_not("cpu") is None:
            assert layer.run("native")["module.hypothesis"].isfinite().all()
    finally:
        node._load.cache_clear()


def test_what_was_not_built_together_is_not_used(monkeypatch):
    if node.why_not() is not None:
        pytest.skip(f"no node: {node.why_not()}")
    monkeypatch.setattr(native, "sources", lambda: "others")
    node._load.cache_clear()
    try:
        assert node.why_not() == f"{node.PATH.name} and {native.PATH.name} were not built together"
    finally:
        node._load.cache_clear()


def test_env_says_whether_it_is_used(capsys):
    from ar_kernels import env

    env.main(["--json"])
    line = json.loads(capsys.readouterr().out)["native"]["node"]
    assert line == (node.why_not() or "is used on a CPU, and where plans are: layers' backwards need no Python")
