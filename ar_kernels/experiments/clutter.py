"""clutter: the test error against the number of distractors, with attention and without (Figure 4e)."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from . import data
from .ablate import PATIENCE, VARIANTS, Rows, settings_of, train_runs
from .figures import draw_lines
from .files import write_atomically
from .nets import load_run
from .parallel import processes
from .progress import on_terminal
from .statistics import paired_interval
from .training import accuracy

ATTENTIVE, BASELINE = "ad4-aw4", "baseline"

TRAINED_WITH = 8

PAPER = {BASELINE: 1.95, ATTENTIVE: 1.72, "STN": 2.07}
"""How much the paper's test errors grow up to 64 distractors."""


def run(options: argparse.Namespace) -> None:
    """Trains what is missing, tests and draws, as __main__ parsed it. Raises ValueError and OSError."""
    counts = sorted({TRAINED_WITH, *options.distractors})
    if counts[0] < 0:
        raise ValueError(f"distractors must be at least 0, got {counts[0]}")
    with processes(options.device, PATIENCE) as group:
        settings = settings_of(options, group.device)
        console = Console(highlight=False, force_terminal=None if group.world == 1 else False)
        runs = [(name, seed) for seed in range(options.seeds) for name in (BASELINE, ATTENTIVE)]
        mine = runs[group.rank :: group.world]
        trains = argparse.Namespace(**vars(options) | {"out": options.runs, "resume": True})
        train_runs(settings, mine, trains, console)
        for name, seed in mine:
            folder = Path(options.runs) / name / f"seed-{seed}"
            _test(settings.source, settings.device, folder, _path(options, name, seed), counts, options)
            console.print(f"tested {name}, seed {seed}", markup=False)
        group.wait()
        if group.is_first:
            errors = {name: _read(options, name, counts) for name in (BASELINE, ATTENTIVE)}
            summary = summarise(settings.source.name, counts, errors)
            out = Path(options.out)
            text = json.dumps(summary, indent=1).encode() + b"\n"
            write_atomically(out / "figure4e.json", lambda file: file.write(text))
            labels = {name: VARIANTS[name].label for name in errors}
            draw_lines(
                out / "figure4e.png", counts, {labels[name]: 100 * errors[name].mean(axis=2) for name in errors},
                "distractors (trained with 8)", "test error, %", caption(summary),
            )  # fmt: skip
            for table in tables(summary):
                console.print(on_terminal(*table))
            console.print(f"  {out / 'figure4e.json'}\n  {out / 'figure4e.png'}", markup=False, soft_wrap=True)


def _path(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.out) / name / f"seed-{seed}.json"


def _test(
    source: data.Source, device: torch.device, folder: Path, path: Path, counts: list[int], options: argparse.Namespace
) -> None:
    model, _, identity = load_run(folder, device)
    mark = {"run": json.loads(json.dumps(identity)), "draws": options.draws}
    found = json.loads(path.read_bytes()) if options.resume and path.is_file() else {}
    errors = found.get("errors", {}) if {name: found.get(name) for name in mark} == mark else {}
    digits = source.test.to(device)
    for count in counts:
        if str(count) in errors:
            continue
        clutter = data.Clutter(digits, count)
        errors[str(count)] = [
            1 - accuracy(model, clutter.test_batches(500, first=draw), identity["bf16"])
            for draw in range(options.draws)
        ]
        text = json.dumps(mark | {"errors": errors}, indent=1).encode() + b"\n"
        write_atomically(path, lambda file, text=text: file.write(text))


def _read(options: argparse.Namespace, name: str, counts: list[int]) -> np.ndarray:
    """Errors [counts, seeds, draws]."""
    files = [json.loads(_path(options, name, seed).read_bytes())["errors"] for seed in range(options.seeds)]
    return np.array([[file[str(count)] for file in files] for count in counts])


def summarise(source: str, counts: list[int], errors: dict[str, np.ndarray]) -> dict:
    """What figure4e.json holds, of_draws [counts, seeds, draws]. Growth: the error with the most distractors over that
    with as many as in training, in points and as a multiple of the latter; the paper's growths are given without a
    unit, so neither is called theirs.
    """
    base = counts.index(TRAINED_WITH)
    growth = {name: values[-1] - values[base] for name, values in errors.items()}
    interval = paired_interval(growth[BASELINE] - growth[ATTENTIVE])
    at = {name: values[base].mean() for name, values in errors.items()}
    return {
        "data": source,
        "distractors": counts,
        "seeds": errors[BASELINE].shape[1],
        "draws": errors[BASELINE].shape[2],
        "errors": {name: values.mean(axis=(1, 2)).tolist() for name, values in errors.items()},
        "of_draws": {name: values.tolist() for name, values in errors.items()},
        "growth": {name: float(values.mean()) for name, values in growth.items()},
        "growth_relative": {name: float(v.mean() / at[name]) if at[name] > 0 else None for name, v in growth.items()},
        "paper_growth_at_64": PAPER,
        "less_growth_with_attention": interval.as_json(),
    }


def caption(summary: dict) -> str:
    row = summary["less_growth_with_attention"]
    return (
        f"{summary['data']}, {summary['seeds']} seeds, {summary['draws']} draws: mean and range over seeds. "
        f"With attention the error grows less: {row['verdict']}"
    )


def tables(summary: dict) -> list[Rows]:
    """The summary in words, for a terminal or a page."""
    header = ["net", *map(str, summary["distractors"]), "+ points", "+ times", "paper"]
    rows = []
    for name, errors in summary["errors"].items():
        relative = summary["growth_relative"][name]
        rows.append(
            [
                VARIANTS[name].label,
                *(f"{100 * error:.2f}" for error in errors),
                f"{100 * summary['growth'][name]:+.2f}",
                "?" if relative is None else f"{relative:+.2f}",
                f"{PAPER[name]:+.2f}",
            ]
        )
    row = summary["less_growth_with_attention"]
    ends = ["?" if row[end] is None else f"{100 * row[end]:+.2f}" for end in ("low", "high")]
    verdict = ["less growth with attention", f"{100 * row['difference']:+.2f}", *ends, row["verdict"]]
    return [
        ("Test error, %, by distractors, and how much it grows from 8 to the most", header, rows),
        ("The paper's ordering: points, 95 % interval", ["ordering", "here", "from", "to", "verdict"], [verdict]),
    ]
