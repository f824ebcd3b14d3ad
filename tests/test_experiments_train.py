"""Training of images: recipes, losses, networks by name, several processes, and the command."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_experiments import assert_same_run
from test_experiments_data import write_folder
from test_experiments_images import torchvision  # noqa: F401  (a fixture)
from torch import nn

import ar_kernels
from ar_kernels.experiments import __main__ as command_line
from ar_kernels.experiments import data, nets, training
from ar_kernels.experiments.nets import Net
from ar_kernels.experiments.parallel import Processes
from ar_kernels.experiments.training import Recipe, Run, loss_of, read_metrics
from ar_kernels.models import DigitNet, WideAttentiveResNet

ROOT = Path(__file__).parent.parent


def test_the_papers_schedule():
    recipe = Recipe(steps=200, warmup=0.0, milestones=(0.3, 0.6, 0.8))
    rates = {step: recipe.rate(step) for step in (1, 60, 61, 120, 121, 160, 161, 200)}
    assert rates == pytest.approx({1: 0.1, 60: 0.1, 61: 0.02, 120: 0.02, 121: 0.004, 160: 0.004, 161: 8e-4, 200: 8e-4})


@pytest.mark.parametrize("mix", ["logit", "log"])
def test_the_attentive_loss_is_the_mixs_plus_the_regulariser(mix):
    torch.manual_seed(0)
    net = WideAttentiveResNet(10, 1, 4, attention_width=2, mix=mix).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 2, 3])
    details = net(images, return_details=True)
    expected = (F.cross_entropy if mix == "logit" else F.nll_loss)(details.output, labels)
    torch.testing.assert_close(loss_of(mix)(net, images, labels), expected)
    penalty = 1e6 * sum(ar_kernels.mask_regulariser(masks) for masks in details.masks) / 3
    assert penalty > 0.1  # else the sum would hardly tell
    torch.testing.assert_close(loss_of(mix, 1e6)(net, images, labels), expected + penalty)
    alone = torch.stack([F.cross_entropy(details.hypotheses[:, layer], labels) for layer in range(3)]).mean()
    torch.testing.assert_close(loss_of(mix, 0, 0.5)(net, images, labels), expected + 0.5 * alone)
    torch.testing.assert_close(loss_of(mix, 1e6, 0.5)(net, images, labels), expected + penalty + 0.5 * alone)


def test_the_log_tells_means_and_does_not_depend_on_interruptions(tmp_path):
    losses = {}
    for every in (1, 4):
        torch.manual_seed(0)
        with Run(tmp_path / str(every), {}) as run:
            training.train(
                nn.Linear(3, 2), lambda step: (torch.full((2, 3), float(step)), torch.tensor([0, 1])),
                Recipe(steps=10, batch_size=2), run, log_every=every, checkpoint_every=6,
                evaluate=lambda step: {"epoch": step}, evaluate_every=5,
            )  # fmt: skip
        lines = read_metrics(tmp_path / str(every))
        losses[every] = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert [line["epoch"] for line in lines if "epoch" in line] == [5, 10]
    assert list(losses[4]) == [4, 6, 8, 10]  # 6, 10: checkpoints
    assert losses[4][4] == pytest.approx(sum(losses[1][step] for step in range(1, 5)) / 4)
    assert losses[4][6] == pytest.approx((losses[1][5] + losses[1][6]) / 2)


def test_runs_side_by_side_take_the_steps_that_they_take_alone(tmp_path):
    def steps(folder: str, seed: int, count: int):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        with Run(tmp_path / folder, {}) as run:
            yield from training.training_steps(
                model, lambda step: (torch.ones(2, 3) * step / count, torch.tensor([0, 1])),
                Recipe(steps=count, batch_size=2), run, checkpoint_every=4,
            )  # fmt: skip

    counts = (5, 9, 3)
    assert training.side_by_side(steps(f"beside-{n}", n, count) for n, count in enumerate(counts)) == sum(counts)
    for n, count in enumerate(counts):
        training.side_by_side([steps(f"alone-{n}", n, count)])
        assert_same_run(tmp_path / f"beside-{n}", tmp_path / f"alone-{n}")
    assert training.side_by_side([]) == 0


def test_a_run_that_fails_stops_those_beside_it(tmp_path):
    closed = []

    def endless():
        try:
            while True:
                yield
        finally:
            closed.append(True)

    def failing():
        yield
        raise FloatingPointError("the loss is nan at step 2")

    with pytest.raises(FloatingPointError, match="at step 2"):
        training.side_by_side([endless(), failing(), endless()])
    assert closed == [True, True]


def test_a_captured_run_takes_every_step_once(tmp_path, monkeypatch):
    """On a CPU, with a graph that records nothing and whose replay takes the step again into the same loss: what is
    left of capture is its bookkeeping, steps and rates on the device, and a fused optimizer.
    """
    made, recorded = [], []

    class Graph:
        def replay(self) -> None:
            (captured,) = made
            captured._loss.copy_(captured._take(*captured._inputs))

    class Recording:
        """What the block computes is taken back: a real graph records it without computing."""

        def __init__(self, graph: Graph, stream: object, capture_error_mode: str) -> None:
            (self.model, self.optimizer), self.graph = recorded, graph

        def __enter__(self) -> None:
            self.before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

        def __exit__(self, *_: object) -> None:
            self.model.load_state_dict(self.before[0])
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.load_state_dict(self.before[1])
            self.optimizer.param_groups[0]["lr"] = rate

    class Noticed(training.CapturedStep):
        def __init__(self, inputs_of, take, optimizer, *others) -> None:
            super().__init__(inputs_of, take, optimizer, *others)
            made[:] = [self]
            recorded.append(optimizer)

    stream = types.SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cpu"))
    for name, fake in {
        "Stream": lambda device: stream, "current_stream": lambda: stream, "CUDAGraph": Graph, "graph": Recording,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(training, "CapturedStep", Noticed)

    def read(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((2, 3), step, dtype=torch.uint8), torch.tensor([0, 1])

    lines = {}
    for name, capture, inputs_of, batch_of in (
        ("plain", False, None, lambda step: (torch.ones(2, 3) * step, torch.tensor([0, 1]))),
        ("composed", True, None, lambda step: (torch.ones(2, 3) * step, torch.tensor([0, 1]))),
        ("given", True, read, lambda images, labels: (images.float(), labels)),
    ):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        recorded[:] = [model]
        with Run(tmp_path / name, {}) as run:
            training.train(
                model, batch_of, Recipe(steps=9, batch_size=2, milestones=(0.6,)), run, inputs_of=inputs_of,
                log_every=2, checkpoint_every=9, capture=capture,
            )  # fmt: skip
        lines[name] = [list(line.values()) for line in read_metrics(tmp_path / name)]
    assert len(lines["plain"]) == 5
    assert np.allclose(lines["composed"], lines["plain"], rtol=1e-5, atol=0) and lines["given"] == lines["composed"]


@pytest.mark.gpu
def test_captured_runs_side_by_side_equal_those_alone(tmp_path, device):
    """Bit by bit: each has a stream, a graph and memory of its own."""
    clutter = data.Clutter(data.bundled().train.to(device))

    def steps(folder: str, seed: int):
        torch.manual_seed(seed)
        net = DigitNet(attention_depth=4, attention_width=seed + 1).to(device, memory_format=torch.channels_last)
        with Run(tmp_path / folder, {}) as run:
            yield from training.training_steps(
                net, lambda step: clutter.train_batch(seed, step, 50), Recipe(steps=30, batch_size=50), run,
                loss=loss_of("logit", 0.001), capture=True, log_every=10,
            )  # fmt: skip

    training.side_by_side(steps(f"beside-{seed}", seed) for seed in range(3))
    for seed in range(3):
        training.side_by_side([steps(f"alone-{seed}", seed)])
        assert_same_run(tmp_path / f"beside-{seed}", tmp_path / f"alone-{seed}")


@pytest.mark.gpu
def test_a_captured_run_equals_a_run_step_by_step(tmp_path, device):
    clutter, results = data.Clutter(data.bundled().train.to(device)), []
    for capture in (False, True):
        torch.manual_seed(0)
        net = DigitNet(attention_depth=4, attention_width=2).to(device)
        with Run(tmp_path / str(capture), {}) as run:
            training.train(
                net, lambda step: clutter.train_batch(0, step, 32), Recipe(steps=12, batch_size=32), run,
                loss=loss_of("logit", 0.001), capture=capture, mixed=False,
            )  # fmt: skip
        results.append([line["loss"] for line in read_metrics(tmp_path / str(capture))])
    assert results[0][:3] == pytest.approx(results[1][:3], rel=1e-5)
    assert results[0] == pytest.approx(results[1], rel=1e-2) and len(set(results[1])) == 12


@pytest.mark.gpu
def test_the_command_captures_the_steps_that_it_takes(tmp_path, device):
    """Images are read, and the dropout's seed set, outside the graph; augmentation, net and update are inside."""
    write_folder(tmp_path / "data", train=64, test=8, size=14)
    losses = []
    for name in ("taken", "captured"):
        more = ["--device", "cuda", "--no-bf16", "--no-compile", "--log-every", "1"]
        more += ["--capture"] if name == "captured" else []
        assert command_line.main(arguments(tmp_path / name, *more)) == 0
        losses.append([line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line])
    assert len(losses[0]) == 16 and len(set(losses[1])) == 16
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=1e-3) and losses[0] == pytest.approx(losses[1], rel=0.1)


