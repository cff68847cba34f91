"""The generator as a deployment: an engine without the API, which streams events."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from flux2_ray.remote_encoder import remote_encoder
from flux2_shared.device.thread import DeviceThread
from flux2_shared.errors import Flux2Error
from flux2_shared.model.compile_cache import replace_unwritable_caches
from flux2_shared.observability.logs import set_up_logs
from generator_service.app import load_model, make_upsampler, running_engine
from generator_service.engine.engine import Runtime
from generator_service.engine.events import ProgressEvent, Queued, StepStarted
from generator_service.engine.generation import GenerationResult
from generator_service.engine.latency import LatencyEstimate
from generator_service.engine.metrics import GeneratorMetrics
from generator_service.engine.request import Request
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.model_info import ModelInfo
from generator_service.settings import GeneratorSettings

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class GeneratorInfo:
    """The model of a generator and its speed."""

    model: ModelInfo
    embedding_shape: tuple[int, int]
    latency: LatencyEstimate | None
    """Latency of an image of the default size, measured by the warm-up."""


class GeneratorReplica:
    """One generator on one GPU.

    Args:
        encoder: handle of the ``EncoderReplica`` deployment.
    """

    async def __init__(self, encoder: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = GeneratorSettings()
        set_up_logs(settings.log_level, settings.log_format)
        replace_unwritable_caches()
        self._stack = AsyncExitStack()
        self._thread = await self._stack.enter_async_context(DeviceThread())
        model, self._shape = await self._thread.call(self.load, settings)
        remote, upsampler = remote_encoder(encoder, settings, model.info), make_upsampler(settings, None)
        runtime = Runtime(self._thread, GeneratorMetrics(), report=logger.info)
        engine = running_engine(settings, model, self._shape, remote, runtime, upsampler)
        self._engine = await self._stack.enter_async_context(engine)

    def check_health(self) -> None:
        """Raise ``DeviceLost`` if the device is lost. Serve polls it and replaces replicas that raise."""
        self._thread.refuse_if_lost()

    def load(self, settings: GeneratorSettings) -> tuple[Flux2Model, tuple[int, int]]:
        """Load the model; also return the shape of its prompt embeddings."""
        return load_model(settings)

    async def info(self) -> GeneratorInfo:
        """Describe the model and its speed to the API."""
        model = self._engine.info
        return GeneratorInfo(model, self._shape, self._engine.latencies.estimate(model.default_num_tokens))

    async def generate(self, request: Request) -> AsyncIterator[ProgressEvent | GenerationResult | Flux2Error]:
        """Yield the events of a generation, except its queue position, and finally its results.

        An error is yielded as the last item instead of raised, because Ray would wrap it.
        """
        try:
            with self._engine.admit() as permit:
                generation = self._engine.submit(replace(request, is_followed=True), permit)
            try:
                async for event in generation.events():
                    if not isinstance(event, Queued):
                        yield event
            finally:
                generation.cancel()
        except Flux2Error as error:
            yield error

    async def generate_without_events(
        self, request: Request
    ) -> AsyncIterator[ProgressEvent | GenerationResult | Flux2Error]:
        """Like ``generate``, but stream only the first step and the results; messages cost time."""
        has_begun = False
        async for event in self.generate(request):
            if isinstance(event, GenerationResult | Flux2Error) or (isinstance(event, StepStarted) and not has_begun):
                has_begun = True
                yield event

    async def __del__(self) -> None:
        await self._stack.aclose()
