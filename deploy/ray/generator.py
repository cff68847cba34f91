"""The generator as a deployment: an engine without the API, which streams events."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from deploy.ray.remote_encoder import RemoteEncoder
from generator_service.app import load_model, make_upsampler, running_engine
from generator_service.cost import Cost
from generator_service.engine.engine import Runtime
from generator_service.engine.events import ProgressEvent, Queued, StepStarted
from generator_service.engine.generation import GenerationResult
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.settings import GeneratorSettings
from shared.device_thread import DeviceThread
from shared.errors import Flux2Error
from shared.logs import set_up_logs
from shared.metrics import Metrics

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class GeneratorInfo:
    """The model of a generator and its speed."""

    card: ModelCard
    embedding_shape: tuple[int, int]
    cost: Cost | None
    """The latency of an image of the model's default size, measured during warm-up."""


class GeneratorReplica:
    """One generator on one GPU.

    Args:
        encoder: a handle of the deployment of ``EncoderReplica``.
    """

    async def __init__(self, encoder: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = GeneratorSettings()
        set_up_logs(settings.log_level, settings.log_format)
        self._stack = AsyncExitStack()
        self._thread = await self._stack.enter_async_context(DeviceThread())
        model, self._shape = await self._thread.call(self.load, settings)
        remote, upsampler = RemoteEncoder(encoder, settings), make_upsampler(settings, None)
        runtime = Runtime(self._thread, Metrics(), report=logger.info)
        engine = running_engine(settings, model, self._shape, remote, runtime, upsampler)
        self._engine = await self._stack.enter_async_context(engine)

    def check_health(self) -> None:
        """Raise ``DeviceLost`` if the device is lost. Serve polls it and replaces replicas that raise."""
        self._thread.refuse_if_lost()

    def load(self, settings: GeneratorSettings) -> tuple[Flux2Model, tuple[int, int]]:
        """Load the model; also return the shape of its prompt embeddings."""
        return load_model(settings)

    async def info(self) -> GeneratorInfo:
        """Return what the API needs before the first request."""
        card = self._engine.card
        cost = self._engine.cost.of(card.default_num_tokens)
        return GeneratorInfo(card, self._shape, cost)

    async def generate(self, orders: Sequence[Order]) -> AsyncIterator[ProgressEvent | GenerationResult | Flux2Error]:
        """Stream the events of a generation except its queue position, which the fleet knows, and finally its results.

        An error is yielded as the last item instead of raised, because Ray would wrap it.
        """
        try:
            with self._engine.admit() as permit:
                generation = self._engine.submit(orders, permit, is_followed=True)
            try:
                async for event in generation.events():
                    if not isinstance(event, Queued):
                        yield event
            finally:
                generation.cancel()
        except Flux2Error as error:
            yield error

    async def generate_without_events(
        self, orders: Sequence[Order]
    ) -> AsyncIterator[ProgressEvent | GenerationResult | Flux2Error]:
        """Like ``generate``, but stream only the first step and the results; messages cost time."""
        has_begun = False
        async for event in self.generate(orders):
            if isinstance(event, GenerationResult | Flux2Error) or (isinstance(event, StepStarted) and not has_begun):
                has_begun = True
                yield event

    async def __del__(self) -> None:
        await self._stack.aclose()
