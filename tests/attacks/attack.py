"""An attack, its figures against their bounds, and the table of all attacks."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

LIMIT_S = 150.0
"""An attack that takes longer has failed."""


class CannotRun(Exception):
    """This machine does not allow the attack; the message says what is missing."""


@dataclass
class Figures:
    """What an attack measured."""

    lines: list[str] = field(default_factory=list)
    has_failed: bool = False

    def at_most(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """Note a figure that must not exceed ``bound``."""
        self._note(f"{name} {number(value)} (<= {number(bound)}{unit})", holds=value <= bound)

    def at_least(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """Note a figure that must reach ``bound``."""
        self._note(f"{name} {number(value)} (>= {number(bound)}{unit})", holds=value >= bound)

    def one_of(self, name: str, value: object, allowed: tuple[object, ...]) -> None:
        """Note a value, such as a status, that must be one of the allowed ones."""
        self._note(f"{name} {value} ({' or '.join(map(str, allowed))})", holds=value in allowed)

    def _note(self, line: str, *, holds: bool) -> None:
        self.lines.append(line if holds else f"{line} !")
        self.has_failed |= not holds


Run = Callable[[Figures], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """One row of the table."""

    row: int
    name: str
    run: Run

    @property
    def promise(self) -> str:
        """What must hold."""
        return (self.run.__doc__ or "").split("\n\n")[0]


ATTACKS: list[Attack] = []


def attack(row: int, name: str) -> Callable[[Run], Run]:
    """Add the decorated function to the table."""

    def add(run: Run) -> Run:
        ATTACKS.append(Attack(row, name, run))
        return run

    return add


def execute(chosen: Attack) -> bool:
    """Run an attack and print its line; return whether the service held."""
    figures, began = Figures(), time.monotonic()
    try:
        asyncio.run(asyncio.wait_for(chosen.run(figures), LIMIT_S))
        verdict = "FAILED" if figures.has_failed else "held"
    except CannotRun as error:
        figures.lines.append(f"cannot run here: {error}")
        verdict = "skipped"
    except Exception as error:  # noqa: BLE001 - whatever stops an attack is a line, and the next one runs
        figures.lines.append(f"{type(error).__name__}: {error}"[:200])
        verdict = "FAILED"
    seconds = time.monotonic() - began
    print(f"{chosen.row} {chosen.name}: {', '.join(figures.lines)}: {verdict} [{seconds:.0f} s]", flush=True)
    return verdict != "FAILED"


def number(value: float) -> str:
    """A figure with three digits."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