# ---------------------------------------------------------------------------------------------- networks


def test_networks_by_name(torchvision):  # noqa: F811
    images = torch.randn(2, 3, 32, 32)
    for name, layers, parts in (
        ("wrn-10-1", "", ()),
        ("warn-10-1", "", ("attention", "global_gates")),
        ("torchvision/resnet18", "layer2,layer4", ("backbone.layer4", "attention")),
        ("torchvision/resnet18", "", ("layer4",)),
        ("timm/test_resnet", "layer3", ("backbone.layer3", "attention")),
    ):
        net = Net(model=name, num_classes=5, layers=layers, attention_width=2, image_size=32)
        model = net.build().eval()
        assert model(images).shape == (2, 5)
        assert all(model.get_submodule(part) for part in parts)
        assert net.is_attentive == (name.startswith("warn") or layers != "")
        assert nets.net_of(net.settings() | {"steps": 3}) == net
    for wrong in ("resnet18", "wrn-28", "elsewhere/resnet18"):
        with pytest.raises(ValueError, match=f"model must be one of digitnet, .* got '{wrong}'"):
            Net(model=wrong).build()


def test_warm_starts_take_what_fits(tmp_path, torchvision):  # noqa: F811
    plain = Net(model="torchvision/resnet18", num_classes=7).build()
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    attentive = Net(model="torchvision/resnet18", num_classes=5, layers="layer4", image_size=32).build()
    kept = nets.load_weights(attentive, tmp_path / "weights.pt")
    assert kept == ["fc.weight", "fc.bias"]
    assert torch.equal(attentive.backbone.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="holds no weight that fits"):
        nets.load_weights(DigitNet(), tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match="could not be read as weights"):
        nets.load_weights(plain, tmp_path / "weights.pt")


