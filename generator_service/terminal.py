"""What the commands have in common: errors in one line, sizes, and strips of steps."""

import re
from collections.abc import Iterable

import typer
from rich.console import Console
from rich.text import Text

from generator_service.client import GeneratorError
from generator_service.imaging import NoProvenance
from generator_service.lemica import LemicaError
from shared.errors import Flux2Error

err = Console(stderr=True)


class one_line_errors:  # noqa: N801 - reads as the statement it is
    """Ends the program with one line, instead of a traceback, for what users can meet."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Turn known errors into a line and exit code 1."""
        if isinstance(error, Flux2Error | GeneratorError | LemicaError | NoProvenance | OSError):
            err.print(f"flux2: {error}", highlight=False, markup=False)
            raise typer.Exit(1) from None


def parse_size(text: str) -> tuple[int, int]:
    """``1024x768`` as (1024, 768)."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise typer.BadParameter("--size is WIDTHxHEIGHT, for example 1024x768")
    return int(match[1]), int(match[2])


def step_timeline(steps: Iterable[bool]) -> Text:
    """Computed steps as blocks, predicted ones as dots."""
    return Text.assemble(*(("█", "green") if is_computed else ("·", "dim") for is_computed in steps))
