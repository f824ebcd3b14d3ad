"""Faults of mutants.py can be planted: what they replace is there, once, and what comes out is still Python."""

import ast
import json

import mutants
import pytest

ALL = mutants.mutants()


def test_there_are_enough_and_all_are_different():
    assert len(mutants.HAND_MADE) >= 40 and len(ALL) == len(mutants.HAND_MADE) + mutants.SAMPLED
    assert len({mutant.id for mutant in ALL}) == len(ALL) and mutants.EQUIVALENT.keys() <= {m.id for m in ALL}


def test_an_edit_elsewhere_moves_none(tmp_path, monkeypatch):
    """The sampled are chosen by what their lines say: lines before them change neither choice nor names."""
    for file in mutants.SAMPLED_FROM:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        source = (mutants.ROOT / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text("# one line more\n" + source, encoding="utf-8")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    assert [mutant.id for mutant in mutants.mutants()] == [mutant.id for mutant in ALL]


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.id)
def test_it_can_be_planted(mutant):
    source = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutants.planted(source, mutant)
    assert changed != source
    if mutant.file.endswith(".py"):
        ast.parse(changed)
        groups = mutants.TESTS[mutant.file]
    else:
        groups = mutants.OF_NATIVE
    assert all((mutants.ROOT / word).is_file() for group in groups for word in group if word.endswith(".py"))


def test_the_report_counts_what_it_lists():
    """Each result is of the sources at its commit; a line that has changed since is another mutant, not run yet."""
    report = json.loads(mutants.REPORT.read_text(encoding="utf-8"))
    for kind in ("killed", "survived", "equivalent"):
        assert report[kind] == sum(result["outcome"] == kind for result in report["results"])
    assert all(result["reason"] for result in report["results"] if result["outcome"] == "equivalent")
