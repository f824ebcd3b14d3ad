"""One process or several: torchrun starts them, this module tells them apart. NCCL on GPUs, gloo on CPUs."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions' defaults are the group that is there when it is imported, in a training by torch.optim: they would keep
# that group, and gloo's threads with it, until the interpreter ends, which these can crash.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process's rank among `world`, and its device."""

    rank: int
    world: int
    device: torch.device
    bucket_mb: float = 25.0
    """Gradients that are added up at once."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.total(value) / self.world

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def take_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's running statistics."""
        if self.world > 1:
            _take_from_the_first(model.buffers())

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, with every weight and statistic as the first process has it, whose gradients are means over all
        processes. Running statistics stay each process's own from here on (take_buffers).
        """
        return model if self.world == 1 else _Averaged(model, self.bucket_mb)


def _take_from_the_first(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)


class _Averaged(nn.Module):
    """A model whose gradients are means over all processes by the time backward() returns.

    They are added up where autograd left them, several tensors in one call, while the pass goes on. In place of
    DistributedDataParallel, which copies every gradient into its bucket first, one kernel a parameter and step: all
    gradients written and read once more, and in between two convolutions.
    """

    def __init__(self, model: nn.Module, bucket_mb: float) -> None:
        super().__init__()
        _take_from_the_first((*model.parameters(), *model.buffers()))
        self.model, self._least_bytes = model, bucket_mb * 2**20
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._count = self._left = len(trained)
        self._waiting: list[Tensor] = []
        self._sums: list[tuple[dist.Work, list[Tensor]]] = []
        # gloo has no means: it adds up, and a call of its own divides
        self._options, self._divisor = dist.AllreduceCoalescedOptions(), dist.get_world_size()
        self._options.asyncOp = True
        if dist.get_backend() == "nccl":
            self._options.reduceOp, self._divisor = dist.ReduceOp.AVG, 1
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._take)

    def forward(self, *all: Any, **named: Any) -> Any:
        """Raises RuntimeError if the last backward pass left a parameter without its gradient: another process may wait
        for its sum, and those that came may not be added up.
        """
        if self._left != self._count:
            raise RuntimeError(f"a backward pass must reach all {self._count} parameters, {self._left} were left out")
        return self.model(*all, **named)

    def _take(self, parameter: Tensor) -> None:
        self._waiting.append(parameter.grad)
        self._left -= 1
        if self._left == 0 or sum(gradient.nbytes for gradient in self._waiting) >= self._least_bytes:
            group = dist.group.WORLD
            self._sums.append((group.allreduce_coalesced(self._waiting, self._options), self._waiting))
            self._waiting = []
        if self._left == 0:
            for sums, gradients in self._sums:
                sums.wait()  # NCCL: the stream does, not this thread
                if self._divisor > 1:
                    torch._foreach_div_(gradients, self._divisor)
            self._sums, self._left = [], self._count


@contextmanager
def processes(device: str, patience: timedelta | None = None, bucket_mb: float = 25.0) -> Iterator[Processes]:
    """What torchrun started (in a group of the caller's, where one is initialised), or this process alone.

    device: "cpu" or "cuda", which must be there. patience: how long processes wait for each other.
    bucket_mb: as Processes has it.

    Raises ValueError where torchrun started more processes here than there are GPUs.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    place = torch.device("cpu")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun must start one process per GPU, {torch.cuda.device_count()} here, got more")
        place = torch.device("cuda", local if world > 1 else torch.cuda.current_device())
        torch.cuda.set_device(place)
    if world == 1:
        yield Processes(0, 1, place)
        return
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(rank, world, place, bucket_mb)
    finally:
        if is_ours:
            dist.destroy_process_group()


_ENVIRONMENT = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
