"""What hears how far a service is on its way to being ready."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Gets a few words about what the service does now; may be called from any thread."""


def ignore(_stage: str) -> None:
    """A ``Report`` that nobody reads."""
