"""The library built from csrc/: the same bits whatever the threads, every target's kernels, and how it gets built.

What it computes is tested with every other implementation, in test_attend.py and test_ops.py.
"""

import functools
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from layers import EPS, Layer, channels_last
from torch.utils._python_dispatch import TorchDispatchMode

import ar_kernels
from ar_kernels import env, native, ops, plans

ROOT = Path(__file__).parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILERS = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
COMPILER = next((name for name in COMPILERS if shutil.which(name)), None)

built = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
compiles = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def _python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT / "tests",  # not where a folder named ar_kernels would come first
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---------------------------------------------------------------------------------------------- threads


@built
@pytest.mark.parametrize("taps", [(), (3, 3)], ids=["1×1", "3×3"])
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(37, 70, 13, 11), (2, 64, 56, 56)], ids=str)
def test_same_bits_whatever_the_number_of_threads(shape, layout, taps):
    """Many images and few: the work is cut by shape alone."""
    generator = torch.Generator().manual_seed(0)
    z, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    z = z if layout is None else layout(z)
    w, score_w = (torch.randn(6, shape[1], *taps, generator=generator) / 8 for _ in range(2))
    operators = torch.ops.ar_kernels_native
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if taps:
                outputs = operators.gated_attend3x3(z, w, None, score_w, None, 4, True)
            else:
                outputs = operators.gated_attend(z, w, w[:, 0], score_w, None, 4, True, True)
            pooled, lse, logits, scores, gates, features, mean = outputs
            grads = pooled, lse, logits, scores, gates, features, mean, upstream  # as good as any of their shapes
            rest = (*grads, True, True, True, layout is not None)
            if taps:
                saved = z, w, score_w, pooled, lse, logits, scores, gates
                results.append(outputs + operators.gated_attend3x3_backward(*saved, *rest))
            else:
                saved = z, w, w[:, 0], score_w, pooled, lse, scores, gates
                results.append(outputs + operators.gated_attend_backward(*saved, *rest))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, another) for one, another in zip(results[0], other))


# ---------------------------------------------------------------------------------------------- tiles


@built
@pytest.mark.parametrize(
    "sizes, layout",
    [({"c": 5, "h": 17, "w": 19}, channels_last), ({"c": 520, "h": 10, "w": 13}, None)],
    ids=["channels_last", "contiguous"],
)
def test_an_image_of_several_tiles_that_is_not_split(sizes, layout):
    """So many images that each is one item's: its sums are rescaled from tile to tile, and merged with none."""
    layer = Layer(n=33, k=3, globals=1, **sizes)
    got, exact = layer.run("native", layout=layout), layer.run("reference")
    for name, truth in exact.items():
        assert (got[name] - truth).abs().max() <= 1e-12 * max(1.0, truth.abs().max().item()), name


# ---------------------------------------------------------------------------------------------- products with W_O

WAYS = {
    "features times W_O": lambda x, w, g: (x, w.t()),
    "a gradient times W_O": lambda x, w, g: (g, w),
    "W_O's gradient": lambda x, w, g: (g.t(), x),
}


HALVES = (torch.float16, torch.bfloat16)


def _rounds_once(found, a, b):
    """Whether a sum in float32, in any order, and one rounding to found's dtype explain how far it is off a b: half a
    unit in the last place of what was summed, or of a subnormal half."""
    unit = 0.0 if found.dtype == torch.float32 else EPS[found.dtype] / 2
    smallest = 2**-25 if found.dtype == torch.float16 else 0.0
    a, b, found = a.double(), b.double(), found.double()
    exact, summed = a @ b, a.shape[1] * 2**-24 * (a.abs() @ b.abs())
    return ((found - exact).abs() <= unit * (exact.abs() + summed) + smallest + summed).all().item()


def _factors(images: int, channels: int, labels: int, seed: int = 0, gap: int = 0, dtype=torch.float32):
    """x [N, K·C], W_O [L, K·C] and y's gradient [N, L]; gap: NaN between their rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, channels), (labels, channels), (images, labels)
    found = []
    for rows, columns in shapes:
        whole = torch.full((rows, columns + gap), torch.nan, dtype=dtype)
        whole[:, :columns] = torch.randn(rows, columns, generator=generator, dtype=dtype)
        found.append(whole[:, :columns])
    return found


@built
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(1, 16, 1), (5, 48, 7), (4, 1088, 100), (33, 320, 66), (300, 64, 10)], ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_products(sizes, gap, way):
    """No less exact than PyTorch's of the same draws (or off by an ulp), whatever lies between rows."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        a, b = WAYS[way](*_factors(*sizes, seed=seed, gap=gap))
        exact = a.double() @ b.double()
        found = torch.ops.ar_kernels_native.product(a, b)
        assert found.shape == exact.shape and found.is_contiguous()
        squares += torch.stack([((value - exact) / exact.norm()).square().sum() for value in (found.double(), a @ b)])
    error, allowed = squares.div(3).sqrt().tolist()
    assert error <= 2 * allowed + 2**-23


