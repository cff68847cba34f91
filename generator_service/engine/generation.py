"""State of a request from its admission to its end: status, progress events, results, error.

Responses, streams and jobs read the same ``Generation``: a response waits for its images, streams and jobs follow its
events. It belongs to the event loop. The device thread only reads ``is_wanted`` and ``request`` and calls
``emit_threadsafe``.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from PIL.Image import Image

from flux2_shared.errors import DeadlineExceeded, Flux2Error
from generator_service.engine.events import EmittedEvent, ProgressEvent, Queued, StepStarted
from generator_service.engine.history import History
from generator_service.engine.request import Request
from generator_service.errors import JobCancelled
from generator_service.pipelines.params import Params

logger = logging.getLogger("flux2")


class Status(StrEnum):
    """Status of a generation."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Timings:
    """Time of an image in each stage, in seconds."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    expected_s: float | None = None
    """Estimate of denoising and decoding when the device began."""


@dataclass(frozen=True)
class Comparison:
    """Similarity of an image to the one without a cache."""

    psnr_db: float
    """Infinite for equal images."""
    ssim: float
    side_by_side: Image = field(repr=False)
    """The image without a cache on the left, the image on the right."""


@dataclass(frozen=True)
class GenerationResult:
    """An encoded image and the parameters it was generated with."""

    params: Params
    """Without tensors."""
    data: bytes
    timings: Timings
    comparison: Comparison | None = None
    """Set if the request has ``compare``."""
    side_by_side: bytes = b""
    """The encoded side-by-side image of the comparison."""

    @property
    def file(self) -> bytes:
        """The file for responses that contain one file."""
        return self.side_by_side if self.comparison else self.data


class Generation:
    """The images of one request, from its admission to its end.

    It ends once, by ``complete``, ``fail`` or ``cancel``; later calls do nothing.

    Args:
        request: what to generate. Events are only kept if ``request.is_followed``.
        on_end: called once, when the generation ends.
    """

    def __init__(self, request: Request, *, on_end: Callable[["Generation"], None]) -> None:
        self.request = request
        self.status = Status.QUEUED
        self.results: list[GenerationResult] = []
        self.error: Flux2Error | None = None
        self.admitted = time.monotonic()
        self.ended: float | None = None
        self.is_wanted = True
        """Whether the generation has not ended; may be read from any thread."""
        self.is_encoding = False
        """Whether it waits for the text encoder."""
        self.queued: Queued | None = None
        """The latest queue position."""
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._history = History()
        self._has_ended = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, work: "GenerationWork", admitted: float) -> None:
        """Run ``work`` in a task, and end with its results or its error, at the latest at the request's deadline.

        Args:
            work: returns the results. It is a function, because a task that is cancelled before its first step would
                never await a coroutine.
            admitted: when the request was admitted, by ``time.monotonic``; the deadline counts from then.
        """
        self.admitted = admitted
        self._driver = asyncio.create_task(self._drive(work))
        deadline_s = self.request.deadline_s
        if deadline_s is not None:
            error = DeadlineExceeded("the deadline passed before the images were finished")
            self._timer = self._loop.call_at(admitted + deadline_s, self.fail, error)

    @property
    def seconds(self) -> float:
        """Time from the admission to the end, or until now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.admitted

    @property
    def num_bytes(self) -> int:
        """Size of the results."""
        return sum(len(result.data) + len(result.side_by_side) for result in self.results)

    def emit(self, event: EmittedEvent) -> None:
        """Record an event. Must be called on the event loop's thread."""
        if not self.is_wanted:
            return
        if isinstance(event, Queued):
            self.queued = event
        elif isinstance(event, StepStarted):
            self.status = Status.RUNNING
        if self.request.is_followed:
            self._history.add(event)

    def emit_threadsafe(self, event: EmittedEvent) -> None:
        """Like ``emit``, from any thread."""
        self._loop.call_soon_threadsafe(self.emit, event)

    def complete(self, results: list[GenerationResult]) -> None:
        if self.is_wanted:
            self.results = results
            self._end(Status.COMPLETED)

    def fail(self, error: Flux2Error) -> None:
        self._end(Status.FAILED, error)

    def cancel(self) -> None:
        """End the generation; the device stops within one step."""
        self._end(Status.CANCELLED, JobCancelled("this job was cancelled"))

    async def images(self) -> list[GenerationResult]:
        """Wait for the results.

        Raises:
            JobCancelled: the generation was cancelled.
            Flux2Error: the generation failed with this error.
        """
        await self._has_ended.wait()
        if self.error is not None:
            raise self.error
        return self.results

    async def events(self) -> AsyncIterator[ProgressEvent | GenerationResult]:
        """Yield all events from the start, including future ones, and finally the results; see ``History``.

        Raises:
            JobCancelled: the generation was cancelled.
            Flux2Error: the generation failed with this error.
        """
        async for event in self._history.read():
            yield event
        if self.error is not None:
            raise self.error

    async def _drive(self, work: "GenerationWork") -> None:
        try:
            self.complete(await work(self))
        except Flux2Error as error:
            self.fail(error)
        except Exception:
            logger.exception("a generation failed")
            self.fail(Flux2Error("an internal error; the log contains more under this request id"))

    def _end(self, status: Status, error: Flux2Error | None = None) -> None:
        if not self.is_wanted:
            return
        self.status, self.error, self.ended, self.is_wanted = status, error, time.monotonic(), False
        self.request = self.request.without_tensors()
        if self._timer is not None:
            self._timer.cancel()
        if self._driver is not None and self._driver is not asyncio.current_task():
            self._driver.cancel()
        self._on_end(self)
        self._has_ended.set()
        self._history.close(self.results)


GenerationWork = Callable[[Generation], Coroutine[Any, Any, list[GenerationResult]]]
