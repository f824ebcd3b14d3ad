"""Plans: what the native library repeats of a call, when it may, and that results have the same bits."""

import ctypes
import functools
import gc
import itertools
import math
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
from layers import Layer, channels_last

import ar_kernels
from ar_kernels import native, node, ops, plans

planned = pytest.mark.skipif(
    not torch.cuda.is_available() or plans._cannot() is not None, reason=str(plans._cannot() or "there is no GPU")
)


@pytest.fixture(autouse=True)
def turned_on(monkeypatch):
    monkeypatch.setattr(plans, "wanted", True)


# ---------------------------------------------------------------------------------------------- a driver's double

DRIVER = """
#include <stddef.h>
struct Kernel { void (*call)(unsigned* grid, void** parameters); size_t count, sizes[8]; int error; };
static int context;
int cuLaunchKernel(struct Kernel* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned u, unsigned v,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  unsigned grid[] = {x, y, z, threads, shared};
  if (!f->error) f->call(grid, parameters);
  return f->error;
}
int cuFuncGetParamInfo(struct Kernel* f, size_t index, size_t* offset, size_t* size) {
  if (index >= f->count) return 1;
  *offset = 0, *size = f->sizes[index];
  return 0;
}
int cuCtxGetCurrent(void** current) { *current = &context; return 0; }
int cuCtxSetCurrent(void* other) { return other != &context; }
int cuGetErrorName(int error, const char** name) { *name = "CUDA_ERROR_OF_THE_DOUBLE"; return 0; }
"""


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("sizes", ctypes.c_size_t * 8),
        ("error", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """The path of a driver that runs kernels as Python functions on the CPU's memory."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if native.why_not("cpu") is not None or compiler is None:
        pytest.skip(str(native.why_not("cpu") or "there is no C compiler"))
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    library = str(folder / "libdouble.so")
    subprocess.run([compiler, "-shared", "-fPIC", str(folder / "driver.c"), "-o", library], check=True)
    return library


@pytest.fixture
def driver(double):
    """The native library opens the double, and afterwards the driver that is there again."""
    before = plans._cannot()
    assert plans.open_driver(double) == ""
    yield double
    if before is None:
        assert plans.open_driver(plans.DRIVER) == ""


@pytest.fixture
def toy(driver):
    """toy.calls(x, y, shift): the operator's results by plans.run: x + y + shift, y may be None, and an empty one;
    toy.call gives the first alone. toy.python counts how often Python did it, toy.launched has the grid, threads and
    bytes of shared memory of what the driver was given."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from ar_kernels.kernels import launch

    toy = SimpleNamespace(python=0, launched=[], kernels=[], change=lambda kernel: None)

    def add(x, y, out, shift, length):
        x, y, out = (ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)) for pointer in (x, y, out))
        for i in range(length):
            out[i] = x[i] + (y[i] if y else 0) + shift

    def kernel_of(has_y):
        @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))
        def call(grid, parameters):
            words = [ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0] for i in range(kernel.count - 2)]
            x, y, scratch, out, shift, length = words if has_y else (words[0], 0, *words[1:])
            assert scratch % 16 == 0 and scratch not in (x, y, out)
            add(x, y, out, shift, length)
            toy.launched.append(list(grid[:5]))

        kernel = _Kernel(ctypes.cast(call, ctypes.c_void_p), 7 + has_y, (8,) * (3 + has_y) + (4, 4, 8, 8))
        toy.change(kernel)
        toy.kernels.append((kernel, call))
        pointers = {"x": "*fp32", "y": "*fp32" if has_y else "constexpr", "scratch": "*fp32", "out": "*fp32"}
        metadata = {"num_ctas": 1, "num_warps": 4, "shared": 96, "launch_cooperative_grid": False, "launch_pdl": False}
        return SimpleNamespace(
            function=ctypes.addressof(kernel),
            src=SimpleNamespace(signature={**pointers, "shift": "i32", "length": "i32", "BLOCK": "constexpr"}),
            metadata=SimpleNamespace(**metadata, global_scratch_size=0, profile_scratch_size=0),
        )

    def operator(x, y, shift):
        toy.python += 1
        scratch = x.new_empty(7)
        out = x.new_empty(x.shape)
        tensors = x.contiguous(), y, scratch, out
        add(tensors[0].data_ptr(), 0 if y is None else y.data_ptr(), out.data_ptr(), shift, x.numel())
        if launch._recording.recorder is not None:
            made = SimpleNamespace(grid=(2, 3, 1), sizes=(shift, x.numel()))
            launch._recording.recorder.add(made, kernel_of(y is not None), tensors)
        return out, x.new_empty(0)

    toy.operator = operator
    toy.name = f"toy {next(_numbers)}"
    toy.calls = lambda *tensors: plans.run(toy.name, lambda *a: toy.operator(*a), launch, tensors[:2], tensors[2:])
    toy.call = lambda x, y, shift: toy.calls(x, y, shift)[0]
    return toy


