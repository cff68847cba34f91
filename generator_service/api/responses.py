"""HTTP responses with generated images: a file, a multipart body, or JSON."""

import base64
import secrets
from collections.abc import Sequence
from urllib.parse import quote

from fastapi import Response
from fastapi.responses import JSONResponse

from flux2_shared.thread_pool import ThreadPool
from flux2_shared.web.accept import JSON_MEDIA_TYPE
from generator_service.engine.generation import GenerationResult
from generator_service.engine.imaging import MEDIA_TYPES
from generator_service.engine.request import Request

RESULT_TYPES = (*MEDIA_TYPES.values(), "multipart/mixed", JSON_MEDIA_TYPE)
"""The media types of results. Which of the files is sent depends on the request's body, not on ``Accept``."""


async def to_response(
    request: Request, results: Sequence[GenerationResult], media_type: str, threads: ThreadPool
) -> Response:
    """Return JSON if that is the ``media_type``, else the files; base64 and multipart are encoded on ``threads``."""
    if media_type == JSON_MEDIA_TYPE:
        return await threads.run(json_response, request, results)
    if len(results) == 1:
        return one_file(request, results[0])
    return await threads.run(multipart, request, results)


def json_response(request: Request, results: Sequence[GenerationResult]) -> Response:
    return JSONResponse({"images": [as_json(request, result) for result in results]})


def as_json(request: Request, result: GenerationResult) -> dict[str, str]:
    """Return the image as base64, with the fields that other responses send as headers."""
    fields = result_headers(request, result) | {"image": base64.b64encode(result.data).decode()}
    if result.comparison is not None:
        fields["side_by_side"] = base64.b64encode(result.side_by_side).decode()
    return fields


def one_file(request: Request, result: GenerationResult) -> Response:
    return Response(result.file, media_type=MEDIA_TYPES[request.output_format], headers=result_headers(request, result))


def multipart(request: Request, results: Sequence[GenerationResult]) -> Response:
    """Return a ``multipart/mixed`` body (RFC 2046); each image is a part with its own headers."""
    boundary = f"image-{secrets.token_hex(16)}"
    body = bytearray()
    for result in results:
        headers = {"content-type": MEDIA_TYPES[request.output_format]} | result_headers(request, result)
        lines = [f"--{boundary}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        body += "\r\n".join(lines).encode("latin-1") + result.file + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return Response(bytes(body), media_type=f"multipart/mixed; boundary={boundary}")


def result_headers(request: Request, result: GenerationResult) -> dict[str, str]:
    """Return the seed, schedule, timings and optional fields of an image as headers."""
    params, timings = result.params, result.timings
    optional: dict[str, str] = {}
    if timings.expected_s is not None:
        optional["x-estimate-ms"] = f"{1000 * timings.expected_s:.1f}"
    if request.is_upsampled and params.prompt is not None:
        optional["x-revised-prompt"] = quote(params.prompt, safe=" ,;:'()!?")
    if params.is_truncated:
        optional["x-prompt-truncated"] = "true"
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
