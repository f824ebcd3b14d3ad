"""Pictures of where attention looks."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..attend_rectify import Rectified
from ..models.digits import IMAGE_SIZE, MapGeometry
from .files import write_atomically


def on_image(mask: Tensor, geometry: MapGeometry) -> Tensor:
    """Masks [..., H, W] laid where the map lies on the image: [..., 40, 40], between positions bilinear.

    Pixels farther than one step from every position's centre get 0.
    """
    pixels = torch.arange(IMAGE_SIZE, device=mask.device, dtype=mask.dtype)
    # Position i has its centre at (2i + 1) / size - 1 in grid_sample's coordinates.
    where = (2 * (pixels - geometry.first) / geometry.step + 1) / geometry.size - 1
    grid = torch.stack(torch.meshgrid(where, where, indexing="xy"), dim=2).unsqueeze(0)
    maps = mask.reshape(1, -1, *mask.shape[-2:])
    return F.grid_sample(maps, grid, align_corners=False).reshape(*mask.shape[:-2], IMAGE_SIZE, IMAGE_SIZE)


def overlays(
    masks: Sequence[Tensor], size: tuple[int, int], geometries: Sequence[MapGeometry] | None = None
) -> list[Tensor]:
    """Masks of each layer, [N, K, H, W], laid over images of `size`, each divided by its own maximum: [N, K, *size].

    geometries: where DigitNet's maps lie; None: each map covers the image evenly. Masks over tokens [N, K, S] must be
    of a square of them, after a class token or not. Raises ValueError where they are not.
    """
    laid = []
    for index, mask in enumerate(masks):
        mask = mask.float()
        if mask.dim() == 3:
            side = math.isqrt(mask.shape[2])
            if mask.shape[2] - side**2 not in (0, 1):
                raise ValueError(f"masks over tokens must be of a square of them, got {list(mask.shape)}")
            mask = mask[..., -(side**2) :].unflatten(2, (side, side))
        if geometries is None:
            mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
        else:
            mask = on_image(mask, geometries[index])
        laid.append((mask / mask.amax(dim=(2, 3), keepdim=True).clamp(min=1e-20)).cpu())
    return laid


def layer_titles(details: Rectified, geometries: Sequence[MapGeometry] | None) -> list[str]:
    """What each attended layer is called: by its map."""
    if geometries is not None:
        return [f"{map_.channels} channels at {map_.size}×{map_.size}" for map_ in geometries]
    return [
        f"layer {index}, " + (f"{mask.shape[2]}×{mask.shape[3]}" if mask.dim() == 4 else f"{mask.shape[2]} tokens")
        for index, mask in enumerate(details.masks, 1)
    ]


_LEGEND = (
    "label → prediction, of a layer: its own; γ: how much a layer's hypothesis counts (first column: the network's "
    "own); g: how much a head counts"
)


def draw_attention(
    path: str | Path,
    images: Tensor,
    labels: Sequence[object] | None,
    details: Rectified,
    geometries: Sequence[MapGeometry] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes a PNG: a row per image, with each head's mask of each attended layer laid over it.

    images [N, 1 or 3, H, W] in [0, 1]; labels [N], or None where they are not known; what the model returned for the
    images with return_details=True; geometries as overlays takes them; classes: the labels' names, else numbers.
    Titles tell the label and the prediction, of the network and of each layer alone, γ of every layer and of the
    network's own output, and the gate g of every head. Each mask is coloured up to its own maximum.
    """
    layers, heads = len(details.masks), details.head_gates[0].shape[1]
    pixels, predictions = images.movedim(1, 3).cpu().numpy(), details.output.argmax(dim=1).tolist()
    gammas, guesses = details.global_gates.float().cpu(), details.hypotheses.argmax(dim=2).cpu()
    laid = overlays(details.masks, tuple(images.shape[2:]), geometries)
    size, gap = 1.0, 0.28  # of a tile and of the space between groups, in inches
    title, top = 0.27, 0.42
    width = gap + (1 + layers * heads) * size + (layers + 1) * gap
    legend = textwrap.wrap(_LEGEND, int(15 * width))
    foot = 0.12 + 0.14 * len(legend)
    height = top + len(images) * (size + title) - title + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def name(label: int) -> str:
        return str(label) if classes is None else classes[label][:8]

    def tile(row: int, left: float, brightest: float) -> Axes:
        bottom = height - top - row * (size + title) - size
        axes = figure.add_axes((left / width, bottom / height, 0.94 * size / width, 0.94 * size / height))
        axes.set_axis_off()
        shown = np.broadcast_to(pixels[row] * brightest, (*pixels.shape[1:3], 3))
        axes.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
        return axes

    def heading(left: float, text: str) -> None:
        figure.text(left / width, 1 - 0.06 / height, text, fontsize=10, fontweight="bold", va="top")

    figure.text(gap / width, 0.06 / height, "\n".join(legend), fontsize=8, va="bottom")
    heading(gap, "image")
    for row in range(len(images)):
        right = labels is None or predictions[row] == int(labels[row])
        label = "" if labels is None else f"{name(int(labels[row]))} "
        tile(row, gap, brightest=1.0).set_title(
            f"{label}→ {name(predictions[row])}  γ {gammas[row, -1]:.2f}",
            fontsize=8, pad=3, color="black" if right else "crimson",
        )  # fmt: skip
    for layer, text in enumerate(layer_titles(details, geometries)):
        left = gap + size + gap + layer * (heads * size + gap)
        heading(left, text)
        masks = laid[layer].numpy()
        gates = details.head_gates[layer].float().cpu()
        for row in range(len(images)):
            for head in range(heads):
                axes = tile(row, left + head * size, brightest=0.55)
                mask = masks[row, head]
                axes.imshow(mask, cmap="inferno", vmin=-0.3, vmax=1, alpha=0.9 * mask**0.5, interpolation="nearest")
                guess = f"→{name(int(guesses[row, layer]))} γ{gammas[row, layer]:.2f} " if head == 0 else ""
                axes.set_title(f"{guess}g{gates[row, head]:.2f}", fontsize=8 if classes is None else 6, pad=3)
    write_atomically(path, lambda file: canvas.print_png(file))


