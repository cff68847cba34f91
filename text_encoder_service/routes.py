"""``POST /predict`` and ``GET /info``."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from flux2_shared.device.queue import DeviceQueue
from flux2_shared.embedding import TRUNCATED_HEADER, Embedding, ModelVersion, truncated_indices
from flux2_shared.errors import InvalidRequest
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.cpu_tensors import concatenate
from flux2_shared.observability.metrics import Metrics
from flux2_shared.schemas import EncoderInfo, PredictRequest
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.web.accept import preferred_type
from flux2_shared.web.connection import CLIENT_CLOSED_REQUEST, while_connected
from flux2_shared.web.route import ServiceRoute
from flux2_shared.wire import SAFETENSORS_MEDIA_TYPE, TORCH_MEDIA_TYPE, dump_safetensors, dump_torch
from text_encoder_service.settings import TextEncoderSettings

router = APIRouter(route_class=ServiceRoute)


@dataclass(frozen=True)
class EncoderState:
    """The resources that the app's lifespan owns."""

    settings: TextEncoderSettings
    info: EncoderInfo
    queue: DeviceQueue[str, Embedding]
    cache: ByteBoundedCache[Embedding]
    metrics: Metrics
    responses: ThreadPool
    """Serializes embeddings."""


async def encoder_state(request: Request) -> EncoderState:
    """Return the app's state; raise ``Starting`` until the model is loaded."""
    request.app.state.health.refuse_while_starting()
    state: EncoderState = request.app.state.encoder
    return state


State = Annotated[EncoderState, Depends(encoder_state)]


@router.get("/info")
async def info(state: State) -> EncoderInfo:
    """Describe the model and its embeddings."""
    return state.info


@router.post(
    "/predict",
    response_class=Response,
    responses={200: {"content": {TORCH_MEDIA_TYPE: {}, SAFETENSORS_MEDIA_TYPE: {}}}},
)
async def predict(body: PredictRequest, request: Request, state: State) -> Response:
    """Encode prompts: embeddings ``[prompts, tokens, width]`` by ``torch.save``, or safetensors if preferred."""
    prompts = validate_prompts(body, state.settings)
    embeddings = await while_connected(request, embed_all(prompts, state))
    if embeddings is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    media_type = preferred_type(request, [TORCH_MEDIA_TYPE, SAFETENSORS_MEDIA_TYPE])
    dump = dump_safetensors if media_type == SAFETENSORS_MEDIA_TYPE else dump_torch
    headers = ModelVersion(state.info.model, state.info.revision).headers()
    if truncated := truncated_indices(embeddings):
        headers[TRUNCATED_HEADER] = truncated
    content = await state.responses.run(lambda: dump(concatenate([each.tensor for each in embeddings])))
    return Response(content, media_type=media_type, headers=headers)


def validate_prompts(body: PredictRequest, settings: TextEncoderSettings) -> list[str]:
    """Return the body's prompts as a list.

    Raises:
        InvalidRequest: there are no or too many prompts, or one is too long.
    """
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not 0 < len(prompts) <= settings.max_prompts:
        raise InvalidRequest(f"prompt: give 1 to {settings.max_prompts} prompts, not {len(prompts)}", param="prompt")
    longest = max(map(len, prompts))
    if longest > settings.max_prompt_chars:
        limit = f"prompt: at most {settings.max_prompt_chars} characters each, not {longest}"
        raise InvalidRequest(limit, param="prompt")
    return prompts


async def embed_all(prompts: Sequence[str], state: EncoderState) -> list[Embedding]:
    """Encode all prompts concurrently; the first error cancels the others."""
    tasks = [asyncio.create_task(embed(prompt, state)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def embed(prompt: str, state: EncoderState) -> Embedding:
    """Return the embedding of one prompt, from the cache or the model."""
    cached = state.cache.get(prompt)
    state.metrics.cache.labels("miss" if cached is None else "hit").inc()
    if cached is not None:
        return cached
    with state.queue.admit():
        completed = await state.queue.submit(prompt)
    state.metrics.seconds.labels("queue").observe(completed.queue_s)
    state.cache.put(prompt, completed.value)
    return completed.value
