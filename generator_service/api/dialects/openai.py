"""OpenAI's images API, for its clients with ``base_url=http://.../v1``."""

import base64
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sse_starlette import ServerSentEvent
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from flux2_shared.errors import InvalidRequest, MalformedBody, UnsupportedMediaType
from flux2_shared.schemas import MAX_FIELDS
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.web.connection import CLIENT_CLOSED_REQUEST, while_connected
from flux2_shared.web.problem import name_fields
from flux2_shared.web.route import media_type_of
from generator_service.api import sse
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.dialects.form import form_fields
from generator_service.api.dialects.openai_schemas import FIELD_NAMES, ImagesRequest
from generator_service.api.routes.large_body import LargeBodyRoute
from generator_service.api.schemas import MAX_IMAGES, GenerateRequest
from generator_service.engine.admission import Permit
from generator_service.engine.events import Preview
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.request import Request

router = APIRouter(prefix="/v1", route_class=LargeBodyRoute)
State = Annotated[GeneratorState, Depends(generator_state)]
Prefix = Literal["image_generation", "image_edit"]
FORM_MEDIA_TYPE = "multipart/form-data"
EDIT_FORM = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {"prompt": {"type": "string"}, "image": {"type": "string", "format": "binary"}},
}
"""OpenAPI schema of the required fields of an edit; the others are those of ``ImagesRequest``."""
IMAGE_FIELD = re.compile(r"image(\[\d*\])?", re.ASCII)
"""Names of the files of an edit: ``image``, ``image[]`` or ``image[0]``."""


@router.get("/models")
async def models(state: State) -> dict[str, Any]:
    """List the model that is served."""
    return {"object": "list", "data": [model_object(state)]}


@router.get("/models/{name:path}")
async def model(name: str, state: State) -> dict[str, Any]:
    """Describe the model. Requests may use any name for it."""
    return model_object(state) | {"id": name}


def model_object(state: GeneratorState) -> dict[str, Any]:
    return {"id": state.engine.info.name, "object": "model", "created": 0, "owned_by": "flux2-services"}


@router.post("/images/generations")
async def generations(body: ImagesRequest, http_request: HTTPRequest, state: State) -> Response:
    """Generate images from a prompt."""
    name_fields(http_request, FIELD_NAMES)
    generation = await state.submit(body.native(), http_request.state.owner, is_followed=body.stream)
    return await respond(generation, body, http_request, state, "image_generation")


@router.post("/images/edits", openapi_extra={"requestBody": {"content": {FORM_MEDIA_TYPE: {"schema": EDIT_FORM}}}})
async def edits(http_request: HTTPRequest, state: State) -> Response:
    """Generate images from reference images: multipart parts ``image`` or ``image[]``."""
    check_is_form(http_request)
    with state.engine.admit(http_request.state.owner) as permit:  # before the files are read
        async with readable_form(http_request, state.settings.max_body_bytes) as form:
            body = form_request(form)
            images = [await file.read() for file in image_files(form)]
        name_fields(http_request, FIELD_NAMES | ({"images[0]": "image"} if len(images) == 1 else {}))
        generation = await submit(body, await state.requests.run(body.native, images), state, permit)
    return await respond(generation, body, http_request, state, "image_edit")


def check_is_form(http_request: HTTPRequest) -> None:
    """Raise ``UnsupportedMediaType`` if the body is not declared as a multipart form."""
    content_type = media_type_of(http_request)
    if content_type != FORM_MEDIA_TYPE:
        detail = f", not {content_type[:100]}" if content_type else ""
        raise UnsupportedMediaType(f"content-type: must be {FORM_MEDIA_TYPE} with the files as parts `image`{detail}")


@asynccontextmanager
async def readable_form(http_request: HTTPRequest, max_bytes: int) -> AsyncIterator[FormData]:
    """Parse a multipart form; raise ``MalformedBody`` if that fails.

    Its files, of up to ``max_bytes``, stay in memory, which ``BodyLimit`` bounds, so that a full disk does not matter.
    """
    stream = http_request.stream()
    parser = MultiPartParser(http_request.headers, stream, max_files=MAX_IMAGES, max_fields=MAX_FIELDS)
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:  # ValueError: charsets that are not text encodings
        reason = error.message if isinstance(error, MultiPartException) else "a field has an unknown charset"
        raise MalformedBody(f"the multipart form cannot be read: {reason}") from None
    try:
        yield form
    finally:
        await form.close()


