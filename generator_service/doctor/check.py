"""The result of a check, and the isolation of checks from each other's errors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

Value = TypeVar("Value")
MAX_CHARS = 500
"""The maximum length of a detail, since messages of other programs can be long."""


class Status(StrEnum):
    """The status of a check."""

    OK = "ok"
    WARNING = "warning"
    """The services start, but something is slow, missing or unknown."""
    FAILED = "failed"
    """A service would not start, or would never become ready."""
    SKIPPED = "skipped"
    """The check does not apply, or a check that it depends on has failed."""


@dataclass(frozen=True)
class Check:
    """The result of one check: a line of the report."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """How to fix the problem, if there is one."""


def ok(name: str, detail: str) -> Check:
    return Check(name, Status.OK, detail)


def warning(name: str, detail: str, fix: str = "") -> Check:
    return Check(name, Status.WARNING, detail, fix)


def failed(name: str, detail: str, fix: str) -> Check:
    return Check(name, Status.FAILED, detail, fix)


def skipped(name: str, detail: str) -> Check:
    return Check(name, Status.SKIPPED, detail)


def isolated(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """Run checks; an unexpected exception becomes a warning, so that other checks continue."""
    checks: list[Check] = []
    try:
        checks.extend(check())
    except Exception as error:  # noqa: BLE001 - a broken host fails in unforeseen ways
        checks.append(warning(name, f"could not be checked ({describe(error)})"))
    return checks


def attempt(name: str, read: Callable[[], Value], default: Value) -> tuple[Value, list[Check]]:
    """Read a value for other checks; after an unexpected exception return ``default`` and a warning."""
    try:
        return read(), []
    except Exception as error:  # noqa: BLE001 - as above
        return default, [warning(name, f"could not be determined ({describe(error)})")]


def describe(error: BaseException) -> str:
    """Return the type and message of an exception in one line."""
    return one_line(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__


def one_line(text: str) -> str:
    """Replace line breaks and control characters with spaces, and truncate long text."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    words = " ".join(printable.split())
    return words if len(words) <= MAX_CHARS else f"{words[: MAX_CHARS - 3]}..."
