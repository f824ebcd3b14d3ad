"""early-exit: an attended layer that is sure enough answers, and the rest of the network does not run.

The global gates look at the last map, which an image that leaves early never reaches. So the layers heard so far are
mixed by the gates' means over training images: y_i = Σ_{j ≤ i} γ̄_j h_j / Σ_{j ≤ i} γ̄_j in the model's own mix. An image
leaves where the largest probability of y_i passes the exit's threshold; the batch that goes on is the smaller for it.
The last attended layer is no exit: nothing but a classifier comes after it.

Thresholds come from training images that were held out: each exit's is the least at which it would have cost no more
than its share of the answers that may be lost, an answer lost being one that the whole network has right and the exit
wrong. Nothing is picked on the test set.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import AttendRectify, rectify, use_implementation
from ..models.digits import DigitNet
from ..models.wrn import WideAttentiveResNet
from .ablate import Rows
from .figures import draw_exits
from .files import write_atomically
from .nets import examples_of, load_run
from .progress import on_terminal
from .training import mixed_precision

_GATE_BATCHES = 8  # of training images, to take the gates' means over
_NEVER = 2.0

_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
"""Where nothing was held out, a curve of them."""


class Answers(NamedTuple):
    """What early_exit returns for N images."""

    labels: Tensor
    """The predicted class: [N], int64."""
    exits: Tensor
    """After how many of the model's layers, in its order of running, each image left; D where it went through: [N]."""


def early_exit(
    model: nn.Module,
    images: Tensor,
    gates: Tensor,
    threshold: float | Sequence[float],
    on_exit: Callable[[int], None] = lambda images: None,
) -> Answers:
    """Answers images [N, ...] by an AttendRectify, WideAttentiveResNet or DigitNet in eval mode, without gradients.

    gates: γ̄ [D+1], as mean_gates returns them. threshold: the probability from which an image leaves, or one for each
    of the D-1 exits in order of running; above 1, none does and the answers are the model's own. on_exit: called at
    each exit with how many images arrived.
    A backbone's later layers must see earlier ones only through the attended map (ResNets' stages do, a block inside
    one does not). Raises TypeError for another model, ValueError for another number of thresholds and where the
    backbone's rest does not fit the smaller batch.
    """
    batch = _through(model, images, gates, threshold, on_exit)
    return Answers(batch.labels, batch.exits)


class Opinions(NamedTuple):
    """What exits and network say of N images, and what they are."""

    shares: Tensor
    """The largest probability at each of E exits: [N, E]."""
    labels: Tensor
    """The class that each exit and, last, the network would answer: [N, E+1], int64."""
    truth: Tensor
    """[N], int64."""


def opinions(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], gates: Tensor, mixed: bool = True) -> Opinions:
    """Asks every exit of every image. Raises what early_exit raises."""
    shares, labels, truth = [], [], []
    for images, wanted in batches:
        with mixed_precision(images.device, mixed):
            batch = _through(model, images, gates, _NEVER)
        shares.append(torch.stack([share for share, _ in batch.said], dim=1))
        labels.append(torch.stack([*(label for _, label in batch.said), batch.labels], dim=1))
        truth.append(wanted)
    return Opinions(*(torch.cat(found) for found in (shares, labels, truth)))


def thresholds_for(found: Opinions, lost: float) -> list[float]:
    """A threshold for each exit, at which all together lose at most this share of the answers in `found`."""
    whole_is_right, thresholds = found.labels[:, -1] == found.truth, []
    for shares, labels in zip(found.shares.T, found.labels.T):
        order = shares.argsort(descending=True)
        losses = (whole_is_right & (labels != found.truth))[order].cumsum(0)
        sorted_shares = shares[order]
        ends = torch.ones_like(whole_is_right)  # equal shares leave together
        ends[:-1] = sorted_shares[:-1] > sorted_shares[1:]
        fits = (ends & (losses <= lost * len(shares) / found.shares.shape[1])).nonzero()
        thresholds.append(sorted_shares[fits[-1]].item() if len(fits) else _NEVER)
    return thresholds


