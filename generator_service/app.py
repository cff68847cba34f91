"""Builds the generator's app; its lifespan owns the model, the engine and the connection to the text encoder."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass

import httpx
from fastapi import FastAPI

from flux2_shared.device.thread import DeviceThread
from flux2_shared.embedding import ModelVersion
from flux2_shared.errors import ModelRefused
from flux2_shared.model.compilation import CompilerBackend
from flux2_shared.model.folder import find_model, read_prompt_format
from flux2_shared.model.subfolders import SUBFOLDERS, Service
from flux2_shared.report import Report, ignore
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.version import product_version
from flux2_shared.web.app import make_app
from flux2_shared.web.auth import BEARER
from flux2_shared.web.health import ReadyCheck
from generator_service.api.dependencies import GeneratorState
from generator_service.api.dialects import openai
from generator_service.api.resolve import Resolver, open_registry
from generator_service.api.routes import generate, modes, page
from generator_service.api.routes import jobs as job_routes
from generator_service.clients.readiness import EncoderCheck
from generator_service.clients.retrying import MAX_ATTEMPTS, RetryingEncoder, TextEncoder
from generator_service.clients.text_encoder import TextEncoderClient
from generator_service.clients.upsampler import Upsampler
from generator_service.engine.engine import Engine, ImageGenerator, PromptEncoder, Runtime
from generator_service.engine.job_store import JobStore
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.warm_up import Batching
from generator_service.lemica import ScheduleRegistry
from generator_service.pipelines.components import ComponentsReader, load_components
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.model_info import ModelInfo
from generator_service.pipelines.optimizations.profiles import Machine, choose
from generator_service.settings import GeneratorSettings

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Backend:
    """What the API runs on: an engine, in this process or in a Ray cluster, and its readiness check."""

    engine: ImageGenerator
    embedding_shape: tuple[int, int]
    ready: ReadyCheck
    profile: str = "unknown"
    """The optimization profile, for the metrics."""


def create_app(settings: GeneratorSettings, transport: httpx.AsyncBaseTransport | None = None) -> FastAPI:
    """Create the app, whose lifespan loads the model. ``transport`` replaces the network to the text encoder."""

    @asynccontextmanager
    async def open_backend(app: FastAPI) -> AsyncIterator[Backend]:
        health, tracing = app.state.health, app.state.tracing
        async with DeviceThread(health.device_lost.set) as thread:
            runtime = Runtime(thread, app.state.metrics, tracing, health.report)
            model, shape = await thread.call(load_model, settings, health.report)
            version = ModelVersion(model.info.name, model.info.revision)
            client = make_encoder_client(settings, version, shape, transport)
            client.trace(tracing)
            encoder = with_retries(client, settings, version)
            upsampler = make_upsampler(settings, transport)
            async with (
                client,
                aclosing(EncoderCheck(encoder, model.info, shape, settings.encoder_grace_s)) as is_ready,
                running_engine(settings, model, shape, encoder, runtime, upsampler) as engine,
            ):
                app.state.metrics.circuit_open.set_function(lambda: encoder.is_circuit_open)
                yield Backend(engine, shape, is_ready, model.performance.profile)

    return build_app(open_backend, settings)


def build_app(
    open_backend: Callable[[FastAPI], AbstractAsyncContextManager[Backend]], settings: GeneratorSettings
) -> FastAPI:
    """Create an app whose lifespan enters ``open_backend``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for weakness in settings.key_warnings(settings.published_host or settings.host):
            logger.warning(weakness)
        async with (
            open_backend(app) as backend,
            ThreadPool("requests") as requests,
            ThreadPool("images") as images,
            ThreadPool("responses") as responses,
        ):
            engine = backend.engine
            registry = await requests.run(open_registry, settings, engine.info)
            resolver = Resolver(settings, engine.info, registry, backend.embedding_shape, engine.latencies)
            jobs = JobStore(max_jobs=settings.max_jobs, max_bytes=settings.max_job_bytes, ttl_s=settings.job_ttl_s)
            watch(app.state.metrics, backend, registry, jobs, settings)
            app.state.generator = GeneratorState(settings, engine, resolver, jobs, requests, images, responses)
            app.state.health.start_serving(backend.ready, engine.close)
            yield
            jobs.close()

    app = make_app("FLUX.2 generator", product_version(), settings, lifespan, GeneratorMetrics())
    for routes in (generate, job_routes, modes, openai):
        app.include_router(routes.router, dependencies=[BEARER])
    app.include_router(page.router)
    return app


