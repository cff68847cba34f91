"""What happens to a request on its way, for whoever follows it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL.Image import Image

from generator_service.line import Queued


@dataclass(frozen=True)
class Encoding:
    """A request's prompt is being embedded."""


@dataclass(frozen=True)
class Rewritten:
    """A request's prompt was rewritten."""

    prompt: str


@dataclass(frozen=True)
class StepBegun:
    """A step of one of a request's pictures begins."""

    index: int
    """Which picture, from 0."""
    step: int
    is_computed: bool
    seconds_left: float | None
    """Until this picture is there."""


@dataclass(frozen=True)
class Preview:
    """What one of a request's pictures will be, as far as it is known."""

    index: int
    number: int
    """Which preview of the picture, from 0."""
    image: Image = field(repr=False)


Happening = Queued | Rewritten | Encoding | StepBegun | Preview
Listener = Callable[[Happening], None]
"""Called on the device thread, and with what happens before on the event loop's."""


def ignore(_happening: Happening) -> None:
    """Nobody listens."""
