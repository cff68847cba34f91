"""The printed report: for terminals, pipes and programs."""

import io
import json

from rich.console import Console

from generator_service.doctor.check import Check, failed, ok, skipped, warning
from generator_service.doctor.report import as_json, is_ok, print_report

GOOD = [ok("torch", "2.13.0"), skipped("gpus", "none: the CPU is used"), warning("token", "none is set", "set one")]
BAD = [*GOOD, failed("model", "[red]broken[/red] " + "long " * 60, "run flux2 weights")]


def printed(checks: list[Check], *, is_terminal: bool) -> str:
    """The report as text."""
    out = io.StringIO()
    print_report(checks, Console(file=out, force_terminal=is_terminal, width=80, color_system=None))
    return out.getvalue()


def test_a_failed_check_makes_the_report_fail() -> None:
    """The report is ok unless a check failed."""
    assert is_ok(GOOD)
    assert not is_ok(BAD)
    assert is_ok([])


def test_json_has_every_check() -> None:
    """The JSON is one object whose checks have the four documented keys."""
    report = json.loads(as_json(BAD))
    assert report.keys() == {"ok", "checks"}
    assert report["ok"] is False
    assert report["checks"][0] == {"name": "torch", "status": "ok", "detail": "2.13.0", "fix": ""}
    assert [check["status"] for check in report["checks"]] == ["ok", "skipped", "warning", "failed"]


def test_without_a_terminal_each_check_is_one_line() -> None:
    """Without a terminal each check is one line, followed by its fix, without markup."""
    lines = printed(BAD, is_terminal=False).splitlines()
    assert lines[0].split() == ["ok", "torch", "2.13.0"]
    assert lines[3].split() == ["->", "set", "one"]
    assert "[red]broken[/red] long long" in lines[4]
    assert len(lines[4]) > 300
    assert lines[-1] == "1 check failed: the services would not start here as configured."


def test_on_a_terminal_the_report_is_a_table() -> None:
    """On a terminal the report is a table of its width."""
    text = printed(BAD, is_terminal=True)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("status", "check", "[red]broken[/red]", "-> run flux2 weights"):
        assert part in text


def test_warnings_are_counted() -> None:
    """The last line counts failures and warnings."""
    assert printed(GOOD, is_terminal=False).endswith("The services would start here, with 1 warning.\n")
    assert printed(GOOD[:1], is_terminal=False).endswith("The services would start here.\n")
    two = printed([*BAD, *BAD[-1:]], is_terminal=False)
    assert two.endswith("2 checks failed: the services would not start here as configured.\n")
