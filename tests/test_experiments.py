"""Runs that are killed and resumed, their files, the pictures, and the demo's command line."""

import copy
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from test_experiments_data import write_folder
from torch import nn

import ar_kernels
from ar_kernels import native
from ar_kernels.attend_rectify import Rectified
from ar_kernels.experiments import __main__ as command_line
from ar_kernels.experiments import demo, figures, training
from ar_kernels.experiments.files import write_atomically
from ar_kernels.experiments.progress import progress_bar
from ar_kernels.experiments.training import Recipe, Run, accuracy, read_checkpoint, train
from ar_kernels.models.digits import DigitNet, MapGeometry

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------- a small run

RECIPE = Recipe(steps=12, batch_size=4)
IDENTITY = {"seed": 0, "data": "noise"}


class Stopped(Exception):
    """Stands for whatever ends a run early."""


def small_run(folder: Path, resume: bool = False, stop_after: int | None = None, identity=IDENTITY) -> nn.Module:
    """Trains a small net on noise; with stop_after it breaks off right after that step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)

    def on_step(step: int, loss: float) -> None:
        if step == stop_after:
            raise Stopped

    with Run(folder, identity, resume=resume) as run:
        train(model, batch_of, RECIPE, run, checkpoint_every=5, on_step=on_step)
    return model


def assert_same_run(folder: Path, unbroken: Path) -> None:
    assert (folder / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    one, other = (read_checkpoint(each / "checkpoint.pt") for each in (folder, unbroken))
    assert_identical(one, other)


def assert_identical(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_identical(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each in zip(one, other):
            assert_identical(*each)
    else:
        assert one == other


@pytest.mark.parametrize("stop_after", [1, 4, 5, 7, 11, 12])
def test_a_broken_run_goes_on_to_the_same_numbers(tmp_path, stop_after):
    small_run(tmp_path / "unbroken")
    with pytest.raises(Stopped):
        small_run(tmp_path / "broken", stop_after=stop_after)
    with open(tmp_path / "broken" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 13, "lo')  # torn
    small_run(tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["learning_rate"] for line in lines] == [RECIPE.rate(step) for step in range(1, 13)]


def test_a_finished_run_resumes_to_itself(tmp_path):
    small_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    small_run(tmp_path / "two", resume=True)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(tmp_path, monkeypatch, device):
    """Training goes on meanwhile, in the same tensors."""
    go_on = threading.Event()

    def late(path: Path, write) -> None:
        assert go_on.wait(30)
        write_atomically(path, write)

    monkeypatch.setattr(training, "write_atomically", late)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(device, memory_format=torch.channels_last)
    optimizer = RECIPE.optimizer(model)
    with Run(tmp_path, IDENTITY) as run:
        for step in (1, 2):
            model(torch.randn(4, 3, 8, 8, device=device)).square().sum().backward()
            optimizer.step()
            if step == 1:
                run.save(step, model, optimizer)
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        assert not run.checkpoint.exists()
        go_on.set()
    state = read_checkpoint(run.checkpoint)
    assert state["step"] == 1
    for mine, kept in zip(saved, (state["model"], state["optimizer"])):
        assert_identical(on_cpu(mine), on_cpu(kept))


def on_cpu(value: object) -> object:
    """Plain dicts, tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [on_cpu(entry) for entry in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, last):
    """What a write raises, the next save raises, or the end of the run."""
    writes = []

    def full(path: Path, write) -> None:
        writes.append(path)
        if len(writes) > 1 + last:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, write)

    monkeypatch.setattr(training, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        small_run(tmp_path)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == (10 if last else 5)
    monkeypatch.undo()
    small_run(tmp_path, resume=True)
    small_run(tmp_path / "unbroken")
    assert_same_run(tmp_path, tmp_path / "unbroken")


def test_without_resume_a_run_starts_anew(tmp_path):
    with pytest.raises(Stopped):
        small_run(tmp_path / "one", stop_after=7)
    small_run(tmp_path / "one")
    small_run(tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path):
    small_run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"other settings: seed 0 \(now 1\), extra None \(now 2\)"):
        small_run(tmp_path, resume=True, identity={**IDENTITY, "seed": 1, "extra": 2})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_lost_metrics_are_refused(tmp_path):
    small_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl must hold at least the \d+ bytes .* got 3"):
        small_run(tmp_path, resume=True)


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    small_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()

    def refused(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            small_run(tmp_path, resume=True)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        refused(whole[:length], "is damaged or no checkpoint")
    weight = read_checkpoint_bytes(whole)
    at = whole.index(weight)
    refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "is damaged or no checkpoint")
    refused(b"text, not a checkpoint", "is damaged or no checkpoint")

    for state, message in (
        ({"model": Code(tmp_path / "ran")}, "holds more than tensors and plain values"),
        ([1, 2], "is not a checkpoint of a run"),
        ({"model": {}}, "is not a checkpoint of a run: it must hold identity, step"),
    ):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        refused(buffer.getvalue(), message)
    assert not (tmp_path / "ran").exists()


