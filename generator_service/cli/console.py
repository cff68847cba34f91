"""Helpers of the command line: one-line errors, sizes, and timelines of steps."""

import math
import re
from collections.abc import Iterable

import typer
from rich.console import Console
from rich.text import Text

err = Console(stderr=True)
USAGE_STATUS = 2
"""Exit status after an invalid argument."""


class one_line_errors:  # noqa: N801 - reads as the statement it is
    """Context manager that turns expected errors into one line on stderr and exit status 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, typer.BadParameter):
            print_error(error.message)
            raise typer.Exit(USAGE_STATUS) from None
        if error is not None and is_expected(error):
            print_error(message_of(error))
            raise typer.Exit(1) from None


def print_error(message: str) -> None:
    """Print one line, however wide the terminal is."""
    err.print(f"flux2: {' '.join(message.split())}", highlight=False, markup=False, soft_wrap=True)


def message_of(error: BaseException) -> str:
    """Return the message of an expected error; settings that are invalid are named."""
    from pydantic import ValidationError  # noqa: PLC0415

    if not isinstance(error, ValidationError):
        return str(error)
    return "bad setting: " + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def is_expected(error: BaseException) -> bool:
    """Return whether ``error`` is shown as one line. Imports the classes only after a failure."""
    from pydantic import ValidationError  # noqa: PLC0415

    from flux2_shared.errors import Flux2Error  # noqa: PLC0415
    from generator_service.cli.client import GeneratorError  # noqa: PLC0415
    from generator_service.engine.imaging import NoProvenance  # noqa: PLC0415
    from generator_service.lemica import LemicaError  # noqa: PLC0415

    return isinstance(error, Flux2Error | GeneratorError | LemicaError | NoProvenance | OSError | ValidationError)


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``1024x768`` as (1024, 768)."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match:
        raise typer.BadParameter("--size must be WIDTHxHEIGHT, for example 1024x768")
    return int(match[1]), int(match[2])


def finite(option: str, value: float) -> float:
    """Return ``value``; raise ``BadParameter`` if it is infinite or not a number."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{option} must be a finite number, not {value}")
    return value


def step_timeline(steps: Iterable[bool]) -> Text:
    """Show computed steps as blocks and predicted ones as dots."""
    return Text.assemble(*(("█", "green") if is_computed else ("·", "dim") for is_computed in steps))
