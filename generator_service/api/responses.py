"""Finished images as HTTP responses: one file, several parts, or JSON."""

import base64
import secrets
from collections.abc import Sequence
from urllib.parse import quote

from fastapi import Response
from fastapi.responses import JSONResponse

from flux2_shared.thread_pool import ThreadPool
from generator_service.engine.generation import GenerationResult
from generator_service.engine.imaging import MEDIA_TYPES
from generator_service.engine.request import Request

JSON_MEDIA_TYPE = "application/json"


async def to_response(
    request: Request, results: Sequence[GenerationResult], accept: str, threads: ThreadPool
) -> Response:
    """The response that ``accept`` asks for; one that has to be encoded is encoded on ``threads``."""
    if JSON_MEDIA_TYPE in accept:
        return await threads.run(json_response, request, results)
    if len(results) == 1:
        return one_file(request, results[0])
    return await threads.run(multipart, request, results)


def json_response(request: Request, results: Sequence[GenerationResult]) -> Response:
    """All images in one JSON object."""
    return JSONResponse({"images": [as_json(request, result) for result in results]})


def as_json(request: Request, result: GenerationResult) -> dict[str, str]:
    """The image as base64, and the fields that are headers otherwise."""
    fields = result_headers(request, result) | {"image": base64.b64encode(result.data).decode()}
    if result.comparison is not None:
        fields["side_by_side"] = base64.b64encode(result.side_by_side).decode()
    return fields


def one_file(request: Request, result: GenerationResult) -> Response:
    """The image's file is the body; of a comparison, both images side by side."""
    return Response(result.file, media_type=MEDIA_TYPES[request.output_format], headers=result_headers(request, result))


def multipart(request: Request, results: Sequence[GenerationResult]) -> Response:
    """Each image is a part with its own headers (RFC 2046)."""
    boundary = f"image-{secrets.token_hex(16)}"
    body = bytearray()
    for result in results:
        headers = {"content-type": MEDIA_TYPES[request.output_format]} | result_headers(request, result)
        lines = [f"--{boundary}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        body += "\r\n".join(lines).encode("latin-1") + result.file + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return Response(bytes(body), media_type=f"multipart/mixed; boundary={boundary}")


def result_headers(request: Request, result: GenerationResult) -> dict[str, str]:
    """Seed, schedule, timings and what else the response says about an image."""
    params, timings = result.params, result.timings
    optional: dict[str, str] = {}
    estimate_s = request.seconds_left(params.schedule)
    if estimate_s is not None:
        optional["x-estimate-ms"] = f"{1000 * estimate_s:.1f}"
    if request.is_upsampled and params.prompt is not None:
        optional["x-revised-prompt"] = quote(params.prompt, safe=" ,;:'()!?")
    if result.comparison is not None:
        optional["x-psnr-db"] = f"{result.comparison.psnr_db:.2f}"
        optional["x-ssim"] = f"{result.comparison.ssim:.5f}"
    return optional | {
        "x-seed": str(params.seed),
        "x-steps-computed": str(params.schedule.num_computed),
        "x-steps-total": str(params.schedule.num_steps),
        "x-schedule": str(params.schedule),
        "x-queue-ms": f"{1000 * timings.queue_s:.1f}",
        "x-encode-ms": f"{1000 * timings.encode_s:.1f}",
        "x-denoise-ms": f"{1000 * timings.denoise_s:.1f}",
        "x-decode-ms": f"{1000 * timings.decode_s:.1f}",
    }
