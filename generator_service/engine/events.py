"""Progress events of a generation."""

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL.Image import Image


@dataclass(frozen=True)
class Queued:
    """Where a generation waits."""

    position: int
    """How many others must end before its turn comes; with 0 it has come."""
    seconds: float | None
    """How long they will take, as far as it is known."""


@dataclass(frozen=True)
class EncodingPrompt:
    """The prompt is being embedded."""


@dataclass(frozen=True)
class PromptUpsampled:
    """The prompt was rewritten."""

    prompt: str


@dataclass(frozen=True)
class StepStarted:
    """A step of one of the images begins."""

    index: int
    """Which image, from 0."""
    step: int
    is_computed: bool
    seconds_left: float | None
    """Until this image is finished."""


@dataclass(frozen=True)
class Preview:
    """An image as far as it is known."""

    index: int
    number: int
    """Which preview of the image, from 0."""
    image: Image = field(repr=False)


ProgressEvent = Queued | PromptUpsampled | EncodingPrompt | StepStarted | Preview
ProgressCallback = Callable[[ProgressEvent], None]
