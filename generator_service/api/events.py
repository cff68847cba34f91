"""``POST /generate`` with ``Accept: text/event-stream``: one event per step, then the pictures or what went wrong."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from generator_service.engine.events import (
    EncodingPrompt,
    Preview,
    ProgressEvent,
    PromptUpsampled,
    Queued,
    StepStarted,
)
from generator_service.engine.generation import GenerationResult
from generator_service.imaging import preview_file
from shared.errors import Flux2Error
from shared.web import problem_of, unknown_error

logger = logging.getLogger("flux2")

MEDIA_TYPE = "text/event-stream"
PING_S = 15
AppStatus.enable_automatic_graceful_drain = False  # a stream ends with its picture: SIGTERM must not cut it before
Told = AsyncIterator[tuple[str, dict[str, Any]]]
"""Names and data of events."""


def do_nothing() -> None:
    """A stream's end changes nothing."""


def respond(request: Request, told: Told, on_end: Callable[[], None] = do_nothing) -> EventSourceResponse:
    """A stream of events; what goes wrong in ``told`` becomes the last one, with the problem that would be the body.

    Args:
        request: the one that is answered.
        told: the events.
        on_end: called when the stream ends in whatever way, also when the client left before its first byte.
    """

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            async for name, data in told:
                yield ServerSentEvent(json.dumps(data), event=name)
        except Flux2Error as error:
            yield _failure(request, error)
        except Exception as error:
            logger.exception("a streamed generation failed")
            yield _failure(request, unknown_error(error))

    return _EventStream(events(), on_end)


class _EventStream(EventSourceResponse):
    """Calls back at its end. A generator that was never started would not run its ``finally``."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], on_end: Callable[[], None]) -> None:
        super().__init__(events, ping=PING_S)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _failure(request: Request, error: Flux2Error) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(problem_of(request, error).model_dump()), event="error")


def queued(place: Queued) -> dict[str, Any]:
    """What is told of a place in the line."""
    return {"position": place.position} | ({} if place.seconds is None else {"wait_ms": round(1000 * place.seconds)})


async def native_events(
    progress: AsyncIterable[ProgressEvent | GenerationResult],
    num_steps: int,
    as_json: Callable[[GenerationResult], dict[str, str]],
) -> Told:
    """``queued``, ``encoding``, ``step`` and ``preview`` as they happen, then for each picture ``completed``."""
    index = 0
    async for event in progress:
        if isinstance(event, StepStarted):
            step = {"index": event.index, "step": event.step, "total": num_steps, "computed": event.is_computed}
            eta = {} if event.seconds_left is None else {"eta_ms": round(1000 * event.seconds_left)}
            yield "step", step | eta
        elif isinstance(event, Queued):
            yield "queued", queued(event)
        elif isinstance(event, PromptUpsampled):
            yield "rewritten", {"prompt": event.prompt}
        elif isinstance(event, EncodingPrompt):
            yield "encoding", {}
        elif isinstance(event, Preview):
            image = await asyncio.to_thread(preview_file, event.image)
            yield "preview", {"index": event.index, "number": event.number, "image": base64.b64encode(image).decode()}
        else:
            yield "completed", as_json(event) | {"index": index}
            index += 1
