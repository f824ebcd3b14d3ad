"""ablate: the paper's Figure 4 on cluttered digits, variant by variant and seed by seed."""

import argparse
import json
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from . import data
from .figures import draw_curves
from .files import write_atomically
from .nets import Net
from .parallel import processes
from .progress import on_terminal, progress_bar
from .statistics import paired_interval
from .training import Identity, Recipe, Run, accuracy, loss_of, read_metrics, side_by_side, training_steps


@dataclass(frozen=True)
class Variant:
    """A net of the ablation, and how it is trained."""

    label: str
    attention_depth: int = 4
    attention_width: int = 4
    gating: str | None = "softmax"
    gated: bool = True
    regularised: bool = True


VARIANTS = {
    "baseline": Variant("plain", attention_depth=0, attention_width=1),
    "ad1-aw1": Variant("AD 1, AW 1", 1, 1),
    "ad2-aw1": Variant("AD 2, AW 1", 2, 1),
    "ad3-aw1": Variant("AD 3, AW 1", 3, 1),
    "ad4-aw1": Variant("AD 4, AW 1", 4, 1),
    "ad4-aw2": Variant("AD 4, AW 2", 4, 2),
    "ad4-aw4": Variant("AD 4, AW 4", 4, 4),
    "sigmoid": Variant("AD 4, AW 4, sigmoid", gating="sigmoid"),
    "no-gates": Variant("AD 4, AW 4, no gates", gating=None, gated=False),
    "no-regulariser": Variant("AD 4, AW 4, no regulariser", regularised=False),
}
"""By name. No gates: neither over heads nor over layers, as we read the paper."""


@dataclass(frozen=True)
class Panel:
    """Variants drawn together, and the accuracies that the paper gives for them."""

    title: str
    paper: dict[str, float]


PANELS = (
    Panel(
        "a  attention depth",
        {"baseline": 0.9754, "ad1-aw1": 0.9761, "ad2-aw1": 0.9769, "ad3-aw1": 0.9776, "ad4-aw1": 0.9777},
    ),
    Panel("b  attention width", {"ad4-aw1": 0.9778, "ad4-aw2": 0.9778, "ad4-aw4": 0.9780}),
    Panel("c  gates", {"ad4-aw4": 0.9781, "sigmoid": 0.9772, "no-gates": 0.9752}),
    Panel("d  regulariser", {"ad4-aw4": 0.9781, "no-regulariser": 0.9780}),
)

ORDERINGS = (
    ("attention above the baseline", "ad4-aw4", "baseline", 0.9781 - 0.9754),
    ("depth helps", "ad4-aw1", "ad1-aw1", 0.9777 - 0.9761),
    ("width helps", "ad4-aw4", "ad4-aw1", 0.9780 - 0.9778),
    ("gates above no gates", "ad4-aw4", "no-gates", 0.9781 - 0.9752),
    ("softmax above sigmoid", "ad4-aw4", "sigmoid", 0.9781 - 0.9772),
    ("the regulariser helps", "ad4-aw4", "no-regulariser", 0.9781 - 0.9780),
)
"""What the paper finds: (in words, the better variant, the other, the difference of their accuracies there)."""

PATIENCE = timedelta(days=2)  # how long the first process waits for the others' runs


@dataclass(frozen=True)
class Settings:
    """What the runs of an ablation have in common."""

    source: data.Source
    device: torch.device
    recipe: Recipe
    epoch: int
    mix: str
    regulariser: float
    draws: int
    bf16: bool
    capture: bool
    at_once: int