# ---------------------------------------------------------------------------------------------- the command


def arguments(folder: Path, *more: str) -> list[str]:
    options = ("--data", str(folder.parent / "data"), "--model", "warn-10-1", "--attention-width", "2")
    sizes = ("--epochs", "2", "--batch-size", "8", "--device", "cpu", "--dropout", "0.3")
    return ["train", "--out", str(folder), *options, *sizes, *more]


def test_the_command_trains_and_resumes_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "data", train=24, test=8, size=14)
    assert command_line.main(arguments(tmp_path / "whole")) == 0
    printed = capsys.readouterr().out
    lines = read_metrics(tmp_path / "whole")
    tests = [line["test_accuracy"] for line in lines if "test_accuracy" in line]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]
    assert f"after the last epoch: {100 * tests[-1]:.2f} %" in printed and "the paper reports the best" in printed
    assert json.loads((tmp_path / "whole" / "speed.json").read_text())["images_per_second"] > 0
    with monkeypatch.context() as patch:
        save = Run.save

        def interrupted(run: Run, *state: object) -> None:
            save(run, *state)
            raise KeyboardInterrupt

        patch.setattr(Run, "save", interrupted)
        assert command_line.main(arguments(tmp_path / "broken")) == 130
    assert command_line.main(arguments(tmp_path / "broken", "--resume")) == 0
    assert "Resuming after step 3 of 6" in capsys.readouterr().out
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert command_line.main(arguments(tmp_path / "broken", "--resume", "--mix", "log")) == 1
    assert "other settings: mix 'logit' (now 'log')" in capsys.readouterr().err
    model, net, identity = nets.load_run(tmp_path / "whole", torch.device("cpu"))
    assert isinstance(model, WideAttentiveResNet) and not model.training and identity["dropout"] == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "digitnet"], "model digitnet is for cluttered digits: ablate and demo train it"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--test-batch-size", "0"], "test_batch_size must be at least 1, got 0"),
        (["--batch-size", "40"], "batch_size must be from 1 to the 24 training images and divisible by 1 processes"),
        (["--pretrained"], "only torchvision's and timm's backbones come pretrained, got warn-10-1"),
        (["--capture"], "--capture needs a GPU, got cpu"),
        (["--bucket", "0"], "bucket must be above 0, got 0.0"),
        (["--held-out", "24"], "held_out must be at least 0 and below the 24 training images, got 24"),
        (["--download"], "only sets known by name can be downloaded, got '"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, options, message):
    write_folder(tmp_path / "data", train=24, test=8, size=14)
    assert command_line.main(arguments(tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


SCRIPT = """
import os, sys, torch
from pathlib import Path
from torch import nn
from ar_kernels.experiments import __main__ as command_line, images
from ar_kernels.experiments.parallel import processes
from ar_kernels.experiments.training import Recipe, Run, accuracy, train

torch.set_num_threads(1)
out = sys.argv[1]
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
with processes("cpu", bucket_mb=1e-6) as group:  # each gradient by itself
    source = images.random_set(24, 9, group.device, 3)
    torch.manual_seed(group.rank)  # all take the first one's weights
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    batch_of = lambda step: source.train_batch(0, step, 8, group.rank, group.world)
    with Run(out + "/run", {}, writes=group.is_first) as run:
        train(model, batch_of, Recipe(steps=5, batch_size=8, learning_rate=0.001), run,
              processes=group)
    share = accuracy(model, source.test_batches(2, group.rank, group.world), processes=group)
    torch.save([model.state_dict(), share], f"{out}/rank{group.rank}.pt")
    group.wait()
status = command_line.main(sys.argv[2:]) if len(sys.argv) > 2 else 0
if "RANK" in os.environ:
    torch.distributed.destroy_process_group()
    threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]  # nothing keeps the group alive
    assert not any("gloo" in name for name in threads), threads
sys.exit(status)
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Over gloo: the same weights, losses and accuracy as one process on the whole batches; then the command itself."""
    (tmp_path / "script.py").write_text(SCRIPT)
    write_folder(tmp_path / "data", train=16, test=6, size=14)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("RANK", None)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    results = []
    for start, more in (((sys.executable,), ()), (torchrun, arguments(tmp_path / "train", "--epochs", "1"))):
        out = tmp_path / str(len(start))
        out.mkdir()
        done = subprocess.run(
            [*start, str(tmp_path / "script.py"), str(out), *more],
            env=environment, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        ranks = [torch.load(path) for path in sorted(out.glob("rank*.pt"))]
        losses = [line["loss"] for line in read_metrics(out / "run")]
        results.append((ranks, losses))
    ((one,), losses), ((first, second), their_losses) = results
    torch.testing.assert_close(their_losses, losses)
    assert first[1] == second[1] == one[1]
    for name, value in one[0].items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value)
    assert "2 × cpu" in done.stdout and done.stdout.count("Test accuracy after the last epoch") == 1
    assert nets.load_run(tmp_path / "train", torch.device("cpu"))[2]["processes"] == 2


def test_a_backward_pass_that_leaves_parameters_out_is_told(monkeypatch):
    """The next forward pass raises; parameters that are not trained may be left out."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model, images = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(2, 3)
        model[0].bias.requires_grad_(False)
        model(images).square().sum().backward()
        alone = [parameter.grad for parameter in model.parameters()]
        called = Processes(0, 2, torch.device("cpu")).wrapped(model)
        for _ in range(2):
            model.zero_grad()
            called(images).square().sum().backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), alone) if p.requires_grad)
        model[0](images).sum().backward()
        with pytest.raises(RuntimeError, match="must reach all 5 parameters, 4 were left out"):
            called(images)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_take_steps_one_by_one_and_captured(tmp_path):
    """Over NCCL, in bfloat16 with the regulariser, as `train --capture` trains: losses of the first steps, which are
    taken one by one, and of the graph's, by plans and without. A training became NaN there with plans
    (test_plans::test_factors_that_begin_within_their_storage)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    losses = []
    for plans in ("0", "1"):
        out = tmp_path / plans
        words = ["train", "--out", str(out), "--data", "random", "--model", "warn-16-4", "--epochs", "1"]
        words += ["--batch-size", "256", "--capture", "--no-compile", "--log-every", "1", "--device", "cuda"]
        done = subprocess.run(
            [*torchrun, "-m", "ar_kernels.experiments", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT), "AR_KERNELS_PLANS": plans}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append([line["loss"] for line in read_metrics(out) if "loss" in line])
    assert len(losses[0]) == len(losses[1]) == 195
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=1e-2)
