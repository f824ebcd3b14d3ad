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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import mask_regulariser
from .files import write_atomically
from .parallel import Processes

Identity = dict[str, int | float | str | bool | tuple | None]
"""All that decides a run's numbers, by name. A run resumes only what has the same identity."""

_FIELDS = {"identity": dict, "step": int, "metrics_bytes": int, "model": dict, "optimizer": dict}


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, Nesterov's or not; the learning rate rises linearly over the first `warmup` of the steps and
    then falls along a half cosine to 0, or, with milestones, stays and is multiplied by `factor` after each of them.

    milestones: shares of the steps, e.g. (0.3, 0.6, 0.8).
    """

    steps: int = 400
    batch_size: int = 100
    learning_rate: float = 0.1
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    nesterov: bool = True
    milestones: tuple[float, ...] = ()
    factor: float = 0.2

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
        if self.milestones:
            return self.learning_rate * self.factor ** sum(step > round(m * self.steps) for m in self.milestones)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def optimizer(self, model: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
        """For all parameters of the model. fused: as torch.optim.SGD takes it."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
            fused=fused,
        )


class Run:
    """A folder that holds a run's metrics and its checkpoint.

    identity: what decides the run's numbers.
    resume: go on from the folder's checkpoint, or from the first step where there is none yet. Without it an earlier
        run's files in the folder are replaced.
    writes: False for the other processes of a run, which only read the checkpoint.

    Raises ValueError, and leaves the files alone, if the checkpoint is damaged, is of a run with another identity, or
    goes with more metrics than there are.
    """

    def __init__(self, folder: str | Path, identity: Identity, resume: bool = False, writes: bool = True) -> None:
        self.folder, self.identity, self.step = Path(folder), identity, 0
        self._checkpoint, self._log = None, None
        self._writer = ThreadPoolExecutor(1)
        self._written: tuple[Future, dict] | None = None
        if resume and self.checkpoint.exists():
            self._checkpoint = read_checkpoint(self.checkpoint)
            _check_identity(self.checkpoint, self._checkpoint["identity"], identity)
            self.step = self._checkpoint["step"]
        if not writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.checkpoint.unlink(missing_ok=True)  # first, so that no checkpoint ever stands by another run's metrics
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
        if self._log is None:
            return
        self._log.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._log.flush()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes the checkpoint that follows `step`, while training goes on: it is on disk once the next save() or
        close() returns, which raise what writing it raised.
        """
        if self._log is None:
            return
        self._finish()
        state = {
            "identity": self.identity,
            "step": step,
            "metrics_bytes": self._log.tell(),
            "model": _copied(model.state_dict()),
            "optimizer": _copied(optimizer.state_dict()),
        }
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies have arrived
        # The state is kept until the next save, so that no other thread frees memory that CUDA copied to.
        self._written = self._writer.submit(self._write, state), state
        self.step = step

    def _write(self, state: dict) -> None:
        os.fsync(self._log.fileno())  # the metrics that the checkpoint counts on reach the disk before it does
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def _finish(self) -> None:
        if self._written is not None:
            (done, _), self._written = self._written, None
            done.result()

    def close(self) -> None:
        """Closes metrics.jsonl, safe on disk, once the last checkpoint is."""
        try:
            self._finish()
        finally:
            self._writer.shutdown()
            if self._log is not None:
                os.fsync(self._log.fileno())
                self._log.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copied(value: Any) -> Any:
    """A state_dict whose tensors are copies on the CPU; a GPU's may arrive later."""
    if isinstance(value, Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)  # pinned: several times as fast
        return copy.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a torn last one is left out. Raises FileNotFoundError where there is none."""
    lines = (Path(folder) / "metrics.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


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


def mixed_precision(device: torch.device, on: bool = True) -> torch.autocast:
    """bfloat16 on a GPU, where the fused kernels are made for it; float32 on a CPU, and where it is turned off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on and device.type == "cuda")


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) → the loss to descend, a scalar."""


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of a model that returns class scores."""
    return F.cross_entropy(model(images).float(), labels)