def read_checkpoint_bytes(content: bytes) -> bytes:
    """The raw bytes of the first weight in a checkpoint."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    return state["model"]["0.weight"].numpy().tobytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = nn.Linear(2, 2)

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, 2), float("inf") if step == 3 else 1.0), torch.tensor([0])

    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"), Run(tmp_path, {}) as run:
        train(model, batch_of, RECIPE, run)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_wrong_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_the_rate_rises_and_falls():
    rates = [Recipe(steps=100).rate(step) for step in range(1, 101)]
    assert max(rates) == rates[9] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == 0


def test_accuracy_counts_in_eval_mode():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    scores = torch.eye(3).repeat(2, 1)
    batches = [(scores[:4], torch.tensor([0, 1, 2, 1])), (scores[4:], torch.tensor([1, 2]))]
    assert accuracy(model, iter(batches)) == pytest.approx(5 / 6)
    assert model.training and model[1].num_batches_tracked == 0


# ---------------------------------------------------------------------------------------------- files and figures


def test_writing_fails_without_a_trace(tmp_path):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"new, but only hal")
        file.flush()
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    path.with_name(".file.tmp").write_bytes(b"left by a kill")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("geometry", DigitNet(attention_depth=5).attended_maps, ids=str)
def test_masks_are_laid_over_what_they_look_at(geometry: MapGeometry):
    size = geometry.size
    mask = torch.eye(size * size, dtype=torch.float64).view(size * size, size, size)  # one position at a time
    spots = figures.on_image(mask, geometry)
    weight = spots.sum(dim=(1, 2))
    pixels = torch.arange(40.0, dtype=torch.float64)
    y, x = (spots.sum(dim=2) * pixels).sum(dim=1) / weight, (spots.sum(dim=1) * pixels).sum(dim=1) / weight
    centre = geometry.first + geometry.step * torch.arange(size, dtype=torch.float64)
    torch.testing.assert_close(y, centre.repeat_interleave(size))
    torch.testing.assert_close(x, centre.repeat(size))
    inside = figures.on_image(torch.ones(1, size, size), geometry)[0]
    first, last = round(geometry.first + 0.5), int(geometry.first + geometry.step * (size - 1))
    assert torch.allclose(inside[first : last + 1, first : last + 1], torch.tensor(1.0))


def test_the_picture_shows_images_masks_and_colours(tmp_path, device):
    net = DigitNet(attention_depth=2, attention_width=3).to(device).eval()
    images = torch.rand(4, 1, 40, 40, device=device)
    with torch.no_grad():
        details: Rectified = net(images, return_details=True)
    figures.draw_attention(tmp_path / "one.png", images, torch.arange(4), details, net.attended_maps)
    picture = imread(tmp_path / "one.png")[..., :3]
    assert picture.shape[0] > 300 and picture.shape[1] > 700
    coloured = (picture.max(axis=2) - picture.min(axis=2)) > 0.3
    assert coloured.mean() > 0.01 and 0.2 < picture.mean() < 0.9
    moved = details._replace(masks=tuple(mask.flip(3) for mask in details.masks))
    figures.draw_attention(tmp_path / "two.png", images, torch.arange(4), moved, net.attended_maps)
    changed = (imread(tmp_path / "two.png")[..., :3] != picture).any(axis=2)
    left = picture.shape[1] // 8  # the images' column stays, the overlays change
    assert not changed[:, :left].any() and changed[:, left:].mean() > 0.05


# ---------------------------------------------------------------------------------------------- the demo


def arguments(folder: Path, device: torch.device, *more: str) -> list[str]:
    steps = ("--steps", "30", "--batch-size", "8", "--checkpoint-every", "1", "--compare-steps", "0")
    return ["demo", "--out", str(folder), "--device", device.type, *steps, *more]


def start(folder: Path, device: torch.device, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ar_kernels.experiments", *arguments(folder, device, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_at_random_moments_it_ends_with_the_same_numbers(tmp_path, device):
    """SIGKILL three times, each at a random moment after some more steps, in or between writes."""
    write_folder(tmp_path / "data", train=200, test=40)
    more = ("--data", str(tmp_path / "data"))
    unbroken = start(tmp_path / "unbroken", device, *more)
    chance, metrics = random.Random(time.time_ns()), tmp_path / "broken" / "metrics.jsonl"
    seen = []
    for kill in range(3):
        process = start(tmp_path / "broken", device, *more, *(["--resume"] if kill else []))
        goal = 3 + 8 * kill  # lines
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < goal):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.append(metrics.read_bytes().count(b"\n"))
    output = unbroken.communicate()[0]
    assert unbroken.returncode == 0, output
    last = start(tmp_path / "broken", device, *more, "--resume")
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert "Resuming after step" in output and seen[-1] < 31
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    lines = metrics.read_text().splitlines()
    assert len(lines) == 31 and 0 <= json.loads(lines[-1])["test_accuracy"] <= 1
    assert sorted(os.listdir(tmp_path / "broken")) == ["attention.png", "checkpoint.pt", "metrics.jsonl"]


def test_the_demo_tells_what_it_does(tmp_path, device, capsys):
    options = arguments(tmp_path, device, "--steps", "4", "--compare-steps", "2", "--attention-depth", "2")
    assert command_line.main(options) == 0
    printed = capsys.readouterr().out
    default = "triton" if device.type == "cuda" else "eager" if native.why_not("cpu") else "native"
    for text in (f"→ {default}", "reference", "median", "step 4 of 4"):
        assert text in printed
    share = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert f"Test accuracy: {100 * share:.1f} % (355 held-out digits" in printed
    for file in ("metrics.jsonl", "checkpoint.pt", "attention.png"):
        assert str(tmp_path / file) in printed and (tmp_path / file).exists()
    assert command_line.main([*options, "--resume", "--seed", "1"]) == 1
    assert "other settings: seed 0 (now 1)" in capsys.readouterr().err


def test_the_first_losses_equal_the_references(tmp_path, device):
    """What the demo's table shows: before rounding has grown, both implementations print the same losses."""
    table = demo._comparison(
        lambda: _seeded_net(device),
        lambda step: _noise(step, device),
        Recipe(steps=100, batch_size=8),
        3,
        "triton" if device.type == "cuda" else "eager",
    )
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["step"] == ["1", "2", "3", "median"]
    differences = [float(cell) for cell in columns["difference"][:3]]
    if device.type == "cuda":  # bfloat16: the first loss within one rounding of its 2.3 nats, later ones drift apart
        assert abs(differences[0]) < 2**-8 * 2.3
    else:
        assert max(map(abs, differences)) < 1e-3 and abs(differences[0]) < 1e-5