def _through(
    model: nn.Module,
    images: Tensor,
    gates: Tensor,
    threshold: float | Sequence[float],
    on_exit: Callable[[int], None] = lambda images: None,
) -> "_Batch":
    forward = next((each for kind, each in _FORWARDS.items() if isinstance(model, kind)), None)
    if forward is None:
        raise TypeError(f"model must be one of {', '.join(k.__name__ for k in _FORWARDS)}, got {type(model).__name__}")
    exits = len(model.attention) - 1
    thresholds = [threshold] * exits if isinstance(threshold, int | float) else list(threshold)
    if len(thresholds) != exits:
        raise ValueError(f"threshold must be one number or {exits}, one for each exit, got {len(thresholds)}")
    batch = _Batch(len(images), gates.to(images.device), model.mix, thresholds, on_exit)
    with torch.no_grad():
        try:
            batch.answer(forward(model, images, batch))
        except _AllLeft:
            pass
    return batch


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[Tensor], mixed: bool = True) -> Tensor:
    """γ of the model over all images of the batches, their mean: [D+1]."""
    found = []
    for images in batches:
        with mixed_precision(images.device, mixed):
            found.append(model(images, return_details=True).global_gates.float())
    return torch.cat(found).mean(dim=0)


class _AllLeft(Exception):
    """No image is left to go on."""


class _Batch:
    """The images of one call: which of them are still in the network, and what was said of them."""

    def __init__(
        self, count: int, gates: Tensor, mix: str, thresholds: list[float], on_exit: Callable[[int], None]
    ) -> None:
        self.labels = torch.zeros(count, dtype=torch.int64, device=gates.device)
        self.exits = torch.zeros_like(self.labels)
        self._inside = torch.arange(count, device=gates.device)
        self._gates, self._mix, self._thresholds, self._on_exit = gates.float(), mix, thresholds, on_exit
        self.hypotheses: dict[int, Tensor] = {}
        self.said: list[tuple[Tensor, Tensor]] = []
        """At each exit, of the images inside: how sure, and of which class."""

    def heard(self, layer: int, hypothesis: Tensor) -> Tensor:
        """Takes what a layer says of the images inside; returns which of them go on. Raises _AllLeft if none does."""
        self._on_exit(len(hypothesis))
        self.hypotheses[layer] = hypothesis
        order = sorted(self.hypotheses)
        scores = self._gates[order].clamp(min=1e-20).log().expand(len(hypothesis), -1).contiguous()
        mixed = rectify([self.hypotheses[i] for i in order], scores, mix=self._mix, gating="softmax")
        share, label = mixed.float().softmax(dim=1).max(dim=1)
        self.said.append((share, label))
        leaves = share >= self._thresholds[len(order) - 1]
        gone, stay = self._inside[leaves], (~leaves).nonzero().flatten()
        self.labels[gone], self.exits[gone] = label[leaves], len(order)
        self._inside = self._inside[stay]
        self.hypotheses = {i: value[stay] for i, value in self.hypotheses.items()}
        if len(stay) == 0:
            raise _AllLeft
        return stay

    def mixed(self, model: nn.Module, own: Tensor, scores: Tensor | None) -> Tensor:
        """The model's output for the images that went through."""
        if len(own) != len(self._inside):
            raise ValueError(f"the backbone must answer the {len(self._inside)} images that went on, got {len(own)}")
        hypotheses = [self.hypotheses[i] for i in sorted(self.hypotheses)] + [own]
        if scores is None:
            return rectify(hypotheses, own.new_zeros(own.shape[0], len(hypotheses)).float(), mix=model.mix, gating=None)
        return rectify(hypotheses, scores, mix=model.mix, gating=model.gating)

    def answer(self, output: Tensor) -> None:
        """Takes the output for the images that went through."""
        self.labels[self._inside] = output.argmax(dim=1)
        self.exits[self._inside] = len(self._gates) - 1


def _warn(model: WideAttentiveResNet, images: Tensor, batch: _Batch) -> Tensor:
    def attend(group: int, feature_map: Tensor) -> Tensor:
        layer = group - (3 - model.attention_depth)
        if layer < 0:
            return feature_map
        return feature_map[batch.heard(layer, model.attention[layer](feature_map).hypothesis)]

    last = F.relu(model.bn_g2(model._last_of_groups(images, attend)))
    layer = model.attention[-1](last, global_gates=model.global_gates, mean=True)
    batch.hypotheses[model.attention_depth - 1] = layer.hypothesis
    return batch.mixed(model, model.classifier(layer.mean.to(last.dtype)), layer.global_scores)


def _digitnet(model: DigitNet, images: Tensor, batch: _Batch) -> Tensor:
    feature_map, plain = model.normalise(images), len(model.blocks) - model.attention_depth
    for index, block in enumerate(model.blocks[:-1]):
        feature_map = block(feature_map)
        if index >= plain:
            hypothesis = model.attention[index - plain](feature_map).hypothesis
            feature_map = feature_map[batch.heard(index - plain, hypothesis)]
    last = model.blocks[-1](feature_map)
    layer = model.attention[-1](last, global_gates=model.global_gates)
    batch.hypotheses[model.attention_depth - 1] = layer.hypothesis
    return batch.mixed(model, model.classifier(last), layer.global_scores)