# ---------------------------------------------------------------------------------------------- curves


def draw_curves(
    path: str | Path, panels: Sequence[tuple[str, dict[str, str], dict[str, np.ndarray]]], caption: str
) -> None:
    """Writes a PNG of panels, two in a row: (title, {name: legend}, {name: accuracies [seeds, epochs]}).

    Each name is a line, the mean over seeds, in a band from the least to the most. The axis leaves the first epochs'
    low accuracies out.
    """
    rows = (len(panels) + 1) // 2
    figure, canvas = _figure(11, 3.6 * rows + 0.5)
    for index, (title, legends, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, index + 1)
        late = []
        for number, (name, legend) in enumerate(legends.items()):
            values = 100 * curves[name]
            _band(axes, np.arange(1, values.shape[1] + 1), values, legend, number)
            late.append(values[:, values.shape[1] // 3 :])
        low, high = min(map(np.min, late)), max(map(np.max, late))
        margin = 0.05 * max(high - low, 0.1)
        axes.set_ylim(low - margin, high + margin)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("test accuracy, %", fontsize=9)
        axes.legend(fontsize=8)
    _finish(path, figure, canvas, caption)


def draw_lines(
    path: str | Path, x: Sequence[float], lines: dict[str, np.ndarray], x_label: str, y_label: str, caption: str
) -> None:
    """Writes a PNG of one plot: by legend, values [x, seeds] as their mean in a band from the least to the most."""
    figure, canvas = _figure(7, 4.6)
    axes = figure.add_subplot(1, 1, 1)
    for number, (legend, values) in enumerate(lines.items()):
        _band(axes, np.asarray(x), values.T, legend, number, marker="o")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.legend(fontsize=8)
    _finish(path, figure, canvas, caption)


def curves_png(curves: dict[str, tuple[np.ndarray, np.ndarray]], x_label: str, y_label: str) -> bytes:
    """A PNG of one plot: by legend, x [n] and values [seeds, n]."""
    figure, canvas = _figure(9, 4.6)
    axes = figure.add_subplot(1, 1, 1)
    for number, (legend, (x, values)) in enumerate(curves.items()):
        _band(axes, x, values, legend, number)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def draw_exits(
    path: str | Path,
    saved: dict[str, Sequence[float]],
    accuracies: Sequence[float],
    names: Sequence[str],
    caption: str,
) -> None:
    """Writes a PNG: accuracy in % against what is saved in %, a curve for each kind of saving by name, a point for each
    threshold; the first curve's points have the thresholds' names.
    """
    figure, canvas = _figure(7, 4.6)
    axes = figure.add_subplot(1, 1, 1)
    first = next(iter(saved.values()))
    order = sorted(range(len(first)), key=lambda point: first[point])  # a curve goes from what saves least to most
    for index, (what, shares) in enumerate(saved.items()):
        points = [shares[point] for point in order], [accuracies[point] for point in order]
        axes.plot(*points, marker="o", markersize=4, linewidth=1.6, label=what, alpha=0.5 if index else 1)
    for x, y, name in zip(first, accuracies, names):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7)
    axes.set_xlabel("saved, %", fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    _finish(path, figure, canvas, caption)


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width, height), facecolor="white", dpi=110)
    return figure, FigureCanvasAgg(figure)


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, legend: str, number: int, marker: str = "") -> None:
    colour = f"C{number}"
    axes.plot(x, values.mean(axis=0), color=colour, label=legend, linewidth=1.6, marker=marker, markersize=4)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def _finish(path: str | Path, figure: Figure, canvas: FigureCanvasAgg, caption: str) -> None:
    lines = textwrap.wrap(caption, int(15 * figure.get_figwidth()))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, (0.1 + 0.16 * len(lines)) / figure.get_figheight(), 1, 1))
    write_atomically(path, lambda file: canvas.print_png(file))
