"""early-exit: images that leave do not cost what comes after, and those that stay get the model's own answer."""

import json

import pytest
import torch
from matplotlib.image import imread
from test_experiments_data import write_folder
from test_experiments_pages import save_run
from torch import nn

from ar_kernels import AttendRectify, rectify
from ar_kernels.experiments import __main__ as command_line
from ar_kernels.experiments.early_exit import Opinions, best, costs, early_exit, mean_gates, opinions, thresholds_for
from ar_kernels.experiments.nets import Net
from ar_kernels.models import DigitNet, WideAttentiveResNet


def backbone() -> nn.Sequential:
    sides = (3, 4, 6, 8)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in zip(sides, sides[1:])]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


MODELS = {
    "warn": (
        lambda mix: WideAttentiveResNet(10, 1, 5, attention_width=2, mix=mix),
        (3, 32, 32),
        "group_2.block_0.conv0",
    ),
    "digits": (lambda mix: DigitNet(5, 3, 2, mix=mix), (1, 40, 40), "blocks.4.0"),
    "backbone": (lambda mix: AttendRectify(backbone(), ["0", "1", "2"], 5, 2, mix=mix), (3, 32, 32), "backbone.2.0"),
}
"""By name: the model with three attended layers, its images, and a convolution behind the second."""


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest):
    make, shape, behind = MODELS[request.param]
    torch.manual_seed(1)
    model = make("log" if request.param == "warn" else "logit")
    for layer in model.attention:
        layer.output_weight.data *= 3  # opinions that differ
    images = torch.randn(12, *shape)
    model(images)  # running statistics
    return model.eval(), images, model.get_submodule(behind)


def so_far(model: nn.Module, images: torch.Tensor, gates: torch.Tensor) -> list[torch.Tensor]:
    """Probabilities after each exit, from a forward of the whole model; the last are its own."""
    with torch.no_grad():
        details = model(images, return_details=True)
    parts = []
    for count in (1, 2):
        scores = gates[:count].log().expand(len(images), -1).contiguous()
        mixed = rectify(details.hypotheses[:, :count].contiguous(), scores, mix=model.mix, gating="softmax")
        parts.append(mixed.softmax(dim=1))
    return [*parts, details.output.softmax(dim=1)]


def test_images_leave_where_they_are_sure_and_the_rest_is_not_computed(case):
    model, images, behind = case
    gates = mean_gates(model, [images[:6], images[6:]])
    first, second, whole = so_far(model, images, gates)
    threshold = (first.amax(dim=1).sort().values[7:9].mean()).item()  # four leave at the first exit
    expected, exits = whole.argmax(dim=1), torch.full((12,), 3)
    for number, shares in ((2, second), (1, first)):
        sure = shares.amax(dim=1) >= threshold
        expected, exits = torch.where(sure, shares.argmax(dim=1), expected), torch.where(sure, number, exits)
    arrived, seen = [], []
    with behind.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0]))):
        answers = early_exit(model, images, gates, threshold, arrived.append)
    assert torch.equal(answers.exits, exits) and torch.equal(answers.labels, expected)
    assert (exits == 1).sum() == 4 and arrived == [12, 8]
    inside = int((exits == 3).sum())
    assert seen == ([inside] if inside else [])


def test_all_may_leave_or_none(case):
    model, images, behind = case
    gates, seen = mean_gates(model, [images]), []
    with behind.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0]))):
        assert (early_exit(model, images, gates, 0.0).exits == 1).all() and seen == []
        answers = early_exit(model, images, gates, 2.0)
    with torch.no_grad():
        assert torch.equal(answers.labels, model(images).argmax(dim=1))
    assert (answers.exits == 3).all() and seen == [12]


def test_each_exit_has_a_threshold_of_its_own(case):
    """What opinions says beforehand is what then happens, at any pair of thresholds."""
    model, images, _ = case
    gates, truth = mean_gates(model, [images]), torch.arange(12) % 5
    found = opinions(model, [(images[:7], truth[:7]), (images[7:], truth[7:])], gates)
    assert torch.equal(found.truth, truth)
    for shares, ours in zip(so_far(model, images, gates)[:2], found.shares.T):
        torch.testing.assert_close(ours, shares.amax(dim=1))
    first, second = found.shares.sort(dim=0).values[7:9].mean(dim=0).tolist()  # between two: batches round apart
    leaves = found.shares >= torch.tensor([first, second])
    expected = torch.where(leaves[:, 0], 1, torch.where(leaves[:, 1], 2, 3))
    answers = early_exit(model, images, gates, [first, second])
    assert torch.equal(answers.exits, expected) and (expected == 1).sum() == 4
    assert torch.equal(answers.labels, found.labels.gather(1, expected.unsqueeze(1) - 1).squeeze(1))
    with pytest.raises(ValueError, match="threshold must be one number or 2, one for each exit, got 3"):
        early_exit(model, images, gates, [0.5, 0.5, 0.5])