def form_request(form: FormData) -> ImagesRequest:
    """Parse the text fields of a multipart body.

    Raises:
        InvalidRequest: a field is invalid.
        UnsupportedParameter: there is a mask, or another argument that cannot be served.
    """
    fields = form_fields(form, [name for name in form if IMAGE_FIELD.fullmatch(name)])
    try:
        return ImagesRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else "body"  # a field's name may be invalid text
        raise InvalidRequest(f"{param}: {first['msg']}", param=param) from None


def image_files(form: FormData) -> list[UploadFile]:
    """Return the files to edit, in order.

    Raises:
        InvalidRequest: there is none, or one is not a file.
    """
    files = [value for name, value in form.multi_items() if IMAGE_FIELD.fullmatch(name)]
    if not files:
        raise InvalidRequest("image: at least one file is required", param="image")
    if not all(isinstance(file, UploadFile) for file in files):
        raise InvalidRequest("image: must be a file", param="image")
    return cast("list[UploadFile]", files)


async def submit(body: ImagesRequest, native: GenerateRequest, state: GeneratorState, permit: Permit) -> Generation:
    threads = state.images if native.images else state.requests
    return state.engine.submit(await threads.run(state.resolver.resolve, native, body.stream), permit)


async def respond(
    generation: Generation, body: ImagesRequest, http_request: HTTPRequest, state: GeneratorState, prefix: Prefix
) -> Response:
    """Return the images as JSON or as a stream of events."""
    common, usage = common_fields(generation.request), usage_of(generation.request, state)
    if body.stream:
        events = openai_events(generation, prefix, common, usage, state.responses)
        return sse.stream(http_request, events, on_end=generation.cancel)
    results = await while_connected(http_request, generation.images(), on_end=generation.cancel)
    if results is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    total = usage | {"output_tokens": usage["output_tokens"] * body.n}
    total |= {"total_tokens": total["input_tokens"] + total["output_tokens"]}
    fields = {"created": int(time.time()), "usage": total} | common
    return await state.responses.run(json_response, generation.request, results, fields)


def json_response(request: Request, results: Sequence[GenerationResult], fields: dict[str, Any]) -> Response:
    return JSONResponse({"data": [as_json(request, result) for result in results]} | fields)


def as_json(request: Request, result: GenerationResult) -> dict[str, Any]:
    """Return the image as base64, its seed, the rewritten prompt if there is one, and whether its end was ignored."""
    params = result.params
    revised = {"revised_prompt": params.prompt} if request.is_upsampled else {}
    truncated = {"prompt_truncated": True} if params.is_truncated else {}
    return {"b64_json": base64.b64encode(result.data).decode(), "seed": params.seed} | revised | truncated


def common_fields(request: Request) -> dict[str, Any]:
    size = f"{request.params.width}x{request.params.height}"
    return {"background": "opaque", "output_format": request.output_format, "quality": "high", "size": size}


def usage_of(request: Request, state: GeneratorState) -> dict[str, Any]:
    """Return the usage of one image, in tokens of the transformer."""
    text, model = state.resolver.embedding_shape[0], state.engine.info
    output = model.num_image_tokens(request.params.width, request.params.height)
    references = request.num_tokens - output
    return {
        "input_tokens": text + references,
        "input_tokens_details": {"text_tokens": text, "image_tokens": references},
        "output_tokens": output,
        "total_tokens": text + references + output,
    }


async def openai_events(
    generation: Generation, prefix: Prefix, common: dict[str, Any], usage: dict[str, Any], threads: ThreadPool
) -> sse.Events:
    """Yield ``partial_image`` events, then ``completed`` for each image; they are encoded on ``threads``."""
    common = common | {"created_at": int(time.time())}

    def partial_image(preview: Preview) -> ServerSentEvent:
        kind = f"{prefix}.partial_image"
        image = {"b64_json": base64.b64encode(preview.file).decode(), "output_format": "jpeg"}
        return sse.json_event(kind, {"type": kind, "partial_image_index": preview.number} | common | image)

    def completed(result: GenerationResult) -> ServerSentEvent:
        kind = f"{prefix}.completed"
        return sse.json_event(kind, {"type": kind} | as_json(generation.request, result) | common | {"usage": usage})

    async for event in generation.events():
        if isinstance(event, Preview):
            yield await threads.run(partial_image, event)
        elif isinstance(event, GenerationResult):
            yield await threads.run(completed, event)
