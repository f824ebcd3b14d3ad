"""The two figures that README and docs show, drawn from a file of the suite's results."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .bars import attend_bar, by_shard, is_rival, multiples

# Okabe and Ito's colours, told apart with any colour vision; shapes tell the same once more.
OURS = "#0072B2"
KINDS = {
    "matmul": ("#D55E00", "o", "re-associated, matmul"),
    "sdpa": ("#009E73", "^", "re-associated, SDPA"),
    "convolutions": ("#CC79A7", "s", "the paper's convolutions"),
    "convolutions-3x3": ("#E69F00", "v", "the official code's 3×3"),
}
GREY = "#777777"


def draw(content: dict, folder: Path, dtype: str, layout: str) -> list[Path]:
    """Writes performance-rivals.png and performance-floor.png into folder; returns their paths.

    content: as results.load returns it. Only K = 4 in that dtype and layout is drawn. Raises ValueError without rows.
    """
    rows = [row for row in content["rows"] if (row["dtype"], row["layout"], row["K"]) == (dtype, layout, 4)]
    if not rows:
        raise ValueError(f"no row of {dtype}, {layout} and 4 heads to draw")
    shards = by_shard(rows)
    order = sorted(shards, key=lambda shard: next(iter(shards[shard].values()))["bytes"])
    where = f"{content['device']}, torch {content['torch']}, triton {content['triton']}; {dtype}, {layout}, 4 heads"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "performance-rivals.png": _rivals([(_label(shard), shards[shard]) for shard in order], where),
        "performance-floor.png": _floor([(_label(shard), shards[shard]) for shard in order], where),
    }
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def _label(shard: tuple) -> str:
    images, channels, side, labels = shard[:4]
    return f"{images} × {channels} × {side}², L {labels}"


def _axes(axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _rivals(shards: list[tuple[str, dict]], where: str) -> Figure:
    """Time of a layer's forward and backward; a rival under torch.compile hollow, the faster of its modes."""
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(shards)), layout="constrained")
    axes = figure.add_subplot()
    _axes(axes, [name for name, _ in shards])
    drawn = set()
    for y, (_, rows) in enumerate(shards):
        times = {
            name: row["p50_us"]
            for (operation, name, direction), row in rows.items()
            if (operation, direction) == ("layer", "forward_backward") and "p50_us" in row
        }
        ours = rows.get(("layer", "ours", "forward_backward"), {})
        if "floor_us" in ours:
            axes.plot(ours["floor_us"], y, marker="|", markersize=14, color=GREY, markeredgewidth=1.6)
        for kind, (colour, marker, _) in KINDS.items():
            style = {"linestyle": "", "marker": marker, "markeredgecolor": colour, "markersize": 7, "zorder": 3}
            compiled = [us for name, us in times.items() if name.startswith(kind + "+") and is_rival(name)]
            if kind in times:
                drawn.add(kind)
                axes.plot(times[kind], y, markerfacecolor=colour, **style)
            if compiled:
                drawn |= {kind, "compiled"}
                axes.plot(min(compiled), y, markerfacecolor="none", markeredgewidth=1.5, **style)
        if "ours" in times:
            axes.plot(times["ours"], y, marker="D", markersize=9, color=OURS, zorder=4)
    axes.set_xscale("log")
    axes.set_xlabel("device time of one layer, forward and backward, µs (p50)")
    handles = [Line2D([], [], linestyle="", marker="D", color=OURS, label="ours")]
    for kind, (colour, marker, text) in KINDS.items():
        if kind in drawn:
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=text))
    if "compiled" in drawn:
        hollow = {"markerfacecolor": "none", "markeredgecolor": "black"}
        handles.append(Line2D([], [], linestyle="", marker="o", label="hollow: torch.compile", **hollow))
    handles.append(
        Line2D([], [], linestyle="", marker="|", markersize=12, color=GREY, label="floor: one read, one copy")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    axes.set_title(where, fontsize=9, color="#444444", loc="left")
    return figure


def _floor(shards: list[tuple[str, dict]], where: str) -> Figure:
    """attend's multiples of a same-size read and copy, each beside the bar it is judged by."""
    figure = Figure(figsize=(9, 1.7 + 0.42 * len(shards)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction, floor in zip(panels, ("forward", "backward"), ("reading", "copying")):
        _axes(axes, [name for name, _ in shards])
        axes.axvline(1, color=GREY, linewidth=1)
        for y, (_, rows) in enumerate(shards):
            bar = attend_bar(direction, next(iter(rows.values()))["bytes"])
            axes.plot([bar, bar], [y - 0.3, y + 0.3], color="#D55E00", linewidth=2)
            value = multiples(rows).get(direction)
            if value is not None:
                axes.plot([1, value], [y, y], color=OURS, linewidth=1.2)
                axes.plot(value, y, marker="D", markersize=7, color=OURS)
                axes.annotate(
                    f"{value:.2f}",
                    (value, y),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
        axes.set_xlim(0.9, max(2.0, axes.get_xlim()[1] * 1.08))
        axes.set_xlabel(f"attend {direction}: times {floor} the map once")
    handles = [
        Line2D([], [], linestyle="", marker="D", color=OURS, label="ours"),
        Line2D([], [], color="#D55E00", linewidth=2, label="bar"),
        Line2D([], [], color=GREY, linewidth=1, label="floor, the fastest read or copy of the same bytes"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(where, fontsize=9, color="#444444", x=0.01, ha="left")
    return figure
