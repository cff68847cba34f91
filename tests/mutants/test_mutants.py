"""The tool that applies mutants, on a toy; ``make mutants`` applies the real ones."""

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, Verdict, copy_tree, try_mutant
from tests.mutants.catalog import Mutant, StaleMutant, load_mutants

SOURCE = """
def double(number: int) -> int:
    if number < 0:
        number = -number
        return -2 * number
    return 2 * number


def negated(number: int) -> int:
    if number < 0:
        return -number
    return -number
"""
TEST = """
from toy import double

def test_positive_numbers_are_doubled() -> None:
    assert double(2) == 4
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A module and its test."""
    (tmp_path / "toy.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "test_toy.py").write_text(TEST, encoding="utf-8")
    return tmp_path


def toy(line: str, becomes: str, after: str = "") -> Mutant:
    """A mutant of the toy."""
    return Mutant("a mistake", "toy.py", line, becomes, ("test_toy.py",), after)


@pytest.mark.parametrize(
    ("mutant", "verdict", "detail"),
    [
        (toy("return 2 * number", "return 3 * number"), Verdict.KILLED, "test_toy.py::test_positive_numbers"),
        (toy("return -2 * number", "return -3 * number"), Verdict.SURVIVED, "1 passed"),
        (toy("return 2 * number", "return (2 * number"), Verdict.BROKEN, "test_toy.py"),
    ],
    ids=["detected", "undetected", "not Python"],
)
def test_a_mutant_is_detected_if_a_test_fails(tree: Path, mutant: Mutant, verdict: Verdict, detail: str) -> None:
    """Only a failing test detects a mutant, not tests that cannot be collected; the tree is restored."""
    outcome = try_mutant(mutant, tree)
    assert (outcome.verdict, outcome.is_noticed) == (verdict, verdict is Verdict.KILLED)
    assert detail in outcome.detail
    assert (tree / "toy.py").read_text(encoding="utf-8") == SOURCE


@pytest.mark.parametrize(
    ("line", "after", "number"),
    [("return -number", "if number < 0:", 10), ("return -number", "return -number", 11), ("number = -number", "", 3)],
)
def test_a_line_is_located_by_itself_or_by_the_line_before(line: str, after: str, number: int) -> None:
    """If a line occurs more than once, the line before it decides; indentation is ignored."""
    assert toy(line, "pass", after).find(SOURCE) == number


@pytest.mark.parametrize(
    ("line", "after"), [("return -number", ""), ("return 4 * number", ""), ("number = -number", "x")]
)
def test_a_line_that_does_not_occur_once_is_stale(tree: Path, line: str, after: str) -> None:
    """A mutant whose line is missing, or occurs more than once, is an error, and the file stays unchanged."""
    with pytest.raises(StaleMutant, match=r"toy\.py: found [02] times, not once"):
        toy(line, "pass", after).apply(tree)
    assert (tree / "toy.py").read_text(encoding="utf-8") == SOURCE


def test_the_mutants_are_valid_and_distinct() -> None:
    """Names are unique, each entry changes its line, and the files of its tests exist; there are at least 40."""
    mutants = load_mutants()
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 40
    for mutant in mutants:
        assert mutant.line == mutant.line.strip() != mutant.becomes
        assert mutant.tests
        assert all((ROOT / test.split("::")[0]).is_file() for test in mutant.tests), mutant.name


def test_no_mutant_is_stale() -> None:
    """The line that each mutant changes is in its file, once."""
    for mutant in load_mutants():
        mutant.find((ROOT / mutant.file).read_text(encoding="utf-8"))


def test_the_shared_package_of_a_copy_is_its_own(tmp_path: Path) -> None:
    """A mutant of the shared code is tried, not the code beside the copy."""
    tree = copy_tree(tmp_path / "copy")
    assert (tree / "flux2_shared" / "errors.py").resolve() == tree.resolve() / "shared" / "errors.py"
