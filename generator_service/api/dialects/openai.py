"""OpenAI's images API, for its clients with ``base_url=http://.../v1``."""

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import Field, StrictInt, StrictStr, ValidationError
from sse_starlette import ServerSentEvent
from starlette.datastructures import FormData, UploadFile

from flux2_shared.errors import InvalidRequest
from flux2_shared.schemas import Text
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.web.connection import CLIENT_CLOSED_REQUEST
from generator_service.api import sse
from generator_service.api.dependencies import GeneratorState, generator_state
from generator_service.api.responses import results_while_connected
from generator_service.api.routes.large_body import LargeBodyRoute
from generator_service.api.schemas import GenerateRequest, Sampling
from generator_service.engine.events import Preview
from generator_service.engine.generation import Generation, GenerationResult
from generator_service.engine.imaging import ImageFormat
from generator_service.engine.queue import Permit
from generator_service.engine.request import Request
from generator_service.errors import UnsupportedParameter

router = APIRouter(prefix="/v1", route_class=LargeBodyRoute)
State = Annotated[GeneratorState, Depends(generator_state)]
Prefix = Literal["image_generation", "image_edit"]
EDIT_FORM = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {"prompt": {"type": "string"}, "image": {"type": "string", "format": "binary"}},
}
"""OpenAPI schema of the required fields of an edit; the others are those of ``ImagesRequest``."""
INTEGERS = ("n", "num_inference_steps", "output_compression", "partial_images", "seed")


class ImagesRequest(Sampling):
    """Body of ``/v1/images/generations``, and the text fields of ``/v1/images/edits``."""

    prompt: Text
    model: StrictStr | None = None
    n: Annotated[StrictInt, Field(ge=1)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] = "auto"
    output_format: ImageFormat = "png"
    output_compression: Annotated[StrictInt | None, Field(ge=0, le=100)] = None
    response_format: Literal["b64_json"] | None = None
    stream: bool = False
    partial_images: Annotated[StrictInt, Field(ge=0, le=3)] = 0
    # Accepted for compatibility, and ignored.
    background: str | None = None
    input_fidelity: str | None = None
    moderation: str | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None

    def native(self, images: Sequence[bytes] = ()) -> GenerateRequest:
        """Convert to the body of ``POST /generate``."""
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return GenerateRequest(
            **{name: getattr(self, name) for name in Sampling.model_fields},
            prompt=self.prompt,
            width=width,
            height=height,
            output_format=self.output_format,
            output_compression=self.output_compression,
            previews=self.partial_images,
            num_images=self.n,
            images=[base64.b64encode(data).decode() for data in images],
        )


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
    with state.engine.admit() as permit:
        generation = await submit(body, body.native(), state, permit)
    return await respond(generation, body, http_request, state, "image_generation")


@router.post(
    "/images/edits", openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": EDIT_FORM}}}}
)
async def edits(http_request: HTTPRequest, state: State) -> Response:
    """Generate images from reference images: multipart parts ``image`` or ``image[]``."""
    with state.engine.admit() as permit:  # before the files are read
        async with http_request.form() as form:
            body = form_request(form)
            images = [await part.read() for name in ("image", "image[]") for part in files(form, name)]
        if not images:
            raise InvalidRequest("image: at least one file is required", param="image")
        generation = await submit(body, await state.requests.run(body.native, images), state, permit)
    return await respond(generation, body, http_request, state, "image_edit")


def form_request(form: FormData) -> ImagesRequest:
    """Parse the text fields of a multipart body.

    Raises:
        InvalidRequest: a field is invalid.
        UnsupportedParameter: there is a mask.
    """
    if "mask" in form:
        raise UnsupportedParameter("mask: not supported by this model; describe the change in the prompt", param="mask")
    fields: dict[str, Any] = {k: v for k, v in form.items() if k not in ("image", "image[]")}
    for name, text in fields.items():
        if name in INTEGERS or (name == "cache" and str(text).isdigit()):
            fields[name] = number(name, text, int)
        elif name == "guidance_scale":
            fields[name] = number(name, text, float)
        elif name in ("stream", "upsample_prompt"):
            fields[name] = text == "true"
    try:
        return ImagesRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0])
        raise InvalidRequest(f"{param}: {first['msg']}", param=param) from None


def number(name: str, text: Any, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name}: must be a number", param=name) from None


def files(form: FormData, name: str) -> list[UploadFile]:
    """Return the files of all parts with one name."""
    parts = form.getlist(name)
    if not all(isinstance(part, UploadFile) for part in parts):
        raise InvalidRequest(f"{name}: must be a file", param=name)
    return cast("list[UploadFile]", parts)


async def submit(body: ImagesRequest, native: GenerateRequest, state: GeneratorState, permit: Permit) -> Generation:
    return state.engine.submit(await state.requests.run(state.resolver.resolve, native, body.stream), permit)


async def respond(
    generation: Generation, body: ImagesRequest, http_request: HTTPRequest, state: GeneratorState, prefix: Prefix
) -> Response:
    """Return the images as JSON or as a stream of events."""
    common, usage = common_fields(generation.request), usage_of(generation.request, state)
    if body.stream:
        events = openai_events(generation, prefix, common, usage, state.responses)
        return sse.stream(http_request, events, on_end=generation.cancel)
    results = await results_while_connected(http_request, generation)
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
        image = {"b64_json": sse.preview_base64(preview), "output_format": "jpeg"}
        return sse.json_event(kind, {"type": kind, "partial_image_index": preview.number} | common | image)

    def completed(result: GenerationResult) -> ServerSentEvent:
        kind = f"{prefix}.completed"
        return sse.json_event(kind, {"type": kind} | as_json(generation.request, result) | common | {"usage": usage})

    async for event in generation.events():
        if isinstance(event, Preview):
            yield await threads.run(partial_image, event)
        elif isinstance(event, GenerationResult):
            yield await threads.run(completed, event)
