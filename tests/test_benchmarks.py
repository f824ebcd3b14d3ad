"""What the benchmarks stand on: what is measured, what a row may say, what is done again, and the verdicts."""

import itertools
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarks.__main__ as main
from ar_kernels import native, node, reference
from benchmarks import (
    bars,
    cases,
    compare,
    counters,
    experiments,
    first_call,
    floors,
    host,
    numerics,
    pooling,
    results,
    rivals,
    step,
    suite,
    taps,
    timing,
    training,
)
from benchmarks.cases import Case, Shard
from benchmarks.parity import _moved
from benchmarks.results import OtherResults, Results
from benchmarks.rivals import RIVALS, Rival

# ---------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_weights_move_to_the_next_number_of_the_dtype(dtype):
    """Up and down, through powers of two, and not at all from 0; running statistics stay."""
    value = torch.tensor([1.0, -1.0, 0.75, -3.5, 0.001, 2.0**-20, 0.0]).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    seen = set()
    for seed in range(20):
        moved = _moved({"w": value.float(), "running_mean": value.float()}, dtype, seed)
        assert torch.equal(moved["running_mean"], value.float())
        steps = moved["w"].to(dtype).view(bits).to(torch.int64) - value.view(bits).to(torch.int64)
        assert torch.equal(moved["w"].to(dtype).float(), moved["w"]), "not a number of the dtype"
        assert steps[:-1].abs().eq(1).all() and steps[-1] == 0
        seen |= set(steps[:-1].tolist())
    assert seen == {-1, 1}


# ---------------------------------------------------------------------------------------------- the suite

TINY = [Shard(Case(3, 8, 4, 5, 2), "float32", "channels_last"), Shard(Case(4, 16, 3, 5, 2), "bfloat16", "contiguous")]


def measured(shards, path=None, level="none", budget=None):
    """Runs the suite on the CPU; returns the rows that this run reported, and the shards that it left."""
    reported = []
    left = suite.run(shards, Results(path), suite.Plan(level), budget, "cpu", report=reported.append)
    return reported, left


def results_of(path, implementation, direction):
    """The one row of a layer in a file."""
    names = implementation, direction, "layer"
    rows = [r for r in Results(path).rows if (r["implementation"], r["direction"], r["operation"]) == names]
    assert len(rows) == 1
    return rows[0]


def rival(function):
    return Rival("mine", function, lambda weights, layout: weights)


def test_the_suite_holds_what_was_promised():
    names = [str(shard) for shard in cases.shards()]
    assert len(names) == len(set(names)) == (12 + 8) * 3 * 2
    assert names[0] == "128x160x32-L100-K4-bfloat16-channels_last"
    assert names[12].endswith("K4-bfloat16-contiguous") and names[24].endswith("K4-float16-channels_last")
    assert {shard.case.K for shard in cases.shards()[72:]} == {1, 2, 8, 16}