def settings_of(options: argparse.Namespace, device: torch.device) -> Settings:
    """Reads the digits. Raises what data.load raises, and ValueError for numbers that make no recipe."""
    source = data.load(options.data, download=options.download, root=options.data_root)
    epoch = max(1, len(source.train.images) // options.batch_size)
    recipe = Recipe(
        steps=epoch * options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=0.0,
        weight_decay=1e-5,
        nesterov=False,
        milestones=(0.3,),  # epoch 60 of 200
        factor=0.1,
    )
    on_gpu = device.type == "cuda"
    mixed, capture = (on_gpu if choice is None else choice for choice in (options.bf16, options.capture))
    if capture and not on_gpu:
        raise ValueError("--capture needs a GPU")
    return Settings(
        source, device, recipe, epoch, options.mix, options.regulariser, options.draws, mixed and on_gpu, capture,
        at_once=options.at_once if capture else 1,
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Trains what is missing and draws the figure, as __main__ parsed it. Raises ValueError, OSError and
    FloatingPointError.
    """
    names = tuple(options.only or VARIANTS)
    with processes(options.device, PATIENCE) as group:
        settings = settings_of(options, group.device)
        console = Console(highlight=False, force_terminal=None if group.world == 1 else False)
        runs = [(name, seed) for seed in range(options.seeds) for name in names]
        train_runs(settings, runs[group.rank :: group.world], options, console)
        group.wait()
        if not group.is_first:
            return
        found = {name: read_results(options.out, name, options.seeds) for name in names}
        summary = summarise(settings.source.name, options, found)
        out = Path(options.out)
        write_atomically(out / "figure4.json", lambda file: file.write(json.dumps(summary, indent=1).encode() + b"\n"))
        curves = {name: read_curves(out, name, options.seeds) for name in names}
        panels = [(panel.title, _legend(panel, summary, names), curves) for panel in PANELS]
        draw_curves(out / "figure4.png", [panel for panel in panels if panel[1]], caption(summary))
        for table in tables(summary):
            console.print(on_terminal(*table))
        console.print(f"  {out / 'figure4.json'}\n  {out / 'figure4.png'}", markup=False, soft_wrap=True)


def train_runs(
    settings: Settings, runs: Iterable[tuple[str, int]], options: argparse.Namespace, console: Console
) -> None:
    """Trains and tests each (variant, seed) into options.out / variant / seed-N, several side by side on a GPU; one
    that is finished is left alone if options.resume. Prints how many images a second that were.
    """
    runs, missing = list(runs), []
    for number, (name, seed) in enumerate(runs, 1):
        folder = Path(options.out) / name / f"seed-{seed}"
        if options.resume and read_result(folder, identity_of(settings, name, seed), settings.draws) is not None:
            continue
        if not options.resume:
            (folder / "result.json").unlink(missing_ok=True)
        missing.append((name, seed, folder, f"{name}, seed {seed} ({number} of {len(runs)})"))
    steps, began = 0, time.perf_counter()
    for first in range(0, len(missing), settings.at_once):
        together = missing[first : first + settings.at_once]
        title = together[0][3] + (f" and the next {len(together) - 1}" if len(together) > 1 else "")
        with progress_bar(console, settings.recipe.steps, 0, title) as on_step:
            shown = [on_step] + [lambda step, loss: None] * (len(together) - 1)  # the first stands for all
            steps += side_by_side(
                _train_one(settings, name, seed, folder, options.resume, show)
                for (name, seed, folder, _), show in zip(together, shown)
            )
        for name, seed, folder, title in together:
            error = 100 * (1 - np.mean(read_result(folder, identity_of(settings, name, seed), settings.draws)))
            console.print(f"{title}: test error {error:.2f} %", markup=False, soft_wrap=True)
    if missing:
        write_speed(Path(options.out), settings, steps, time.perf_counter() - began)


def write_speed(out: Path, settings: Settings, steps: int, seconds: float) -> None:
    """speed.json: what the runs just trained took, their tests and the capture of their steps included."""
    on_gpu = settings.device.type == "cuda"
    found = {
        "images_per_second": steps * settings.recipe.batch_size / seconds,
        "steps": steps,
        "seconds": seconds,
        "at_once": settings.at_once,
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    write_atomically(out / "speed.json", lambda file: file.write(json.dumps(found, indent=1).encode() + b"\n"))


def identity_of(settings: Settings, name: str, seed: int) -> Identity:
    """All that decides a run's numbers."""
    variant, recipe = VARIANTS[name], replace(settings.recipe, seed=seed)
    return {
        **asdict(recipe), **_net(settings, name).settings(), "data": settings.source.name,
        "data_crc32": settings.source.fingerprint, "device": settings.device.type, "bf16": settings.bf16,
        "captured": settings.capture, "regulariser": settings.regulariser if variant.regularised else 0.0,
    }  # fmt: skip


def _net(settings: Settings, name: str) -> Net:
    variant = VARIANTS[name]
    return Net(
        "digitnet", settings.source.num_classes, variant.attention_depth, variant.attention_width,
        mix=settings.mix, gating=variant.gating, gated=variant.gated, image_size=0,
    )  # fmt: skip


def _train_one(
    settings: Settings, name: str, seed: int, folder: Path, resume: bool, on_step: Callable[[int, float], None]
) -> Generator[None, None, None]:
    """Pauses after each step; ends when result.json is written."""
    identity = identity_of(settings, name, seed)
    clutter, held_out = (
        data.Clutter(digits.to(settings.device)) for digits in (settings.source.train, settings.source.test)
    )
    recipe = replace(settings.recipe, seed=seed)
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU: the same on every device
        torch.manual_seed(seed)
        model = _net(settings, name).build()
    on_gpu = settings.device.type == "cuda"
    model = model.to(settings.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)

    def evaluate(step: int) -> dict[str, float]:
        share = accuracy(model, held_out.test_batches(2500), settings.bf16)
        return {"epoch": step // settings.epoch, "test_accuracy": share}

    with Run(folder, identity, resume=resume) as progress:
        yield from training_steps(
            model, lambda step: clutter.train_batch(seed, step, recipe.batch_size), recipe, progress,
            loss=loss_of(settings.mix, identity["regulariser"] if VARIANTS[name].attention_depth else 0.0),
            checkpoint_every=settings.epoch, log_every=settings.epoch, on_step=on_step, evaluate=evaluate,
            evaluate_every=settings.epoch, mixed=settings.bf16, capture=settings.capture,
        )  # fmt: skip
    found = [accuracy(model, held_out.test_batches(2500, first=draw), settings.bf16) for draw in range(settings.draws)]
    result = {"identity": identity, "accuracies": found}
    write_atomically(folder / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode() + b"\n"))


# ---------------------------------------------------------------------------------------------- results


def read_result(folder: Path, identity: Identity, draws: int) -> list[float] | None:
    """The accuracies of a finished run with this identity, on so many draws; None where there is none."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    same = found["identity"] == json.loads(json.dumps(identity)) and len(found["accuracies"]) == draws
    return found["accuracies"] if same else None


def read_results(out: str | Path, name: str, seeds: int) -> np.ndarray:
    """Accuracies [seeds, draws] of a variant."""
    paths = [Path(out) / name / f"seed-{seed}" / "result.json" for seed in range(seeds)]
    return np.array([json.loads(path.read_bytes())["accuracies"] for path in paths])


def read_curves(out: str | Path, name: str, seeds: int) -> np.ndarray:
    """Test accuracies [seeds, epochs] of a variant, on the first draw."""
    lines = [read_metrics(Path(out) / name / f"seed-{seed}") for seed in range(seeds)]
    return np.array([[line["test_accuracy"] for line in run if "test_accuracy" in line] for run in lines])


def summarise(source: str, options: argparse.Namespace, found: dict[str, np.ndarray]) -> dict:
    """What figure4.json holds: accuracies of all variants, of_draws [seeds, draws], and what became of the paper's
    orderings.
    """
    seeds, draws = next(iter(found.values())).shape
    orderings = []
    for text, better, other, paper in ORDERINGS:
        if better in found and other in found:
            interval = paired_interval(found[better] - found[other])
            orderings.append(
                {"ordering": text, "better": better, "other": other, "paper": round(paper, 4)} | interval.as_json()
            )
    return {
        "data": source,
        "epochs": options.epochs,
        "seeds": seeds,
        "draws": draws,
        "variants": {
            name: {
                "label": VARIANTS[name].label,
                "accuracy": float(values.mean()),
                "of_seeds": values.mean(axis=1).tolist(),
                "of_draws": values.tolist(),
            }
            for name, values in found.items()
        },
        "orderings": orderings,
    }


def _legend(panel: Panel, summary: dict, names: Iterable[str]) -> dict[str, str]:
    variants = summary["variants"]
    return {
        name: f"{variants[name]['label']}: {100 * variants[name]['accuracy']:.2f} (paper {100 * paper:.2f})"
        for name, paper in panel.paper.items()
        if name in names
    }


def caption(summary: dict) -> str:
    verdicts = ", ".join(f"{row['ordering']} {row['verdict']}" for row in summary["orderings"])
    return (
        f"{summary['data']}, 8 distractors, {summary['epochs']} epochs, {summary['seeds']} seeds: mean and range. "
        f"In the legends: accuracy in % after the last epoch on {summary['draws']} draws of the test set's clutter"
        + (f". Of the paper's orderings: {verdicts}" if verdicts else "")
    )


Rows = tuple[str, list[str], list[list[str]]]
"""A table: its title, header and rows."""


def tables(summary: dict) -> list[Rows]:
    """The summary in words, for a terminal or a page."""
    variants = [
        [
            values["label"],
            f"{100 * values['accuracy']:.2f}",
            " ".join(f"{100 * value:.2f}" for value in values["of_seeds"]),
            " / ".join(f"{100 * value:.2f}" for value in sorted({p.paper[name] for p in PANELS if name in p.paper})),
        ]
        for name, values in summary["variants"].items()
    ]
    orderings = [
        [
            row["ordering"],
            f"{100 * row['difference']:+.2f}",
            *("?" if row[end] is None else f"{100 * row[end]:+.2f}" for end in ("low", "high")),
            f"{100 * row['paper']:+.2f}",
            row["verdict"],
        ]
        for row in summary["orderings"]
    ]
    return [
        ("Test accuracy, %", ["variant", "here", "of seeds", "paper"], variants),
        (
            "The paper's orderings: differences in points, 95 % intervals",
            ["ordering", "here", "from", "to", "paper", "verdict"],
            orderings,
        ),
    ]
