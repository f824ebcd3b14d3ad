"""report: what runs left behind, on one page."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from . import ablate, clutter, early_exit
from .figures import curves_png
from .nets import net_of
from .pages import escaped, picture, table, write_page
from .training import Identity, read_checkpoint, read_metrics

PAPER = {
    ("wrn-40-10", "cifar10"): 3.80, ("wrn-40-10", "cifar100"): 18.30,
    ("warn-40-10", "cifar10"): 3.46, ("warn-40-10", "cifar100"): 17.82,
    ("warn-28-10", "cifar10"): 3.44, ("warn-28-10", "cifar100"): 18.26,
}  # fmt: skip
"""The paper's test errors in %, the best of all epochs."""

SUMMARIES: dict[str, tuple[str, Callable[[dict], list], Callable[[dict], str]]] = {
    "figure4.json": ("Figure 4", ablate.tables, ablate.caption),
    "figure4e.json": ("Figure 4e", clutter.tables, clutter.caption),
    "early-exit.json": ("Early exit", early_exit.tables, early_exit.best),
}
"""By file: a heading, its tables and its caption. The picture lies beside it."""


def run(options: argparse.Namespace) -> None:
    """Writes the page that __main__ parsed. Raises FileNotFoundError where a folder or all runs are missing."""
    parts = []
    for folder in map(Path, options.folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: report looks through folders that the other commands wrote")
        parts += _summaries(folder) + _runs(folder) + _attention(folder)
    if not parts:
        raise FileNotFoundError(f"{', '.join(options.folders)} holds nothing that the other commands wrote")
    write_page(options.out, "Experiments", "\n".join(parts))
    Console(highlight=False).print(f"  {options.out}", markup=False, soft_wrap=True)


def _summaries(folder: Path) -> list[str]:
    parts = []
    for name, (heading, tables, caption) in SUMMARIES.items():
        for path in sorted(folder.rglob(name)):
            summary = json.loads(path.read_bytes())
            parts.append(f"<h2>{heading} <span class='note'>{escaped(path.parent)}</span></h2>")
            for title, header, rows in tables(summary):
                parts.append(f"<p>{escaped(title)}</p>{table(header, rows)}")
            parts.append(f"<p class='note'>{escaped(caption(summary))}</p>")
            drawn = path.with_suffix(".png")
            if drawn.is_file():
                parts.append(picture(drawn.read_bytes(), heading))
    return parts


def _runs(folder: Path) -> list[str]:
    """Runs that belong to no ablation, each with its last and best accuracy; what could not be read is named."""
    rows, curves, damaged = [], {}, []
    for path in sorted(folder.rglob("checkpoint.pt")):
        if (path.parent.parent.parent / "figure4.json").is_file() or (path.parent / "result.json").is_file():
            continue
        lines = [line for line in read_metrics(path.parent) if "test_accuracy" in line]
        if lines:
            try:
                identity = read_checkpoint(path)["identity"]
            except ValueError:
                damaged.append(str(path))
                continue
            rows.append(_row(path.parent, identity, [line["test_accuracy"] for line in lines]))
            if len(lines) > 1:
                curves[str(path.parent)] = (
                    np.array([line.get("epoch", line["step"]) for line in lines]),
                    np.array([[100 * line["test_accuracy"] for line in lines]]),
                )
    left_out = [f"<p class='note'>left out: {escaped(path)} is damaged or no checkpoint</p>" for path in damaged]
    if not rows:
        return left_out
    header = ["run", "net", "data", "weights", "last, %", "best, %", "paper's best, %", "images/s"]
    note = "best: chosen by looking at the test set, as the paper does; last: after the last epoch."
    parts = ["<h2>Training</h2>", table(header, rows), f"<p class='note'>{note}</p>", *left_out]
    if curves:
        parts.append(picture(curves_png(curves, "epoch", "test accuracy, %"), "test accuracy by epoch"))
    return parts


def _row(folder: Path, identity: Identity, accuracies: list[float]) -> list[str]:
    net = net_of(identity)
    speed = folder / "speed.json"
    rate = json.loads(speed.read_bytes()) if speed.is_file() else None
    paper = PAPER.get((net.model, identity["data"]))
    attention = f" AD {net.attention_depth} AW {net.attention_width}" if net.is_attentive else ""
    start = "pretrained" if identity.get("pretrained") else identity.get("weights") or "drawn"
    return [
        str(folder),
        net.model + (f" at {net.layers} AW {net.attention_width}" if net.layers else attention),
        str(identity["data"]),
        str(start),
        f"{100 * accuracies[-1]:.2f}",
        f"{100 * max(accuracies):.2f} of {len(accuracies)}",
        "" if paper is None else f"{100 - paper:.2f}",
        "" if rate is None else f"{rate['images_per_second']:,.0f} on {rate['processes']} × {rate['device']}",
    ]


def _attention(folder: Path) -> list[str]:
    return [
        f"<h2>Attention <span class='note'>{escaped(path.parent)}</span></h2>{picture(path.read_bytes(), 'attention')}"
        for path in sorted(folder.rglob("attention.png"))
    ]