def whole(*shape):
    """Whole numbers: sums of them are exact."""
    return torch.randint(-9, 9, shape).float()


_numbers = itertools.count(1000)  # every test's own: plans outlive it


def test_a_plan_repeats_a_call_on_other_tensors(toy):
    for _ in range(3):
        x, y = whole(2, 4, 6)
        assert torch.equal(toy.call(x, y, 5), x + y + 5)
    assert toy.python == 1 and toy.launched == [[2, 3, 1, 128, 96]] * 2


def test_results_are_those_of_the_launcher(toy):
    """Empty ones have their dtype, None is None, and one tensor alone is no tuple."""
    x, y = whole(2, 4, 6)
    plain = toy.operator

    def several(x, y, shift):
        return plain(x, y, shift)[0], x.new_empty(0, dtype=torch.float64), None, x.new_empty(3, 0)

    def one(x, y, shift):
        return plain(x, y, shift)[0]

    for operator in (several, one):
        toy.operator, toy.name = operator, f"toy {next(_numbers)}"
        want, got = toy.calls(x, y, 5), toy.calls(x, y, 5)
        assert type(want) is type(got)
        pairs = [(want, got)] if operator is one else zip(want, got, strict=True)
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))
    assert toy.python == 2 and len(toy.launched) == 2


def test_operators_of_a_graph_go_by_plans(toy, monkeypatch):
    """What the dispatcher calls: tensors first, then options, words among them."""
    from ar_kernels.kernels import launch

    monkeypatch.setattr(plans, "are_used", lambda *arguments: True)
    monkeypatch.setattr(ops, "_hand_over", lambda: None)
    monkeypatch.setattr(ops, "_import_kernels", lambda: SimpleNamespace(launch=launch))
    shifts = {"five": 5, "six": 6, None: 7}
    monkeypatch.setitem(ops._launchers, toy.name, lambda x, y, word: toy.operator(x, y, shifts[word]))
    for _ in range(3):
        x, y = whole(2, 4, 6)
        for word, shift in shifts.items():
            assert torch.equal(ops._run_operator(toy.name, 2, x, y, word)[0], x + y + shift)
    assert toy.python == 3 and len(toy.launched) == 6


