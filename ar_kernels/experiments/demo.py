"""The demo: an attentive digit net learns to find a digit in clutter, and shows where it looks."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ar_kernels

from ..models.digits import DigitNet
from . import data
from .figures import draw_attention
from .progress import progress_bar
from .training import Recipe, Run, accuracy, repeatable, train, train_step

_SHOWN = 5  # images in the picture
_TEST_IMAGES = 3000  # a small test set is seen in several clutters, up to about this many images


def run(options: argparse.Namespace) -> None:
    """Runs the demo as __main__ parsed it: compares, trains or resumes, tests, draws.

    Raises ValueError, FileNotFoundError and ModuleNotFoundError with a message for the user.
    """
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    device = torch.device(options.device)
    recipe = Recipe(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    source = data.load(options.data, download=options.download, root=options.data_root)
    clutter = data.Clutter(source.train.to(device))
    held_out = data.Clutter(source.test.to(device))
    depth, width = options.attention_depth, options.attention_width

    def new_model() -> DigitNet:
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU: the same on every device
            torch.manual_seed(recipe.seed)
            return DigitNet(source.num_classes, depth, width).to(device)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        return clutter.train_batch(recipe.seed, step, recipe.batch_size)

    model = new_model()
    with torch.no_grad():  # an implementation that was asked for and cannot run says so before files are touched
        model.eval()(clutter.train_batch(recipe.seed, 1, 1)[0])
    explanation = _explanation(model, recipe.batch_size, device)
    identity = {
        **asdict(recipe),
        "attention_depth": depth,
        "attention_width": width,
        "data": source.name,
        "data_crc32": source.fingerprint,
        "device": device.type,
    }
    with Run(options.out, identity, resume=options.resume) as progress:  # first of all: it may refuse
        say(
            f"Data: {source.name}, {len(source.train.images):,} digits to train on and {len(source.test.images):,} "
            f"to test on, each placed among {clutter.distractors} patches of others."
        )
        say(
            f"Net: five convolutions, {depth} of their maps attended by {width} heads each; "
            f"{sum(parameter.numel() for parameter in model.parameters()):,} weights, on {_name(device)}."
        )
        say(f"Attention, as ar_kernels.explain tells:\n{explanation}")
        if progress.step:
            say(f"Resuming after step {progress.step} of {recipe.steps}.")
        else:
            if options.resume:
                say("There is no checkpoint yet: starting from the first step.")
            if options.compare_steps > 0:
                console.print(_comparison(new_model, batch_of, recipe, options.compare_steps, explanation.chosen))
                say("Rounding grows with every step: the last column is the reference against itself,")
                say("from first weights of which one is moved to the next float.")
        started = time.perf_counter()
        with progress_bar(console, recipe.steps, progress.step) as on_step:
            train(model, batch_of, recipe, progress, checkpoint_every=options.checkpoint_every, on_step=on_step)
        seconds = time.perf_counter() - started
        repeats = max(1, _TEST_IMAGES // len(source.test.images))
        share = accuracy(model, held_out.test_batches(repeats=repeats))
        progress.log(step=recipe.steps, test_accuracy=share)

    picture = Path(options.out) / "attention.png"
    _draw(picture, model, held_out)
    times = "" if repeats == 1 else f", each {repeats} times in other clutter"
    say(f"Trained in {seconds:.0f} s.")
    say(f"Test accuracy: {100 * share:.1f} % ({len(source.test.images):,} held-out digits{times})")
    say(f"  metrics     {progress.metrics}\n  checkpoint  {progress.checkpoint}\n  picture     {picture}")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.get_num_threads()} threads)"


def _explanation(model: DigitNet, batch_size: int, device: torch.device) -> ar_kernels.Explanation:
    last = model.attended_maps[-1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as training.mixed_precision has it
    feature_map = torch.empty(batch_size, last.channels, last.size, last.size, device=device, dtype=dtype)
    return ar_kernels.explain(feature_map, model.attention[-1].mask_weight)


def _comparison(
    new_model: Callable[[], DigitNet],
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    recipe: Recipe,
    steps: int,
    name: str,
) -> Table:
    """The first steps from the same weights on the same batches, by the implementation `name` and the reference.

    A third run, the reference from first weights that differ by one ulp, tells how much of a difference is chance.
    """
    names = (name, "reference", "reference")
    models = [new_model() for _ in names]
    with torch.no_grad():
        weight = models[2].blocks[0][0].weight.view(-1)
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    optimizers = [recipe.optimizer(model) for model in models]
    losses, times = [], []  # per step: of each model
    with repeatable():
        for step in range(1, steps + 1):
            batch = batch_of(step)
            losses.append([])
            times.append([])
            for index, implementation in enumerate(names):  # in turns: other load on the machine meets all three
                with ar_kernels.use_implementation(implementation):
                    began = time.perf_counter()
                    losses[-1].append(train_step(models[index], optimizers[index], batch, recipe.rate(step)).item())
                times[-1].append(1e3 * (time.perf_counter() - began))
    table = Table(title=f"The first {steps} steps, from the same seed", title_justify="left")
    for column in ("step", f"{name}: loss", "ms", "reference: loss", "ms", "difference", "of 1 ulp"):
        table.add_column(column, justify="right")
    for step, ((ours, theirs, moved), (ms, reference_ms, _)) in enumerate(zip(losses, times), 1):
        table.add_row(
            str(step), f"{ours:.6f}", f"{ms:.0f}", f"{theirs:.6f}", f"{reference_ms:.0f}",
            f"{ours - theirs:+.1e}", f"{moved - theirs:+.1e}",
        )  # fmt: skip
    table.add_section()
    median, reference_median, _ = (statistics.median(column) for column in zip(*times))
    table.add_row("median", "", f"{median:.0f}", "", f"{reference_median:.0f}")
    return table


@torch.no_grad()
def _draw(path: Path, model: DigitNet, held_out: data.Clutter) -> None:
    images, labels = (values[:_SHOWN] for values in next(held_out.test_batches()))
    model.eval()
    draw_attention(path, images, labels, model(images, return_details=True), model.attended_maps)
