"""Faults of mutants.py can be planted: what they replace is there, once, and what comes out is still Python."""

import ast
import json

import mutants
import pytest

ALL = mutants.mutants()


def test_there_are_enough_and_all_are_different():
    assert len(mutants.HAND_MADE) >= 40 and len(ALL) == len(mutants.HAND_MADE) + mutants.SAMPLED
    assert len({mutant.id for mutant in ALL}) == len(ALL) and mutants.EQUIVALENT.keys() <= {m.id for m in ALL}


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
    """Its mutants are of the sources as they were at their commit: a change of a file moves the sampled ones."""
    report = json.loads(mutants.REPORT.read_text(encoding="utf-8"))
    for kind in ("killed", "survived", "equivalent"):
        assert report[kind] == sum(result["outcome"] == kind for result in report["results"])
    assert all(result["reason"] for result in report["results"] if result["outcome"] == "equivalent")
