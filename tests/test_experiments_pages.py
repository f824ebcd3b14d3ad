"""Pages and pictures: visualize, and report."""

import argparse
import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from test_experiments_images import torchvision  # noqa: F401  (a fixture)

from ar_kernels.experiments import __main__ as command_line
from ar_kernels.experiments import ablate, data, figures, report, visualize
from ar_kernels.experiments.nets import Net, load_run
from ar_kernels.experiments.training import Recipe, Run
from ar_kernels.models import DigitNet


class Page(HTMLParser):
    """The text of a page and its images, decoded; anything it would fetch is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.images, self._skip = "", [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._skip += tag == "style"
        for name, value in attributes:
            assert name not in ("href", "srcset", "action")
            if name == "src":
                kind, _, content = value.partition(",")
                assert kind == "data:image/png;base64"
                self.images.append(imread(io.BytesIO(base64.b64decode(content))))

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._skip else data + " "


def save_run(folder: Path, net: Net, **identity: object) -> torch.nn.Module:
    """What a run leaves behind, untrained."""
    torch.manual_seed(0)
    model = net.build()
    with Run(folder, {**net.settings(), **identity}) as run:
        run.save(0, model, Recipe().optimizer(model))
    return model.eval()


def test_visualize_shows_what_the_model_returned(tmp_path, device):
    model = save_run(tmp_path / "run", Net("digitnet", attention_depth=2, attention_width=3), data="digits")
    options = ["visualize", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--count", "2"]
    assert command_line.main([*options, "--device", device.type]) == 0
    page = Page(tmp_path / "out" / "attention.html")
    images, labels = next(data.Clutter(data.bundled().test).test_batches(2))
    with torch.no_grad():
        details = model(images, return_details=True)
    assert len(page.images) == 2 * (1 + 2 * 2 * 3)  # the input once, and under every mask
    np.testing.assert_allclose(page.images[0][..., 0], images[0, 0].numpy(), atol=1 / 255)
    mask = figures.on_image(details.masks[0], model.attended_maps[0])[0, 0]
    np.testing.assert_allclose(page.images[2][..., 3], (mask / mask.max()).sqrt().numpy(), atol=2 / 255)
    for row in range(2):
        assert f"{labels[row]} → {details.output[row].argmax()}" in page.text
        for gamma, hypothesis in zip(details.global_gates[row], details.hypotheses[row]):
            share = 100 * hypothesis.softmax(dim=0).max()
            assert f"→ {hypothesis.argmax()} ({share:.0f} %)" in page.text and f"γ {gamma:.2f}" in page.text
        for gate in torch.stack(details.head_gates)[:, row].flatten():
            assert f"g {gate:.2f}" in page.text
    assert imread(tmp_path / "out" / "attention.png").std() > 0.05


def test_visualize_takes_any_model_and_images_of_the_users(tmp_path, torchvision):  # noqa: F811
    net = Net("torchvision/resnet18", num_classes=3, layers="layer2,layer4", attention_width=2, image_size=48)
    settings = {"mean": (120.0,) * 3, "std": (60.0,) * 3, "classes": ("cat", "<dog>", "eel")}
    model = save_run(tmp_path / "run", net, **settings)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    (tmp_path / "mine").mkdir()
    Image.fromarray(pixels).save(tmp_path / "mine" / "one.png")
    Image.fromarray(pixels[:48, :48]).save(tmp_path / "mine" / "two.png")
    options = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "mine")]
    assert command_line.main(["visualize", *options, "--device", "cpu"]) == 0
    page = Page(tmp_path / "out" / "attention.html")
    exact = torch.from_numpy(pixels[:48, :48].copy()).movedim(2, 0)[None].float()
    with torch.no_grad():
        details = model((exact - 120) / 60, return_details=True)
    shares = 100 * details.hypotheses[0].softmax(dim=1).amax(dim=1)
    for hypothesis, share in zip(details.hypotheses[0], shares):
        assert f"→ {settings['classes'][hypothesis.argmax()]} ({share:.0f} %)" in page.text
    assert page.images[0].shape[:2] == (48, 48) and len(page.images) == 2 * (1 + 2 * 2 * 2)


def test_masks_over_tokens_and_even_maps():
    peaks = torch.zeros(1, 2, 10)
    peaks[0, 0, 1], peaks[0, 1, 9] = 0.5, 0.2  # of 3×3 after a class token: the first and the last
    (laid,) = figures.overlays([peaks], (30, 30))
    assert laid[0, 0].argmax() // 30 < 10 and laid[0, 0].argmax() % 30 < 10 and laid.amax() == 1
    assert laid[0, 1].argmax() // 30 >= 20 and laid[0, 1, 20:, 20:].max() == 1
    with pytest.raises(ValueError, match="masks over tokens must be of a square of them"):
        figures.overlays([peaks[..., :7]], (30, 30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "nowhere"], "nowhere/checkpoint.pt is missing: nowhere must be a folder that train, ablate or demo"),
        (["--run", "run", "--images", "gone.png"], "gone.png is missing: --images takes files and folders"),
        (["--run", "run", "--images", "."], ". holds no picture"),
        (["--run", "run", "--images", "run/metrics.jsonl"], "run/metrics.jsonl is no picture that could be read"),
        (["--run", "plain"], "plain is a run of digitnet without attention"),
        (["--run", "run", "--count", "0"], "count must be at least 1, got 0"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    save_run(Path("run"), Net("digitnet", attention_depth=1), data="digits")
    save_run(Path("plain"), Net("digitnet", attention_depth=0), data="digits")
    assert command_line.main(["visualize", *options, "--device", "cpu", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not Path("out").exists()


def test_the_demos_runs_are_known(tmp_path):
    """Their identity names no model: it is the digit net."""
    torch.manual_seed(0)
    with Run(tmp_path, {"attention_depth": 2, "attention_width": 1, "data": "digits"}) as run:
        model = DigitNet(10, 2, 1)
        run.save(0, model, Recipe().optimizer(model))
    found, net, _ = load_run(tmp_path, torch.device("cpu"))
    assert isinstance(found, DigitNet) and (net.attention_depth, net.attention_width) == (2, 1)
    assert visualize.test_images(net, {"data": "digits"}, 3, "data")[0].shape == (3, 1, 40, 40)


# ---------------------------------------------------------------------------------------------- report


def test_the_report_tells_what_the_runs_did(tmp_path):
    run = tmp_path / "runs" / "warn"
    save_run(run, Net("warn-10-1", attention_width=2), data="cifar10")
    lines = [
        {"step": 10 * epoch, "epoch": epoch, "test_accuracy": value}
        for epoch, value in ((1, 0.5), (2, 0.75), (3, 0.625))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = {"images_per_second": 1234.5, "processes": 2, "device": "a GPU"}
    (run / "speed.json").write_text(json.dumps(speed))
    ablation = tmp_path / "runs" / "ablate"
    found = {"baseline": np.array([[0.5, 0.5], [0.5, 0.5]]), "ad4-aw4": np.array([[0.625, 0.625], [0.625, 0.625]])}
    ablation.mkdir()
    summary = ablate.summarise("digits", argparse.Namespace(epochs=3), found)
    (ablation / "figure4.json").write_text(json.dumps(summary))
    Image.new("RGB", (30, 20), "red").save(ablation / "figure4.png")
    part = ablation / "baseline" / "seed-0"
    save_run(part, Net("digitnet", attention_depth=0), data="digits")  # belongs to the figure
    (part / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")

    assert command_line.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    words = " ".join(page.text.split())
    assert "warn-10-1 AD 3 AW 2 cifar10 drawn 62.50 75.00 of 3 1,234 on 2 × a GPU" in words
    assert "attention above the baseline +12.50 +12.50 +12.50 +0.27 holds" in words
    assert "AD 4, AW 4 62.50 62.50 62.50 97.80 / 97.81" in words
    assert "seed-0" not in words and len(page.images) == 2
    assert any(image.shape[:2] == (20, 30) for image in page.images)


def test_the_report_names_the_papers_numbers_and_what_is_missing(tmp_path, capsys):
    run = tmp_path / "run"
    save_run(run, Net("warn-10-1"), data="cifar100")
    identity = Net("warn-28-10", num_classes=100).settings() | {"data": "cifar100"}
    assert report._row(run, identity, [0.8])[6] == "81.74"
    for folder, message in ((tmp_path / "gone", "is missing: report looks"), (tmp_path, "holds nothing that")):
        assert command_line.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 1
        assert message in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1, "test_accuracy": 0.5}\n')
    save_run(tmp_path / "good", Net("warn-10-1"), data="cifar100")
    (tmp_path / "good" / "metrics.jsonl").write_text('{"step": 1, "test_accuracy": 0.5}\n')
    (run / "checkpoint.pt").write_bytes(b"junk")
    assert command_line.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    words = " ".join(Page(tmp_path / "page.html").text.split())
    assert f"left out: {run / 'checkpoint.pt'} is damaged or no checkpoint" in words and "50.00 of 1" in words
