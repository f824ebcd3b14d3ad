"""Checkpoints that are torn, of something else, or made to do harm are refused and run nothing; a full disk leaves the
last good one.
"""

import copy
import errno
import io
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ar_kernels import official
from ar_kernels.experiments import files
from ar_kernels.experiments.training import Recipe, Run, read_checkpoint, train

RECIPE = Recipe(steps=6, batch_size=4)
IDENTITY = {"seed": 0}


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def small_run(folder: Path, resume: bool = False, on_step: Callable[[int, float], None] = lambda *_: None) -> None:
    with Run(folder, IDENTITY, resume=resume) as run:
        train(network(), batch_of, RECIPE, run, checkpoint_every=2, on_step=on_step)


def of_a_run(tmp_path: Path) -> bytes:
    small_run(tmp_path / "source")
    return (tmp_path / "source" / "checkpoint.pt").read_bytes()


def of_the_official_code(legacy: bool = False, **changes: object) -> bytes:
    net = official.AttentionModule(3, 2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    content = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "training_time": 1.5, "epoch": 1}
    torch.save(content | changes, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def read_official(content: bytes) -> dict:
    """What load_checkpoint makes of a net's state, once it is seen to change nothing where it raises."""
    torch.manual_seed(1)
    net = official.AttentionModule(3, 2, 2)
    before = copy.deepcopy(net.state_dict())
    try:
        read = official.load_checkpoint(net, io.BytesIO(content))
    except BaseException:
        assert_same(net.state_dict(), before)
        raise
    return {"model": net.state_dict(), "rest": read._asdict()}


def read_a_run(content: bytes, tmp_path: Path) -> dict:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    try:
        return read_checkpoint(path)
    finally:
        assert path.read_bytes() == content


def assert_same(one: object, other: object) -> None:
    assert is_same(one, other)


def is_same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


# ---------------------------------------------------------------------------------------------- torn


@pytest.mark.parametrize("kind", ["run", "official", "legacy"])
def test_cut_off_anywhere(kind, tmp_path):
    """At 200 lengths and at each of the last 100 bytes."""
    whole = of_a_run(tmp_path) if kind == "run" else of_the_official_code(kind == "legacy")
    read = (lambda content: read_a_run(content, tmp_path)) if kind == "run" else read_official
    assert read(whole)
    for length in {*range(0, len(whole), len(whole) // 200 + 1), *range(len(whole) - 100, len(whole))}:
        with pytest.raises(ValueError, match=r"is damaged or no checkpoint|^file must be a checkpoint") as raised:
            read(whole[:length])
        assert type(raised.value) is ValueError


@pytest.mark.parametrize("kind", ["run", "official"])
def test_one_bit_flipped_anywhere(kind, tmp_path):
    """It is refused, or it is in the zip's padding and the very same is read; 1,000 random places."""
    whole = of_a_run(tmp_path) if kind == "run" else of_the_official_code()
    read = (lambda content: read_a_run(content, tmp_path)) if kind == "run" else read_official
    good, random_place, refused = read(whole), random.Random(0), 0
    for _ in range(1000):
        at = random_place.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << random_place.randrange(8)]) + whole[at + 1 :]
        try:
            got = read(flipped)
        except ValueError as error:
            assert type(error) is ValueError
            refused += 1
        else:
            assert_same(got, good)
    assert refused > 300


NOISE = random.Random(0).randbytes(4096)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02.", b"\x89PNG", b"\x00" * 4096, NOISE],
    ids=["nothing", "zip", "pickle", "picture", "zeros", "noise"],
)
def test_no_checkpoint_at_all(content, tmp_path):
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read_a_run(content, tmp_path)
    with pytest.raises(ValueError, match="^file must be a checkpoint"):
        read_official(content)


# ---------------------------------------------------------------------------------------------- of something else


