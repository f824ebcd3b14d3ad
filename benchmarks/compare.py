"""Two files of results side by side, or two commits measured in turn."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import cases
from .results import RESULTS_APART, Results, load

ROOT = Path(__file__).parent.parent


class NotComparable(RuntimeError):
    """Why two things cannot be compared here."""


def compare(a: str, b: str, only: Sequence[str] = (), rounds: int = 2, device: str | None = None) -> str:
    """A table of B's times over A's. a, b: two JSON files of the suite, or two commits. Raises NotComparable."""
    are_files = [Path(one).is_file() for one in (a, b)]
    if all(are_files):
        return table(load(Path(a)), load(Path(b)))
    if any(are_files):
        raise NotComparable(f"{a} and {b}: one is a file, the other is not; compare two files or two commits")
    return table(*measure_commits(a, b, only, rounds, device))


def table(a: dict, b: dict) -> str:
    """A line for each row that both have, and the geometric mean of each operation, direction and implementation."""
    first, second = ({Results.key(row): row for row in content["rows"]} for content in (a, b))
    lines = [f"{side}: {content['commit']} on {content['device']}" for side, content in (("A", a), ("B", b))]
    if a["device"] != b["device"]:
        lines.append("not the same device: the ratios compare machines as well")
    ratios: dict[tuple, list[float]] = {}
    for key, row in first.items():
        other = second.get(key)
        if other is None or "p50_us" not in row or "p50_us" not in other:
            continue
        ratio = other["p50_us"] / row["p50_us"]
        ratios.setdefault(key[7:], []).append(ratio)
        shard = "{N}x{C}x{side}-L{L}-K{K}-{dtype}-{layout}".format(**row)
        times = f"{row['p50_us']:10.1f} {other['p50_us']:10.1f} us"
        lines.append(f"{shard:52} {' '.join(key[7:]):44} {times}  B/A {ratio:.3f}")
    if not ratios:
        return "\n".join([*lines, "no row with times is in both"])
    for names, found in ratios.items():
        lines.append(f"{' '.join(names):44} geometric mean of {len(found)}: B/A {statistics.geometric_mean(found):.3f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- commits


def measure_commits(
    a: str, b: str, only: Sequence[str], rounds: int, device: str | None
) -> tuple[dict, dict]:  # contents as load returns them
    """Measures ours at both commits, shard by shard in turn, each time in a new process, with today's benchmarks.

    Of a row's rounds the median of p50 is kept. Raises NotComparable where git does not know what to measure.
    """
    hashes = [_resolve(commit) for commit in (a, b)]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", RESULTS_APART)
    if changed:
        raise NotComparable(f"the working tree has changes that neither commit holds; commit them first:\n{changed}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shards = cases.select(cases.shards(device), only)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trees = [stack.enter_context(_worktree(commit, Path(folder) / side)) for commit, side in zip(hashes, "AB")]
        found: tuple[list[dict], list[dict]] = ([], [])
        for shard in shards:
            for turn in range(rounds):
                for side in (0, 1) if turn % 2 == 0 else (1, 0):
                    file = Path(folder) / f"{'AB'[side]}-{len(found[side])}.json"
                    _measure(trees[side], hashes[side], str(shard), device, file)
                    found[side].append(load(file))
                    print(f"measured {'AB'[side]} {hashes[side][:12]} {shard}, round {turn + 1}", flush=True)
    return tuple(_medians(contents) for contents in found)


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        raise NotComparable("commits are compared with git, which is not installed") from None
    if done.returncode != 0:
        raise NotComparable(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _resolve(commit: str) -> str:
    if not (ROOT / ".git").exists():
        raise NotComparable(f"{commit} is no file, and this checkout has no history to find a commit in")
    return _git("rev-parse", "--verify", f"{commit}^{{commit}}")


@contextlib.contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's files in folder, but today's benchmarks: one harness measures both sides."""
    _git("worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignored)
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _measure(tree: Path, commit: str, shard: str, device: str, file: Path) -> None:
    words = ["run", "--only", shard, "--rivals", "none", "--device", device]
    command = [sys.executable, "-m", "benchmarks", *words, "--file", str(file)]
    # The tree stands before an installed ar_kernels, which may be a link to another checkout.
    environment = os.environ | {"AR_KERNELS_COMMIT": commit, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if not file.exists():
        raise NotComparable(f"{commit[:12]} could not be measured on {shard}:\n{(done.stderr or done.stdout)[-2000:]}")


def _medians(contents: Sequence[dict]) -> dict:
    rows: dict[tuple, list[dict]] = {}
    for content in contents:
        for row in content["rows"]:
            rows.setdefault(Results.key(row), []).append(row)
    merged = []
    for found in rows.values():
        times = [row["p50_us"] for row in found if "p50_us" in row]
        whole = len(times) == len(found)  # a result that is wrong in one round has no speed
        rest = {name: value for name, value in found[-1].items() if name != "p50_us"}
        merged.append(rest | ({"p50_us": statistics.median(times)} if whole else {}))
    return contents[0] | {"rows": merged}