def attentive_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, mix: str, regulariser: float, layer_loss: float
) -> Tensor:
    """Of an attentive model: the loss that goes with its mix, plus, by weight, the masks' regulariser and the
    cross-entropy of each attended layer's hypothesis alone, means over its layers.
    """
    compare = F.cross_entropy if mix == "logit" else F.nll_loss
    if regulariser == 0 and layer_loss == 0:
        return compare(model(images).float(), labels)
    details = model(images, return_details=True)
    loss = compare(details.output.float(), labels)
    penalties = [mask_regulariser(masks) for masks in details.masks if masks.shape[1] > 1]
    if penalties and regulariser != 0:
        loss = loss + regulariser * torch.stack(penalties).mean()
    if layer_loss != 0:
        attended = details.hypotheses[:, :-1].float()  # [N, D, L]
        loss = loss + layer_loss * F.cross_entropy(
            attended.flatten(0, 1), labels.unsqueeze(1).expand(attended.shape[:2]).flatten()
        )
    return loss


def loss_of(mix: str, regulariser: float = 0.0, layer_loss: float = 0.0) -> Loss:
    """attentive_loss with its settings."""
    return partial(attentive_loss, mix=mix, regulariser=regulariser, layer_loss=layer_loss)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    rate: float,
    loss: Loss = cross_entropy,
    mixed: bool = True,
) -> Tensor:
    """One step of gradient descent on a batch; the loss before the step, in nats, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return _descend(model, optimizer, batch, loss, mixed)


def _descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], loss: Loss, mixed: bool
) -> Tensor:
    with repeatable():
        with mixed_precision(batch[0].device, mixed):
            value = loss(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()


class CapturedStep:
    """Whole training steps as one CUDA graph, from what a step is given to the update. A replay costs Python a few
    small launches, so that the GPU sets the pace.

    All of it runs on a stream of its own, so that several runs' steps run side by side. The first steps are taken as
    usual: they make what the graph may not (cuDNN's plans, compiled kernels, momentum, NCCL's connections). The
    optimizer must be fused: others read the rate back.
    """

    WARM_UP = 3

    def __init__(
        self,
        inputs_of: Callable[[int], tuple[Tensor, ...]],
        take: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        stream: torch.cuda.Stream,
    ) -> None:
        """inputs_of(step): what a step is given, tensors of the same shapes at every step; not captured.
        take(*inputs): one whole step; the loss.
        """
        self._inputs_of, self._take, self._graph, self._left = inputs_of, take, None, self.WARM_UP
        self._inputs: tuple[Tensor, ...] = ()  # where replays find theirs
        self._rate, self._stream = torch.zeros((), device=stream.device), stream
        for group in optimizer.param_groups:
            group["lr"] = self._rate

    def __call__(self, step: int, rate: float) -> Tensor:
        """Queues the step, after all that the current stream was given so far. Its loss, to be read after join()."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            inputs = self._inputs_of(step)
            self._rate.fill_(rate)
            if self._left > 0:
                self._left -= 1
                return self._take(*inputs)
            if self._graph is None:
                self._graph, self._inputs = torch.cuda.CUDAGraph(), tuple(value.clone() for value in inputs)
                # Records, runs nothing. Threads that read images or watch NCCL are none of its business.
                with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._loss = self._take(*self._inputs)
            for mine, value in zip(self._inputs, inputs):
                mine.copy_(value)
            self._graph.replay()
            return self._loss.clone()  # the next replay writes over it

    def join(self) -> None:
        """The current stream waits for the steps queued so far."""
        torch.cuda.current_stream().wait_stream(self._stream)


def train(*all: Any, **named: Any) -> None:
    """Trains to the recipe's last step: takes all of training_steps(...), which has the arguments."""
    for _ in training_steps(*all, **named):
        pass


