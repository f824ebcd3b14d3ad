"""What the figures are judged by, and the verdicts on a file of results."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LARGE, MIDDLE = 64e6, 20e6
"""|Z| in bytes from which a map is bound by bandwidth, and below which by latency."""

SHARD = ("N", "C", "side", "L", "K", "dtype", "layout")


def attend_bar(direction: str, nbytes: int) -> float:
    """The largest multiple of the same-size read (forward) or copy (backward) that attend may take."""
    return {"forward": (1.15, 1.5), "backward": (1.2, 1.6)}[direction][nbytes < LARGE]


def layer_bar(nbytes: int) -> float:
    """How many times the fastest rival's speed a whole layer must have, forward and backward."""
    return 3.0 if nbytes >= LARGE else 2.0 if nbytes >= MIDDLE else 1.5


@dataclass(frozen=True)
class Verdict:
    """One figure of one shard against its bar."""

    shard: tuple
    what: str
    value: float | None
    bar: float
    at_most: bool
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value is not None and (self.value <= self.bar if self.at_most else self.value >= self.bar)


def by_shard(rows: Iterable[dict]) -> dict[tuple, dict[tuple[str, str, str], dict]]:
    """Rows by shard and then by (operation, implementation, direction), in the order of the file."""
    found: dict[tuple, dict] = {}
    for row in rows:
        names = row["operation"], row["implementation"], row["direction"]
        found.setdefault(tuple(row[name] for name in SHARD), {})[names] = row
    return found


def multiples(rows: dict[tuple[str, str, str], dict], implementation: str = "ours") -> dict[str, float]:
    """attend's time over the floor of one shard: forward over read, backward ((f+b) - f) over copy."""
    forward = rows.get(("attend", implementation, "forward"), {})
    both = rows.get(("attend", implementation, "forward_backward"), {})
    found = {}
    if "p50_us" in forward:
        found["forward"] = forward["p50_us"] / forward["read_us"]
        if "p50_us" in both:
            found["backward"] = (both["p50_us"] - forward["p50_us"]) / both["copy_us"]
    return found


def fastest_rival(rows: dict[tuple[str, str, str], dict], direction: str) -> tuple[str, float] | None:
    """The rival that ours beats by least: (its name, its time over that of ours in the same process)."""
    found = [
        (name, row["p50_us"] / row["ours_us"])
        for (operation, name, way), row in rows.items()
        if operation == "layer" and way == direction and is_rival(name) and "p50_us" in row and "ours_us" in row
    ]
    return min(found, key=lambda pair: pair[1]) if found else None


def is_rival(implementation: str) -> bool:
    return implementation not in ("ours", "triton", "native", "eager", "floor")


def verdicts(rows: Iterable[dict]) -> list[Verdict]:
    """Every bar on every shard; without a value where ours is wrong or missing, or no rival was measured."""
    found = []
    for shard, measured in by_shard(rows).items():
        nbytes = next(iter(measured.values()))["bytes"]
        over = multiples(measured)
        for direction, floor in (("forward", "read"), ("backward", "copy")):
            bar = attend_bar(direction, nbytes)
            found.append(Verdict(shard, f"attend {direction} / {floor}", over.get(direction), bar, True))
        for direction, bar in (("forward_backward", layer_bar(nbytes)), ("forward", 1.0)):
            rival = fastest_rival(measured, direction)
            what = "layer f+b, rival / ours" if direction != "forward" else "layer f, rival / ours"
            name, times = rival or ("no rival measured", None)
            found.append(Verdict(shard, what, times, bar, False, name))
        found.append(_memory(shard, measured))
    return found


def _memory(shard: tuple, measured: dict[tuple[str, str, str], dict]) -> Verdict:
    """Peak of a layer's f+b over the thriftiest rival's, both above the inputs."""
    mine = measured.get(("layer", "ours", "forward_backward"), {}).get("peak_mb")
    peaks = {
        name: row["peak_mb"]
        for (operation, name, direction), row in measured.items()
        if operation == "layer" and direction == "forward_backward" and is_rival(name) and row.get("peak_mb")
    }
    if mine is None or not peaks:
        return Verdict(shard, "layer peak memory / rival", None, 1.0, True, "not measured")
    least = min(peaks, key=peaks.get)
    note = f"{mine:.1f} MB, {least} {peaks[least]:.1f}"
    return Verdict(shard, "layer peak memory / rival", mine / peaks[least], 1.0, True, note)


def table(rows: Sequence[dict]) -> str:
    """The verdicts as text, a line for each; the number of bars met comes last."""
    lines, all_verdicts = [], verdicts(rows)
    wrong = [row for row in rows if row.get("correct") is False]
    for row in wrong:
        lines.append(f"WRONG RESULT  {_name(tuple(row[n] for n in SHARD))}  {row['operation']} {row['implementation']}")
    for verdict in all_verdicts:
        value = "    –" if verdict.value is None else f"{verdict.value:5.2f}"
        sign = "≤" if verdict.at_most else "≥"
        word = "?   " if verdict.value is None else "met " if verdict.met else "MISS"
        line = f"{word} {_name(verdict.shard):52} {verdict.what:26} {value} {sign} {verdict.bar:<4} {verdict.note}"
        lines.append(line.rstrip())
    judged = [verdict for verdict in all_verdicts if verdict.value is not None]
    if judged:
        for what in dict.fromkeys(verdict.what for verdict in judged):
            values = [verdict.value for verdict in judged if verdict.what == what]
            met = sum(verdict.met for verdict in judged if verdict.what == what)
            middle = statistics.median(values)
            lines.append(f"{what}: {met} of {len(values)} met, median {middle:.2f}")
    return "\n".join(lines)


def _name(shard: tuple) -> str:
    images, channels, side, labels, heads, dtype, layout = shard
    return f"{images}x{channels}x{side}-L{labels}-K{heads}-{dtype}-{layout}"
