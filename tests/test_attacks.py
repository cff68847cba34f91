"""The table of attacks; the attacks themselves are run by ``make attack``."""

import pytest

from tests.attacks.__main__ import main, matching
from tests.attacks.attack import ATTACKS, Attack, CannotRun, Figures, execute
from tests.test_docs import text_of

ROWS = range(21, 39)


def test_every_row_has_an_attack() -> None:
    """Each threat of the table has an attack, whose docstring says what must hold, in one line of the documents."""
    assert {each.row for each in ATTACKS} == set(ROWS)
    assert all(each.promise.endswith(".") for each in ATTACKS)
    assert len({each.name for each in ATTACKS}) == len(ATTACKS)
    document = text_of("docs/security.md")
    assert [each.name for each in ATTACKS if f"| {each.name} |" not in document] == []


def test_attacks_are_selected_by_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    """A word selects by name, row or module; one that selects nothing is an error with all names."""
    assert [each.row for each in matching("upsampler")] == [36, 36]
    assert {each.row for each in matching("22")} == {22}
    assert main(["no such attack"]) == 1
    assert "flood of readiness probes" in capsys.readouterr().out


def test_a_cheap_attack_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """An attack prints one line with its figures and what became of it."""
    assert main(["keys file without keys"]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "38 keys file without keys: GENERATOR: status 1 (1), lines 1 (<= 1), requests served 0 (<= 0)"
    )
    assert ": held [" in line
    assert summary == "1 of 1 held"


async def exceeds(figures: Figures) -> None:
    figures.at_most("growth", 51, 50, " MiB")
    figures.at_least("served", 1, 1)


async def ends(figures: Figures) -> None:
    raise OSError("reset")


async def is_impossible(figures: Figures) -> None:
    raise CannotRun("no namespaces")


@pytest.mark.parametrize(
    ("run", "line", "held"),
    [
        (exceeds, "growth 51 (<= 50 MiB) !, served 1 (>= 1): FAILED", False),
        (ends, "OSError: reset: FAILED", False),
        (is_impossible, "cannot run here: no namespaces: skipped", True),
    ],
)
def test_failures_are_printed(capsys: pytest.CaptureFixture[str], run: object, line: str, held: bool) -> None:
    """A figure beyond its bound is marked and fails the attack, as an exception does; a skipped one does not."""
    assert execute(Attack(99, "test", run)) is held  # type: ignore[arg-type]
    assert line in capsys.readouterr().out