@pytest.fixture
def taken(toy, monkeypatch):
    """toy as an operator of the dispatcher, (x, y, word) → (its result, an empty one, None's place), whose calls on a
    CPU csrc/node takes. taken.by_python counts those that it gives to Python."""
    from ar_kernels.kernels import launch

    module = node.module()
    if module is None:
        pytest.skip(str(node.why_not()))
    monkeypatch.setattr(plans, "are_used", lambda *arguments: True)
    monkeypatch.setattr(ops, "_hand_over", lambda: None)
    monkeypatch.setattr(ops, "_import_kernels", lambda: SimpleNamespace(launch=launch))
    shifts = {"five": 5, "six": 6, None: 7, "new": 8}
    name = toy.name.replace(" ", "_")
    monkeypatch.setitem(ops._launchers, name, lambda x, y, word: (*toy.operator(x, y, shifts[word]), None))
    library = torch.library.Library("ar_kernels_toys", "FRAGMENT")
    library.define(f"{name}(Tensor x, Tensor? y, str? word) -> (Tensor, Tensor, Tensor)")
    operator = getattr(torch.ops.ar_kernels_toys, name).default
    library.impl(name, functools.partial(ops._without_autocast, operator, "cpu"), "AutocastCPU")  # as ops._define
    words = {word: plans.number_of(word) for word in ("five", "six", None)}
    replay = native.address("ar_kernels_replay")
    module.take_operator("ar_kernels_toys", name, "CPU", replay, plans.number_of(name), words)
    taken = SimpleNamespace(toy=toy, shifts=shifts, by_python=0, operator=operator)

    def run(*arguments):
        taken.by_python += 1
        return ops._run_operator(*arguments)

    module.set_python(*node.python[:2], run)
    yield taken
    module.set_python(*node.python)


def test_operators_of_a_graph_go_by_plans_without_python(taken):
    for _ in range(3):
        x, y = whole(2, 4, 6)
        for word, shift in taken.shifts.items():
            found, empty, none = taken.operator(x, y, word)
            assert torch.equal(found, x + y + shift)
            assert empty.shape == none.shape == (0,) and none.dtype == x.dtype
    assert taken.toy.python == 4  # and a word without a number has a plan all the same
    assert taken.by_python == 3 + 3 and len(taken.toy.launched) == 8
    taken.by_python = 0
    assert torch.equal(taken.operator(x, None, "six")[0], x + 6)
    assert taken.by_python == 1


def test_operators_that_are_taken_can_do_without_plans(taken):
    x, y = whole(2, 4, 6)
    taken.operator(x, y, "six")
    node.module().use_plans(False)
    try:
        assert torch.equal(taken.operator(x, y, "six")[0], x + y + 6) and taken.by_python == 2
    finally:
        node.module().use_plans(True)
    assert torch.equal(taken.operator(x, y, "six")[0], x + y + 6) and taken.by_python == 2


@pytest.mark.parametrize("way", ["in Python", "csrc/node's"])
def test_products_of_a_plan_under_autocast(way, taken):
    """They stay in their operator's dtype, with which what follows was recorded."""
    plain = taken.toy.operator
    taken.toy.operator = lambda x, y, shift: plain(torch.mm(x, y), None, shift)
    node.module().use_plans(way == "csrc/node's")
    try:
        for _ in range(3):
            x, y = whole(4, 6) / 7, whole(6, 8) / 7
            with torch.autocast("cpu", torch.bfloat16):
                found = taken.operator(x, y, "six")[0]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, x @ y + 6)
    finally:
        node.module().use_plans(True)
    assert taken.toy.python == 1 and taken.by_python == (1 if way == "csrc/node's" else 3)


def test_a_product_of_another_dtype_than_recorded_is_refused(toy):
    """A kernel behind it would take its memory for what was recorded."""

    def operator(x, y, shift):
        toy.python += 1
        return torch.mm(x, y), x.new_empty(0)

    toy.operator = operator
    x, y = whole(4, 6), whole(6, 8)
    for _ in range(2):
        assert torch.equal(toy.call(x, y, 5), x @ y)
    assert toy.python == 1
    with torch.autocast("cpu", torch.bfloat16):
        toy.call(x, y, 5)
    assert toy.python == 2


def test_an_operators_call_that_has_no_plan_is_pythons(taken):
    x, y = whole(2, 24)
    memory = whole(25)
    for _ in range(2):
        assert torch.equal(taken.operator(memory[1:], y, "six")[0], memory[1:] + y + 6)  # unaligned
    assert taken.by_python == 2 and taken.toy.launched == []

    def fail(x, y, shift):
        raise KeyError("of Python")

    taken.toy.operator = fail
    with pytest.raises(KeyError, match="of Python"):
        taken.operator(x, y, "six")


