"""Direct launches of compiled kernels: when they are taken, what they hand over, and that results are the same."""

import ast
import contextlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="the triton package is not installed")

import triton.language as tl  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from ar_kernels.kernels import launch  # noqa: E402


def add(x, y, out, length, shift, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < length).to(tl.float32) + shift
    if y is not None:
        value += tl.load(y + offsets, mask=offsets < length).to(tl.float32)
    if NEGATE:
        value = -value
    tl.store(out + offsets, value, mask=offsets < length)


add_kernel = triton.jit(do_not_specialize=["length", "shift"])(add)
CONSTANTS = {"BLOCK": 128, "NEGATE": True, "num_warps": 4}


@pytest.fixture
def calls(monkeypatch):
    """Launches go to lists: `ordinary` (what JITFunction.run was given), `direct` (what a compiled kernel was)."""
    ordinary, direct, loaded, built = [], [], [], []
    current = SimpleNamespace(device=0)
    active = SimpleNamespace(get_current_device=lambda: current.device, get_current_stream=lambda device: 7 + device)
    active.launcher_cls = lambda *arguments: built.append(arguments)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    caller = threading.current_thread()

    class Compiled(triton.compiler.CompiledKernel):
        def __init__(self):
            self.src, self.metadata = "source", "metadata"

        def __getitem__(self, grid):
            assert threading.current_thread() is caller  # Triton 3.6 mixes launchers up that threads load at once
            loaded.append(grid)
            return lambda *arguments: direct.append((grid, arguments))

    def run(*arguments, grid, warmup, **options):
        ordinary.append((grid, arguments, options))
        return Compiled()

    kernel = triton.JITFunction(add, do_not_specialize=["length", "shift"])
    kernel.run = run
    return SimpleNamespace(
        kernel=kernel, ordinary=ordinary, direct=direct, loaded=loaded, built=built, current=current, Compiled=Compiled
    )


def test_the_second_call_is_direct(calls):
    x, y, out = torch.zeros(3, 256)
    call = launch.Launch(calls.kernel, (2,), (256, 3), **CONSTANTS)
    call(x, y, out)
    assert calls.ordinary == [((2, 1, 1), (x, y, out, 256, 3), CONSTANTS)] and calls.direct == []
    call(x, y, out)
    call(x, y, x)
    assert len(calls.ordinary) == 1
    assert calls.direct == [
        ((2, 1, 1), (x.data_ptr(), y.data_ptr(), out.data_ptr(), 256, 3, 128, True)),
        ((2, 1, 1), (x.data_ptr(), y.data_ptr(), x.data_ptr(), 256, 3, 128, True)),
    ]


def test_what_specialises_a_kernel_compiles_its_own(calls):
    """dtypes, None, the device; an unaligned pointer goes the ordinary way each time."""
    x, y, out = torch.zeros(3, 256)
    call = launch.Launch(calls.kernel, (2,), (255, 3), **CONSTANTS)
    variants = [(x, y, out), (x.bfloat16(), y, out), (x, None, out), (x, y, out.bfloat16())]
    for tensors in variants:
        call(*tensors)
        call(*tensors)
    assert len(calls.ordinary) == len(calls.direct) == len(variants)
    calls.current.device = 1
    call(x, y, out)
    assert len(calls.ordinary) == len(variants) + 1
    for _ in range(2):
        call(x[1:], y[1:], out[1:])
    assert len(calls.ordinary) == len(variants) + 3 and len(calls.direct) == len(variants)


def test_hooks_before_a_run_see_every_launch(calls):
    call = launch.Launch(calls.kernel, (2,), (256, 3), **CONSTANTS)
    tensors = torch.zeros(3, 256).unbind()
    call(*tensors)
    calls.kernel.pre_run_hooks.append(lambda *arguments, **options: None)
    call(*tensors)
    calls.kernel.pre_run_hooks.clear()  # or no plan is used in this process again
    assert len(calls.ordinary) == 2 and calls.direct == []


@pytest.mark.parametrize("change", ["result", "constexpr"])
def test_another_triton_is_launched_the_ordinary_way(change, calls):
    """Where run returns no CompiledKernel, or a constexpr is left to its default."""
    constants = dict(CONSTANTS)
    if change == "result":
        run = calls.kernel.run
        calls.kernel.run = lambda *arguments, **options: run(*arguments, **options) and None
    else:
        del constants["NEGATE"]
    call = launch.Launch(calls.kernel, (2,), (256, 3), **constants)
    for _ in range(3):
        call(*torch.zeros(3, 256))
    assert len(calls.ordinary) == 3 and calls.direct == []


def test_the_installed_triton_hands_over_what_it_is_given():
    """CompiledKernel[grid] with the device's part replaced: the stream, the hooks and every argument arrive."""
    received = []
    compiled = object.__new__(triton.compiler.CompiledKernel)
    compiled.module = compiled.src = object()
    compiled.name, compiled.function, compiled.packed_metadata = "add", "function", "metadata"
    compiled._run = lambda *arguments: received.append(arguments)
    compiled[(2, 1, 1)](1, 2, 0, 256, True, stream=5)
    (arguments,) = received
    assert arguments[:6] == (2, 1, 1, 5, "function", "metadata")
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    assert arguments[7:] == (*hooks, 1, 2, 0, 256, True)