def _seeded_net(device: torch.device) -> DigitNet:
    torch.manual_seed(0)
    return DigitNet(attention_depth=2).to(device)


def _noise(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(8, 1, 40, 40, generator=torch.Generator().manual_seed(step))
    return images.to(device), torch.arange(8, device=device)


def test_the_bar_moves_on_a_terminal_and_prints_lines_elsewhere():
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100)
        with progress_bar(console, 20, 5) as on_step:
            for step in range(6, 21):
                on_step(step, 1.5)
        assert ("20/20" in file.getvalue()) == terminal
        assert ("step 20 of 20  loss 1.500" in file.getvalue()) == (not terminal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "error: nowhere/train-images-idx3-ubyte is missing"),
        (["--steps", "0"], "error: steps must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "error: checkpoint_every must be at least 1, got 0"),
        (["--attention-width", "0"], "error: attention_width must be at least 1, got 0"),
        (["--download"], "error: only mnist and fashion-mnist can be downloaded, got 'digits'"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, options, message):
    assert command_line.main(["demo", "--out", str(tmp_path / "out"), *options]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "train", "ablate", "clutter", "visualize --run x", "early-exit --run x"])
def test_a_missing_gpu_ends_in_one_line(monkeypatch, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main([*command.split(), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "error: --device cuda was given and torch sees no CUDA device\n"


def test_an_implementation_that_cannot_run_is_refused_before_files_are_touched(tmp_path, capsys):
    options = ["demo", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with ar_kernels.use_implementation("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ar_kernels.functional, "_INTERPRETED", False)
        assert command_line.main(options) == 1
    assert capsys.readouterr().err.startswith("error: implementation 'triton' cannot run: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [("--regulariser", "nan"), ("--regulariser", "-1"), ("--weight-decay", "inf"), ("--layer-loss", "-0.5")]
)
def test_weights_of_the_loss_are_numbers_from_0_on(options, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["train", *options])
    assert f"argument {options[0]}: must be a number from 0 on, got '{options[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("demo", ["--data", "--resume", "--seed", "scikit-learn", "default: 400"]),
        ("train", ["30, 60 and 80 % of the epochs", "torchrun"]),
        ("ablate", ["95 % intervals", "default: 40)"]),
        ("clutter", ["95 % interval"]),
        ("visualize", ["--run", "--images"]),
        ("early-exit", ["--thresholds"]),
        ("report", ["--out"]),
    ],
)
def test_help_explains(command, texts, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main([command, "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in texts:
        assert text in printed
    for text in ("%%", "default: None", "default: False"):
        assert text not in printed
