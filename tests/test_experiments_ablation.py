"""ablate and clutter: their statistics, runs and figures."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from test_experiments_data import write_folder

from ar_kernels.experiments import __main__ as command_line
from ar_kernels.experiments import ablate
from ar_kernels.experiments.statistics import paired_interval
from ar_kernels.experiments.training import Run

# ---------------------------------------------------------------------------------------------- statistics


def test_the_interval_is_students_where_draws_do_not_matter():
    """Three seeds, draws all alike: a t interval of three means with two degrees of freedom."""
    interval = paired_interval(np.array([[1.0, 1.0], [2.0, 2.0], [4.5, 4.5]]))
    half = 4.302653 * (3.25 / 3) ** 0.5
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)
    assert paired_interval(np.array([[1.0, 1.0], [2.0, 2.0], [4.5, 4.5]]).T) == pytest.approx(interval)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Crossed random effects of several sizes: at least 95 in 100 hold the true mean, to five standard errors."""
    chance, trials = np.random.default_rng(0), 1000
    for of_seed, of_draw, of_both in ((1, 0, 0.1), (0, 1, 0.1), (1, 1, 1), (0, 0, 1), (1, 0.3, 0.3)):
        held = 0
        for _ in range(trials):
            values = 0.7 + of_seed * chance.normal(size=(3, 1)) + of_draw * chance.normal(size=(1, 10))
            interval = paired_interval(values + of_both * chance.normal(size=(3, 10)))
            held += interval.low <= 0.7 <= interval.high
        assert held / trials > 0.95 - 5 * (0.95 * 0.05 / trials) ** 0.5


def test_verdicts():
    noise = np.random.default_rng(0).normal(size=(3, 10)) * 0.1
    assert paired_interval(1 + noise).verdict == "holds"
    assert paired_interval(noise - 1).verdict == "fails"
    assert paired_interval(noise).verdict == "undecided"
    for few in (noise[:1] + 1, noise[:, :1] + 1):
        interval = paired_interval(few)
        assert interval.verdict == "undecided" and interval.high == np.inf and interval.mean == few.mean()
    with pytest.raises(ValueError, match=r"differences must be \[seeds, draws\], got \[3\]"):
        paired_interval(noise[:, 0][:3])


# ---------------------------------------------------------------------------------------------- the commands

NAMES = ("baseline", "ad4-aw4")


def arguments(command: str, folder: Path, *more: str) -> list[str]:
    sizes = ("--seeds", "2", "--draws", "2", "--epochs", "2", "--batch-size", "10", "--device", "cpu")
    return [command, "--out", str(folder), "--data", str(folder.parent / "data"), *sizes, *more]


def accuracies(folder: Path, name: str) -> np.ndarray:
    paths = [folder / name / f"seed-{seed}" / "result.json" for seed in range(2)]
    return np.array([json.loads(path.read_text())["accuracies"] for path in paths])


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "speed.json")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_the_ablation_and_the_clutter_end_to_end(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "data", train=20, test=8, size=14)
    only = ("--only", *NAMES)
    assert command_line.main(arguments("ablate", tmp_path / "whole", *only)) == 0
    assert "undecided" in capsys.readouterr().out
    summary = json.loads((tmp_path / "whole" / "figure4.json").read_text())
    found = {name: accuracies(tmp_path / "whole", name) for name in NAMES}
    expected = paired_interval(found["ad4-aw4"] - found["baseline"])
    (row,) = summary["orderings"]
    assert row["ordering"] == "attention above the baseline" and row["paper"] == 0.0027
    assert (row["difference"], row["low"], row["verdict"]) == pytest.approx((*expected[:2], expected.verdict))
    assert summary["variants"]["baseline"]["of_draws"] == found["baseline"].tolist()
    assert imread(tmp_path / "whole" / "figure4.png").std() > 0.05

    finish, finished = Run.close, []

    def interrupted(run: Run) -> None:
        finish(run)
        finished.append(run)
        if len(finished) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "close", interrupted)
        assert command_line.main(arguments("ablate", tmp_path / "broken", *only)) == 130
    assert len(list((tmp_path / "broken").rglob("result.json"))) == 2
    trained = []
    with monkeypatch.context() as patch:
        whole = ablate._train_one
        patch.setattr(ablate, "_train_one", lambda *all: trained.append(all[1:3]) or whole(*all))
        assert command_line.main(arguments("ablate", tmp_path / "broken", *only, "--resume")) == 0
    assert trained == [("baseline", 1), ("ad4-aw4", 1)]
    assert contents(tmp_path / "broken").keys() == contents(tmp_path / "whole").keys()
    for path, content in contents(tmp_path / "whole").items():
        if path.suffix != ".pt":  # zip files carry times
            assert contents(tmp_path / "broken")[path] == content

    before = contents(tmp_path / "whole")
    assert command_line.main(arguments("ablate", tmp_path / "whole", *only, "--resume", "--mix", "log")) == 1
    assert "other settings: mix 'logit' (now 'log')" in capsys.readouterr().err
    assert contents(tmp_path / "whole") == before

    clutter = arguments("clutter", tmp_path / "clutter", "--runs", str(tmp_path / "whole"), "--distractors", "0", "20")
    assert command_line.main(clutter) == 0
    assert (
        "how much it grows" in capsys.readouterr().out and contents(tmp_path / "whole") == before
    )  # nothing trained anew
    measured = json.loads((tmp_path / "clutter" / "figure4e.json").read_text())
    assert measured["distractors"] == [0, 8, 20]
    for name in NAMES:  # at 8 distractors these are the ablation's own draws
        assert measured["errors"][name][1] == pytest.approx(1 - found[name].mean())
        growth = measured["errors"][name][2] - measured["errors"][name][1]
        assert measured["growth"][name] == pytest.approx(growth)
        assert np.allclose(measured["of_draws"][name][1], 1 - found[name])
    assert imread(tmp_path / "clutter" / "figure4e.png").std() > 0.05


def test_the_command_line_knows_all_variants():
    assert tuple(ablate.VARIANTS) == command_line._VARIANTS
    named = {name for panel in ablate.PANELS for name in panel.paper}
    assert named == set(ablate.VARIANTS)
    nets = [ablate.VARIANTS[name] for name in ablate.VARIANTS]
    assert len({(v.attention_depth, v.attention_width, v.gating, v.gated, v.regularised) for v in nets}) == len(nets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--capture",), "--capture needs a GPU"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, options, message):
    write_folder(tmp_path / "data")
    assert command_line.main(arguments("ablate", tmp_path / "out", *options)) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()