def test_results(device):
    """Three calls with new tensors each: in the interpreter, or compiled once and then launched directly."""
    call = launch.Launch(add_kernel, (2,), (200, 3), **CONSTANTS)
    for _ in range(3):
        x, y = torch.randn(2, 256, device=device)
        out = torch.zeros(256, device=device)
        call(x, y, out)
        want = torch.where(torch.arange(256, device=device) < 200, -(x + y + 3), 0)
        torch.testing.assert_close(out, want)
    assert bool(call._compiled) == (device.type == "cuda")


@pytest.mark.gpu
def test_on_a_gpu_later_calls_are_direct(device, monkeypatch):
    """The ordinary way is closed after the first call; streams, CUDA graphs and Triton's hooks work as before."""
    x, y, out = torch.zeros(3, 256, device=device)
    x += 1
    call = launch.Launch(add_kernel, (2,), (256, 3), **CONSTANTS)
    call(x, y, out)
    monkeypatch.setattr(launch.Launch, "_ordinary", lambda *arguments: pytest.fail("launched the ordinary way"))
    y += 2
    call(x, y, out)
    assert (out == -6).all()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y += 1
        call(x, y, out)
    stream.synchronize()
    assert (out == -7).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, y, out)
    out.zero_()
    graph.replay()
    assert (out == -7).all()
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(x, y, out)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1


def test_launches_are_prepared_once_and_side_by_side(calls, monkeypatch):
    """Each compilation waits for the other to begin. Kernels are loaded on the caller's device, none is launched."""
    x, y, out = torch.zeros(3, 256)
    both, warm, devices = threading.Barrier(2, timeout=30), [], []
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(devices.append(index)))
    calls.current.device = 1

    def warmup(*arguments, grid, **options):
        both.wait()
        warm.append((grid, arguments, options))
        return calls.Compiled()

    calls.kernel.warmup = warmup
    one, other = (launch.Launch(calls.kernel, (grid,), (256, 3), **CONSTANTS) for grid in (2, 3))
    for _ in range(2):
        launch.prepare([(one, (x, y, out)), (other, (x, None, out))])
    assert sorted(warm, key=lambda call: call[0]) == [
        ((2, 1, 1), (x, y, out, 256, 3), CONSTANTS),
        ((3, 1, 1), (x, None, out, 256, 3), CONSTANTS),
    ]
    assert calls.loaded == [(2, 1, 1), (3, 1, 1)] and devices == [1, 1]
    assert calls.built == [("source", "metadata")] * 2
    assert calls.ordinary == calls.direct == []


@pytest.mark.parametrize("read", [lambda out: out + 1, lambda out: torch.cat([out, out])], ids=["alone", "of a list"])
def test_a_recorder_holds_launches_back_to_compile_them_side_by_side(read, calls, monkeypatch):
    """Until something reads what they write; in their order, and not at all after an error."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launch.Recorder, "add", lambda *arguments: None)
    x, y, out = torch.zeros(3, 256)
    both = threading.Barrier(2, timeout=30)
    calls.kernel.warmup = lambda *arguments, grid, **options: both.wait() and None or calls.Compiled()

    def pair():
        return [launch.Launch(calls.kernel, (grid,), (256, 3), **CONSTANTS) for grid in (2, 3)]

    def grids():
        return [grid[0] for grid, *_ in calls.ordinary]

    one, other = pair()
    with launch.Recorder([x, y]):
        launch.prepare([(one, (x, y, out))])
        one(x, y, out)
        other(x, y, x.new_empty(256))
        out.view(2, 128)
        assert calls.loaded == calls.ordinary == []
        read(out)
        assert calls.loaded[:2] == [(2, 1, 1), (3, 1, 1)] and grids() == [2, 3]
        one(x, y, out)  # what is compiled is launched at once
        assert grids() == [2, 3] and len(calls.direct) == 1
    one, other = pair()
    with launch.Recorder([x, y]):
        other(x, y, out)
        one(x, y, out)
        assert grids() == [2, 3]
    assert grids() == [2, 3, 3, 2]
    with pytest.raises(ZeroDivisionError), launch.Recorder([x, y]):
        pair()[0](x, y, out)
        1 / 0  # noqa: B018
    assert len(calls.ordinary) == 4


def test_a_compilation_that_fails_is_raised_and_tried_again(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    tensors = torch.zeros(3, 256).unbind()
    call = launch.Launch(calls.kernel, (2,), (256, 3), **CONSTANTS)
    calls.kernel.warmup = lambda *arguments, **options: pytest.fail("no such instruction")
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="no such instruction"):
            launch.prepare([(call, tensors)])


def test_what_is_expected_is_compiled_beside_what_is_needed(calls, monkeypatch):
    """A rehearsal launches nothing; what it would have is compiled by its dtypes, where something else is."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    both, warm, rehearsed = threading.Barrier(2, timeout=30), [], []

    def warmup(*arguments, grid, **options):
        both.wait()
        warm.append((grid, arguments))
        return calls.Compiled()

    def act():
        assert torch._C._len_torch_dispatch_stack() == 0 and not torch.is_grad_enabled()
        rehearsed.append(stand_in(torch.float16).new_empty(7))
        other(stand_in(torch.float16), None, rehearsed[-1])

    calls.kernel.warmup = warmup
    one, other = (launch.Launch(calls.kernel, (grid,), (256, 3), **CONSTANTS) for grid in (2, 3))
    x, y, out = torch.zeros(3, 256)
    with launch.expecting(act):
        launch.prepare([])
        assert rehearsed == warm == []
        with TorchDispatchMode():
            launch.prepare([(one, (x, y, out))])
        launch.prepare([(one, (x, y, out))])
    found = dict(warm)
    assert len(warm) == 2 and len(rehearsed) == 1 and found[(2, 1, 1)] == (x, y, out, 256, 3)
    assert found[(3, 1, 1)] == (torch.float16, None, torch.float16, 256, 3)
    assert calls.ordinary == calls.direct == [] and other.is_prepared((torch.float16, None, torch.float16))
    assert not other.is_prepared((torch.float16, x, torch.float16)), "another kernel"
    third = launch.Launch(calls.kernel, (4,), (256, 3), **CONSTANTS)
    calls.kernel.warmup = lambda *arguments, **options: calls.Compiled()
    launch.prepare([(third, (x, y, out))])
    assert len(rehearsed) == 1, "what is expected ends with its block"


