"""--device: the same tests run in Triton's interpreter on a CPU (default) and compiled on a GPU. --cases: how many at
random."""

import importlib.util
import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (Triton in its interpreter) or cuda")
    parser.addoption("--cases", type=int, help="random cases of test_properties: 2000 on a CPU, 5000 on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # tests share the cores; else each starts one per core
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, saying so, without --device cuda")
    if config.getoption("--device") == "cpu" and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"  # before @triton.jit runs
        import interpreter_fixes  # noqa: F401  (repairs bf16 in the interpreter)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run with --device cuda"))


@pytest.fixture
def device(request: pytest.FixtureRequest):
    import torch

    name = request.config.getoption("--device")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.fail("--device cuda was given and torch sees no CUDA device")
    return torch.device(name)


def pytest_sessionstart(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores: one thread each
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_float32_products():
    """cuDNN's convolutions take TF32 by default and matrix products do not: here neither does, unless a test says."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty and its kin return NaN: whatever the package allocates and does not write shows. torch does so in its
    deterministic mode alone; the package is not told, and cuts its work as it does without. torch's own answer stays:
    Dynamo restores the mode by it."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(1).new_empty(3).isnan().all()
    monkeypatch.setattr("ar_kernels.ops.are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr("ar_kernels.node.wanted", False)  # it asks torch, and allocates nothing itself
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def no_plans(monkeypatch):
    """Every call goes through Python: no plan launches behind its back, nor does csrc/node by one that it knows."""
    from ar_kernels import node

    module = node.module()
    monkeypatch.setattr("ar_kernels.plans.wanted", False)
    monkeypatch.setattr("ar_kernels.node.wanted", False)
    if module is not None:
        module.use_plans(False)
    yield
    if module is not None:
        module.use_plans(True)


@pytest.fixture
def guarded_memory(monkeypatch):
    """Interpreted kernels find NaN on both sides of every tensor's memory: reading it shows, writing it fails."""
    if not importlib.util.find_spec("triton"):
        return
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    unguarded = InterpretedFunction.run

    def run(kernel, *arguments, **options):
        memories = {}
        for tensor in filter(torch.is_tensor, arguments):
            storage = tensor.untyped_storage()
            memory = torch.empty(0, dtype=tensor.dtype).set_(storage)
            nan = torch.full((256,), float("nan"), dtype=tensor.dtype)
            memories.setdefault(storage.data_ptr(), (memory, torch.cat([nan, memory, nan])))

        def inside(tensor):
            wide = memories[tensor.untyped_storage().data_ptr()][1]
            return wide.as_strided(tensor.shape, tensor.stride(), 256 + tensor.storage_offset())

        unguarded(kernel, *[inside(value) if torch.is_tensor(value) else value for value in arguments], **options)
        for memory, wide in memories.values():
            assert wide[:256].isnan().all() and wide[-256:].isnan().all(), f"{kernel.__name__} writes outside a tensor"
            memory.copy_(wide[256:-256])

    monkeypatch.setattr(InterpretedFunction, "run", run)


def _skip_where_it_cannot_run(name: str, device) -> None:
    if name == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("the triton package is not installed")
    if name == "native":
        from ar_kernels import native

        reason = native.why_not(device.type)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(params=["eager", "triton", "native"])
def implementation(request: pytest.FixtureRequest, device) -> str:
    """Every implementation that is checked against the reference."""
    _skip_where_it_cannot_run(request.param, device)
    return request.param


@pytest.fixture(params=["triton", "native"])
def fused(request: pytest.FixtureRequest, device) -> str:
    """Every implementation behind the operators of ops.py."""
    _skip_where_it_cannot_run(request.param, device)
    return request.param


@pytest.fixture
def native_sweeps(monkeypatch):
    """The Triton operators take the library's sweeps wherever they can: which they asked for, and if they got it."""
    from ar_kernels.kernels import attend_backward, attend_forward, hopper

    if hopper._operators() is None:
        pytest.fail("the native library has no kernels for Hopper: build it where nvcc is")
    got = []
    for name in ("forward_sweep", "backward_sweep"):
        plain = getattr(hopper, name)

        def sweep(*arguments, name=name, plain=plain):
            found = plain(*arguments)
            got.append((name, (found[0] if isinstance(found, tuple) else found) is not None))
            return found

        monkeypatch.setattr(hopper, name, sweep)
    monkeypatch.setattr(hopper, "_is_faster", lambda *arguments: True)
    for module in (attend_forward, attend_backward):
        module._plan.cache_clear()
    yield got
    for module in (attend_forward, attend_backward):
        module._plan.cache_clear()
