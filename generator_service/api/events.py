"""``POST /generate`` with ``Accept: text/event-stream``: one event per step, then the picture or what went wrong."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from generator_service.engine import Delivery, PictureListener
from shared.errors import Flux2Error
from shared.web import problem_of, unknown_error

logger = logging.getLogger("flux2")

MEDIA_TYPE = "text/event-stream"
PING_S = 15
AppStatus.enable_automatic_graceful_drain = False  # a stream ends with its picture: SIGTERM must not cut it before


async def stream(
    request: Request,
    work: Callable[[PictureListener], Coroutine[Any, Any, list[Delivery]]],
    num_steps: int,
    headers: Callable[[Delivery], dict[str, str]],
) -> EventSourceResponse:
    """Run ``work`` and tell its steps as they happen.

    Events: ``step`` (index of the picture, step, total, computed), then for each picture ``completed`` (index, image as
    base64, and what else would be in the headers), or ``error`` (the problem that would be the body). A client that
    leaves cancels the work.

    Raises:
        Busy: the queue is full; nothing was sent yet.
    """
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[tuple[int, int, bool] | None] = asyncio.Queue()

    def on_step(index: int, step: int, is_computed: bool) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, (index, step, is_computed))

    task = asyncio.create_task(work(on_step))
    task.add_done_callback(lambda _task: steps.put_nowait(None))
    await asyncio.sleep(0)  # the work takes its place in the queue, or is refused
    if task.done():
        task.result()

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            while (begun := await steps.get()) is not None:
                index, step, is_computed = begun
                yield _event("step", {"index": index, "step": step, "total": num_steps, "computed": is_computed})
            for index, delivery in enumerate(task.result()):
                picture = {"index": index, "image": base64.b64encode(delivery.data).decode()}
                yield _event("completed", headers(delivery) | picture)
        except Flux2Error as error:
            yield _event("error", problem_of(request, error).model_dump())
        except Exception as error:
            logger.exception("a streamed generation failed")
            yield _event("error", problem_of(request, unknown_error(error)).model_dump())
        finally:
            task.cancel()

    return EventSourceResponse(events(), ping=PING_S)


def _event(name: str, data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(data), event=name)