@built
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(1, 16, 1), (5, 48, 7), (33, 1088, 99), (300, 64, 10)], ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_products_of_halves(sizes, gap, way, dtype):
    for seed in range(3):
        a, b = WAYS[way](*_factors(*sizes, seed=seed, gap=gap, dtype=dtype))
        found = torch.ops.ar_kernels_native.product(a, b)
        assert found.dtype == dtype and found.is_contiguous()
        assert _rounds_once(found, a, b)


@built
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_products_of_other_sizes_strides_and_dtypes_are_pytorchs(dtype, way):
    product = torch.ops.ar_kernels_native.product
    others = {torch.float64: [(3, 64, 5)], torch.bfloat16: [(130, 2592, 100)]}  # as many as are PyTorch's in bfloat16
    for sizes in ((3, 7, 5), (2, 50, 9), *others.get(dtype, [])):
        a, b = WAYS[way](*_factors(*sizes, dtype=dtype))
        assert torch.equal(product(a, b), a @ b)
    a, b = WAYS[way](*_factors(4, 64, 64, dtype=dtype))
    ones = a.new_ones(1, 1)
    for one, other in ((ones.expand_as(a), b), (a, ones.expand_as(b)), (a[:0], b), (a[:, :0], b[:0])):
        assert torch.equal(product(one, other), one @ other)


