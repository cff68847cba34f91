"""``POST /generate``: returns images as files, as JSON, or as a stream of events."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import Discriminator, Tag

from flux2_shared.web.accept import preferred_type
from flux2_shared.web.connection import CLIENT_CLOSED_REQUEST, while_connected
from flux2_shared.web.problem import name_fields
from generator_service.api import sse
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.dialects.huggingface import InferenceRequest
from generator_service.api.responses import RESULT_TYPES, to_response
from generator_service.api.routes.large_body import LargeBodyRoute
from generator_service.api.schemas import GenerateRequest
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.imaging import MEDIA_TYPES
from generator_service.engine.job_store import Job

router = APIRouter(route_class=LargeBodyRoute)
MAX_KEY_CHARS = 255
"""Longest ``Idempotency-Key``."""
RESPONSE_TYPES = (*RESULT_TYPES, sse.MEDIA_TYPE)


def dialect_of(value: object) -> str:
    is_inference = isinstance(value, dict) and "inputs" in value
    return "<huggingface>" if is_inference or isinstance(value, InferenceRequest) else "<native>"


Body = Annotated[
    Annotated[GenerateRequest, Tag("<native>")] | Annotated[InferenceRequest, Tag("<huggingface>")],
    Discriminator(dialect_of),
]


async def native_body(body: Body, http_request: Request) -> GenerateRequest:
    """Convert the body of any API that ``/generate`` and ``/jobs`` understand to the native one."""
    if not isinstance(body, InferenceRequest):
        return body
    native = body.native()
    name_fields(http_request, body.field_names)
    return native


NativeBody = Annotated[GenerateRequest, Depends(native_body)]


@router.post("/", include_in_schema=False)
@router.post(
    "/generate",
    response_class=Response,
    responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}}},
)
async def generate(
    body: NativeBody,
    http_request: Request,
    state: Annotated[GeneratorState, Depends(generator_state)],
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """Generate images. Seed, schedule and timings are in the headers, and the parameters in the metadata of the file.

    The body is the native one or that of Hugging Face's inference API. Several images are sent as ``multipart/mixed``.
    If ``Accept`` prefers ``application/json`` to files, images are base64 in JSON. If it prefers ``text/event-stream``,
    there is an event for every step, and the last events contain the images as base64. With ``on_disconnect: keep``
    the request becomes a job, which continues if the client disconnects.
    """
    media_type = preferred_type(http_request, RESPONSE_TYPES)
    if body.on_disconnect == "keep":
        job = await state.job(body, http_request.state.owner, idempotency_key)
        return await respond_to_job(job, http_request, state, media_type)
    is_stream = media_type == sse.MEDIA_TYPE
    generation = await state.submit(body, http_request.state.owner, is_followed=is_stream)
    if is_stream:
        events = sse.native_events(generation, state.responses)
        return sse.stream(http_request, events, on_end=generation.cancel)
    results = await while_connected(http_request, generation.images(), on_end=generation.cancel)
    return await respond(generation, results, state, media_type)


async def respond(
    generation: Generation, results: Sequence[GenerationResult] | None, state: GeneratorState, media_type: str
) -> Response:
    """Send ``results`` in the format of ``media_type``; None: the client has disconnected."""
    if results is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return await to_response(generation.request, results, media_type, state.responses)


async def respond_to_job(job: Job, http_request: Request, state: GeneratorState, media_type: str) -> Response:
    """Return the images of a job in the format of ``media_type``. The job continues if the client disconnects."""
    if media_type == sse.MEDIA_TYPE:
        response: Response = sse.stream(http_request, sse.native_events(job.generation, state.responses))
    else:
        results = await while_connected(http_request, job.generation.images())
        response = await respond(job.generation, results, state, media_type)
    response.headers["x-job-id"] = job.id
    return response
