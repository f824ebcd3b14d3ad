"""Several processes and replicas: DistributedDataParallel, fully_shard, DataParallel, against one process.

Processes of a CPU talk through gloo. The tests of two GPUs have run on two H100s of one host.
"""

import copy
import importlib
import os
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ar_kernels import AttendRectify, native, use_implementation
from ar_kernels.models import WideAttentiveResNet
from ar_kernels.official import WideResNetAttention

LABELS, STEPS, PROCESSES = 5, 3, 2


class Stages(nn.Module):
    """No norm sees the whole batch: half of it on each of two processes is the same computation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 1))
        self.end = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.classifier = nn.Linear(12, LABELS)

    def forward(self, images):
        return self.classifier(F.relu(self.end(self.middle(F.relu(self.stem(images))))).mean(dim=(2, 3)))


def attend_rectify() -> AttendRectify:
    return AttendRectify(Stages(), ["middle.0", "end"], LABELS, heads=2)


MODELS = {
    "AttendRectify": attend_rectify,
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2).eval(),
    "official": lambda: WideResNetAttention(10, 1, LABELS, 0, 2, 2).eval(),
    "WARN in training": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2),
}
"""BatchNorm in eval mode: statistics of half a batch are not those of the whole, SyncBatchNorm's on GPUs are."""


def make(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device, dtype)


def batch(step: int, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2 * PROCESSES, 3, 16, 12, generator=generator, dtype=torch.float64)
    return images.to(device, dtype), torch.randint(LABELS, (2 * PROCESSES,), generator=generator).to(device)


