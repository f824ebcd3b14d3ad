"""Training that can be killed at any moment and goes on to the same numbers.

A run is a folder of two files. metrics.jsonl has one JSON object per line and step; checkpoint.pt has everything the
next step depends on, and how long metrics.jsonl was when it was written: what came later is dropped at resume and
computed again. Batches and learning rates are functions of the step, so nothing else has to be remembered.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import write_atomically

Identity = dict[str, int | float | str | bool | None]
"""All that decides a run's numbers, by name. A run resumes only what has the same identity."""

_FIELDS = {"identity": dict, "step": int, "metrics_bytes": int, "model": dict, "optimizer": dict}


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum; the learning rate rises linearly over the first `warmup` of the steps and then falls
    along a half cosine to 0.
    """

    steps: int = 400
    batch_size: int = 100
    learning_rate: float = 0.1
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 1."""
        progress = step / self.steps
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """For all parameters of the model."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )


class Run:
    """A folder that holds a run's metrics and its checkpoint.

    identity: what decides the run's numbers.
    resume: go on from the folder's checkpoint, or from the first step where there is none yet. Without it an earlier
        run's files in the folder are replaced.

    Raises ValueError, and leaves the files alone, if the checkpoint is damaged, is of a run with another identity, or
    goes with more metrics than there are.
    """

    def __init__(self, folder: str | Path, identity: Identity, resume: bool = False) -> None:
        self.folder, self.identity, self.step = Path(folder), identity, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint = None
        if not resume:
            self.checkpoint.unlink(missing_ok=True)  # first, so that no checkpoint ever stands by another run's metrics
        elif self.checkpoint.exists():
            self._checkpoint = read_checkpoint(self.checkpoint)
            _check_identity(self.checkpoint, self._checkpoint["identity"], identity)
            self.step = self._checkpoint["step"]
        keep = self._checkpoint["metrics_bytes"] if self._checkpoint else 0
        held = self.metrics.stat().st_size if self.metrics.exists() else 0
        if held < keep:
            raise ValueError(f"{self.metrics} must hold at least the {keep} bytes its checkpoint counts on, got {held}")
        self._log = open(self.metrics, "ab")
        self._log.truncate(keep)
        self._log.seek(keep)

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the checkpoint's state into model and optimizer; does nothing at the start of a run. Raises ValueError,
        and changes neither, if they are of another network.
        """
        if self._checkpoint is not None:
            _check_state(self.checkpoint, self._checkpoint, model, optimizer)
            model.load_state_dict(self._checkpoint["model"])
            optimizer.load_state_dict(self._checkpoint["optimizer"])
            self._checkpoint = None  # held no longer than needed

    def log(self, **values: int | float) -> None:
        """Appends one line to metrics.jsonl."""
        self._log.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._log.flush()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes the checkpoint that follows `step`."""
        os.fsync(self._log.fileno())  # the metrics that the checkpoint counts on reach the disk before it does
        state = {
            "identity": self.identity,
            "step": step,
            "metrics_bytes": self._log.tell(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))
        self.step = step

    def close(self) -> None:
        """Closes metrics.jsonl, safe on disk."""
        os.fsync(self._log.fileno())
        self._log.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_checkpoint(path: str | Path) -> dict:
    """A run's checkpoint as a dict, tensors on the CPU. Reads tensors and plain values only, never code.

    Raises ValueError saying what is wrong with the file.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{path} holds more than tensors and plain values, and is not read") from None
        except Exception as error:  # of a torn file unzipping and unpickling raise whatever they stumble over
            reason = str(error) or repr(error)
            raise ValueError(f"{path} is damaged or no checkpoint ({reason}): start again without --resume") from None
    wrong = not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in _FIELDS.items())
    if wrong or state["step"] < 0 or state["metrics_bytes"] < 0:
        raise ValueError(f"{path} is not a checkpoint of a run: it must hold {', '.join(_FIELDS)}")
    return state


def _check_identity(path: Path, found: Identity, asked: Identity) -> None:
    names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    if names:
        changes = ", ".join(f"{name} {found.get(name)!r} (now {asked.get(name)!r})" for name in names)
        raise ValueError(f"{path} is of a run with other settings: {changes}. Resume with its own, or start anew")


def _check_state(path: Path, checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    found, own = checkpoint["model"], model.state_dict()
    for name in {**own, **found}:
        kinds = [_tensor_kind(state.get(name)) for state in (own, found)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{path} is of another network: its {name} is {kinds[1]}, the model's {kinds[0]}")
    shape = [_optimizer_shape(state) for state in (optimizer.state_dict(), checkpoint["optimizer"])]
    if shape[0] != shape[1]:
        raise ValueError(f"{path} is of another optimizer: its groups of parameters are {shape[1]}, not {shape[0]}")


def _tensor_kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return "missing" if value is None else type(value).__name__
    return f"{list(value.shape)} of {value.dtype}" + ("" if value.layout == torch.strided else f", {value.layout}")


def _optimizer_shape(state: dict) -> object:
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        return None
    return [group.get("params") if isinstance(group, dict) else None for group in groups]


# ---------------------------------------------------------------------------------------------- training


@contextmanager
def repeatable() -> Iterator[None]:
    """Within the block cuDNN takes the same deterministic algorithms at every run."""
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        backend.deterministic, backend.benchmark = before


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, where the fused kernels are made for it; float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float) -> float:
    """One step of gradient descent on the cross entropy of a batch; the loss before the step, in nats."""
    images, labels = batch
    for group in optimizer.param_groups:
        group["lr"] = rate
    with mixed_precision(images.device):
        output = model(images)
    loss = F.cross_entropy(output.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(
    model: nn.Module,
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    recipe: Recipe,
    run: Run,
    *,
    checkpoint_every: int = 50,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains the model from where the run stands to the recipe's last step.

    batch_of: images and labels of a step, a function of the step alone. on_step: called after each step with its loss.
    Metrics: step (from 1), loss, learning_rate. Raises FloatingPointError when a loss is not finite.
    """
    optimizer = recipe.optimizer(model)
    run.restore(model, optimizer)
    model.train()
    with repeatable():
        for step in range(run.step + 1, recipe.steps + 1):
            rate = recipe.rate(step)
            loss = train_step(model, optimizer, batch_of(step), rate)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: a smaller learning rate may help")
            run.log(step=step, loss=loss, learning_rate=rate)
            if step % checkpoint_every == 0 or step == recipe.steps:
                run.save(step, model, optimizer)
            on_step(step, loss)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose highest score is their label's, from 0 to 1. The model is left in its own mode."""
    training, right, count = model.training, 0, 0
    model.eval()
    with repeatable():
        for images, labels in batches:
            with mixed_precision(images.device):
                right += int((model(images).argmax(dim=1) == labels).sum())
            count += len(labels)
    model.train(training)
    return right / count
