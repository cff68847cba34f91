"""Progress reports during the startup of a service."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Called with a short description of the current stage, from any thread."""


def ignore(_stage: str) -> None:
    """A ``Report`` that does nothing."""
