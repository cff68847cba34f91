"""``POST /generate``: one picture, as the bytes of an image file."""

import base64
import secrets
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag

from generator_service.api import events
from generator_service.api.huggingface import InferenceRequest
from generator_service.api.schemas import GenerateRequest
from generator_service.api.state import GeneratorState, generator_state
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.job_store import Job
from generator_service.imaging import MEDIA_TYPES
from shared.web import CLIENT_CLOSED_REQUEST, owner_of, while_connected

router = APIRouter()
JSON_MEDIA_TYPE = "application/json"
MAX_KEY_CHARS = 255
"""Of an ``Idempotency-Key``."""


def dialect_of(value: object) -> str:
    """Which of the two bodies it is."""
    is_inference = isinstance(value, dict) and "inputs" in value
    return "<huggingface>" if is_inference or isinstance(value, InferenceRequest) else "<native>"


Body = Annotated[
    Annotated[GenerateRequest, Tag("<native>")] | Annotated[InferenceRequest, Tag("<huggingface>")],
    Discriminator(dialect_of),
]


@router.post("/", include_in_schema=False)
@router.post(
    "/generate",
    response_class=Response,
    responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}}},
)
async def generate(
    body: Body,
    request: Request,
    state: Annotated[GeneratorState, Depends(generator_state)],
    accept: Annotated[str, Header()] = "",
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """A picture; its seed, schedule and times are in the headers, and in the file itself.

    The body is our own or Hugging Face's. Several pictures are parts of a ``multipart/mixed`` body. With ``Accept:
    application/json`` pictures are base64 in JSON; with ``text/event-stream`` there is an event for every step, and the
    pictures are base64 in the last ones. With ``on_disconnect: keep`` it is a job, which its client may leave.
    """
    native = body.native() if isinstance(body, InferenceRequest) else body
    if native.on_disconnect == "keep":
        return await answer_of_job(await state.job(native, owner_of(request), idempotency_key), request, accept)
    return await answer(native, request, state, accept)


async def answer(body: GenerateRequest, request: Request, state: GeneratorState, accept: str) -> Response:
    """The images of a request, in the form that ``accept`` asks for."""
    is_stream = events.MEDIA_TYPE in accept
    generation = await state.submit(body, is_followed=is_stream)
    if is_stream:
        return events.respond(request, native_events(generation), generation.cancel)
    results = await images_while_connected(request, generation)
    return Response(status_code=CLIENT_CLOSED_REQUEST) if results is None else to_response(results, accept)


async def answer_of_job(job: Job, request: Request, accept: str) -> Response:
    """The images of a job, in the form that ``accept`` asks for; a client that leaves does not stop it."""
    if events.MEDIA_TYPE in accept:
        response: Response = events.respond(request, native_events(job.generation))
    else:
        results = await while_connected(request, job.generation.images())
        response = Response(status_code=CLIENT_CLOSED_REQUEST) if results is None else to_response(results, accept)
    response.headers["x-job-id"] = job.id
    return response


async def images_while_connected(request: Request, generation: Generation) -> list[GenerationResult] | None:
    """The results, or None if the client left before: then the generation is cancelled."""
    try:
        return await while_connected(request, generation.images())
    finally:
        generation.cancel()  # one that has ended stays as it is


def native_events(generation: Generation) -> events.Told:
    """The generation's events as this API sends them."""
    num_steps = generation.orders[0].schedule.num_steps
    return events.native_events(generation.events(), num_steps, as_json)


def to_response(results: Sequence[GenerationResult], accept: str) -> Response:
    """Finished pictures in the form that ``accept`` asks for."""
    if JSON_MEDIA_TYPE in accept:
        return JSONResponse({"images": [as_json(result) for result in results]})
    return one_file(results[0]) if len(results) == 1 else multipart(results)


def as_json(result: GenerationResult) -> dict[str, str]:
    """The picture as base64, beside what would be in the headers."""
    told = result_headers(result) | {"image": base64.b64encode(result.data).decode()}
    if result.comparison is not None:
        told["side_by_side"] = base64.b64encode(result.side_by_side).decode()
    return told


def one_file(result: GenerationResult) -> Response:
    """The picture's file is the body; of a comparison, both side by side."""
    return Response(result.file, media_type=MEDIA_TYPES[result.order.output_format], headers=result_headers(result))


def multipart(results: Sequence[GenerationResult]) -> Response:
    """Each picture is a part with its own headers (RFC 2046)."""
    boundary = f"picture-{secrets.token_hex(16)}"
    body = bytearray()
    for result in results:
        headers = {"content-type": MEDIA_TYPES[result.order.output_format]} | result_headers(result)
        lines = [f"--{boundary}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        body += "\r\n".join(lines).encode("latin-1") + result.file + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return Response(bytes(body), media_type=f"multipart/mixed; boundary={boundary}")


def result_headers(result: GenerationResult) -> dict[str, str]:
    """What the answer says beside the picture."""
    order, timings = result.order, result.timings
    known: dict[str, str] = {}
    if order.estimate_s is not None:
        known["x-estimate-ms"] = f"{1000 * order.estimate_s:.1f}"
    if order.is_upsampled and order.prompt is not None:
        known["x-revised-prompt"] = quote(order.prompt, safe=" ,;:'()!?")
    if result.comparison is not None:
        known["x-psnr-db"] = f"{result.comparison.psnr_db:.2f}"
        known["x-ssim"] = f"{result.comparison.ssim:.5f}"
    return known | {
        "x-seed": str(order.seed),
        "x-steps-computed": str(order.schedule.num_computed),
        "x-steps-total": str(order.schedule.num_steps),
        "x-schedule": str(order.schedule),
        "x-queue-ms": f"{1000 * timings.queue_s:.1f}",
        "x-encode-ms": f"{1000 * timings.encode_s:.1f}",
        "x-denoise-ms": f"{1000 * timings.denoise_s:.1f}",
        "x-decode-ms": f"{1000 * timings.decode_s:.1f}",
    }