def test_what_a_plan_is_found_by(toy):
    """Each of these is another plan: None, a shape, strides, an option, a dtype's or a device's is."""
    x, y = whole(2, 4, 6)
    wide = whole(4, 12)
    variants = [(x, y, 5), (x, None, 5), (x, y, 6), (x[:3], y[:3], 5), (x.view(6, 4), y.view(6, 4), 5)]
    for _ in range(2):
        for a, b, shift in variants:
            assert torch.equal(toy.call(a, b, shift), a + (0 if b is None else b) + shift)
    assert toy.python == len(toy.launched) == len(variants)
    for _ in range(2):  # contiguous() copies: that is no launch
        assert torch.equal(toy.call(wide[:, :6], None, 5), wide[:, :6] + 5)
    assert toy.python == len(variants) + 2


def test_unaligned_tensors_have_no_plan(toy):
    memory = whole(25)
    x, y = whole(2, 4, 6)
    for _ in range(2):
        for a, b in ((memory[1:].view(4, 6), y), (x, memory[1:].view(4, 6))):
            assert torch.equal(toy.call(a, b, 5), a + b + 5)
    assert toy.python == 4 and toy.launched == []
    for _ in range(2):
        assert torch.equal(toy.call(x, y, 5), x + y + 5)
    assert toy.python == 5 and len(toy.launched) == 1


def test_tensors_in_one_place_have_a_plan_of_their_own(toy):
    """As one tensor of zeros that a compiled graph hands over as several gradients."""
    for _ in range(2):
        x, y = whole(2, 4, 6)
        for a, b in ((x, x), (x, y), (y, y)):
            assert torch.equal(toy.call(a, b, 5), a + b + 5)
    assert toy.python == 2 and len(toy.launched) == 4


def test_a_factor_in_the_place_of_another_layout_has_no_plan(toy):
    """The record knows it by the first tensor there, which is no factor of that product."""

    def operator(x, y, shift):
        toy.python += 1
        return torch.mm(y, y.t()), x.new_empty(0)

    toy.operator = operator
    for _ in range(2):
        x = torch.randn(4, 6)
        assert torch.equal(toy.call(x, x.view(6, 4), 5), x.view(6, 4) @ x.view(6, 4).t())
    assert toy.python == 2


def test_products_and_conversions_are_repeated(toy):
    def operator(x, y, shift):
        toy.python += 1
        return torch.mm(x, y.to(x.dtype).t()), torch.mm(x.t(), x).double()

    toy.operator = operator
    for _ in range(3):
        x, y = torch.randn(4, 6), torch.randn(5, 6, dtype=torch.float64)
        assert torch.equal(toy.call(x, y, 5), x @ y.float().t())
    assert toy.python == 1


def test_small_scratch_shares_one_allocation(driver):
    """Three kernels: x to a, x to b, both to the result. a and b are apart in one piece of memory, which the caller
    never sees; what is large, and what is a result, has its own."""
    places = []

    def copy(source, to, out, count):
        places.append([source, to, out])
        x, a, b = (ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)) for pointer in (source, to, out))
        for i in range(count):
            if out:
                b[i] = x[i] + a[i]
            else:
                a[i] = x[i]

    def kernel_of(pointers):
        @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))
        def call(grid, parameters):
            words = [ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0] for i in range(pointers + 1)]
            copy(*words[:pointers], *[0] * (3 - pointers), words[pointers])

        return _Kernel(ctypes.cast(call, ctypes.c_void_p), pointers + 3, (8,) * pointers + (4, 8, 8), 0), call

    kernels = [kernel_of(2), kernel_of(3)]
    copying, adding = (ctypes.addressof(kernel) for kernel, _ in kernels)
    for count, is_shared in ((200, True), (2**14 + 1, False)):  # 800 bytes, and more than 2**16
        like = torch.empty(count, device="meta")
        x, key = whole(count), [next(_numbers)]
        steps = []
        for kernel, slots in ((copying, (0, 1)), (copying, (0, 2)), (adding, (1, 2, 3))):
            pointers = [part for slot in slots for part in (slot, 0)]
            steps += [0, kernel, 1, 1, 1, 4, 0, len(slots) + 1, *pointers, -1, count]
        torch.ops.ar_kernels_plans.record([x], key, [like] * 3, [2], steps)
        places.clear()
        (got,) = torch.ops.ar_kernels_plans.replay([x], key)
        assert torch.equal(got, 2 * x)
        (_, a, _), (_, b, _), (*both, out) = places
        assert both == [a, b] and out == got.data_ptr()
        assert (abs(b - a) == 1024) == is_shared
    torch.ops.ar_kernels_plans.record([x], [next(_numbers)], [like] * 2, [], [])  # of no steps: there can be no plan


