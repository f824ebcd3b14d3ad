"""python -m benchmarks [run | compare | figures | bars] ... — each explains itself with --help."""

import argparse
import sys
import time
from pathlib import Path

import torch

from . import bars, cases, suite
from .results import OtherResults, Results, load, path_of
from .rivals import RIVALS

COMMANDS = ("run", "compare", "figures", "bars")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")

    run = commands.add_parser(
        "run",
        help="measure the suite or a part of it (the default)",
        description="Measures shards (a case in one dtype and layout) one after another, the most telling first, and "
        "adds each row to a JSON file as soon as it is known. What the file has already is not measured again.",
    )
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TERMS",
        help="terms joined by commas that a shard must all fit: dtype=bfloat16,layout=channels_last,C=320|640, or part "
        "of its name, 128x320x16; given several times, any of them will do",
    )
    run.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing beyond this")
    run.add_argument(
        "--rivals",
        choices=suite.LEVELS,
        default="eager",
        help="how many rivals: none, uncompiled (seconds a shard), also under torch.compile (some 20 s each), also "
        "with its search (over a minute each, on some cases only); default: eager",
    )
    run.add_argument(
        "--rival",
        action="append",
        default=[],
        choices=[rival.name for rival in RIVALS],
        help="only this rival; may be given several times (default: all)",
    )
    run.add_argument("--compiled-forward", action="store_true", help="compile and time rivals' forward alone as well")
    run.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    run.add_argument("--file", type=Path, default=None, help="the JSON file (default: results/suite-<device>.json)")
    run.add_argument("--fresh", action="store_true", help="begin the file anew instead of adding to it")
    run.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/COUNT",
        help="every COUNT-th shard from the I-th on: 0/2 on one GPU while 1/2 runs on another, into the same file",
    )
    run.add_argument(
        "--prepare",
        type=int,
        default=0,
        metavar="PROCESSES",
        help="first compile the kernels of all that is to be measured, in so many processes at once",
    )
    run.add_argument("--list", action="store_true", help="only print the names of the shards that would be measured")

    compare = commands.add_parser(
        "compare",
        help="two files of results, or two commits",
        description="Prints B's time over A's for every row that both have. Files are read; commits are measured, in "
        "worktrees, shard by shard in turn, in processes of their own, by this suite.",
    )
    compare.add_argument("a", help="a JSON file or a commit")
    compare.add_argument("b", help="a JSON file or a commit")
    compare.add_argument("--only", action="append", default=[], metavar="TERMS", help="for commits: as run takes it")
    compare.add_argument("--rounds", type=int, default=2, help="for commits: how often each side measures each shard")
    compare.add_argument("--device", choices=("cuda", "cpu"), default=None, help="for commits: as run takes it")

    figures = commands.add_parser(
        "figures",
        help="draw the figures of README and docs",
        description="Draws performance-rivals.png (a layer's "
        "time against rivals) and performance-floor.png (attend's multiples of the floor) from a file of results.",
    )
    figures.add_argument("file", type=Path, nargs="?", default=None, help="default: results/suite-<device>.json")
    figures.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs", help="folder")
    figures.add_argument("--dtype", choices=tuple(cases.DTYPES), default="bfloat16")
    figures.add_argument("--layout", choices=tuple(cases.LAYOUTS), default="channels_last")

    verdicts = commands.add_parser(
        "bars",
        help="judge a file of results",
        description="Prints every figure beside the bar it is judged by; "
        "exits with 1 where a result is wrong or a bar is missed.",
    )
    verdicts.add_argument("file", type=Path, nargs="?", default=None, help="default: results/suite-<device>.json")
    return parser


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/COUNT with I from 0 to COUNT - 1, got {text!r}")
    return int(index), int(count)


def _print_row(row: dict) -> None:
    where = "{N}x{C}x{side}-L{L}-K{K} {dtype} {layout}".format(**row)
    what = f"{row['operation']} {row['implementation']} {row['direction']}"
    if "p50_us" in row:
        told = f"{row['p50_us']:10.1f} us"
        if "floor_us" in row:
            told += f"  {row['p50_us'] / row['floor_us']:7.2f}x floor"
        if "ours_us" in row and row["implementation"] != "ours":
            told += f"  {row['p50_us'] / row['ours_us']:7.2f}x ours"
        more = ("warm_us", "host_us", "launches", "peak_mb", "error", "chosen", "way")
        told += "".join(f"  {name} {row[name]}" for name in more if row.get(name) is not None)
    else:
        told = next((f"{name}: {row[name]}" for name in ("failed", "skipped") if name in row), None)
        told = told or ("out of memory" if "out_of_memory" in row else f"WRONG RESULT, error {row.get('error')}")
    print(f"{where:42} {what:46} {told}  ({row['seconds']} s)", flush=True)


def _run(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        selected = cases.select(cases.shards(device), arguments.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    index, count = arguments.part
    selected = selected[index::count]
    if arguments.list:
        print(*selected, sep="\n")
        return 0
    if device == "cuda":
        # Every product in its own precision, cuDNN's convolutions the fastest of all that it has: rivals at their best.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    try:
        results = Results(arguments.file or path_of("suite"), arguments.fresh)
    except OtherResults as error:
        print(error, file=sys.stderr)
        return 2
    started = time.monotonic()
    budget = suite.Budget(arguments.budget)
    if arguments.prepare and device == "cuda":
        suite.prepare([shard for shard in selected if not suite.has_ours(shard, results)], arguments.prepare)
        print(f"kernels compiled, {time.monotonic() - started:.0f} s", flush=True)
    plan = suite.Plan(arguments.rivals, tuple(arguments.rival), arguments.compiled_forward)
    left = suite.run(selected, results, plan, budget, device, report=_print_row)
    seconds = time.monotonic() - started
    print(f"{len(selected) - len(left)} of {len(selected)} shards done, {seconds:.0f} s, {results.path}")
    if left:
        print("left for another run:", *left)
    return 1 if any(row.get("correct") is False for row in results.rows) else 0


def _bars(arguments: argparse.Namespace) -> int:
    rows = load(arguments.file or path_of("suite"))["rows"]
    print(bars.table(rows))
    wrong = any(row.get("correct") is False for row in rows)
    missed = any(not verdict.met for verdict in bars.verdicts(rows) if verdict.value is not None)
    return 1 if wrong or missed else 0


def _figures(arguments: argparse.Namespace) -> int:
    from .figures import draw

    content = load(arguments.file or path_of("suite"))
    print(*draw(content, arguments.out, arguments.dtype, arguments.layout), sep="\n")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import NotComparable, compare

    try:
        print(compare(arguments.a, arguments.b, arguments.only, arguments.rounds, arguments.device))
    except NotComparable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words = ["run", *words]
    arguments = _parser().parse_args(words)
    return {"run": _run, "compare": _compare, "figures": _figures, "bars": _bars}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
