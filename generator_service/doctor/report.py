"""The report of ``flux2 doctor``: a table on a terminal, lines for a file or a pipe, or JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from generator_service.doctor.check import Check, Status

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.SKIPPED: "dim"}


def is_ok(checks: Sequence[Check]) -> bool:
    """Return whether the services would start."""
    return all(check.status is not Status.FAILED for check in checks)


def as_json(checks: Sequence[Check]) -> str:
    return json.dumps({"ok": is_ok(checks), "checks": [asdict(check) for check in checks]}, indent=1)


def print_report(checks: Sequence[Check], console: Console) -> None:
    """Print a table on a terminal, else lines of any length, which can be searched."""
    if console.is_terminal:
        console.print(_table(checks))
    else:
        for check in checks:
            fix = f"\n{'':<8} {'':<20} -> {check.fix}" if check.fix else ""
            text = f"{check.status:<8} {check.name:<20} {check.detail}{fix}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(summary(checks), markup=False, highlight=False, soft_wrap=True)


def summary(checks: Sequence[Check]) -> str:
    """Return the last line of the report."""
    counts = Counter(check.status for check in checks)
    if counts[Status.FAILED]:
        return f"{_count(counts[Status.FAILED], 'check')} failed: the services would not start here as configured."
    warnings = f", with {_count(counts[Status.WARNING], 'warning')}" if counts[Status.WARNING] else ""
    return f"The services would start here{warnings}."


def _table(checks: Sequence[Check]) -> Table:
    table = Table("status", "check", "result and fix", box=None, pad_edge=False)
    for check in checks:
        style = STYLES[check.status]
        detail = Text(check.detail, style="dim" if check.status is Status.SKIPPED else "")
        if check.fix:
            detail.append(f"\n-> {check.fix}", style="bold")
        table.add_row(Text(check.status, style=style), Text(check.name), detail)
    return table


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