class _View(ctypes.Structure):
    """csrc/filling.h's."""

    _fields_ = [
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("dims", ctypes.c_int64),
        ("dtype", ctypes.c_int8),
    ]


@pytest.fixture
def sweep():
    """The operator sweep_backward_ of csrc/cuda; on a CPU it adds z, lse and, where it is there, b into dz. What plans
    repeat does so too, and keeps of every call z's sizes and strides and the places in sweep.repeated."""
    hopper = pytest.importorskip("ar_kernels.kernels.hopper", reason="the triton package is not installed")
    if hopper._operators() is None:
        pytest.skip(native.why_not("cuda") or "the native library has no kernels for Hopper")

    def add(z, b, lse, pairs, delta, unscale, grad_logits, upstream, dz, dw, *others):
        torch.add(z, lse, out=dz)
        dz += 0 if b is None else b

    fill_type = ctypes.CFUNCTYPE(None, ctypes.POINTER(_View), ctypes.c_void_p)
    repeated = []

    @fill_type
    def fill(views, stream):
        z, b, lse, dz = (views[i] for i in (0, 1, 2, 8))
        sizes, strides = (list(values[: z.dims]) for values in (z.sizes, z.strides))
        repeated.append((sizes, strides, *(ctypes.cast(view.data, ctypes.c_void_p).value for view in (z, dz))))
        for i in range(math.prod(sizes)):
            dz.data[i] = z.data[i] + lse.data[i] + (b.data[i] if b.sizes else 0)

    put = ctypes.CDLL(str(native.PATH)).ar_kernels_put_filling
    put.argtypes, put.restype = (ctypes.c_int64, ctypes.c_void_p), ctypes.c_void_p
    before = put(1, ctypes.cast(fill, ctypes.c_void_p))
    library = torch.library.Library(native.NAMESPACE, "IMPL")
    library.impl("sweep_backward_", add, "CPU")
    operator = torch.ops.ar_kernels_native.sweep_backward_.default
    yield SimpleNamespace(operator=operator, repeated=repeated, put=lambda address: put(1, address))
    library._destroy()
    put(1, before)


def test_operators_of_the_library_are_repeated(toy, sweep):
    """Without the dispatcher; small scratch between them is a part of one allocation."""

    def operator(x, y, shift):
        toy.python += 1
        first, second, out = (x.new_empty(x.shape) for _ in range(3))
        torch.ops.ar_kernels_native.sweep_backward_programs(x.shape, x.stride(), None, None, 4, 2)
        sweep.operator(x, None, x, x, x, None, None, None, first, *[None] * 13)
        sweep.operator(first, None, x, x, x, None, None, None, second, *[None] * 13)
        sweep.operator(second, y, x, x, x, None, None, None, out, *[None] * 13)
        return out, x.new_empty(0)

    toy.operator = operator
    for _ in range(3):
        x, y = whole(2, 4, 6)
        assert torch.equal(toy.call(x, y, 5), 4 * x + y)
        assert torch.equal(toy.call(x, None, 5), 4 * x)
    assert toy.python == 2 and len(sweep.repeated) == 12
    (sizes, strides, _, first), (_, _, again, second), (_, _, last, _) = sweep.repeated[:3]
    assert (sizes, strides) == ([4, 6], [6, 1])
    assert first == again and second == last and second - first == 512


