"""Helpers of the command line: one-line errors, sizes, and timelines of steps."""

import re
from collections.abc import Iterable

import typer
from rich.console import Console
from rich.text import Text

err = Console(stderr=True)


class one_line_errors:  # noqa: N801 - reads as the statement it is
    """Context manager that turns expected errors into one line on stderr and exit status 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and is_expected(error):
            err.print(f"flux2: {error}", highlight=False, markup=False)
            raise typer.Exit(1) from None


def is_expected(error: BaseException) -> bool:
    """Return whether ``error`` is shown as one line. Imports the classes only after a failure."""
    from flux2_shared.errors import Flux2Error  # noqa: PLC0415
    from generator_service.cli.client import GeneratorError  # noqa: PLC0415
    from generator_service.engine.imaging import NoProvenance  # noqa: PLC0415
    from generator_service.lemica import LemicaError  # noqa: PLC0415

    return isinstance(error, Flux2Error | GeneratorError | LemicaError | NoProvenance | OSError)


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``1024x768`` as (1024, 768)."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise typer.BadParameter("--size must be WIDTHxHEIGHT, for example 1024x768")
    return int(match[1]), int(match[2])


def step_timeline(steps: Iterable[bool]) -> Text:
    """Show computed steps as blocks and predicted ones as dots."""
    return Text.assemble(*(("█", "green") if is_computed else ("·", "dim") for is_computed in steps))
