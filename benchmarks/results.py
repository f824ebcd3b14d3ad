"""Result files: JSON with the device, the versions and the commit that the figures belong to."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from ar_kernels.experiments.files import write_atomically

FOLDER = Path(__file__).parent / "results"

RESULTS_APART = ":(exclude,top)benchmarks/results"
"""For git: everything but the results."""


def commit() -> str:
    """The commit measured: AR_KERNELS_COMMIT where the checkout was copied without its history, else git's word.

    -dirty: tracked files differ from it. Results do not count, or writing them would end what they belong to.
    """
    given = os.environ.get("AR_KERNELS_COMMIT")
    if given:
        return given

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)

    name = git("describe", "--always", "--abbrev=12").stdout.strip()
    is_dirty = name and git("diff", "--quiet", "HEAD", "--", ":/", RESULTS_APART).returncode != 0
    return f"{name}-dirty" if is_dirty else name or "unknown"


def environment() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def path_of(name: str, folder: Path | None = None) -> Path:
    """results/<name>-<device>.json, or such a file in folder."""
    slug = environment()["device"].lower().replace("nvidia", "").strip().replace(" ", "-") or "cpu"
    return (folder or FOLDER) / f"{name}-{slug}.json"


def save(name: str, content: dict, folder: Path | None = None) -> Path:
    """Writes results/<name>-<device>.json (or into folder) with the environment in front; returns the path."""
    path = path_of(name, folder)
    text = json.dumps(environment() | content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def load(path: Path) -> dict:
    """A file of results: the environment's fields and, from the suite, rows."""
    return json.loads(path.read_text(encoding="utf-8"))


class OtherResults(RuntimeError):
    """A file holds what another commit, device or version of PyTorch or Triton has shown; the message says which."""


class Results:
    """The rows of one file, written whole after each row: a run that is killed keeps what it has, and can go on.

    All rows of a file belong to one device, commit and pair of versions. A row replaces an older one of the same
    shard, operation, direction and implementation. Several processes may add to one file, one for each GPU say.
    """

    KEY = ("N", "C", "side", "L", "K", "dtype", "layout", "operation", "direction", "implementation")
    SAME = ("device", "torch", "triton", "commit")

    def __init__(self, path: Path | None = None, fresh: bool = False) -> None:
        """path: of the file, read if it exists and not `fresh`; None keeps rows in memory only."""
        self.path = path
        self.where = environment()
        self._rows: dict[tuple, dict] = {}
        if path is not None and fresh:
            path.unlink(missing_ok=True)
        self._read()

    def _read(self) -> None:
        """Takes over what the file has by now."""
        if self.path is None or not self.path.exists():
            return
        content = load(self.path)
        for name in self.SAME:
            if content.get(name) != self.where[name]:
                raise OtherResults(
                    f"{self.path} is of {name} {content.get(name)}, this is {self.where[name]}: "
                    "take another --file, or --fresh to begin it anew"
                )
        self._rows |= {self.key(row): row for row in content["rows"]}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes the file meanwhile."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @classmethod
    def key(cls, row: dict) -> tuple:
        return tuple(row[name] for name in cls.KEY)

    @property
    def rows(self) -> list[dict]:
        return list(self._rows.values())

    def has(self, shard, operation: str, direction: str, implementation: str) -> bool:
        """Whether there is an answer, be it that memory ran out; a row that was skipped is none."""
        names = {"operation": operation, "direction": direction, "implementation": implementation}
        row = self._rows.get(self.key(shard.fields() | names))
        return row is not None and "skipped" not in row

    def add(self, row: dict) -> None:
        if self.path is None:
            self._rows[self.key(row)] = row
            return
        with self._alone():
            self._read()
            self._rows[self.key(row)] = row
            head = json.dumps(self.where, indent=1)[:-2]  # a line for each row: files of thousands stay readable
            lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in self.rows)
            text = f'{head},\n "rows": [\n{lines}\n ]\n}}\n'
            write_atomically(self.path, lambda file: file.write(text.encode()))
