"""What one check of ``flux2 doctor`` found, and how checks are kept from ending each other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

Value = TypeVar("Value")
MAX_CHARS = 500
"""The longest detail: messages of other programs can be long."""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """The services start, but something is slower, missing or not known."""
    FAILED = "failed"
    """A service would not start, or would never become ready."""
    SKIPPED = "skipped"
    """It does not apply here, or what it needs has failed."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """What to do, if anything is wrong."""


def ok(name: str, detail: str) -> Check:
    """A check that passed."""
    return Check(name, Status.OK, detail)


def warning(name: str, detail: str, fix: str = "") -> Check:
    """A check that found something which does not keep the services from starting."""
    return Check(name, Status.WARNING, detail, fix)


def failed(name: str, detail: str, fix: str) -> Check:
    """A service would not start, or would never become ready."""
    return Check(name, Status.FAILED, detail, fix)


def skipped(name: str, detail: str) -> Check:
    """A check that does not apply."""
    return Check(name, Status.SKIPPED, detail)


def isolated(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """What ``check`` finds. An exception that it did not expect becomes a warning, and other checks go on."""
    found: list[Check] = []
    try:
        found.extend(check())
    except Exception as error:  # noqa: BLE001 - a broken host breaks in ways that nobody has thought of
        found.append(warning(name, f"could not be checked ({describe(error)})"))
    return found


def attempt(name: str, read: Callable[[], Value], otherwise: Value) -> tuple[Value, list[Check]]:
    """What ``read`` finds out for other checks, else ``otherwise`` and a warning."""
    try:
        return read(), []
    except Exception as error:  # noqa: BLE001 - as above
        return otherwise, [warning(name, f"could not be found out ({describe(error)})")]


def describe(error: BaseException) -> str:
    """An exception's type and message, in one line."""
    return one_line(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters, and not too long."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    words = " ".join(printable.split())
    return words if len(words) <= MAX_CHARS else f"{words[: MAX_CHARS - 3]}..."
