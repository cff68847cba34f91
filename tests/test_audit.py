"""The audit of the pinned packages, with databases that answer from a table."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.audit import CONSTRAINTS, Advisories, Ask, Unreachable, ask, audit
from tests.test_docs import ROOT

EMPTY_MIRROR: Advisories = {}
KNOWN = {"jinja2==2.4.1": ["PYSEC-2014-8"]}


def database_of(answers: dict[str, Advisories | str], asked: list[tuple[str, bool]] | None = None) -> Ask:
    """A way to ask databases that know the canary, or refuse with a reason."""

    def answer(database: str, requirements: Path) -> Advisories:
        if asked is not None:
            asked.append((database, requirements == CONSTRAINTS))
        known = answers[database]
        if isinstance(known, str):
            raise Unreachable(known)
        return known if requirements == CONSTRAINTS else (KNOWN if known is not EMPTY_MIRROR else {})

    return answer


@pytest.mark.parametrize(
    ("advisories", "accepted", "status"),
    [
        ({}, {}, 0),
        ({"torch==1.0": ["CVE-1", "CVE-2"]}, {}, 1),
        ({"torch==1.0": ["CVE-1", "CVE-2"]}, {"CVE-1": "only on Windows"}, 1),
        ({"torch==1.0": ["CVE-1"]}, {"CVE-1": "only on Windows"}, 0),
    ],
)
def test_a_vulnerability_fails_unless_it_is_accepted(
    capsys: pytest.CaptureFixture[str], advisories: Advisories, accepted: dict[str, str], status: int
) -> None:
    """Each advisory is printed with the package, and with the reason if it is accepted."""
    assert audit(database_of({"pypi": dict(advisories)}), accepted) == status
    printed = capsys.readouterr().out
    assert all(f"{package}: {each}" in printed for package, ids in advisories.items() for each in ids)
    assert all(reason in printed for reason in accepted.values())


@pytest.mark.parametrize("pypi", ["no route to host", EMPTY_MIRROR])
def test_without_a_database_the_audit_is_skipped(capsys: pytest.CaptureFixture[str], pypi: Advisories | str) -> None:
    """Each reason is printed, also that of an index that answers but has no advisories, and nothing fails."""
    assert audit(database_of({"pypi": pypi, "osv": "name not known"})) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("audit skipped: pypi: ")
    assert "osv: name not known" in printed


def test_the_next_database_is_asked() -> None:
    """The pinned packages are looked up once, in the first database that knows the canary."""
    asked: list[tuple[str, bool]] = []
    assert audit(database_of({"pypi": "closed", "osv": {"a==1": ["CVE-1"]}}, asked)) == 1
    assert asked == [("pypi", False), ("osv", False), ("osv", True)]


def test_a_failed_program_is_unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Output other than JSON is no answer; its last line is the reason."""
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nConnectionError: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Unreachable, match="ConnectionError: no network"):
        ask("pypi", tmp_path / "x")


def test_without_pip_audit_it_fails(tmp_path: Path) -> None:
    """A missing program is not mistaken for a missing network."""
    command = [sys.executable, "-S", "-I", str(ROOT / "tests" / "audit.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "audit: pip-audit is not installed; run make audit\n")