def test_thresholds_lose_no_more_than_they_may():
    truth = torch.zeros(10, dtype=torch.int64)
    whole = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    first = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0])  # image 2 is lost on the whole network too: no loss
    shares = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2])
    found = Opinions(shares.unsqueeze(1), torch.stack([first, whole], dim=1), truth)
    taken = [thresholds_for(found, lost / 10)[0] for lost in (0, 1, 1.9, 2, 3, 10)]
    assert taken == pytest.approx([0.7, 0.6, 0.6, 0.5, 0.2, 0.2])  # those of 0.5 leave together
    both = Opinions(shares.unsqueeze(1).expand(10, 2), torch.stack([first, first, whole], dim=1), truth)
    assert thresholds_for(both, 0.2) == pytest.approx([0.6, 0.6])  # one loss each
    assert min(thresholds_for(Opinions(shares[3:4].unsqueeze(1), both.labels[3:4, 1:], truth[:1]), 0)) > 1


def test_costs_count_what_runs(case):
    model, images, _ = case
    cost = costs(model, images[:1], mean_gates(model, [images]))
    assert len(cost) == 3 and 0 < cost[0] < cost[1] < cost[2]
    if isinstance(model, AttendRectify):
        convolutions = [2 * 9 * a * b * side**2 for a, b, side in ((3, 4, 16), (4, 6, 8), (6, 8, 4))]
        # One layer: heads' logits, their pooling, gates and output.
        attention = 2 * (2 * 4 * 256 * 2) + 2 * (5 * 2 * 4)
        assert convolutions[0] < cost[0] <= 1.1 * (convolutions[0] + attention)
        assert cost[1] - cost[0] >= convolutions[1] and cost[2] - cost[1] >= convolutions[2]


def test_what_cannot_leave_early_is_refused():
    with pytest.raises(
        TypeError, match="model must be one of WideAttentiveResNet, DigitNet, AttendRectify, got Linear"
    ):
        early_exit(nn.Linear(2, 2), torch.zeros(1, 2), torch.ones(2), 0.5)


def test_the_best_threshold_keeps_the_accuracy_and_saves_most():
    def row(threshold: float, accuracy: float, saved: float) -> dict:
        return {"thresholds": [threshold], "accuracy": accuracy, "compute_saved": saved, "time_saved": saved / 2}

    rows = [row(0.5, 0.9, 0.6), row(0.8, 0.9495, 0.2), row(0.9, 0.95, 0.1), row(0.99, 0.95, 0.0), row(2.0, 0.95, 0.0)]
    found = best({"rows": rows, "device": "cpu"})
    assert "threshold 0.8 " in found and "20.0 % of the operations and 10.0 % of the time" in found
    assert best({"rows": [rows[0], *rows[3:]], "device": "cpu"}).startswith("No threshold saves anything")


def test_the_command(tmp_path, capsys):
    write_folder(tmp_path / "data", train=16, test=10, size=14)
    save_run(tmp_path / "run", Net("digitnet", attention_depth=3), data=str(tmp_path / "data"), seed=0)
    options = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--batch-size", "4", "--repeats", "1"]
    assert command_line.main(["early-exit", *options, "--thresholds", "0", "0.9", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Within 0.1 points" in printed or "No threshold" in printed
    summary = json.loads((tmp_path / "out" / "early-exit.json").read_text())
    first, _, never = summary["rows"]
    cost = summary["operations"]
    assert first["left_after"] == [1, 0, 0] and first["compute_saved"] == pytest.approx(1 - cost[0] / cost[2])
    assert never["left_after"] == [0, 0, 1] and never["compute_saved"] == never["time_saved"] == 0
    assert imread(tmp_path / "out" / "early-exit.png").std() > 0.02
    save_run(tmp_path / "run", Net("digitnet", attention_depth=1), data=str(tmp_path / "data"), seed=0)
    assert command_line.main(["early-exit", *options, "--device", "cpu"]) == 1
    assert "must be a run with two attended layers or more" in capsys.readouterr().err


def test_the_command_sets_thresholds_on_images_held_out(tmp_path, capsys):
    write_folder(tmp_path / "data", train=30, test=10, size=14)
    train = ["--data", str(tmp_path / "data"), "--model", "warn-10-1", "--epochs", "1", "--batch-size", "8"]
    train += ["--out", str(tmp_path / "run"), "--held-out", "12", "--layer-loss", "0.5", "--device", "cpu"]
    assert command_line.main(["train", *train]) == 0
    assert "18 images to train on, 10 to test on, 12 held out" in capsys.readouterr().out
    options = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--batch-size", "5", "--repeats", "1"]
    assert command_line.main(["early-exit", *options, "--allow", "0", "0.1", "100", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Thresholds that lose 0.1 % of the answers on 12 images held out: of the test set" in printed
    summary = json.loads((tmp_path / "out" / "early-exit.json").read_text())
    strict, near, loose, never = summary["rows"]
    assert summary["held_out"] == 12 and strict["thresholds"] == near["thresholds"]
    assert loose["left_after"] == pytest.approx([1, 0, 0], abs=0.5) and never["left_after"] == [0, 0, 1]
    for row in summary["rows"]:
        assert row["accuracy"] - never["accuracy"] == pytest.approx((row["won"] - row["lost"]) / 10)