def _backbone(model: AttendRectify, images: Tensor, batch: _Batch) -> Tensor:
    scores: list[Tensor | None] = []

    def hook(module: nn.Module, inputs: tuple, returned: Tensor, *, index: int) -> Tensor | None:
        is_last = index == model._last
        layer = model.attention[index](
            returned.movedim(-1, 1) if model._channels_last[index] else returned,
            global_gates=model.global_gates if is_last else None,
        )
        if is_last:
            batch.hypotheses[index] = layer.hypothesis
            scores.append(layer.global_scores)
            return None
        return returned[batch.heard(index, layer.hypothesis)]

    handles = [
        model.backbone.get_submodule(name).register_forward_hook(partial(hook, index=index))
        for index, name in enumerate(model.layers)
    ]
    try:
        own = model.backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return batch.mixed(model, own, scores[0])


_FORWARDS = {WideAttentiveResNet: _warn, DigitNet: _digitnet, AttendRectify: _backbone}


# ---------------------------------------------------------------------------------------------- the command


def costs(model: nn.Module, image: Tensor, gates: Tensor) -> list[int]:
    """Operations on one image up to each exit and, last, through the network: of convolutions and matrix products, the
    attention's among them.
    """
    found: list[int] = []
    with FlopCounterMode(display=False) as counter, use_implementation("eager"):
        early_exit(model, image, gates, _NEVER, lambda images: found.append(counter.get_total_flops()))
        return [*found, counter.get_total_flops()]


