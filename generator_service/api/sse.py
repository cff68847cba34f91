"""Server-sent events: progress of a generation, then its images or its error."""

import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from flux2_shared.errors import Flux2Error
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.web.problem import note_outcome, problem_of, unknown_error
from generator_service.api.responses import as_json
from generator_service.engine.events import (
    EncodingPrompt,
    Preview,
    PromptUpsampled,
    Queued,
    StepStarted,
)
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.request import Request as EngineRequest

logger = logging.getLogger("flux2")

MEDIA_TYPE = "text/event-stream"
PING_S = 15
AppStatus.enable_automatic_graceful_drain = False  # else SIGTERM would end streams before their images
Events = AsyncIterator[ServerSentEvent]


def do_nothing() -> None:
    pass


def stream(request: Request, events: Events, on_end: Callable[[], None] = do_nothing) -> EventSourceResponse:
    """Stream ``events``. An error is sent as the last event, with the problem details as its data.

    Args:
        request: the HTTP request, for the problem details.
        events: the events to send.
        on_end: called when the stream ends, even if the client disconnected before the first byte.
    """

    async def messages() -> AsyncIterator[ServerSentEvent]:
        try:
            async for event in events:
                yield event
        except Flux2Error as error:
            yield error_event(request, error)
        except Exception as error:
            logger.exception("a streamed generation failed")
            yield error_event(request, unknown_error(error))

    return _EventStream(messages(), on_end)


class _EventStream(EventSourceResponse):
    """Calls ``on_end`` in ``__call__``: an async generator that was never started does not run its ``finally``."""

    def __init__(self, messages: AsyncIterator[ServerSentEvent], on_end: Callable[[], None]) -> None:
        super().__init__(messages, ping=PING_S)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def json_event(name: str, data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(data), event=name)


def error_event(request: Request, error: Flux2Error) -> ServerSentEvent:
    """Return the last event of a stream that fails, whose code is also that of the request in metrics and logs."""
    note_outcome(request, error.code)
    return json_event("error", problem_of(request, error).model_dump())


def queue_fields(queued: Queued) -> dict[str, Any]:
    """Return the queue position and, if known, the waiting time as JSON fields."""
    return {"position": queued.position} | ({} if queued.seconds is None else {"wait_ms": round(1000 * queued.seconds)})


async def native_events(generation: Generation, threads: ThreadPool) -> Events:
    """Yield the progress events of a generation, then ``completed`` for each image.

    Images are encoded on ``threads``.
    """
    num_steps = generation.request.params.schedule.num_steps
    index = 0
    async for event in generation.events():
        match event:
            case StepStarted():
                step = {"index": event.index, "step": event.step, "total": num_steps, "computed": event.is_computed}
                eta = {} if event.seconds_left is None else {"eta_ms": round(1000 * event.seconds_left)}
                yield json_event("step", step | eta)
            case Queued():
                yield json_event("queued", queue_fields(event))
            case PromptUpsampled():
                yield json_event("rewritten", {"prompt": event.prompt})
            case EncodingPrompt():
                yield json_event("encoding", {})
            case Preview():
                yield await threads.run(preview_event, event)
            case GenerationResult():
                yield await threads.run(completed_event, generation.request, event, index)
                index += 1


def preview_event(preview: Preview) -> ServerSentEvent:
    fields = {"index": preview.index, "number": preview.number, "image": base64.b64encode(preview.file).decode()}
    return json_event("preview", fields)


def completed_event(request: EngineRequest, result: GenerationResult, index: int) -> ServerSentEvent:
    return json_event("completed", as_json(request, result) | {"index": index})