@built
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_products_have_the_same_bits_whatever_the_number_of_threads(way, dtype):
    a, b = WAYS[way](*_factors(50, 2064, 300, dtype=dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.ar_kernels_native.product(a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@built
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_direction_of_a_layer_is_one_operator(dtype):
    layer = Layer(n=3, c=16, h=4, w=5, k=2, bias=False, dtype=dtype)
    tensors = {name: value.requires_grad_() for name, value in layer.tensors.items()}
    with _Called() as called:
        output = ar_kernels.attention_module(**tensors, implementation="native").hypothesis
        torch.autograd.grad(output.sum(), list(tensors.values()), allow_unused=True)
    of_the_layer = [name for name in called.names if "ar_kernels" in name or "mm" in name]
    assert of_the_layer == ["ar_kernels_native::layer", "ar_kernels_native::layer_backward"]


@built
def test_bad_factors():
    product = torch.ops.ar_kernels_native.product
    with pytest.raises(RuntimeError, match=r"a must be a matrix, got \[3\]"):
        product(torch.ones(3), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=r"b must be a matrix \[3, N\], got \[2, 2\]"):
        product(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="b must be Float like a, got Double"):
        product(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- a layer as one operator

TENSORS = ("z", "w", "b", "score_w", "score_b", "output_w")
MADE = ("pooled", "lse", "logits", "scores", "gates", "features", "mean", "hypothesis")

LAYERS = {
    "many images": {"n": 33, "c": 96, "h": 8, "w": 7, "labels": 10},
    "few images": {"n": 3, "c": 64, "h": 5, "w": 4, "labels": 9},
    "an image in parts": {"n": 1, "c": 64, "h": 48, "w": 40, "labels": 3},
    "no images": {"n": 0, "c": 16, "h": 3, "w": 2, "labels": 5},
    "large W_O": {"n": 9, "c": 1088, "h": 8, "w": 8, "labels": 500},
    "W_O's width is odd": {"n": 5, "c": 37, "h": 7, "w": 9, "k": 3, "labels": 6},
    "W_O's columns lie in memory": {"n": 12, "c": 16, "h": 3, "w": 5, "labels": 32, "turned": True},
    "W_O's rows lie apart": {"n": 12, "c": 16, "h": 3, "w": 5, "labels": 6, "gap": 3},
    "some heads gated": {"n": 12, "c": 16, "h": 4, "w": 4, "k": 5, "gated": 3, "labels": 7},
    "no scores": {"n": 12, "c": 16, "h": 4, "w": 4, "labels": 7, "scored": False},
    "no gates": {"n": 5, "c": 16, "h": 4, "w": 4, "gated": 0, "labels": 0},
    "no W_O": {"n": 5, "c": 16, "h": 4, "w": 4, "labels": 0},
    "bfloat16": {"n": 12, "c": 16, "h": 4, "w": 5, "labels": 6, "dtype": torch.bfloat16, "weight": torch.bfloat16},
    "more images than one sum has": {"n": 131, "c": 16, "h": 3, "w": 3, "labels": 7},
    "float32 of float64 weights": {"n": 12, "c": 16, "h": 4, "w": 5, "labels": 6, "weight": torch.float64},
    "float64": {"n": 12, "c": 16, "h": 4, "w": 5, "labels": 6, "dtype": torch.float64, "weight": torch.float64},
    "3×3": {"n": 12, "c": 16, "h": 4, "w": 5, "labels": 6, "taps": (3, 3)},
    "3×3, odd": {"n": 2, "c": 7, "h": 9, "w": 5, "k": 3, "gated": 2, "labels": 6, "taps": (3, 3)},
}

RECEIVED = [
    ("hypothesis",),
    ("hypothesis", "scores"),
    ("hypothesis", "pooled", "lse", "mean", "upstream"),
    ("pooled", "logits"),
    ("features",),
    ("upstream",),
    (),
]
"""Of which outputs, or of the tapped map, there is a gradient."""


def _layer_tensors(
    n, c, h, w, labels, k=4, gated=None, scored=True, taps=(), dtype=torch.float32, weight=torch.float32,
    turned=False, gap=0, layout=None,
):  # fmt: skip
    """What the operator layer takes, and K'."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    gated = k if gated is None else gated
    width = gated * c * (9 if taps else 1)
    z = draw(n, c, h, w).to(dtype)
    output_w = None
    if labels:
        rows = (draw(width, labels) if turned else draw(labels, width + gap)).to(weight) / 8
        output_w = rows.t() if turned else rows[:, :width]
    weights = [draw(k, c, *taps) / 8, draw(k), draw(k, c, *taps) / 8 if scored else None, draw(k) if scored else None]
    weights = [None if each is None else each.to(weight) for each in weights]
    return [z if layout is None else layout(z), *weights, output_w], gated


def _assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


def _gradients(tensors, made, received):
    """What the operator layer_backward takes, with gradients of those outputs."""
    generator = torch.Generator().manual_seed(1)
    z, w, b, score_w, _, output_w = tensors
    values = dict(zip(MADE, made)) | {"upstream": z}
    grads = [
        torch.randn(value.shape, generator=generator).to(value.dtype)
        if name in received and value is not None
        else None
        for name, value in values.items()
    ]
    pooled, lse, logits, scores, gates, features = made[:6]
    saved = pooled, lse, logits if w.dim() == 4 else None, scores, gates, features
    return [z, w, b, score_w, output_w, *saved, *grads]


def layer(tensors, options):
    """What the operator made, None in place of what is empty."""
    gated, *flags = options
    return _made(torch.ops.ar_kernels_native.layer(*tensors, gated, *map(bool, flags)))


def layer_backward(tensors, options):
    return _made(torch.ops.ar_kernels_native.layer_backward(*tensors, *map(bool, options)))


def _made(outputs):
    return [None if output is None or output.shape == (0,) else output for output in outputs]


def assert_a_layer_is_its_parts(layout=None, **sizes):
    """The bits, dtypes and strides of the operators that compute the attention and the products."""
    tensors, gated = _layer_tensors(**sizes, layout=layout)
    run, multiply = functools.partial(ops._dispatch, "native"), ops._product_of("native", tensors[0].dtype)
    for flags in itertools.product((0, 1), repeat=3):
        options = [gated, *flags, 0]
        made = layer(tensors, options)
        _assert_same(made, ops._forward(run, multiply, *tensors, *options))
    for received in RECEIVED:
        arguments = _gradients(tensors, made, received)
        for needs in itertools.product((0, 1), repeat=5):
            for channels_last_ in (0, 1):
                options = [*needs, channels_last_, 0]
                with mock.patch.multiple(ops, _launch=run, _product_in_triton=lambda *_: multiply):
                    expected = ops._layer_backward(*arguments, *options)
                _assert_same(layer_backward(arguments, options), _made(expected))


@built
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_parts(name, layout):
    assert_a_layer_is_its_parts(layout, **LAYERS[name])


@built
def test_a_layer_of_positions_without_rows():
    assert_a_layer_is_its_parts(lambda z: z.flatten(2), **LAYERS["many images"])


def assert_a_layer_of_halves_rounds_once(layout=None, turned_grad=False, **sizes):
    """Its products: AVX-512's take a float32 W_O as it is, PyTorch's round it to the map's dtype, and its gradient."""
    tensors, gated = _layer_tensors(**sizes, layout=layout)
    z, output_w = tensors[0], tensors[5]
    # Of so few bits, and times so small whole numbers, that float32 has all sums of them: their bits are known.
    output_w = tensors[5] = (output_w * 2**14).round().clamp(-(2**14), 2**14) / 2**14
    dtype = output_w.dtype if native.target() == "avx512" else z.dtype
    made = layer(tensors, [gated, 0, 0, 0, 0])
    features, hypothesis = made[5], made[7]
    assert hypothesis.dtype == z.dtype and _rounds_once(hypothesis, features, output_w.to(dtype).t())
    arguments = _gradients(tensors, made, ("hypothesis",))
    grad = arguments[18].round().clamp(-2, 2)
    arguments[18] = grad.t().contiguous().t() if turned_grad else grad
    if turned_grad or grad.numel() == 1:  # of one image and label too rows and columns both lie in memory
        dtype = z.dtype
    found = layer_backward(arguments, [1, 1, 1, 1, 1, 0, 0])
    assert found[4].dtype == output_w.dtype and _rounds_once(found[4].to(dtype), grad.t(), features)
    arguments[16], arguments[18] = (grad.double() @ output_w.to(dtype).double()).to(z.dtype), None
    _assert_same(found[:4], layer_backward(arguments, [1, 1, 1, 1, 0, 0, 0])[:4])


@built
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("weight", ["float32", "as the map"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "many images",
        "few images",
        "an image in parts",
        "large W_O",
        "more images than one sum has",
        "W_O's rows lie apart",
        "3×3",
    ],
)
def test_a_layer_of_halves_rounds_its_products_once(name, dtype, weight, layout):
    sizes = LAYERS[name] | {"dtype": dtype, "weight": torch.float32 if weight == "float32" else dtype}
    assert_a_layer_of_halves_rounds_once(layout, **sizes)


@built
@pytest.mark.parametrize("weight", ["float32", "as the map"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_layer_of_halves_takes_gradients_as_they_lie(dtype, weight):
    """Which must not be taken for those of another product, whose W_O is somewhere else."""
    kinds = {"dtype": dtype, "weight": torch.float32 if weight == "float32" else dtype}
    assert_a_layer_of_halves_rounds_once(**LAYERS["many images"] | kinds, turned_grad=True)
    assert_a_layer_of_halves_rounds_once(**LAYERS["few images"] | kinds | {"n": 1, "labels": 1})


@built
def test_threads_find_their_images_in_a_gradient_whose_columns_lie_in_memory():
    tensors, gated = _layer_tensors(**LAYERS["many images"])
    made = layer(tensors, [gated, 0, 0, 0, 0])
    arguments = _gradients(tensors, made, ("hypothesis",))
    expected = layer_backward(arguments, [1, 0, 0, 0, 0, 0, 0])[0]
    arguments[18] = arguments[18].t().contiguous().t()
    found = layer_backward(arguments, [1, 0, 0, 0, 0, 0, 0])[0]
    assert (found - expected).abs().max() <= 2**-20 * expected.abs().max()


@built
@pytest.mark.parametrize("name", ["many images", "bfloat16"])
def test_gradients_of_features_and_of_their_product_add_up(name):
    tensors, gated = _layer_tensors(**LAYERS[name])
    made = layer(tensors, [gated, 0, 0, 0, 0])
    arguments = _gradients(tensors, made, ("features", "hypothesis"))
    found = layer_backward(arguments, [1, 1, 1, 1, 1, 0, 0])
    features, hypothesis = 16, 18
    alone = layer_backward([*arguments[:features], None, *arguments[17:]], [0, 0, 0, 0, 1, 0, 0])
    output_w = arguments[4].to(tensors[0].dtype)
    total = torch.ops.ar_kernels_native.product(arguments[hypothesis], output_w) + arguments[features]
    rest = layer_backward([*arguments[:features], total, None, None, None], [1, 1, 1, 1, 0, 0, 0])
    _assert_same(found, [*rest[:4], alone[4]])


@built
@pytest.mark.parametrize("layout", [None, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["many images", "large W_O", "an image in parts", "3×3"])
def test_a_layer_has_the_same_bits_whatever_the_number_of_threads(name, dtype, layout):
    """Threads have the products of their own images, or share each product: by their number too."""
    sizes = LAYERS[name] if name != "many images" else {"n": 37, "c": 64, "h": 28, "w": 20, "labels": 100}
    tensors, gated = _layer_tensors(**sizes, dtype=dtype, layout=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = layer(tensors, [gated, 1, 1, 1, 0])
            arguments = _gradients(tensors, made, ("hypothesis", "mean"))
            results.append(made + layer_backward(arguments, [1, 1, 1, 1, 1, 0, 0]))
    finally:
        torch.set_num_threads(before)
    _assert_same(results[1], results[0])
    _assert_same(results[2], results[0])


@built
@pytest.mark.parametrize(
    ("backward", "change", "message"),
    [
        (False, [4, 0, 0, 0, 1], "taps_first must be false on a CPU, got true"),
        (False, [5, 0, 0, 0, 0], "gated_heads must be from 0 to K = 4, got 5"),
        (False, [0, 0, 0, 0, 0], r"output_w must be None without gated heads, got \[6, 64\]"),
        (False, {"z": torch.zeros(2, 16)}, r"z must be \[N, C, H, W\] or \[N, C, S\] .*, got \[2, 16\]"),
        (False, {"w": torch.zeros(16)}, r"w must be \[K, C\] with a head, got \[16\]"),
        (False, {"score_b": torch.zeros(3)}, r"score_b must be \[4\], got \[3\]"),
        (False, {"output_w": torch.zeros(6, 63)}, r"output_w must be \[L, 64\], got \[6, 63\]"),
        (False, {"output_w": torch.zeros(64)}, r"output_w must be \[L, 64\], got \[64\]"),
        (False, {"output_w": torch.zeros(6, 64, dtype=torch.int32)}, "output_w must be float16, .*, got Int"),
        (True, {"z": torch.zeros(2)}, r"z must be \[N, C, H, W\] or \[N, C, S\] .*, got \[2\]"),
        (True, {"w": torch.zeros(4, 16, 3, 3), "grad_hypothesis": None}, "logits must be a tensor, got None"),
        (True, {"output_w": torch.zeros(6, 63)}, r"output_w must be \[L, 64\], got \[6, 63\]"),
        (True, {"features": torch.zeros(12, 63)}, r"features must be \[12, 64\], got \[12, 63\]"),
        (True, {"features": torch.zeros(12, 64).double()}, "features must be Float like z, got Double"),
        (True, {"grad_hypothesis": torch.zeros(12, 7)}, r"grad_hypothesis must be \[12, 6\], got \[12, 7\]"),
        (True, {"grad_hypothesis": torch.zeros(12, 6).double()}, "grad_hypothesis must be Float like z, got Double"),
        (True, {"grad_pooled": torch.zeros(12, 4)}, r"grad_pooled must be \[12, 4, 16\], got \[12, 4\]"),
    ],
)
def test_bad_arguments_of_a_layer(backward, change, message):
    tensors, gated = _layer_tensors(n=12, c=16, h=3, w=5, labels=6)
    options = [gated, 0, 0, 0, 0]
    names, operator = TENSORS, layer
    if backward:
        tensors = _gradients(tensors, operator(tensors, options), ("hypothesis", "pooled"))
        options = [1, 1, 1, 1, 1, 0, 0]
        names = ("z", "w", "b", "score_w", "output_w", *MADE[:6], *(f"grad_{name}" for name in MADE), "upstream")
        operator = layer_backward
    assert len(names) == len(tensors)
    if isinstance(change, list):
        options = change
    else:
        tensors = [change.get(name, tensor) for name, tensor in zip(names, tensors)]
    with pytest.raises(RuntimeError, match=message):
        operator(tensors, options)


@built
def test_a_layer_loads_the_library():
    code = (
        "import torch, ar_kernels\n"
        "z, w = torch.ones(1, 2, 3), torch.ones(1, 2)\n"
        "print(torch.ops.ar_kernels_native.layer(z, w, *[None] * 4, 0, *[False] * 4)[0].tolist())\n"
    )
    run = _python(code)
    assert (run.stdout, run.returncode) == ("[[[1.0, 1.0]]]\n", 0), run.stderr


# ---------------------------------------------------------------------------------------------- targets

OF_TARGET = """
import itertools
import sys
import torch
from layers import Layer, assert_within_budget, channels_last, slice_of_cat
from ar_kernels import native
assert native.why_not("cpu") is None
pointwise = {"n": 3, "c": 37, "h": 7, "w": 9, "k": 7, "globals": 4}
spatial = {"n": 2, "c": 19, "h": 9, "w": 5, "k": 3, "globals": 2, "kernel_size": 3}
for sizes, layout in itertools.product((pointwise, spatial), (None, channels_last, slice_of_cat)):
    layer = Layer(**sizes)
    got, exact = layer.run("native", layout=layout), layer.run("reference")
    for name, truth in exact.items():
        assert (got[name] - truth).abs().max() <= 1e-12 * max(1.0, truth.abs().max().item()), name
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        draws = []
        for seed in range(3):
            layer = Layer(**sizes, dtype=dtype, seed=seed)
            runs = layer.run("native", layout=layout), layer.run("eager", layout=layout)
            draws.append((*runs, layer.run("reference", exact=True)))
        assert_within_budget(draws, dtype)
for images, channels, labels in ((1, 16, 1), (7, 1088, 33), (130, 64, 10)):
    x, w, g = (torch.randn(sizes) for sizes in ((images, channels), (labels, channels), (images, labels)))
    for a, b in ((x, w.t()), (g, w), (g.t(), x)):
        exact, allowed = a.double() @ b.double(), a.shape[1] * 2**-24 * (a.abs().double() @ b.abs().double())
        assert ((torch.ops.ar_kernels_native.product(a, b) - exact).abs() <= allowed).all()
# Every half there is, through a layer of one position, whose pooled features are the map's own values.
import ar_kernels
for dtype in (torch.bfloat16, torch.float16):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    z, w = values.reshape(-1, 8, 1, 1), torch.zeros(1, 8)
    pooled = ar_kernels.attend(z, w, implementation="native").pooled
    assert torch.equal(pooled.flatten(), values.float())
    # and back: numbers that round up, down and to even, subnormal halves among them
    grad = torch.cat([values.float() * f for f in (1.0, 1 + 2**-9, 1 + 3 * 2**-12, 1 - 2**-10, 0.3)])
    z = torch.zeros(grad.numel() // 8, 8, 1, 1, dtype=dtype, requires_grad=True)
    (got,) = torch.autograd.grad(ar_kernels.attend(z, w, implementation="native").pooled.flatten(), z, grad)
    assert torch.equal(got.flatten(), grad.to(dtype))
import test_native
for name in ("many images", "few images", "W_O's width is odd", "bfloat16", "3×3"):
    test_native.assert_a_layer_is_its_parts(**test_native.LAYERS[name])
for name in ("many images", "few images", "more images than one sum has"):
    for dtype, weight in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2):
        sizes = test_native.LAYERS[name] | {"dtype": dtype, "weight": weight}
        test_native.assert_a_layer_of_halves_rounds_once(**sizes)
assert native.target() == sys.argv[1], native.target()
"""


@built
@pytest.mark.parametrize("target", ["portable", "avx2", "avx512"] if X86 else ["portable"])
def test_every_target(target):
    """Each in a process of its own: AR_KERNELS_TARGET is read once."""
    run = _python(OF_TARGET, target, AR_KERNELS_TARGET=target)
    if "must name instructions that this CPU has" in run.stderr:
        pytest.skip(f"this CPU has no {target}")
    assert run.returncode == 0, run.stderr


@built
def test_an_unknown_target_is_refused():
    code = "import torch, ar_kernels\nar_kernels.attend(torch.ones(1, 2, 3), torch.ones(1, 2))"
    run = _python(code, AR_KERNELS_TARGET="avx1024")
    assert run.returncode == 1
    assert re.search(r"AR_KERNELS_TARGET must be one of .*portable, got avx1024", run.stderr)


@built
@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
@pytest.mark.skipif(not (ROOT / "build").exists(), reason="no objects: setup.py build_ext --inplace was not run here")
def test_no_target_leaks_instructions_into_another():
    """A function that two targets' files define under one name is kept once by the linker: with whose instructions?"""
    objects = [file for file in ROOT.glob("build/temp*/*-*.o") if not file.stem.endswith(("-cuda", "-node"))]
    assert objects
    for file in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", str(file)], capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if re.match(r"\S* [WVu] ", line)]
        target = file.stem.rpartition("-")[2]
        assert [line for line in weak if f"ar_kernels::{target}::" not in line] == []


# ---------------------------------------------------------------------------------------------- dispatch


@built
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_no_images_have_the_strides_that_were_traced(layout):
    z, w = torch.zeros(0, 5, 4, 6).to(memory_format=layout), torch.zeros(2, 5)
    saved = torch.ops.ar_kernels_native.gated_attend(z, w, None, None, None, 0, False, False)
    arguments = (z, w, None, None, *saved[:2], *[None] * 2, saved[0], *[None] * 7)
    for channels_last_ in (False, True):
        flags = (True, True, False, channels_last_)
        traced = ar_kernels.ops._allocate_gradients(z, w, None, saved[1], *flags)
        got = torch.ops.ar_kernels_native.gated_attend_backward(*arguments, *flags)
        assert [each.stride() for each in got] == [each.stride() for each in traced]


@built
def test_a_library_without_an_operator_has_no_kernels_for_it():
    """As one built without nvcc has none of the sweeps for Hopper."""
    assert native.has_kernels("cpu") and not native.has_kernels("xpu")
    assert not native.has_kernels("cuda", "an_operator_of_no_library") and not native.has_kernels("cuda", "layer")


@built
def test_an_operator_refuses_what_has_no_kernel():
    """The stand-in in Python would otherwise be sent what it sends on."""
    with pytest.raises(RuntimeError, match="tensors must all be dense and on cpu, got a torch.sparse_coo one on cpu"):
        w = torch.ones(2, 5).to_sparse()
        torch.ops.ar_kernels_native.gated_attend(torch.ones(1, 5, 4), w, None, None, None, 0, False, False)


# ---------------------------------------------------------------------------------------------- memory


# A process of its own: where tests ran before, malloc may hold 64 MB for which large pages were already asked.
LARGE_PAGES = """
import re, sys
from pathlib import Path
import torch, ar_kernels

def may_have_large_pages(tensor):
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:x}")

z = torch.zeros(1, 64, 256, 1024, requires_grad=True)
w = torch.zeros(1, 64, *map(int, sys.argv[1:]))
before = may_have_large_pages(z)
(dz,) = torch.autograd.grad(ar_kernels.attend(z, w, implementation="native").pooled.sum(), z)
print(before, may_have_large_pages(dz))
"""


@built
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not os.access("/proc/self/smaps", os.R_OK),
    reason="this system has no transparent large pages, or does not tell of them",
)
@pytest.mark.parametrize("taps", [(), (3, 3)], ids=["1×1", "3×3"])
def test_a_large_gradient_asks_for_large_pages(taps):
    """Fresh memory of 21 MB takes 9 ms to clear by pages of 4 kB, and the backward 3 ms."""
    run = _python(LARGE_PAGES, *map(str, taps))
    assert (run.stdout.split(), run.returncode) == (["False", "True"], 0), run.stderr


# ---------------------------------------------------------------------------------------------- arguments


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 6)}, r"z must be \[N, C, H, W\] or \[N, C, S\] .*, got \[2, 6\]"),
        ({0: torch.zeros(2, 6, 3, dtype=torch.int32)}, "z must be float16, bfloat16, float32 or float64, got Int"),
        ({1: torch.zeros(4, 5)}, r"w must be \[4, 6\], got \[4, 5\]"),
        ({1: torch.zeros(6)}, r"w must be \[K, C\] with a head, got \[6\]"),
        ({2: torch.zeros(3)}, r"b must be \[4\], got \[3\]"),
        ({3: torch.zeros(4, 7)}, r"score_w must be \[4, 6\], got \[4, 7\]"),
        ({3: torch.zeros(4)}, r"score_w must be \[4, 6\], got \[4\]"),
        ({5: 5}, "gated_heads must be from 0 to K = 4, got 5"),
    ],
)
def test_bad_arguments_of_the_operator(change, message):
    """The operators check what they are handed, whoever calls them."""
    arguments = [torch.zeros(2, 6, 3), torch.zeros(4, 6), torch.zeros(4), None, None, 4, False, False]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ar_kernels_native.gated_attend(*arguments)


# ---------------------------------------------------------------------------------------------- whether it is there

WITHOUT = """
import sys
from pathlib import Path
import torch
from ar_kernels import native
native.PATH = Path(sys.argv[1])
native.NOTE = native.PATH.with_suffix(".txt")
import ar_kernels
z, w = torch.ones(1, 2, 3), torch.ones(1, 2)
explanation = ar_kernels.explain(z, w)
assert explanation.chosen == "eager", explanation
print(explanation.reasons["native"])
ar_kernels.attend(z, w)
try:
    ar_kernels.attend(z, w, implementation="native")
except ar_kernels.ImplementationUnavailable as error:
    print(error)
try:
    torch.ops.ar_kernels_native.gated_attend(z, w, None, None, None, 0, False, False)
except RuntimeError as error:
    print(error)
"""


def test_without_the_library_everything_else_runs_and_says_why(tmp_path):
    (tmp_path / "missing.txt").write_text("not built: there is no C++ compiler\n", encoding="utf-8")
    run = _python(WITHOUT, str(tmp_path / "missing.so"))
    assert run.returncode == 0, run.stderr
    reason = "the native library is not built: there is no C++ compiler"
    assert run.stdout.splitlines() == [
        reason,
        f"implementation 'native' cannot run: {reason}",
        f"ar_kernels_native::gated_attend cannot run: {reason}",
    ]


def test_a_broken_library_is_not_used(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    run = _python(WITHOUT, str(tmp_path / "broken.so"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("the native library cannot be loaded: ")


def test_env_reports_what_a_bug_report_needs(capsys):
    env.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ar_kernels"] == ar_kernels.__version__ and report["torch"] == torch.__version__
    z, w = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2)
    assert report["runs"]["cpu"]["1x1 heads, float32"] == ar_kernels.explain(z, w).chosen
    assert report["native"]["cpu"] == (native.why_not("cpu") or f"can run ({native.target()})")
    assert plans.why_not() is None or report["native"]["plans"] == plans.why_not()
    env.main([])
    text = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in text and native.build_note() in text


def test_env_reports_what_is_wrong_with_its_variables():
    run = _python("from ar_kernels import env; env.main([])", AR_KERNELS_IMPLEMENTATION="x", AR_KERNELS_TARGET="y")
    assert run.returncode == 0, run.stderr
    assert "1x1 heads, float32: AR_KERNELS_IMPLEMENTATION must be one of triton, " in run.stdout
    assert native.why_not("cpu") or "cpu: raises: AR_KERNELS_TARGET names nothing that runs here" in run.stdout


# ---------------------------------------------------------------------------------------------- how it is built


def _build(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    names = ("AR_KERNELS_BUILD", "AR_KERNELS_STRICT", "AR_KERNELS_SANITIZE", "AR_KERNELS_CUDA_ARCHS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What the sdist holds, unpacked: no file of this checkout. Made of a copy, for it is put together beside setup.py,
    by several processes of tests at once."""
    folder, copy = tmp_path_factory.mktemp("sdist"), tmp_path_factory.mktemp("checkout") / "copy"
    others = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "docs", "benchmarks")
    shutil.copytree(ROOT, copy, ignore=others)
    run = _build(["sdist", "--dist-dir", str(folder)], copy)
    assert run.returncode == 0, run.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        built = ("_native.", "/_node-", "/tests/")
        assert not any(part in name for name in names for part in built), "of a checkout, not of the package"
        assert any(name.endswith("csrc/cpu/operators.cpp") for name in names)
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@compiles
def test_a_wheel_built_from_the_sdist_works(unpacked, tmp_path):
    """Also by a compiler that links libstdc++ statically, where that can be had: beside the one of PyTorch, the stream
    that makes a refusal's words ended them at the first number."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" {_static_libstdcxx()}\n', encoding="utf-8")
    compiler.chmod(0o755)
    variables = {"AR_KERNELS_BUILD": "1", "AR_KERNELS_CUDA_ARCHS": "", "CXX": str(compiler)}
    run = _build(["bdist_wheel", "--dist-dir", str(tmp_path)], unpacked, **variables)
    assert run.returncode == 0, run.stderr
    assert "native library built for CPU" in run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import ar_kernels, torch\n"
        "print(ar_kernels.__file__)\n"
        "out = ar_kernels.attend(torch.ones(1, 2, 3), torch.ones(1, 2), implementation='native')\n"
        "assert out.pooled.tolist() == [[[1.0, 1.0]]]\n"
        "try:\n"
        "    w = torch.ones(2, 4)\n"
        "    torch.ops.ar_kernels_native.gated_attend(torch.ones(1, 5, 4), w, None, None, None, 0, False, False)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "from ar_kernels import node, ops\n"
        "assert node.why_not() is None, node.why_not()\n"
        "out = ar_kernels.attend(torch.ones(1, 2, 3), torch.ones(1, 2, requires_grad=True), implementation='native')\n"
        "out.pooled.sum().backward()\n"
        "try:\n"
        "    out.pooled.sum().backward()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "def fail(*arguments):\n"
        "    raise KeyError('of Python')\n"
        "node.module().set_python(fail, fail, fail)\n"
        "w = torch.ones(1, 2, requires_grad=True)\n"
        "out = ar_kernels.attend(torch.ones(1, 2, 3), w, implementation='native')\n"
        "try:\n"
        "    torch.autograd.grad(out.pooled.sum(), w, create_graph=True)\n"
        "except KeyError as error:\n"
        "    print(error)\n"
    )
    run = _python(code, PYTHONPATH=str(tmp_path / "installed"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "installed"))
    for line in ("w must be [2, 5], got [2, 4]", "backward through the graph a second time", "'of Python'"):
        assert line in run.stdout


def _static_libstdcxx() -> str:
    """The flag for it, or nothing where the compiler has no such library."""
    command = [COMPILER, "-print-file-name=libstdc++.a"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return "-static-libstdc++" if sys.platform == "linux" and os.path.isabs(found) else ""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"AR_KERNELS_BUILD": "0"}, "native library not built: AR_KERNELS_BUILD=0"),
        ({"PATH": "", "CXX": ""}, "native library not built: there is no C++ compiler (c++, g++ or clang++)"),
        ({"CXX": "no-such-compiler"}, "native library not built: CXX names no program: no-such-compiler"),
        ({"CXX": "false"}, "native library not built: false failed on"),
    ],
)
def test_a_build_that_cannot_be_installs_the_rest_and_says_why(variables, line, unpacked, tmp_path):
    if variables.get("CXX") == "false" and not shutil.which("false"):
        pytest.skip("there is no program that always fails")
    run = _build(["build", "--build-base", str(tmp_path)], unpacked, **variables)
    assert run.returncode == 0, run.stderr
    assert line in run.stderr
    (note,) = tmp_path.glob("lib*/ar_kernels/_native.txt")
    assert note.read_text(encoding="utf-8").startswith("not built: ") and not list(tmp_path.glob("lib*/**/*.so"))
    assert (note.parent / "functional.py").exists()


def test_a_build_that_must_be_fails(unpacked, tmp_path):
    run = _build(["build", "--build-base", str(tmp_path)], unpacked, AR_KERNELS_BUILD="1", PATH="", CXX="")
    assert run.returncode != 0 and "there is no C++ compiler" in run.stderr


# ---------------------------------------------------------------------------------------------- sanitizers


@compiles
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is preloaded as Linux does it")
def test_cpu_code_under_sanitizers(unpacked, tmp_path):
    """Every kernel of every target under AddressSanitizer and UndefinedBehaviorSanitizer, odd sizes and all strides."""
    preloaded = []
    for name in ("libasan.so", "libstdc++.so.6"):  # without the latter, the former aborts at the first exception
        command = [COMPILER, f"-print-file-name={name}"]
        preloaded.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not os.path.isabs(preloaded[-1]):
            pytest.skip(f"{COMPILER} has no {name} to preload")
    variables = {"AR_KERNELS_BUILD": "1", "AR_KERNELS_SANITIZE": "address,undefined", "AR_KERNELS_CUDA_ARCHS": ""}
    run = _build(["build", "--build-base", str(tmp_path)], unpacked, **variables)
    assert run.returncode == 0, run.stderr
    (package,) = tmp_path.glob("lib*")
    path = os.pathsep.join([str(package), str(ROOT / "tests")])
    # Beside a CUDA build the driver takes addresses in the gap; GCC before 14 aligns vectors of 64 bytes to 32 in the
    # frames that find a use after return.
    settings = "detect_leaks=0:protect_shadow_gap=0:detect_stack_use_after_return=0"
    options = {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": settings, "UBSAN_OPTIONS": "print_stacktrace=1"}
    for target in ("portable", "avx2", "avx512") if X86 else ("portable",):
        run = _python(UNDER_SANITIZERS, str(package), PYTHONPATH=path, AR_KERNELS_TARGET=target, **options)
        if "must name instructions that this CPU has" not in run.stderr:
            assert run.returncode == 0, run.stderr


UNDER_SANITIZERS = """
import sys
import torch
import ar_kernels
from ar_kernels import native
assert ar_kernels.__file__.startswith(sys.argv[1]) and native.why_not("cpu") is None
from layers import Layer, batch_last, channels_last, slice_of_cat
try:
    torch.ops.ar_kernels_native.gated_attend(torch.ones(1, 5, 4), torch.ones(2, 4), None, None, None, 0, False, False)
    raise AssertionError("w of another width was taken")
except RuntimeError as error:
    assert "w must be" in str(error)
for sizes in (
    {"n": 2, "c": 37, "h": 5, "w": 7, "k": 7},
    {"n": 1, "c": 3, "h": 37, "w": 41, "k": 1, "globals": 2},
    {"n": 1, "c": 20, "h": 9, "w": 33, "k": 3, "kernel_size": 3},
    {"n": 33, "c": 5, "h": 1, "w": 3, "k": 2, "kernel_size": 3},
):
    for layout in (None, channels_last, batch_last, slice_of_cat):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for value in Layer(**sizes, dtype=dtype).run("native", layout=layout).values():
                assert value.isfinite().all()
for mix in ("logit", "log", "prob"):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        h, s = torch.randn(3, 4, 19, dtype=dtype, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        s = s if dtype != torch.float64 else s.detach().double().requires_grad_()
        ar_kernels.rectify(h, s, mix=mix, implementation="native").sum().backward()
for images, channels, labels in ((1, 16, 1), (7, 528, 33), (130, 64, 10)):
    x, w, g = (torch.randn(sizes) for sizes in ((images, channels), (labels, channels), (images, labels)))
    for a, b in ((x, w.t()), (g, w), (g.t(), x)):
        assert torch.ops.ar_kernels_native.product(a, b).isfinite().all()
import test_native
for name, sizes in test_native.LAYERS.items():
    if name != "large W_O":
        test_native.assert_a_layer_is_its_parts(**sizes)
"""