def test_operators_that_the_library_lacks_are_refused(toy, sweep):
    """As one that was built without nvcc."""

    def operator(x, y, shift):
        out = x.new_empty(x.shape)
        sweep.operator(x, y, x, x, x, None, None, None, out, *[None] * 13)
        return out, x.new_empty(0)

    toy.operator = operator
    before = sweep.put(None)
    try:
        with pytest.raises(RuntimeError, match="the native library was built without sweep_backward_"):
            toy.call(*whole(2, 4, 6), 5)
    finally:
        sweep.put(before)


def test_operators_that_take_a_part_of_something_have_no_plan(toy, sweep):
    def operator(x, y, shift):
        toy.python += 1
        out = x.new_empty(x.shape)
        sweep.operator(x.view(6, 4), None, y.view(6, 4), x, x, None, None, None, out.view(6, 4), *[None] * 13)
        return out, x.new_empty(0)

    toy.operator = operator
    for _ in range(2):
        x, y = whole(2, 4, 6)
        assert torch.equal(toy.call(x, y, 5), x + y)
    assert toy.python == 2


def test_factors_that_begin_within_their_storage(toy):
    """As the gradients of stacked hypotheses do. Their offset was once counted twice, which read the wrong numbers and
    some behind the tensor: a training became NaN."""

    def operator(x, y, shift):
        toy.python += 1
        return torch.mm(x.t(), y), torch.mm(y.t(), y)

    toy.operator = operator
    both = torch.randn(6, 2, 8)
    for i in (0, 1, 1):  # the second begins 32 bytes on, which is aligned
        x, y = both[:, i], torch.randn(6, 4)
        assert torch.equal(toy.call(x, y, 5), x.t() @ y)
    assert toy.python == 1


@pytest.mark.parametrize(
    "what", ["an operation", "a view as a result", "an argument as a result", "one result twice", "nothing"]
)
def test_what_is_more_than_launches_has_no_plan(what, toy):
    plain = toy.operator

    def operator(x, y, shift):
        out, empty = plain(x, y, shift)
        if what == "an operation":
            empty = torch.zeros(3)
        elif what == "a view as a result":
            out = out[:2]
        elif what == "an argument as a result":
            empty = x
        elif what == "one result twice":
            empty = out
        else:
            x.new_empty(3)  # never used
        return out, empty

    toy.operator = operator
    for _ in range(2):
        x, y = whole(2, 4, 6)
        toy.call(x, y, 5)
    assert toy.python == 2


@pytest.mark.parametrize("change", ["cooperative", "clusters", "scratch of Triton's own", "a float"])
def test_kernels_that_take_more_have_no_plan(change, toy, monkeypatch):
    from ar_kernels.kernels import launch

    add = launch.Recorder.add

    def changed(recorder, made, kernel, tensors):
        name, value = {
            "cooperative": ("launch_cooperative_grid", True),
            "clusters": ("num_ctas", 2),
            "scratch of Triton's own": ("global_scratch_size", 64),
            "a float": ("shared", 0),
        }[change]
        setattr(kernel.metadata, name, value)
        if change == "a float":
            kernel.src.signature["shift"] = "fp32"
        add(recorder, made, kernel, tensors)

    monkeypatch.setattr(launch.Recorder, "add", changed)
    x, y = whole(2, 4, 6)
    for _ in range(2):
        toy.call(x, y, 5)
    assert toy.python == 2


def test_a_kernel_that_takes_other_parameters_is_refused(toy):
    """As of a Triton that hands over something else: nothing is launched with the wrong memory."""
    x, y = whole(2, 4, 6)
    for count, size, message in ((7, 8, "CUDA_ERROR_OF_THE_DOUBLE"), (9, 8, "got more"), (8, 4, "must have 8 bytes")):

        def change(kernel, count=count, size=size):
            kernel.count, kernel.sizes[1] = count, size

        toy.change = change
        with pytest.raises(RuntimeError, match=message):
            toy.call(x, y, 5)


def test_an_error_of_the_driver_raises(toy):
    x, y = whole(2, 4, 6)
    toy.call(x, y, 5)
    toy.kernels[0][0].error = 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed: CUDA_ERROR_OF_THE_DOUBLE"):
        toy.call(x, y, 5)