def test_selection():
    everything = cases.shards()
    assert cases.select(everything) == everything
    picked = cases.select(everything, ["dtype=bf16,layout=nchw,C=320|640,K=4"])
    assert [str(s) for s in picked] == [f"128x{c}-L100-K4-bfloat16-contiguous" for c in ("320x16", "640x8")]
    assert len(cases.select(everything, ["8x512x28,K4"])) == 6, "a batch of 8 only, not 128 or 256"
    union = cases.select(everything, ["N=1,dtype=bfloat16,layout=channels_last", "N=1024,dtype=bfloat16,layout=nhwc"])
    assert [shard.case.N for shard in union] == [1, 1024]
    assert cases.select(everything, [str(everything[5])]) == [everything[5]]
    with pytest.raises(ValueError, match="knows the fields N, C"):
        cases.select(everything, ["channels=320"])
    with pytest.raises(ValueError, match="fits none of 120 shards"):
        cases.select(everything, ["C=7"])


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("one", RIVALS, ids=lambda one: one.name)
def test_rivals_compute_the_layer(one, layout):
    """In float64, hypothesis and all gradients: the reference's, for 3×3 heads too, with the parameters permuted."""
    torch.manual_seed(0)
    memory_format, taps = cases.LAYOUTS[layout], (3, 3) if one.taps == 9 else ()
    shapes = [(3, 8, *taps), (5, 3, 8, *taps) if taps else (5, 24), (3, 8, *taps)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    z = torch.randn(2, 8, 5, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 5, dtype=torch.float64)
    flat = [weights[0], weights[1].flatten(1), weights[2]]
    truth = suite._with_gradients(lambda *inputs: reference.attention_module(*inputs)[0], [z, *flat], grad)
    expected = one.store((truth[2], truth[3].view_as(weights[1]), truth[4]), memory_format)
    mine = suite._with_gradients(one.function, [z, *one.store(tuple(weights), memory_format)], grad)
    for found, exact in zip(mine, [*truth[:2], *expected], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "suite.json"

    def killer(row):
        if row["C"] == TINY[1].case.C:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run(TINY, Results(path), suite.Plan("none"), None, "cpu", report=killer)
    kept = Results(path).rows
    assert {row["C"] for row in kept[:-1]} == {8}, "the first shard is whole, of the second there is one row"
    reported, left = measured(TINY, path)
    assert {row["C"] for row in reported} == {16} and not left
    rows = Results(path).rows
    assert len(rows) == len(kept) - 1 + len(reported)
    assert measured(TINY, path) == ([], [])
    for row in rows:
        assert row["correct"] is True and 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        if row["operation"] != "floor":
            both = row["direction"] == "forward_backward"
            assert row["floor_us"] == pytest.approx(row["read_us"] + both * row["copy_us"], abs=0.01)
            assert row["ours_us"] > 0


def test_rivals_are_added_beside_ours_of_the_same_process(tmp_path):
    path = tmp_path / "suite.json"
    measured(TINY[:1], path)
    reported, _ = measured(TINY[:1], path, "eager")
    assert {row["operation"] for row in reported} == {"layer", "floor"}, "attend is known already"
    layers = [row for row in reported if row["operation"] == "layer" and row["direction"] == "forward"]
    assert [row["implementation"] for row in layers] == ["ours", *(one.name for one in RIVALS)]
    assert layers[0]["ours_us"] == layers[0]["p50_us"]
    assert all(row["ours_us"] > 0 for row in layers)  # on a CPU of the same minute, in turns: a figure for each
    assert measured(TINY[:1], path, "eager") == ([], [])


def test_results_of_another_commit_are_not_added_to(tmp_path, monkeypatch):
    path = tmp_path / "suite.json"
    monkeypatch.setenv("AR_KERNELS_COMMIT", "one")
    measured(TINY[:1], path)
    monkeypatch.setenv("AR_KERNELS_COMMIT", "two")
    with pytest.raises(OtherResults, match="commit one, this is two"):
        Results(path)
    assert Results(path, fresh=True).rows == []


def test_two_processes_add_to_one_file(tmp_path):
    """As far as files go: neither knows the other's rows when it adds its own."""
    path = tmp_path / "suite.json"
    both = [Results(path), Results(path)]
    rows = rows_of(LARGE, 11, 34, [("matmul", 110.0)])
    for index, row in enumerate(rows):
        both[index % 2].add(row)
    assert Results(path).rows == rows


def test_parts_are_all_shards_once(capsys):
    shards = []
    for part in ("0/3", "1/3", "2/3"):
        assert main.main(["run", "--device", "cpu", "--list", "--part", part]) == 0
        shards += capsys.readouterr().out.split()
    assert sorted(shards) == sorted(map(str, cases.shards("cpu")))
    with pytest.raises(SystemExit):
        main.main(["run", "--list", "--part", "2/2"])
    assert "must be I/COUNT with I from 0 to COUNT - 1, got '2/2'" in capsys.readouterr().err


def test_an_only_head_is_right_though_its_score_has_no_gradient(monkeypatch):
    one_head = replace(TINY[0], case=replace(TINY[0].case, K=1))
    assert {row["correct"] for row in measured([one_head], level="eager")[0]} == {True}

    def strayed(z, mask, output, gate):
        return rivals.matmul(z, mask, output, gate) + 1e-6 * (gate - gate.detach()).sum()

    monkeypatch.setattr(suite, "RIVALS", (rival(strayed),))
    found = [row["correct"] for row in measured([one_head], level="eager")[0] if row["implementation"] == "mine"]
    assert found == [False, False]


@pytest.mark.parametrize(
    "wrong", [lambda o: 1.01 * o, lambda o: o * float("nan"), lambda o: o.flip(0)], ids=["scaled", "nan", "swapped"]
)
def test_a_wrong_result_has_no_speed(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "RIVALS", (rival(lambda *inputs: wrong(rivals.matmul(*inputs))),))
    path = tmp_path / "suite.json"
    reported, _ = measured(TINY[:1], path, "eager")
    found = [row for row in reported if row["implementation"] == "mine"]
    assert [row["correct"] for row in found] == [False, False]
    for row in found:
        assert not [name for name in row if name.startswith(("p20", "p50", "p80", "warm", "host"))]
        main._print_row(row)
        assert "WRONG RESULT" in (printed := capsys.readouterr().out) and " us" not in printed
    assert main.main(["bars", str(path)]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out


def test_a_gradient_of_another_image_is_seen(monkeypatch):
    def mixing(z, mask, output, gate):
        return rivals.matmul(z, mask, output, gate) + 0 * z[1].sum() + z[1].sum() - z[1].sum().detach()

    shard = Shard(Case(5, 8, 4, 5, 2), "float32", "contiguous")
    monkeypatch.setattr(suite, "RIVALS", (rival(mixing),))
    reported, _ = measured([shard], level="eager")
    assert [row["correct"] for row in reported if row["implementation"] == "mine"] == [False, False]


def test_what_stops_a_rival_is_recorded(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    def capturing(*inputs):
        try:
            raise RuntimeError("not permitted\nmore")
        finally:
            raise RuntimeError("the capture ended badly")

    for function, expected in (
        (full, {"out_of_memory": True}),
        (capturing, {"failed": "RuntimeError: the capture ended badly after RuntimeError: not permitted"}),
    ):
        monkeypatch.setattr(suite, "RIVALS", (rival(function),))
        reported, left = measured(TINY[:1], level="eager")
        found = [row for row in reported if row["implementation"] == "mine"]
        assert len(found) == 2 and not left, "an answer, so no other run asks again"
        for row in found:
            assert expected.items() <= row.items() and "p50_us" not in row


def test_memory_that_runs_out_later_spares_what_is_known(monkeypatch):
    def trains_only(*inputs):
        return rivals.matmul(*inputs)

    real = suite.measure_beside

    def measure_beside(calls, *rest):
        if calls[0].func.__name__ == "forward" and calls[0].func.__self__.name == "mine":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(calls, *rest)

    monkeypatch.setattr(suite, "measure_beside", measure_beside)
    monkeypatch.setattr(suite, "RIVALS", (rival(trains_only),))
    reported, _ = measured(TINY[:1], level="eager")
    found = {row["direction"]: row for row in reported if row["implementation"] == "mine"}
    assert found["forward_backward"]["p50_us"] > 0 and found["forward"]["out_of_memory"]


def test_budget(tmp_path):
    """A shard that cannot be expected to end is not begun; a compiled rival is skipped, and another run takes it."""
    assert measured(TINY, budget=suite.Budget(5))[1] == TINY
    path = tmp_path / "suite.json"
    budget = suite.Budget(100)
    budget.learn("compiled", 1000)
    reported, left = measured(TINY[:1], path, "compiled", budget)
    skipped = [row for row in reported if "skipped" in row]
    assert [row["implementation"] for row in skipped] == [f"{one.name}+compile" for one in RIVALS]
    assert left == TINY[:1] and "1000 s expected" in skipped[0]["skipped"]
    assert suite.Plan("eager").missing(TINY[0], Results(path)) == []
    both = results_of(path, "matmul+compile", "forward_backward") | {"p50_us": 5.0}
    Results(path).add({name: value for name, value in both.items() if name != "skipped"})
    suite.run(TINY[:1], Results(path), suite.Plan("compiled", ("matmul",), True), budget, "cpu")
    assert results_of(path, "matmul+compile", "forward_backward")["p50_us"] == 5.0, "what is known is not skipped over"
    assert "skipped" in results_of(path, "matmul+compile", "forward")
    assert len(suite.Plan("compiled").missing(TINY[0], Results(path))) == len(RIVALS) - 1


def test_plan():
    shard = cases.shards()[0]
    assert suite.Plan("none").wanted(shard) == []
    assert [name for name, _, _ in suite.Plan("eager").wanted(shard)] == [one.name for one in RIVALS]
    some = suite.Plan("max-autotune", ("sdpa",)).wanted(shard)
    assert [kind for _, kind, _ in some] == ["eager", "compiled", "max-autotune"]
    assert [directions for _, _, directions in some] == [suite.DIRECTIONS, *2 * [("forward_backward",)]]
    elsewhere = next(one for one in cases.shards() if one.layout == "contiguous")
    assert len(suite.Plan("max-autotune", ("sdpa",)).wanted(elsewhere)) == 2
    assert suite.Plan("compiled", (), True).wanted(shard)[-1][2] == suite.DIRECTIONS


def test_budget_remembers_the_slow_ones():
    now = iter([0.0, 10.0])
    budget = suite.Budget(60, clock=lambda: next(now))
    assert budget.left() == 50
    assert budget.expects("eager") == budget.FIRST_GUESS["eager"]
    budget.learn("eager", 10)
    budget.learn("eager", 1)
    assert budget.expects("eager") == 7


# ---------------------------------------------------------------------------------------------- reading results


def rows_of(shard, forward, both, others=()):
    """Rows as the suite writes them: ours at `forward` and `both` µs, floors 10 and 20 µs, other (name, µs) in f+b."""
    base = shard.fields() | {"bytes": shard.nbytes, "read_us": 10.0, "copy_us": 20.0, "correct": True}
    rows = []
    for operation in ("attend", "layer"):
        for direction, us in (("forward", forward), ("forward_backward", both)):
            names = {"operation": operation, "direction": direction, "implementation": "ours"}
            rows.append(base | names | {"p50_us": us, "ours_us": us, "floor_us": 10.0, "peak_mb": 5.0})
    for name, us in others:
        names = {"operation": "layer", "direction": "forward_backward", "implementation": name}
        rows.append(base | names | {"p50_us": us, "ours_us": both, "floor_us": 30.0, "peak_mb": 50.0})
    return rows


LARGE, SMALL = (Shard(cases.CASES[i], "bfloat16", "channels_last") for i in (3, 2))


def content_of(rows, commit="abc"):
    where = {"device": "a device", "torch": "1", "triton": "2", "python": "3", "commit": commit, "date": "today"}
    return where | {"rows": rows}


def test_bars():
    rows = rows_of(LARGE, 11, 34, [("matmul", 110.0), ("sdpa+compile", 101.0)]) + rows_of(SMALL, 16, 47)
    found = {(verdict.shard[1], verdict.what): verdict for verdict in bars.verdicts(rows)}
    large = LARGE.case.C
    assert found[large, "attend forward / read"].value == 1.1 and found[large, "attend forward / read"].met
    assert found[large, "attend backward / copy"].value == 1.15 and found[large, "attend backward / copy"].bar == 1.2
    layer = found[large, "layer f+b, rival / ours"]
    assert layer.note == "sdpa+compile" and layer.value == pytest.approx(101 / 34) and layer.bar == 3 and not layer.met
    assert found[large, "layer peak memory / rival"].value == 0.1
    small = SMALL.case.C
    assert not found[small, "attend forward / read"].met and found[small, "attend forward / read"].bar == 1.5
    assert found[small, "attend backward / copy"].value == 1.55 and found[small, "attend backward / copy"].met
    assert found[small, "layer f+b, rival / ours"].value is None
    assert [bars.layer_bar(size) for size in (64e6, 63e6, 20e6, 19e6)] == [3, 2, 2, 1.5]


def test_bars_of_a_file(tmp_path, capsys):
    results = Results(tmp_path / "new" / "a.json")
    for row in rows_of(LARGE, 11, 34, [("matmul", 200.0)]):
        results.add(row)
    assert main.main(["bars", str(results.path)]) == 0
    assert "MISS" not in (printed := capsys.readouterr().out) and "attend forward / read: 1 of 1 met" in printed
    results.add(rows_of(LARGE, 12, 34)[0])
    assert main.main(["bars", str(results.path)]) == 1


def test_compare_files(tmp_path, capsys):
    for name, both in (("a", 30.0), ("b", 45.0)):
        text = json.dumps(content_of(rows_of(LARGE, 10, both), commit=name))
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    assert main.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "A: a on a device" in printed and printed.count("B/A 1.500") == 4 and printed.count("B/A 1.000") == 4
    assert main.main(["compare", str(tmp_path / "a.json"), "HEAD"]) == 2
    assert "one is a file, the other is not" in capsys.readouterr().err


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout of its own with two commits, which compare takes for the project's."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for text in ("1", "2"):
        (root / "benchmarks" / "suite.py").write_text(text, encoding="utf-8")
        git("add", "-A")
        git("commit", "-q", "-m", text)
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def test_compare_commits(repository, monkeypatch, capsys):
    """Sides take turns, both run today's benchmarks, worktrees are gone afterwards."""
    order = []

    def measure(tree, commit, shard, device, file):
        assert (tree / "benchmarks" / "suite.py").read_text(encoding="utf-8") == "2"
        order.append(tree.name)
        us = {"A": 10.0, "B": 20.0}[tree.name]
        file.write_text(json.dumps(content_of(rows_of(LARGE, us, us * len(order)), commit)), encoding="utf-8")

    monkeypatch.setattr(compare, "_measure", measure)
    assert main.main(["compare", "HEAD~1", "HEAD", "--device", "cpu", "--only", "8x160x16,float32,nhwc"]) == 0
    assert order == ["A", "B", "B", "A"]
    assert "B/A 2.000" in capsys.readouterr().out
    trees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(trees.splitlines()) == 1


def test_compare_says_why_not(repository, monkeypatch, tmp_path, capsys):
    assert main.main(["compare", "HEAD", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    (repository / "benchmarks" / "suite.py").write_text("3", encoding="utf-8")
    assert main.main(["compare", "HEAD~1", "HEAD"]) == 2
    assert "commit them first" in capsys.readouterr().err
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    assert main.main(["compare", "HEAD~1", "HEAD"]) == 2
    assert "no history" in capsys.readouterr().err


def test_figures(tmp_path):
    figures = pytest.importorskip("benchmarks.figures", reason="matplotlib is not installed")
    others = [("matmul", 200.0), ("matmul+compile", 150.0), ("convolutions-3x3", 9000.0)]
    content = content_of(rows_of(LARGE, 11, 34, others) + rows_of(SMALL, 16, 47))
    for path in figures.draw(content, tmp_path, "bfloat16", "channels_last"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"performance-rivals.png", "performance-floor.png"}
    with pytest.raises(ValueError, match="no row of float16"):
        figures.draw(content, tmp_path, "float16", "channels_last")


# ---------------------------------------------------------------------------------------------- the others


def test_streaming_kernels(device):
    """The floors move every word, whatever grid they run on, of a map in any dense layout."""
    streams = pytest.importorskip("benchmarks.streams", reason="the triton package is not installed")
    z = torch.randn(3, 5, 7, 9, device=device).to(memory_format=torch.channels_last)
    source, sink = floors.flat(z), torch.zeros(1, device=device, dtype=torch.int32)
    assert source.numel() == z.numel() and source.data_ptr() == z.data_ptr()
    for programs in (1, 3, 8):
        target = torch.zeros_like(source)
        streams.copy_kernel[(programs,)](source, target, source.numel(), TILE=256, num_warps=4)
        assert torch.equal(source, target)
        streams.read_kernel[(programs,)](source, sink, source.numel(), TILE=256, num_warps=4)
    assert floors.flat(torch.zeros(3, dtype=torch.bfloat16)).numel() == 1, "a last odd half is left out"


@pytest.mark.gpu
def test_graph_counts_launches(device):
    x = torch.ones(512, 512, device=device)
    row = timing.measure([lambda: (x + 1) * 2] * 2, "cuda", warm=True)
    assert row["launches"] == 2 and row["peak_mb"] >= 2 * x.nbytes / 1e6
    assert 0 < row["p50_us"] < row["host_us"] + 1000


def test_rotation():
    assert timing.rotation(timing.ROTATED_BYTES) == 1 and timing.rotation(timing.ROTATED_BYTES // 2 - 1) == 3
    assert timing.rounds_within(1, 1) == timing.ROUNDS[1] and timing.rounds_within(1, 1e9) == timing.ROUNDS[0]


def test_host_time_of_every_contender():
    rows = host.measure("float32", "contiguous", "cpu", calls=2, count=2)
    ours = ["ours", "eager"] if native.why_not("cpu") is None else ["ours"]  # eager by name where it is not the default
    assert [row["implementation"] for row in rows] == ["x * 2", *ours, *(one.name for one in RIVALS)]
    assert all(row["correct"] and row["over_yardstick"] > 0 for row in rows[1:])
    parts = host.breakdown("float32", "contiguous", "cpu", calls=2, count=2)
    without = ["the layer without the node"] * (node.why_not() is None)
    names = ["PyTorch's cat of as many", "a Function in Python", "products with W_O", *without]
    assert [row["part"] for row in parts] == names
    assert all(row["host_us"] > 0 and row["one_thread_us"] > 0 for row in parts)


def test_step():
    row = step.compare("eager", blocks=2, steps=1, depth=10, width=1, batch=2, labels=3, device="cpu")
    assert len(row["plain_blocks_ms"]) == 2 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_step_in_several_processes(monkeypatch, tmp_path, capsys):
    sizes = "--depth 10 --width 1 --batch 2 --labels 3 --blocks 2 --steps 1 --device cpu"
    monkeypatch.setattr("sys.argv", ["step", *sizes.split(), "--processes", "2", "--out", str(tmp_path)])
    step.main()
    (path,) = tmp_path.glob("step-*.json")
    ratios = [row["ratio"] for row in json.loads(path.read_text())["rows"]]
    assert len(ratios) == 2 and f"median ratio {sum(ratios) / 2:.4f} of 2 processes" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["step", "--processes", "0"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err


def test_step_of_the_official_nets(monkeypatch):
    sizes = {"depth": 10, "width": 1, "batch": 2, "labels": 3, "device": "cpu", "model": "official"}
    row = step.compare("eager", blocks=2, steps=1, **sizes)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["official_form_ratio"] > 0 and len(row["official_form_blocks_ms"]) == 2
    monkeypatch.setattr(step.official_form.Gate, "forward", lambda gate, x: gate.gates(x))
    with pytest.raises(RuntimeError, match="the nets do not compute the same"):
        step.compare("eager", blocks=2, steps=1, **sizes)


def test_first_call(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_call, "_count_compilations", lambda: [])
    rows = first_call.first_calls("float32", "channels_last", "cpu")
    assert [row["what"] for row in rows] == [shape[0] for shape in first_call.SHAPES]
    assert all(row["seconds"] > 0 and row["new_binaries"] == 0 for row in rows)


def test_what_experiments_found_is_filed_with_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AR_KERNELS_COMMIT", "abc")
    for name, value in (("figure4", 1), ("speed", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"value": value}))
    files = [str(tmp_path / "figure4.json"), str(tmp_path / "speed.json")]
    filed = results.load(experiments.main(["found", *files, "--folder", str(tmp_path / "results")]))
    assert (filed["commit"], filed["figure4"], filed["speed"]) == ("abc", {"value": 1}, {"value": 2})


def test_how_fast_train_trains(tmp_path, monkeypatch):
    """Runs take turns; the first epoch is apart; ratios are over the first model, scaling over one process."""
    rates, asked = {("wrn", 1): 100.0, ("wrn", 2): 150.0, ("warn", 1): 90.0, ("warn", 2): 171.0}, []

    def run(words, **_):
        model, out = (words[words.index(name) + 1] for name in ("--model", "--out"))
        count = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
        assert words[words.index("--batch-size") + 1] == str(8 * count) and words[-2:] == ["--regulariser", "0"]
        asked.append((model, count))
        rate = rates[model, count]
        (Path(out) / "speed.json").write_text(json.dumps({"stretches": [1.0, rate, rate + 2, rate + 1]}))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run))
    words = ["--models", "wrn", "warn", "--processes", "1", "2", "--batches", "8", "--rounds", "2"]
    path = training.main([*words, "--folder", str(tmp_path), "--", "--regulariser", "0"])
    rows = json.loads(path.read_text())["rows"]
    assert asked == [("wrn", 1), ("wrn", 2), ("warn", 1), ("warn", 2)] * 2
    assert [row["images_per_second"] for row in rows] == [101, 151, 91, 172]
    assert rows[2]["ratio"] == round(91 / 101, 4) and rows[3]["ratio"] == round(172 / 151, 4)
    assert rows[3]["scaling"] == round(172 / 91, 4) and "scaling" not in rows[2] and "ratio" not in rows[0]
    assert rows[0]["first_epochs"] == [1, 1] and len(rows[0]["epochs"]) == 6
    failed = subprocess.CompletedProcess([], 1, "out", "no GPU")
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(RuntimeError, match="wrn, captured, 1 processes: out\nno GPU"):
        training.main([*words, "--folder", str(tmp_path)])


def test_counters_are_read_in_their_units():
    rows = counters.rows_of(
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__shared_mem_per_block",'
        '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"\n'
        '"","","usecond","Mbyte","Kbyte","inst"\n'
        '"0","held_kernel","1,041.09","105.59","213.50","1.35"\n'
        '"1","weight_sums_kernel","3.20","0.50","4.10","n/a"\n'
    )
    assert [row["kernel"] for row in rows] == ["held_kernel", "weight_sums_kernel"]
    first, second = rows
    assert (first["us"], first["memory_read_mb"], first["shared_kb"]) == (1041.09, 105.59, 213.5)
    assert first["memory_written_mb"] is None, "a counter that the chip does not have"
    assert first["stalls"]["barrier"] == 1.35 and second["stalls"]["barrier"] is None


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_3x3_layer_beside_its_rivals(layout):
    results = Results(None)
    taps.measure_shard(cases.Shard(Case(3, 12, 5, 7), "float32", layout), "cpu", results)
    ours, *rivals = results.rows
    assert ours["implementation"] == "ours" and {row["implementation"] for row in rivals} == {
        "matmul-3x3",
        "convolutions-3x3",
    }
    assert all(row["correct"] for row in results.rows), "checked against float64, gradients too"
    assert all(row["times_ours"] > 0 for row in rivals)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_attend_beside_average_pooling(layout):
    results = Results(None)
    pooling.measure_shard(cases.Shard(Case(3, 12, 5, 7), "float32", layout), "cpu", results)
    names = [(row["implementation"], row["direction"]) for row in results.rows]
    assert sorted(names) == sorted(itertools.product(("adaptive_avg_pool2d", "ours"), ("forward", "forward_backward")))
    assert all(row["correct"] and row["read_us"] > 0 for row in results.rows), "checked against float64, gradients too"
    assert all(row["over_pooling"] > 0 for row in results.rows if row["implementation"] == "ours")


def test_a_script_beside_the_suite_measures_the_cases_that_are_named(tmp_path, monkeypatch, capsys):
    def measured(shard, device, found):
        names = {"operation": device, "direction": "forward", "implementation": "ours"}
        found.add(shard.fields() | names)

    words = ["script", "--device", "cpu", "--only", "64x384,nchw", "--only", "8x512", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", words)
    suite.measure_cases("some", "what it does", measured)
    (path,) = (tmp_path / "new").glob("some-*.json")
    assert capsys.readouterr().out == f"{path}\n"
    rows = results.load(path)["rows"]
    assert [(row["C"], row["layout"]) for row in rows] == [
        (512, "channels_last"), (384, "contiguous"), (512, "contiguous")
    ]  # fmt: skip
    assert all(row["dtype"] == "bfloat16" and row["operation"] == "cpu" for row in rows)


# ---------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("taps", [1, 9])
def test_numerics_know_each_form_of_the_layer(taps, monkeypatch):
    """A right form errs by roundings in every result and gradient; one with a wrong gradient shows."""
    monkeypatch.setattr(numerics, "CASE", Case(2, 8, 4, 5))
    found = numerics.measure("float32", taps, "cpu")
    assert {"eager", "matmul" if taps == 1 else "matmul-3x3"} <= found.keys()
    assert all(0 < error < 1e-5 for errors in found.values() for error in errors)
    wrong = Rival("wrong", lambda z, *weights: RIVALS[0].function(z.detach() + 0 * z, *weights), RIVALS[0].store)
    monkeypatch.setattr(numerics, "RIVALS", (wrong,))
    errors = dict(zip(numerics.NAMES, numerics.measure("float32", 1, "cpu")["wrong"]))
    assert errors["d feature_map"] == pytest.approx(1.0) and errors["hypothesis"] < 1e-5


def test_the_docs_table_of_errors_is_that_of_the_results():
    content = json.loads((results.FOLDER / "numerics-x86_64.json").read_text(encoding="utf-8"))
    docs = (results.FOLDER.parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    assert "\n".join(numerics.table(content["rows"])) in docs


def test_free_memory_is_the_container_s_where_that_is_less(tmp_path):
    machine = timing.free_memory(tmp_path)
    assert machine > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert timing.free_memory(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert timing.free_memory(tmp_path) > 3000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("2000\n")
    assert timing.free_memory(tmp_path) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is not glibc")
def test_memory_that_is_freed_is_kept():
    """A block of 20 MB is of the heap, which is not trimmed, not one that is mapped for it and unmapped again."""
    code = (
        "import ctypes, sys, torch\n"
        "from benchmarks import timing\n"
        "assert sys.argv[1] == '0' or timing.keep_memory()\n"
        "names = 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()\n"
        "Info = type('Info', (ctypes.Structure,), {'_fields_': [(name, ctypes.c_size_t) for name in names]})\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mallinfo2.restype = Info\n"
        "before = libc.mallinfo2().hblkhd\n"
        "block = torch.empty(20 * 2**18).fill_(1)\n"
        "print(libc.mallinfo2().hblkhd - before)\n"
        "del block\n"
        "print(libc.mallinfo2().fordblks)\n"
    )
    folder = results.FOLDER.parents[1]
    run = [
        subprocess.run([sys.executable, "-c", code, keeps], capture_output=True, text=True, cwd=folder)
        for keeps in "01"
    ]
    if "mallinfo2" in run[0].stderr:
        pytest.skip("glibc before 2.33 has no mallinfo2")
    (mapped, _), (still_mapped, kept) = (map(int, one.stdout.split()) for one in run)
    assert mapped >= 20 * 2**20 and still_mapped == 0 and kept >= 20 * 2**20
