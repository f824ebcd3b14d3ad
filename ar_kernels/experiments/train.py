"""train: a network on images, by the paper's recipe, on one device or several."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from . import images
from .files import write_atomically
from .nets import Net, load_weights
from .parallel import Processes, processes
from .progress import progress_bar
from .training import Recipe, Run, accuracy, cross_entropy, loss_of, read_metrics, train

MILESTONES, FACTOR = (0.3, 0.6, 0.8), 0.2
"""The paper's schedule: after 60, 120 and 160 of 200 epochs."""


def run(options: argparse.Namespace) -> None:
    """Runs or resumes the training that __main__ parsed. Raises ValueError, OSError and FloatingPointError."""
    if not options.bucket > 0:
        raise ValueError(f"bucket must be above 0, got {options.bucket}")
    with processes(options.device, bucket_mb=options.bucket) as group:
        _run(options, group)


def _run(options: argparse.Namespace, group: Processes) -> None:
    console = Console(highlight=False, quiet=not group.is_first)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if options.model == "digitnet":
        raise ValueError("model digitnet is for cluttered digits: ablate and demo train it")
    on_gpu = group.device.type == "cuda"
    mixed, channels_last, compiled = (
        on_gpu if choice is None else choice for choice in (options.bf16, options.channels_last, options.compile)
    )
    if options.capture and not on_gpu:
        raise ValueError(f"--capture needs a GPU, got {group.device.type}")
    if options.download and group.is_first:
        images.load(options.data, torch.device("cpu"), download=True, root=options.data_root, size=options.image_size)
    group.wait()
    source = images.load(
        options.data, group.device, root=options.data_root, size=options.image_size, workers=options.workers,
        held_out=options.held_out,
    )  # fmt: skip
    images.check_batch_size(options.batch_size, source.train_count, group.world)
    epoch = source.train_count // options.batch_size
    recipe = Recipe(
        steps=epoch * options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=0.0,
        weight_decay=options.weight_decay,
        seed=options.seed,
        milestones=MILESTONES,
        factor=FACTOR,
    )
    net = Net(
        model=options.model,
        num_classes=source.num_classes,
        attention_depth=options.attention_depth,
        attention_width=options.attention_width,
        layers=options.layers,
        mix=options.mix,
        gating=None if options.gating == "none" else options.gating,
        gated=options.head_gates,
        kernel_size=options.kernel_size,
        dropout=options.dropout,
        image_size=source.size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # weights are drawn on the CPU: the same on every device and in every process
        model = net.build(options.pretrained)
    kept = load_weights(model, options.weights) if options.weights else []
    model = model.to(group.device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    regulariser, layer_loss = (options.regulariser, options.layer_loss) if net.is_attentive else (0.0, 0.0)
    identity = {
        **asdict(recipe), **net.settings(), "regulariser": regulariser, "layer_loss": layer_loss,
        "data": source.name, "held_out": source.held_out,
        "data_crc32": source.fingerprint, "pretrained": options.pretrained, "weights": options.weights,
        "device": group.device.type, "processes": group.world, "bf16": mixed and on_gpu, "compiled": compiled,
        "captured": options.capture, "bucket": options.bucket if group.world > 1 else 0.0,
        "classes": source.classes, "mean": tuple(source.mean.flatten().tolist()),
        "std": tuple(source.std.flatten().tolist()),
    }  # fmt: skip
    called = torch.compile(model) if compiled else model

    def inputs_of(step: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed((recipe.seed * recipe.steps + step) * group.world + group.rank)  # for dropout
        return source.read_batch(recipe.seed, step, recipe.batch_size, group.rank, group.world)

    def batch_of(
        images: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = source.augmented(images, recipe.seed, numbers)
        return seen.contiguous(memory_format=torch.channels_last) if channels_last else seen, labels

    clock = _Clock(group, recipe.batch_size)

    def evaluate(step: int) -> dict[str, float]:
        clock.stop(step)
        group.take_buffers(model)
        tests = source.test_batches(options.test_batch_size, group.rank, group.world)
        share = accuracy(called, tests, mixed, group)
        clock.start(step)
        return {"epoch": step // epoch, "test_accuracy": share}

    with Run(options.out, identity, resume=options.resume, writes=group.is_first) as progress:
        say(
            f"Data: {source.name}, {source.train_count:,} images to train on, {source.test_count:,} to test on, "
            f"{source.held_out:,} held out."
        )
        if source.name == "random":
            say("This is noise: it measures speed, and its accuracy means nothing.")
        weights = sum(parameter.numel() for parameter in model.parameters())
        say(f"Net: {net.model}, {weights:,} weights, on {group.world} × {group.device.type}.")
        if kept:
            say(f"Not in {options.weights}, drawn anew: {', '.join(kept[:8])}{', ...' if len(kept) > 8 else ''}")
        if progress.step:
            say(f"Resuming after step {progress.step} of {recipe.steps}.")
        clock.start(progress.step)
        with progress_bar(console, recipe.steps, progress.step) as on_step:
            train(
                model, batch_of, recipe, progress, inputs_of=inputs_of,
                loss=loss_of(net.mix, regulariser, layer_loss) if net.is_attentive else cross_entropy,
                checkpoint_every=epoch, log_every=options.log_every, on_step=on_step, evaluate=evaluate,
                evaluate_every=epoch * options.test_every, forward=called, processes=group, mixed=mixed,
                capture=options.capture,
            )  # fmt: skip
    if group.is_first:
        if clock.rates:
            clock.write(Path(options.out) / "speed.json")
            say(f"Median of {len(clock.rates)} stretches of training: {clock.median:,.0f} images a second.")
        say(best_and_last(options.out))
        say(f"  metrics     {progress.metrics}\n  checkpoint  {progress.checkpoint}")


def best_and_last(folder: str | Path) -> str:
    """A sentence on a finished run's test accuracies, read from its metrics."""
    tests = [line for line in read_metrics(folder) if "test_accuracy" in line]
    best, last = max(tests, key=lambda line: line["test_accuracy"]), tests[-1]
    return (
        f"Test accuracy after the last epoch: {100 * last['test_accuracy']:.2f} %. The best of {len(tests)} tests: "
        f"{100 * best['test_accuracy']:.2f} % (epoch {best['epoch']}); the paper reports the best on the test set, "
        "which is chosen by looking at it."
    )


class _Clock:
    """Images a second between start and stop, of all processes together; reading and augmenting included."""

    def __init__(self, group: Processes, batch_size: int) -> None:
        self._group, self._batch_size, self.rates = group, batch_size, []

    def _now(self) -> float:
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        return time.perf_counter()

    def start(self, step: int) -> None:
        self._began = step, self._now()

    def stop(self, step: int) -> None:
        steps, seconds = step - self._began[0], self._now() - self._began[1]
        if steps > 0:
            self.rates.append(steps * self._batch_size / seconds)

    @property
    def median(self) -> float:
        return sorted(self.rates)[len(self.rates) // 2]

    def write(self, path: Path) -> None:
        device = self._group.device
        found = {
            "images_per_second": self.median,
            "stretches": self.rates,
            "processes": self._group.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        write_atomically(path, lambda file: file.write(json.dumps(found, indent=1).encode() + b"\n"))