def run(options: argparse.Namespace) -> None:
    """Tests and draws as __main__ parsed it. Raises ValueError and OSError."""
    device = torch.device(options.device)
    model, net, identity = load_run(options.run, device)
    if not net.is_attentive or len(getattr(model, "attention", ())) < 2:
        raise ValueError(f"{options.run} must be a run with two attended layers or more: the last one is no exit")
    examples = examples_of(net, identity, device, options.data_root, options.batch_size)
    mixed = bool(identity.get("bf16"))
    gates = mean_gates(model, (examples.train(step)[0] for step in range(1, _GATE_BATCHES + 1)), mixed)
    tests, held_out = list(examples.test()), list(examples.held_out())
    cost = costs(model, tests[0][0][:1], gates)
    console = Console(highlight=False)
    rows: list[dict] = []
    if options.thresholds is None and held_out:
        found = opinions(model, held_out, gates, mixed)
        rows += [{"allowed": lost, "thresholds": thresholds_for(found, lost / 100)} for lost in sorted(options.allow)]
    else:
        uniform = sorted({value for value in options.thresholds or _THRESHOLDS if value <= 1})
        rows += [{"thresholds": [value] * (len(cost) - 1)} for value in uniform]
    rows.append({"thresholds": [_NEVER] * (len(cost) - 1)})
    calls = [_call(model, gates, row["thresholds"], mixed) for row in rows]
    answers = [[call(images) for images, _ in tests] for call in calls]
    for row, given in zip(rows, answers):
        row |= _found(given, answers[-1], tests, cost)
        console.print(f"{_name(row)}: {100 * row['accuracy']:.2f} %", markup=False)
    with torch.no_grad(), mixed_precision(device, mixed):  # the yardstick of time is the model as it is
        seconds = _times([*calls[:-1], model], tests, options.repeats)
    for row, value in zip(rows, seconds):
        row |= {"seconds": value, "time_saved": 1 - value / seconds[-1]}
    summary = {
        "run": str(options.run),
        "model": net.model,
        "data": identity["data"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": options.batch_size,
        "held_out": sum(len(labels) for _, labels in held_out),
        "mean_gates": gates.tolist(),
        "operations": cost,
        "rows": rows,
    }
    out = Path(options.out)
    text = json.dumps(summary, indent=1).encode() + b"\n"
    write_atomically(out / "early-exit.json", lambda file: file.write(text))
    draw_exits(
        out / "early-exit.png",
        {what: [100 * row[f"{what}_saved"] for row in rows] for what in ("compute", "time")},
        [100 * row["accuracy"] for row in rows],
        [_name(row) for row in rows],
        caption(summary),
    )
    for table in tables(summary):
        console.print(on_terminal(*table))
    console.print(best(summary), markup=False, soft_wrap=True)
    console.print(f"  {out / 'early-exit.json'}\n  {out / 'early-exit.png'}", markup=False, soft_wrap=True)


def _call(model: nn.Module, gates: Tensor, thresholds: list[float], mixed: bool) -> Callable[[Tensor], Answers]:
    def call(images: Tensor) -> Answers:
        with mixed_precision(images.device, mixed):
            return early_exit(model, images, gates, thresholds)

    return call


def _found(answers: list[Answers], whole: list[Answers], tests: list[tuple[Tensor, Tensor]], cost: list[int]) -> dict:
    """lost: answers that the whole network has right and these have wrong; won: the other way round."""
    truth = torch.cat([labels for _, labels in tests])
    right, without = (torch.cat([each.labels for each in given]) == truth for given in (answers, whole))
    exits = torch.cat([each.exits for each in answers])
    counts = exits.bincount(minlength=len(cost) + 1)[1:].tolist()
    spent = sum(count * operations for count, operations in zip(counts, cost))
    return {
        "accuracy": right.double().mean().item(),
        "lost": int((without & ~right).sum()),
        "won": int((right & ~without).sum()),
        "left_after": [count / len(exits) for count in counts],
        "compute_saved": 1 - spent / (len(exits) * cost[-1]),
    }


def _times(calls: list[Callable], tests: list[tuple[Tensor, Tensor]], repeats: int) -> list[float]:
    """Median seconds of each call over the test set. They take turns, so that other load meets all."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, seconds):
            call(tests[0][0])
            began = _now(tests[0][0].device)
            for images, _ in tests:
                call(images)
            found.append(_now(tests[0][0].device) - began)
    return [statistics.median(found) for found in seconds]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(row: dict) -> str:
    if "allowed" in row:
        return f"{row['allowed']:g}"
    return "never" if min(row["thresholds"]) > 1 else f"{row['thresholds'][0]:g}"


def caption(summary: dict) -> str:
    calibrated = "allowed" in summary["rows"][0]
    points = "the % of answers that may be lost on images held out" if calibrated else "thresholds"
    return (
        f"{summary['model']} on {summary['data']}; numbers at the points are {points}. Compute: operations of "
        f"convolutions and matrix products, counted. Time: batches of {summary['batch_size']} on {summary['device']}."
    )


def best(summary: dict) -> str:
    """What was saved for about 0.1 points of accuracy."""
    *rows, whole = summary["rows"]
    calibrated = [row for row in rows if row.get("allowed", 1) <= 0.1]
    if calibrated:
        row = max(calibrated, key=lambda row: row["allowed"])
        return (
            f"Thresholds that lose {row['allowed']:g} % of the answers on {summary['held_out']} images held out: "
            f"of the test set {100 * row['accuracy']:.2f} % are right, of the whole network's answers "
            f"{100 * whole['accuracy']:.2f} % ({row['lost']} lost, {row['won']} won), with "
            f"{100 * row['compute_saved']:.1f} % fewer operations and {100 * row['time_saved']:.1f} % less time, in "
            f"batches of {summary['batch_size']} on {summary['device']}."
        )
    fitting = [row for row in rows if row["accuracy"] >= whole["accuracy"] - 0.001 and row["compute_saved"] > 0]
    if not fitting:
        return "No threshold saves anything and keeps the accuracy to within 0.1 points."
    row = max(fitting, key=lambda row: row["compute_saved"])
    return (
        f"Within 0.1 points of the whole network's accuracy, threshold {_name(row)} (picked on the test "
        f"set) saves {100 * row['compute_saved']:.1f} % of the operations and {100 * row['time_saved']:.1f} % of the "
        f"time, on {summary['device']}."
    )


def tables(summary: dict) -> list[Rows]:
    """The summary in words, for a terminal or a page."""
    exits = [f"exit {number}, %" for number in range(1, len(summary["operations"]))]
    given = any("allowed" in row for row in summary["rows"])
    header = ["may be lost, %" if given else "surer than", "right, %", "lost", "won", *exits]
    header += ["through, %", "work saved, %", "time saved, %"]
    rows = [
        [
            _name(row),
            f"{100 * row['accuracy']:.2f}",
            str(row["lost"]),
            str(row["won"]),
            *(f"{100 * share:.1f}" for share in row["left_after"]),
            f"{100 * row['compute_saved']:.1f}",
            f"{100 * row['time_saved']:.1f}",
        ]
        for row in summary["rows"]
    ]
    return [(f"Early exits of {summary['model']} on {summary['data']}", header, rows)]