def half(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.chunk(PROCESSES)[rank]


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return F.cross_entropy(output[0] if isinstance(output, tuple) else output, labels)


def trained(model: nn.Module, own: nn.Module, rank: int | None, device: torch.device) -> list[torch.Tensor]:
    """The loss of each step over the whole batch (rank: this process's half of it), then the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step, device)
        if rank is not None:
            images, labels = half(images, rank), half(labels, rank)
        loss = loss_of(model, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if rank is not None:
            dist.all_reduce(loss)
            loss /= PROCESSES
        losses.append(loss)
    return [value.detach().cpu() for value in (*losses, *own.parameters())]


def run(worker: Callable, folder, *arguments: object) -> list[dict]:
    """What each of two processes returns."""
    torch.multiprocessing.spawn(_in_a_process, (worker, str(folder), *arguments), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.results") for rank in range(PROCESSES)]


def _in_a_process(rank: int, worker: Callable, folder: str, backend: str, *arguments: object) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("interpreter_fixes")  # as conftest.py does in its own process
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.deterministic = True
    dist.init_process_group(backend, f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.save(worker(rank, backend, *arguments), f"{folder}/{rank}.results")
    dist.barrier()
    dist.destroy_process_group()


def data_parallel(rank: int, backend: str, cases: list[tuple[str, str]]) -> dict:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    results = {}
    for name, implementation in cases:
        model = make(name, device)
        if model.training:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with use_implementation(implementation):
            results[name, implementation] = trained(DistributedDataParallel(model), model, rank, device)
    return results


def assert_as_one_process(results: list[dict], device: torch.device) -> None:
    for name, implementation in results[0]:
        model = make(name, device)
        with use_implementation(implementation):
            expected = trained(model, model, None, device)
        for process in results:
            for got, truth in zip(process[name, implementation], expected, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)


NATIVE = ["native"] if native.why_not("cpu") is None else []


def test_distributed_data_parallel_equals_one_process_with_the_doubled_batch(tmp_path):
    interpreted = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []  # on a GPU it runs on that alone
    cases = [("AttendRectify", name) for name in ("eager", *interpreted, *NATIVE)]
    cases += [("WARN", "eager"), ("official", "eager")]
    assert_as_one_process(run(data_parallel, tmp_path, "gloo", cases), torch.device("cpu"))


@pytest.fixture
def two_gpus(device, monkeypatch):
    """cuDNN's convolutions give the same bits again: what differs is what is tested."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return [torch.device("cuda", index) for index in range(2)]


@pytest.mark.gpu
def test_distributed_data_parallel_over_nccl(two_gpus, tmp_path):
    cases = [(model, name) for model in ("AttendRectify", "WARN in training") for name in ("triton", "eager")]
    assert_as_one_process(run(data_parallel, tmp_path, "nccl", cases), two_gpus[0])


# ---------------------------------------------------------------------------------------------- fully_shard

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(rank: int, backend: str, cases: list[str]) -> dict:
    kind = "cuda" if backend == "nccl" else "cpu"
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    mesh = init_device_mesh(kind, (PROCESSES,))
    results = {}
    for implementation in cases:
        model = make("AttendRectify", device, torch.float32)
        for unit in (model.backbone.middle, *model.attention, model.backbone, model):
            fully_shard(unit, mesh=mesh, mp_policy=MIXED)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        with use_implementation(implementation):
            for step in range(STEPS):
                images, labels = batch(step, device, torch.float32)
                loss = loss_of(model, half(images, rank), half(labels, rank))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        weights = [parameter.full_tensor() for parameter in model.parameters()]
        results[implementation] = [value.detach().cpu() for value in (*losses, *weights)]
    return results


def in_one_process(implementation: str, device: torch.device) -> tuple[list, list]:
    """The same by hand: a bfloat16 copy of the weights for each half of the batch, float32 sums of their gradients."""
    model = make("AttendRectify", device, torch.float32)
    losses: list = [[] for _ in range(PROCESSES)]
    with use_implementation(implementation):
        for step in range(STEPS):
            images, labels = batch(step, device, torch.float32)
            grads = []
            for rank in range(PROCESSES):
                low = copy.deepcopy(model).bfloat16()
                loss = F.cross_entropy(low(half(images, rank).bfloat16()).float(), half(labels, rank))
                losses[rank].append(loss.detach().cpu())
                grads.append([grad.float() for grad in torch.autograd.grad(loss, list(low.parameters()))])
            with torch.no_grad():
                for parameter, *found in zip(model.parameters(), *grads, strict=True):
                    parameter -= 0.05 * sum(found) / PROCESSES
    return losses, [parameter.detach().cpu() for parameter in model.parameters()]


def assert_as_by_hand(results: list[dict], device: torch.device) -> None:
    for implementation in results[0]:
        losses, weights = in_one_process(implementation, device)
        for rank, process in enumerate(results):
            for got, truth in zip(process[implementation], losses[rank] + weights, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)


def test_fully_shard_with_mixed_precision(tmp_path):
    assert_as_by_hand(run(sharded, tmp_path, "gloo", ["eager", *NATIVE]), torch.device("cpu"))


@pytest.mark.gpu
def test_fully_shard_over_nccl(two_gpus, tmp_path):
    assert_as_by_hand(run(sharded, tmp_path, "nccl", ["triton", "eager"]), two_gpus[0])


def test_global_gates_that_are_sharded_by_themselves_raise(tmp_path):
    """They are read in an attention module's pass, where their own unit does not gather them."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = make("AttendRectify", torch.device("cpu"))
        for unit in (model.global_gates, model):
            fully_shard(unit, mesh=mesh)
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            model(batch(0, torch.device("cpu"))[0])
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- DataParallel


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """What torch.nn.parallel.replicate makes, for devices that it does not know: modules that share hooks with the
    original's, and differentiable copies of its parameters."""
    made = []
    for _ in range(count):
        modules = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in modules.items():
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else modules[child]
            for name, parameter in module._parameters.items():
                replica._parameters.pop(name, None)
                setattr(replica, name, None if parameter is None else parameter.clone())
        made.append(modules[model])
    return made


def test_replicas_run_at_the_same_time(device):
    """Each in a thread of its own with a share of the batch, as DataParallel runs them: outputs and gradients are those
    of the model on the whole batch, and no hook met another replica's forward."""
    model = make("AttendRectify", device)
    images, labels = batch(0, device)
    expected = loss_of(model, images, labels)
    truth = torch.autograd.grad(expected, list(model.parameters()))
    together = threading.Barrier(2, timeout=20)

    def wait(*_: object) -> None:
        together.wait()

    for layer in (model.backbone.stem, model.backbone.middle):  # whoever is first here waits before the next map
        layer.register_forward_hook(wait)  # replicas share the original's hooks
    for _ in range(3):
        copies, outputs = replicas(model, 2), [None, None]

        def work(rank: int, copies=copies, outputs=outputs) -> None:
            outputs[rank] = copies[rank](half(images, rank))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loss = F.cross_entropy(torch.cat(outputs), labels)
        torch.testing.assert_close(loss, expected)
        for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), truth, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AttendRectify", "WARN", "official"])
def test_data_parallel(name, two_gpus):
    """Losses and weights of three steps over two GPUs are those of one. Threads that DataParallel starts do not see
    use_implementation: each AttentionModule is told."""
    runs = []
    for parallel in (False, True):
        model = make(name, two_gpus[0])
        for module in model.modules():
            if hasattr(module, "implementation"):
                module.implementation = "triton"
        whole = nn.DataParallel(model, [0, 1]) if parallel else model
        runs.append(trained(whole, model, None, two_gpus[0]))
    for got, truth in zip(*runs, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)
