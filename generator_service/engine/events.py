"""Progress events of a generation."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Queued:
    """Position of a generation in the queue."""

    position: int
    """Number of generations that must end first; 0 if its turn has come."""
    seconds: float | None
    """Estimated time until its turn; None if unknown."""


@dataclass(frozen=True)
class EncodingPrompt:
    """The prompt is being embedded."""


@dataclass(frozen=True)
class PromptUpsampled:
    """The prompt was rewritten."""

    prompt: str


@dataclass(frozen=True)
class StepStarted:
    """A denoising step of an image has started."""

    index: int
    """Index of the image, from 0."""
    step: int
    is_computed: bool
    seconds_left: float | None
    """Estimated time until this image is finished; None if unknown."""


@dataclass(frozen=True)
class Preview:
    """A preview of an unfinished image."""

    index: int
    number: int
    """Index among the previews of the image, from 0."""
    file: bytes = field(repr=False)
    """A JPEG file."""


@dataclass(frozen=True)
class PendingPreview:
    """A preview that is being encoded on another thread. Readers of the events get the ``Preview``."""

    index: int
    preview: Future[Preview]


ProgressEvent = Queued | PromptUpsampled | EncodingPrompt | StepStarted | Preview
EmittedEvent = ProgressEvent | PendingPreview
ProgressCallback = Callable[[ProgressEvent], None]