@pytest.mark.parametrize("what", ["the rehearsal", "compiling"])
def test_what_is_expected_may_fail(what, calls, monkeypatch):
    """Who needs it is told, nobody else is."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    x, y, out = torch.zeros(3, 256)
    one, other = (launch.Launch(calls.kernel, (grid,), (256, 3), **CONSTANTS) for grid in (2, 3))

    def warmup(*arguments, grid, **options):
        if grid == (3, 1, 1):
            raise RuntimeError("out of registers")
        return calls.Compiled()

    def act():
        other(stand_in(torch.float32), None, stand_in(torch.float32))
        if what == "the rehearsal":
            raise ValueError("too large")

    calls.kernel.warmup = warmup
    with launch.expecting(act):
        launch.prepare([(one, (x, y, out))])
    assert one.is_prepared((x, y, out)) and not other.is_prepared((x, None, out))
    with pytest.raises(RuntimeError, match="out of registers"):
        launch.prepare([(other, (x, None, out))])


def test_a_stand_in_is_a_tensor_but_for_its_memory(monkeypatch):
    made = stand_in(torch.float32)
    results = (made.double() + 1).new_empty(5, dtype=torch.half), torch.mm(made[0], made[0].t()), made
    for tensor, shape, dtype in zip(results, ((5,), (6, 6), (2, 6, 4)), (torch.half, torch.float32, torch.float32)):
        assert isinstance(tensor, launch.StandIn) and tensor.is_cuda and tensor.get_device() == 3
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.data_ptr() == 0
    assert made.stride() == torch.empty_like(made).stride() == (1, 2, 12)
    with torch.library._scoped_library("ar_kernels_rehearsed", "DEF") as library:
        library.define("sweep_(Tensor x, Tensor(a!) out) -> ()")
        sweep = torch.ops.ar_kernels_rehearsed.sweep_.default
        with pytest.raises(NotImplementedError):
            sweep(made, made)
        monkeypatch.setattr(launch, "operators", [sweep])
        sweep(made, made)


def stand_in(dtype):
    """Of a tensor on a third GPU."""
    layout = {"shape": (2, 6, 4), "stride": lambda: (1, 2, 12), "dtype": dtype, "get_device": lambda: 3}
    return launch.StandIn(SimpleNamespace(**layout))


def imported_by(code):
    """Which of PyTorch's slow modules, a second or so each, a new process has imported once it has run the code."""
    code += "\nimport sys; print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def test_recording_and_rehearsing_import_nothing_slow():
    code = """
import torch
from ar_kernels.kernels import launch
x = torch.ones(2, 2)
with launch.Recorder([x]):
    torch.mm(x, x.new_empty(2, 2))
launch._rehearse(lambda: torch.mm(launch.StandIn(x), launch.StandIn(x).t()).new_empty(3).half().contiguous())
y = launch.StandIn(torch.ones(2, 2, 2))
launch._rehearse(lambda: torch.bmm(y, y.mT, out=y.new_empty(2, 2, 2)).add_(y))
"""
    assert imported_by(code) == []
    assert imported_by("import torch._dynamo") == ["torch._dynamo", "sympy"]


@pytest.mark.gpu
def test_on_a_gpu_a_first_training_step_imports_nothing_slow(device):
    code = """
import torch, ar_kernels
z = torch.randn(4, 32, 6, 6, device="cuda", dtype=torch.bfloat16, requires_grad=True)
layer = ar_kernels.AttentionModule(32, 10, 2, device="cuda", dtype=torch.bfloat16)
layer(z).hypothesis.float().sum().backward()
"""
    assert imported_by(code) == []