def watch(
    metrics: GeneratorMetrics,
    backend: Backend,
    registry: ScheduleRegistry,
    jobs: JobStore,
    settings: GeneratorSettings,
) -> None:
    """Export what the service runs, and the jobs that it keeps."""
    metrics.jobs.set_function(lambda: jobs.num_jobs)
    metrics.job_bytes.set_function(lambda: jobs.num_bytes)
    metrics.describe_build(
        {
            "version": product_version(),
            "model": backend.engine.info.name,
            "revision": backend.engine.info.revision,
            "profile": backend.profile,
            "schedules": f"{len(registry.schedules)} calibrated, default {settings.default_cache}",
        }
    )


@asynccontextmanager
async def running_engine(
    settings: GeneratorSettings,
    model: Flux2Model,
    embedding_shape: tuple[int, int],
    encoder: PromptEncoder,
    runtime: Runtime,
    upsampler: Upsampler | None,
) -> AsyncIterator[Engine]:
    """Warm up an engine and serve its queue within the block."""
    batching = Batching(settings.max_batch, settings.max_batch_pixels)
    engine = Engine(
        model,
        encoder,
        runtime,
        settings.max_waiting,
        settings.quality_sampling,
        upsampler,
        batching,
        settings.queue_share(),
    )
    runtime.metrics.watch_memory(model.device)
    await runtime.thread.call(engine.worker.warm_up, embedding_shape, settings.warm_up_sizes, runtime.report)
    async with upsampler or nullcontext(), engine:
        yield engine


def make_encoder_client(
    settings: GeneratorSettings,
    model: ModelVersion,
    embedding_shape: tuple[int, int],
    transport: httpx.AsyncBaseTransport | None,
) -> TextEncoderClient:
    """Create the client of the text encoder at ``settings.text_encoder_url``."""
    return TextEncoderClient(
        str(settings.text_encoder_url),
        embedding_shape,
        model,
        token=settings.token_to_send(),
        timeout_s=settings.text_encoder_timeout_s,
        transport=transport,
    )


def with_retries(
    encoder: TextEncoder,
    settings: GeneratorSettings,
    model: ModelVersion | None = None,
    max_attempts: int | None = MAX_ATTEMPTS,
) -> RetryingEncoder:
    """Wrap ``encoder`` with a cache, retries and a circuit breaker."""
    return RetryingEncoder(
        encoder,
        timeout_s=settings.text_encoder_timeout_s,
        cache_bytes=settings.embedding_cache_bytes,
        max_attempts=max_attempts,
        model=model,
    )


def make_upsampler(settings: GeneratorSettings, transport: httpx.AsyncBaseTransport | None) -> Upsampler | None:
    """Create the client of the chat model that rewrites prompts; None if ``upsampler_url`` is not set."""
    if settings.upsampler_url is None:
        return None
    return Upsampler(
        str(settings.upsampler_url),
        settings.upsampler_model,
        token=settings.upsampler_token,
        timeout_s=settings.upsampler_timeout_s,
        transport=transport,
    )


def load_model(
    settings: GeneratorSettings,
    report: Report = ignore,
    read: ComponentsReader = load_components,
    backend: CompilerBackend = "inductor",
) -> tuple[Flux2Model, tuple[int, int]]:
    """Find, check and load the model; return it with the shape of its prompt embeddings (tokens, width).

    Args:
        settings: name the model, the device and the optimizations.
        report: called with the progress as text.
        read: loads the weights; benchmarks pass one that generates random ones.
        backend: passed to ``torch.compile``.
    """
    report("loading the model")
    device, dtype = settings.torch_device(), settings.torch_dtype()  # may raise, so before any download
    folder = find_model(settings.model, settings.revision, SUBFOLDERS[Service.GENERATOR])
    performance = choose(
        settings.performance,
        Machine.of(device),
        weight_bytes=folder.num_bytes("transformer", "vae"),
        without=settings.performance_without,
        has_adapters=settings.lora_dir is not None,
        backend=backend,
    )
    if settings.lora_dir is not None and "offload" in performance.optimizations:
        raise ModelRefused("GENERATOR_LORA_DIR: adapters cannot be applied where GENERATOR_PERFORMANCE is offload")
    model = Flux2Model.load(folder, device, dtype, settings.lora_dir, settings.max_loras, performance, read)
    check_warm_up_sizes(settings, model.info)
    return model, (read_prompt_format(folder).max_sequence_length, model.info.embedding_width)


def check_warm_up_sizes(settings: GeneratorSettings, info: ModelInfo) -> None:
    """Raise ``ModelRefused`` if the model cannot generate one of ``GENERATOR_WARM_UP_SIZES``."""
    for width, height in settings.warm_up_sizes:
        if (
            width % info.pixels_per_token
            or height % info.pixels_per_token
            or not 0 < width * height <= settings.max_pixels
        ):
            limits = (
                f"sides must be multiples of {info.pixels_per_token}, and at most {settings.max_pixels} pixels in total"
            )
            raise ModelRefused(f"GENERATOR_WARM_UP_SIZES: {width}x{height} cannot be generated: {limits}")
