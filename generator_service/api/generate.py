"""``POST /generate``: one picture, as the bytes of an image file."""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from generator_service.api import events
from generator_service.api.schemas import GenerateRequest
from generator_service.engine import Delivery, Engine
from generator_service.imaging import MEDIA_TYPES
from generator_service.lemica import Shelf
from generator_service.order import Order, make_order
from generator_service.settings import GeneratorSettings
from shared.web import CLIENT_CLOSED_REQUEST, while_connected

router = APIRouter()


@dataclass(frozen=True)
class GeneratorState:
    """What the lifespan of the app owns."""

    settings: GeneratorSettings
    engine: Engine
    shelf: Shelf
    embedding_shape: tuple[int, int]
    """Tokens and width of a prompt embedding."""


def generator_state(request: Request) -> GeneratorState:
    """The state that the lifespan made."""
    state: GeneratorState = request.app.state.generator
    return state


@router.post(
    "/generate",
    response_class=Response,
    responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}}},
)
async def generate(
    body: GenerateRequest,
    request: Request,
    state: Annotated[GeneratorState, Depends(generator_state)],
    accept: Annotated[str, Header()] = "",
) -> Response:
    """A picture; its seed, schedule and times are in the headers, and in the file itself.

    With ``Accept: text/event-stream``: an event for every step, and the picture as base64 in the last one.
    """
    order = await asyncio.to_thread(
        make_order, body, state.settings, state.engine.model, state.shelf, state.embedding_shape
    )
    if events.MEDIA_TYPE in accept:
        deliver = partial(state.engine.deliver, order)
        return await events.stream(request, deliver, order.schedule.num_steps, partial(result_headers, order))
    delivery = await while_connected(request, state.engine.deliver(order))
    if delivery is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(delivery.data, media_type=MEDIA_TYPES[order.output_format], headers=result_headers(order, delivery))


def result_headers(order: Order, delivery: Delivery) -> dict[str, str]:
    """What the answer says beside the picture."""
    timings = delivery.timings
    return {
        "x-seed": str(order.seed),
        "x-steps-computed": str(order.schedule.num_computed),
        "x-steps-total": str(order.schedule.num_steps),
        "x-schedule": str(order.schedule),
        "x-queue-ms": f"{1000 * timings.queue_s:.1f}",
        "x-encode-ms": f"{1000 * timings.encode_s:.1f}",
        "x-denoise-ms": f"{1000 * timings.denoise_s:.1f}",
        "x-decode-ms": f"{1000 * timings.decode_s:.1f}",
    }