def side_by_side(runs: Iterable[Generator[None, None, None]]) -> int:
    """Takes steps of several training_steps in turns until each has ended; how many. Captured ones overlap on the GPU,
    where the steps of a small net leave most of it idle. One that raises stops them all.
    """
    taken = 0
    with ExitStack() as stack:
        going = [stack.enter_context(closing(run)) for run in runs]
        while going:
            going = [run for run in going if next(run, _ENDED) is not _ENDED]
            taken += len(going)
    return taken


_ENDED = object()


def training_steps(
    model: nn.Module,
    batch_of: Callable[..., tuple[Tensor, Tensor]],
    recipe: Recipe,
    run: Run,
    *,
    inputs_of: Callable[[int], tuple[Tensor, ...]] | None = None,
    loss: Loss = cross_entropy,
    checkpoint_every: int = 50,
    log_every: int = 1,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    forward: nn.Module | None = None,
    processes: Processes | None = None,
    mixed: bool = True,
    capture: bool = False,
) -> Generator[None, None, None]:
    """Trains the model from where the run stands to the recipe's last step, and pauses after each step.

    batch_of: images and labels of a step, a function of its number alone or, with inputs_of, of what that makes of the
    number. on_step: called with the step and the loss of every line of the log. evaluate: what to log with every
    `evaluate_every` steps and the last one, by step. forward: the model as it is called, if it is compiled. processes:
    which share each batch. mixed: bfloat16 on a GPU.
    capture: take whole steps as a CUDA graph, batch_of among them: without inputs_of it must take the number as a
    tensor, and nothing in it may wait for the device.
    Metrics: step (from 1), loss (its mean over the steps since the last line, and over processes), learning_rate; a
    line every log_every steps and at checkpoints. Raises FloatingPointError when a loss is not finite.
    """
    forward = model if forward is None else forward
    optimizer = recipe.optimizer(model, fused=True if capture else None)
    run.restore(model, optimizer)
    captured, pending, device = None, [], next(model.parameters()).device
    if inputs_of is None:
        inputs_of = (lambda step: (torch.full((), step, device=device),)) if capture else (lambda step: (step,))
    if processes is not None:
        forward = processes.wrapped(forward)
    if capture:
        captured = CapturedStep(
            inputs_of,
            lambda *inputs: _descend(forward, optimizer, batch_of(*inputs), loss, mixed),
            optimizer,
            torch.cuda.Stream(device),
        )
    model.train()
    for step in range(run.step + 1, recipe.steps + 1):
        rate = recipe.rate(step)
        if captured is not None:
            pending.append(captured(step, rate))
        else:
            pending.append(train_step(forward, optimizer, batch_of(*inputs_of(step)), rate, loss, mixed))
        is_last = step == recipe.steps
        is_kept = step % checkpoint_every == 0 or is_last
        if step % log_every == 0 or is_kept:
            if captured is not None:
                captured.join()
            value = torch.stack(pending).mean()
            value = (value if processes is None else processes.mean(value)).item()
            pending.clear()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}: a smaller learning rate may help")
            run.log(step=step, loss=value, learning_rate=rate)
            on_step(step, value)
        if evaluate is not None and (is_last or (evaluate_every > 0 and step % evaluate_every == 0)):
            run.log(step=step, **evaluate(step))
        if is_kept:
            run.save(step, model, optimizer)
        yield


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    mixed: bool = True,
    processes: Processes | None = None,
) -> float:
    """Share of images whose highest score is their label's, from 0 to 1. The model is left in its own mode.

    processes: each counts its own batches, and the share is of all.
    """
    training, right, count = model.training, 0, 0
    model.eval()
    with repeatable():
        for images, labels in batches:
            with mixed_precision(images.device, mixed):
                right += (model(images).argmax(dim=1) == labels).sum()
            count += len(labels)
    model.train(training)
    if processes is not None:
        both = torch.tensor([float(right), count], dtype=torch.float64, device=processes.device)
        right, count = processes.total(both).tolist()
    return float(right) / count
