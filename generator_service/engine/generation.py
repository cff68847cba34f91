"""One request on its way: what has happened to it, and what came out.

Every view of a request reads the same ``Generation``: an answer waits for its images, a stream and a job follow its
events. It lives on the event loop; the device thread reads ``is_wanted`` and
``request`` and calls ``emit_threadsafe``, nothing else.
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
from generator_service.engine.events import Preview, ProgressEvent, Queued, StepStarted
from generator_service.engine.request import Request
from generator_service.errors import JobCancelled
from generator_service.pipelines.params import Params

logger = logging.getLogger("flux2")


class Status(StrEnum):
    """How far a generation is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Timings:
    """Where an image's time went, in seconds."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float


@dataclass(frozen=True)
class Comparison:
    """How close an image is to the one without a cache."""

    psnr_db: float
    """Infinite if they are equal."""
    ssim: float
    side_by_side: Image = field(repr=False)
    """On the left the image without a cache."""


@dataclass(frozen=True)
class GenerationResult:
    """An encoded image and the parameters it was generated with."""

    params: Params
    """Without tensors."""
    data: bytes
    timings: Timings
    comparison: Comparison | None = None
    """With the image without a cache, if the request wants one."""
    side_by_side: bytes = b""
    """The file of the comparison."""

    @property
    def file(self) -> bytes:
        """What a client gets that can take only one file."""
        return self.side_by_side if self.comparison else self.data


class Generation:
    """The images of one request, from its admission to its end.

    It ends once, by ``complete``, ``fail`` or ``cancel``; what happens later is ignored.

    Args:
        request: what to generate. Without ``is_followed`` no event is kept.
        on_end: called once, when it ends.
    """

    def __init__(self, request: Request, *, on_end: Callable[["Generation"], None]) -> None:
        self.request = request
        self.status = Status.QUEUED
        self.results: list[GenerationResult] = []
        self.error: Flux2Error | None = None
        self.ended: float | None = None
        self.is_wanted = True
        """Whether it has not ended; may be read from any thread."""
        self.queued: Queued | None = None
        """Its place in the queue."""
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._history: list[ProgressEvent | GenerationResult | None] = []
        self._changed = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, work: "GenerationWork") -> None:
        """Do ``work`` in a task, and end with its results or its error.

        Args:
            work: makes the results. A function, because a task that is cancelled at once never enters its coroutine.
        """
        self._driver = asyncio.create_task(self._drive(work))
        deadline_s = self.request.deadline_s
        if deadline_s is not None:
            error = DeadlineExceeded("the deadline passed before it was this request's turn")
            self._timer = self._loop.call_later(deadline_s, self.fail, error)

    def begin(self) -> None:
        """Its turn has come: the deadline is met."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def num_bytes(self) -> int:
        """The size of its results."""
        return sum(len(result.data) + len(result.side_by_side) for result in self.results)

    def emit(self, event: ProgressEvent) -> None:
        """Note what happens, on the event loop's thread."""
        if not self.is_wanted:
            return
        if isinstance(event, Queued):
            self.queued = event
        elif isinstance(event, StepStarted):
            self.status = Status.RUNNING
        if self.request.is_followed:
            self._history.append(event)
            self._wake()

    def emit_threadsafe(self, event: ProgressEvent) -> None:
        """As ``emit``, from any thread."""
        self._loop.call_soon_threadsafe(self.emit, event)

    def complete(self, results: list[GenerationResult]) -> None:
        """End with all images."""
        if self.is_wanted:
            self.results = results
            self._history.extend(results)
            self._end(Status.COMPLETED)

    def fail(self, error: Flux2Error) -> None:
        """End with an error."""
        self._end(Status.FAILED, error)

    def cancel(self) -> None:
        """End because nobody wants it any more; the device stops within one step."""
        self._end(Status.CANCELLED, JobCancelled("this job was cancelled"))

    async def images(self) -> list[GenerationResult]:
        """The results, once they are there.

        Raises:
            JobCancelled: it was cancelled.
            Flux2Error: what it failed with.
        """
        await self._has_ended.wait()
        if self.error is not None:
            raise self.error
        return self.results

    async def events(self) -> AsyncIterator[ProgressEvent | GenerationResult]:
        """Everything from the start, then what happens as it does, at last the results.

        Raises:
            JobCancelled: it was cancelled.
            Flux2Error: what it failed with.
        """
        position = 0
        while True:
            changed = self._changed
            while position < len(self._history):
                event = self._history[position]
                position += 1
                if event is not None:
                    yield event
            if not self.is_wanted:
                break
            await changed.wait()
        if self.error is not None:
            raise self.error

    async def _drive(self, work: "GenerationWork") -> None:
        try:
            self.complete(await work(self))
        except Flux2Error as error:
            self.fail(error)
        except Exception:
            logger.exception("a generation failed")
            self.fail(Flux2Error("an internal error; the request id tells the operator more"))

    def _end(self, status: Status, error: Flux2Error | None = None) -> None:
        if not self.is_wanted:
            return
        self.status, self.error, self.ended, self.is_wanted = status, error, time.monotonic(), False
        # What is large or past goes: a job is kept for long. Readers keep count, so the places stay.
        self._history = [None if isinstance(event, Preview | Queued) else event for event in self._history]
        self.request = self.request.without_tensors()
        self.begin()
        if self._driver is not None and self._driver is not asyncio.current_task():
            self._driver.cancel()
        self._on_end(self)
        self._has_ended.set()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


GenerationWork = Callable[[Generation], Coroutine[Any, Any, list[GenerationResult]]]
