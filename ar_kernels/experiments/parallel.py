"""One process or several: torchrun starts them, this module tells them apart. NCCL on GPUs, gloo on CPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
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
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over all processes. Running statistics stay each process's own
        (take_buffers), and gradients live where they are added up.
        """
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=devices,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,
        )


@contextmanager
def processes(device: str | None, patience: timedelta | None = None, bucket_mb: float = 25.0) -> Iterator[Processes]:
    """What torchrun started (in a group of the caller's, where one is initialised), or this process alone.

    device: "cpu", "cuda", or None for a GPU where there is one. patience: how long processes wait for each other.
    bucket_mb: as Processes has it.

    Raises ValueError where a GPU is asked for and missing, or torchrun started more processes here than there are GPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given and torch sees no CUDA device")
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    place = torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun must start one process per GPU, {torch.cuda.device_count()} here, got more")
        place = torch.device("cuda", local if world > 1 else torch.cuda.current_device())
        torch.cuda.set_device(place)
    if world == 1:
        yield Processes(0, 1, place)
        return
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(rank, world, place, bucket_mb)
    finally:
        if is_ours:
            dist.destroy_process_group()


_ENVIRONMENT = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