@pytest.mark.parametrize(
    "outputs, steps, message",
    [
        ([1], [1, 0, 0, 0, 0, 2], "from 0 to 0"),
        ([1], [1, 0, 0, 0, 0, 0], "must be one of 1 allocations"),
        ([0], [1, 0, 0], "ends too early"),
        ([0], [4], "from 0 to 3"),
        ([0], [3, 2], "from 0 to 1"),
        ([0], [3, 1, -1], "from 0 to 1"),
        ([0], [2, 1, 0], "written before it is read"),
        ([0], [2, 0, 0, 2, 0, 0], "written twice"),
        ([-1], [1, 0, 0, 0, 1, 0, 2, 0, 0], "written twice"),
        ([0, 0], [2, 0, 0], "returned twice"),
    ],
)
def test_a_malformed_plan_is_refused(outputs, steps, message, driver):
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ar_kernels_plans.record([x], [next(_numbers)], [x.to("meta")], outputs, steps)


def test_where_memory_is_short_the_ordinary_way_says_so(toy, monkeypatch):
    """What the library cannot allocate it leaves to Python, so that PyTorch's own error is what is raised."""
    from ar_kernels.kernels import launch

    like = launch._like
    scratch = torch.empty(2**55, device="meta")
    monkeypatch.setattr(launch, "_like", lambda tensor: scratch if tensor.numel() == 7 else like(tensor))
    for _ in range(2):
        x, y = whole(2, 4, 6)
        assert torch.equal(toy.call(x, y, 5), x + y + 5)
    assert toy.python == 2 and toy.launched == []


