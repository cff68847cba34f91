"""The text encoder's app. Its lifespan owns the model, the queue and the cache."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from flux2_shared.device.lock import alone_on_gpu
from flux2_shared.device.queue import DeviceQueue
from flux2_shared.device.thread import DeviceThread
from flux2_shared.embedding import Embedding
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.folder import find_model, read_prompt_format
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from flux2_shared.observability.metrics import Metrics
from flux2_shared.report import Report, ignore
from flux2_shared.schemas import EncoderInfo
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.version import product_version
from flux2_shared.web.app import make_app
from flux2_shared.web.auth import BEARER
from flux2_shared.web.health import READY, Readiness
from text_encoder_service.encoder import LanguageModelReader, MistralEncoder, load_language_model
from text_encoder_service.routes import EncoderState, router
from text_encoder_service.settings import TextEncoderSettings

WARM_UP_PROMPT = "a red circle"
logger = logging.getLogger("flux2")


def create_app(settings: TextEncoderSettings) -> FastAPI:
    """Create the app; its lifespan loads the model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        health = app.state.health
        for weakness in settings.key_warnings(settings.host):
            logger.warning(weakness)
        async with (
            DeviceThread(health.device_lost.set) as thread,
            running_encoder(settings, app.state.metrics, thread, health.report) as state,
        ):
            app.state.encoder = state
            health.start_serving(is_ready, state.queue.close)
            yield

    app = make_app("FLUX.2 text encoder", product_version(), settings, lifespan, Metrics())
    app.include_router(router, dependencies=[BEARER])
    return app


@asynccontextmanager
async def running_encoder(
    settings: TextEncoderSettings, metrics: Metrics, thread: DeviceThread, report: Report
) -> AsyncIterator[EncoderState]:
    """Run a loaded and warmed-up encoder within the block."""
    encoder, info = await thread.call(load_encoder, settings, report)

    def encode(prompts: Sequence[str]) -> Sequence[Embedding]:
        with metrics.seconds.labels("encode").time():
            return encoder.encode(prompts)

    queue = DeviceQueue(
        encode,
        thread,
        max_waiting=settings.max_waiting,
        max_batch=settings.max_batch,
        max_wait_s=settings.max_wait_ms / 1000,
    )
    metrics.queue_depth.set_function(lambda: queue.depth)
    metrics.watch_memory(settings.torch_device())
    metrics.describe_build(
        {
            "version": info.version,
            "model": info.model,
            "revision": info.revision,
            "profile": settings.profile(),
            "weights": settings.weights,
        }
    )
    cache = ByteBoundedCache[Embedding](settings.embedding_cache_bytes)
    async with queue, ThreadPool("responses") as responses:
        with queue.admit():
            await queue.submit(WARM_UP_PROMPT)
        yield EncoderState(settings, info, queue, cache, metrics, responses)


def load_encoder(
    settings: TextEncoderSettings, report: Report = ignore, read: LanguageModelReader = load_language_model
) -> tuple[MistralEncoder, EncoderInfo]:
    """Find, check, load and compile the model of ``settings``.

    Args:
        settings: the service's settings.
        report: called with the progress.
        read: loads the weights; benchmarks replace it to generate random ones.

    Raises:
        ModelRefused: the model or the device cannot be used.
        OutOfMemory: the device has too little memory for the largest batch.
    """
    report("loading the model")
    device, dtype = settings.torch_device(), settings.torch_dtype()  # may be invalid: before the download
    folder = find_model(settings.model, settings.revision, SUBFOLDERS[Service.TEXT_ENCODER])
    prompt_format = read_prompt_format(folder)
    encoder = MistralEncoder(folder, prompt_format, device, dtype, settings.weights, read)
    if settings.profile() == "fast":
        with alone_on_gpu(device, report):
            encoder.compile(settings.max_batch, report=report)
    info = EncoderInfo(
        model=folder.name,
        revision=folder.revision,
        hidden_layers=prompt_format.hidden_layers,
        hidden_size=encoder.hidden_size,
        max_sequence_length=prompt_format.max_sequence_length,
        dtype=str(encoder.dtype).removeprefix("torch."),
        version=product_version(),
        attention=encoder.attention,
    )
    return encoder, info


async def is_ready() -> Readiness:
    """Return that a started text encoder is always ready."""
    return READY