def test_weights_that_do_not_fit():
    state = official.AttentionModule(3, 2, 2).state_dict()
    name = "out_head.conv.weight"
    weight = state[name]
    for value, message in (
        (weight[:, :2], r"has out_head.conv.weight of \[4, 2, 3, 3\] where the model has \[4, 3, 3, 3\]"),
        (weight.to_sparse(), "has out_head.conv.weight as torch.float32 of layout torch.sparse_coo on cpu"),
        (weight.to("meta"), "has out_head.conv.weight as torch.float32 of layout torch.strided on meta"),
        (weight.to(torch.complex64), "has out_head.conv.weight as torch.complex64"),
        (weight.to(torch.int64), "has out_head.conv.weight as torch.int64"),
        (1.0, "file must hold tensors by name in its state_dict"),
    ):
        with pytest.raises(ValueError, match=message):
            read_official(of_the_official_code(state_dict=state | {name: value}))
    for changes, message in (
        ({"state_dict": {1: weight}}, "file must hold tensors by name in its state_dict"),
        (
            {"state_dict": official.AttentionModule(3, 2, 2, self_attention=False).state_dict()},
            "lacks score.conv.weight",
        ),
        ({"state_dict": official.Gate(3, 2).state_dict()}, "lacks .* has bn.bias, .* which the model does not know"),
        ({"optimizer": {"param_groups": [{"params": 3}]}}, "must hold an optimizer's state_dict as optimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            read_official(of_the_official_code(**changes))


def test_a_run_of_another_network_or_optimizer(tmp_path):
    """Of the same identity: nothing is loaded, and the files stay."""
    small_run(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same = network()
    for model, optimizer, message in (
        (network(4), None, r"is of another network: its 0.weight is \[3, 6\] of torch.float32, the model's \[4, 6\]"),
        (network()[:3], None, "is of another network: its 3.weight is .*, the model's missing"),
        (network().double(), None, "its 0.weight is .* of torch.float32, the model's .* of torch.float64"),
        (same, torch.optim.SGD(list(same.parameters())[:2]), r"groups of parameters are \[\[0, 1, 2, 3, 4, 5\]\], not"),
    ):
        optimizer = optimizer or RECIPE.optimizer(model)
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        with Run(tmp_path, IDENTITY, resume=True) as run, pytest.raises(ValueError, match=message):
            run.restore(model, optimizer)
        assert_same([model.state_dict(), optimizer.state_dict()], before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    "changes", [{"step": -1}, {"metrics_bytes": -5}, {"step": "6"}, {"model": []}, {"identity": 1}]
)
def test_a_run_with_impossible_fields(changes, tmp_path):
    state = torch.load(io.BytesIO(of_a_run(tmp_path)), weights_only=True)
    file = io.BytesIO()
    torch.save(state | changes, file)
    with pytest.raises(ValueError, match="is not a checkpoint of a run: it must hold identity, step"):
        read_a_run(file.getvalue(), tmp_path)


# ---------------------------------------------------------------------------------------------- harmful


class Calls:
    """Unpickled by pickle itself, it calls the function."""

    def __init__(self, function: Callable, *arguments: str) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


HARM = {
    "open": lambda path: Calls(open, path, "w"),
    "mkdir": lambda path: Calls(os.mkdir, path),
    "system": lambda path: Calls(os.system, f"touch '{path}'"),
    "eval": lambda path: Calls(eval, f"open({path!r}, 'w')"),
    "exec": lambda path: Calls(exec, f"import os; os.mkdir({path!r})"),
}


def in_a_zip(harm: object, whole: bytes) -> bytes:
    """A good checkpoint with its pickle exchanged for a harmful one; the checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            content = pickle.dumps(harm, 2) if entry.filename.endswith("/data.pkl") else source.read(entry)
            target.writestr(entry.filename, content)
    return file.getvalue()


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


WRAPPED = {
    "pickle": lambda harm, whole: pickle.dumps(harm, 2),
    "saved": lambda harm, whole: saved(harm),
    "legacy": lambda harm, whole: saved({"state_dict": harm}, legacy=True),
    "field": lambda harm, whole: saved(torch.load(io.BytesIO(whole), weights_only=True) | {"extra": [harm]}),
    "exchanged": in_a_zip,
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("harm", HARM)
def test_code_is_never_run(harm, wrap, tmp_path):
    """Shown to do harm where it is unpickled without care, then refused by both readers."""
    path = tmp_path / "harm"
    for whole, read in (
        (of_the_official_code(), read_official),
        (of_a_run(tmp_path), lambda content: read_a_run(content, tmp_path)),
    ):
        content = WRAPPED[wrap](HARM[harm](str(path)), whole)
        if wrap == "pickle":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert path.exists()
        path.rmdir() if path.is_dir() else path.unlink()
        with pytest.raises(ValueError) as raised:
            read(content)
        assert type(raised.value) is ValueError and not path.exists()


# ---------------------------------------------------------------------------------------------- a full disk


class FullDisk(io.FileIO):
    """A file that takes so many bytes and then has no space left."""

    space = 0

    def write(self, content: bytes) -> int:
        taken = super().write(bytes(content)[: max(self.space - self.tell(), 0)])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken


def fill(monkeypatch: pytest.MonkeyPatch, space: int) -> None:
    monkeypatch.setattr(FullDisk, "space", space)
    monkeypatch.setattr(files, "open", lambda path, mode: io.BufferedWriter(FullDisk(path, "w")), raising=False)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_no_space_left_while_saving(share, tmp_path, monkeypatch):
    """The error is the disk's, the last good checkpoint is there alone, and the run goes on to the same numbers."""
    space = int(share * len(of_a_run(tmp_path)))
    folder = tmp_path / "run"

    def on_step(step: int, loss: float) -> None:
        if step == 3:
            until_written(folder)
            fill(monkeypatch, space)

    with pytest.raises((OSError, RuntimeError)) as raised:
        small_run(folder, on_step=on_step)
    assert is_of_the_disk(raised.value, errno.ENOSPC), repr(raised.value)
    monkeypatch.undo()
    check_and_resume(folder, tmp_path / "source")


def test_files_may_not_grow_while_saving(tmp_path):
    """The same by the system's own limit on the size of a file."""
    half = len(of_a_run(tmp_path)) // 2
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on_step(step: int, loss: float) -> None:
        if step == 3:
            until_written(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))

    try:
        with pytest.raises((OSError, RuntimeError)) as raised:
            small_run(folder, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_of_the_disk(raised.value, errno.EFBIG), repr(raised.value)
    check_and_resume(folder, tmp_path / "source")


def until_written(folder: Path) -> None:
    """Training goes on while its checkpoint is written."""
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)


def is_of_the_disk(error: BaseException | None, number: int) -> bool:
    while error is not None and not (isinstance(error, OSError) and error.errno == number):
        error = error.__cause__ or error.__context__
    return error is not None


def check_and_resume(folder: Path, unbroken: Path) -> None:
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "metrics.jsonl"]
    assert read_checkpoint(folder / "checkpoint.pt")["step"] == 2
    small_run(folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert_same(*(read_checkpoint(each / "checkpoint.pt") for each in (folder, unbroken)))