def test_a_driver_that_is_not_there(driver, tmp_path):
    assert "no-such-driver" in plans.open_driver(str(tmp_path / "no-such-driver.so"))
    assert "has no cuLaunchKernel" in plans.open_driver(str(native.PATH))


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(plans, "wanted", False)
    assert plans.why_not() == "AR_KERNELS_PLANS=0 turns them off"
    assert not plans.are_used([torch.zeros(1)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_plans_say_why_and_nothing_uses_them():
    assert plans.why_not()
    assert not plans.are_used([torch.zeros(1)])


# ---------------------------------------------------------------------------------------------- layers on a GPU


@pytest.fixture
def ordinary(monkeypatch):
    """A function that calls another one with plans switched off."""
    module = node.module()

    def call(function, *arguments):
        with monkeypatch.context() as context:
            context.setattr(plans, "are_used", lambda *arguments: False)
            if module is None:
                return function(*arguments)
            module.use_plans(False)  # of operators that it has taken
            try:
                return function(*arguments)
            finally:
                module.use_plans(True)

    return call


@pytest.fixture
def closed(monkeypatch):
    """A function that calls another one, which must go by plans alone: a launcher's Python fails."""

    def fail(*arguments):
        pytest.fail("went through Python")

    def call(function, *arguments):
        with monkeypatch.context() as context:
            context.setattr(ops, "_launchers", dict.fromkeys(ops._launchers, fail))
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
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (64, 160, 16, 16), (1, 256, 56, 56), (257, 16, 4, 4)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_second_call_needs_no_python(shape, weight_dtype, device, ordinary, closed):
    """So many images have PyTorch's products with W_O, for which a plan converts float32 weights, of autocast."""
    for seed in range(2):
        z, weights = drawn(device, shape=shape, seed=seed)
        weights = [weight.to(weight_dtype) for weight in weights]
        found = (closed if seed else lambda call, *arguments: call(*arguments))(step, z, weights)
        equal(found, ordinary(step, z, weights))


@planned
@pytest.mark.gpu
@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_of_stacked_hypotheses(layer, device, ordinary, closed):
    """A network's hypotheses are stacked: the second one's gradient begins within its storage."""

    def step(z, weights):
        tensors = [value.detach().requires_grad_() for value in (z, *weights)]
        hypotheses = [torch.ones(z.shape[0], 8, device=device, dtype=z.dtype)] * 2
        hypotheses[layer] = ar_kernels.attention_module(*tensors, implementation="triton").hypothesis
        loss = (torch.stack(hypotheses, dim=1) * torch.arange(16, device=device).view(2, 8)).float().square().sum()
        return dict(enumerate(torch.autograd.grad(loss, tensors)))

    for seed in range(2):
        z, weights = drawn(device, labels=8, seed=seed)
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
@pytest.mark.parametrize("gating", ["softmax", None])
@pytest.mark.parametrize("mix", ["logit", "prob"])
def test_rectified_outputs_need_no_python(mix, gating, device, ordinary, closed):
    """The logit mix has no log-sum-exp to keep."""

    def mixed(seed):
        torch.manual_seed(seed)
        h = [torch.randn(8, 24, device=device).bfloat16().requires_grad_() for _ in range(3)]
        s = torch.randn(8, 3, device=device, requires_grad=True)
        y = ar_kernels.rectify(h, s, mix=mix, gating=gating, implementation="triton")
        return dict(enumerate((y.detach(), *torch.autograd.grad(y.square().sum(), (*h, s), allow_unused=True))))

    mixed(0)
    want = ordinary(mixed, 1)
    equal(closed(mixed, 1), want)


@planned
@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_compiled_graphs_need_no_python(kernel_size, device, ordinary, closed):
    """Their operators go by plans of their own; what they need not return is empty there."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = ar_kernels.AttentionModule(64, 10, 4, kernel_size=kernel_size).to(device, torch.bfloat16)
    gates = ar_kernels.GlobalGates(64, 2, kernel_size=kernel_size).to(device, torch.bfloat16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def network(z):
        out = layer(z, global_gates=gates, masks=True, mean=True, tap=True)
        own = out.mean[:, :10].to(z.dtype)
        mixed = ar_kernels.rectify([out.hypothesis, own], out.global_scores, implementation="triton")
        return mixed, out.masks, out.feature_map

    def step(seed):
        torch.manual_seed(seed)
        z = torch.randn(2, 64, 7, 7, device=device).bfloat16().requires_grad_()
        outputs = network(z)
        loss = sum(output.float().square().sum() for output in outputs)
        made = torch.autograd.grad(loss, (z, *layer.parameters(), *gates.parameters()))
        return dict(enumerate((*(output.detach() for output in outputs), *made)))

    step(0)
    want = ordinary(step, 1)
    equal(closed(step, 1), want)


@planned
@pytest.mark.gpu
def test_what_a_plan_is_not_for_goes_the_ordinary_way(device, ordinary):
    """Unaligned tensors, weights that must be copied; tensors in one place; each again when it is as usual."""
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
def test_without_a_graph(device, ordinary, closed):
    """Inference goes by the same plan; a tap of it is a view, a mean that was not asked for None."""
    z, weights = drawn(device)

    def outputs():
        with torch.no_grad():
            made = ar_kernels.attention_module(z, *weights, implementation="triton", mean=True, tap=True)
            pooled = ar_kernels.attend(z, weights[0], implementation="triton")
        assert pooled.mean is None and pooled.logits is None
        return {name: value for name, value in made._asdict().items() if value is not None} | {"pooled": pooled.pooled}

    want = ordinary(outputs)
    equal(outputs(), want)
    equal(closed(outputs), want)


@planned
@pytest.mark.gpu
def test_out_of_memory_is_pytorchs_own_error(device):
    z, weights = drawn(device, shape=(64, 256, 32, 32))  # dZ of 33 MB
    step(z, weights)
    gc.collect()  # or what earlier tests have left is freed where memory should be short
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 2**21) / total)
    taken = []
    try:
        with pytest.raises(torch.OutOfMemoryError):
            while True:  # what other tests have left of reserved memory
                taken.append(torch.empty(2**23, dtype=torch.uint8, device=device))
        with pytest.raises(torch.OutOfMemoryError):
            step(z, weights)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del taken
    step(z, weights)


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
