"""The generator as a deployment: an engine without the API, which tells what happens as a stream."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from deploy.ray.remote_encoder import RemoteEncoder
from generator_service.app import load_model, make_upsampler, running_engine
from generator_service.cost import Cost
from generator_service.engine import Delivery, Runtime
from generator_service.happenings import Happening, StepBegun
from generator_service.line import Queued
from generator_service.order import Order
from generator_service.pipelines.card import ModelCard
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.progress import Progress
from generator_service.settings import GeneratorSettings
from shared.device_thread import DeviceThread
from shared.errors import Flux2Error
from shared.logs import set_up_logs
from shared.metrics import Metrics

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Introduction:
    """What a generator tells of itself."""

    card: ModelCard
    embedding_shape: tuple[int, int]
    cost: Cost | None
    """Of a picture of the model's own size, as the warm-up has shown."""


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
        """Raise if the device is lost: Serve asks every few seconds, and replaces a replica that raises."""
        self._thread.refuse_if_lost()

    def load(self, settings: GeneratorSettings) -> tuple[Flux2Model, tuple[int, int]]:
        """The model, and the shape of its prompt embeddings."""
        return load_model(settings)

    async def introduce(self) -> Introduction:
        """What the API needs to know before the first request."""
        card = self._engine.card
        cost = self._engine.cost.of(card.default_num_tokens)
        return Introduction(card, self._shape, cost)

    async def deliver(self, orders: Sequence[Order]) -> AsyncIterator[Happening | Delivery | Flux2Error]:
        """Everything that happens to a request, but for its place in the line, which is elsewhere; at last its files.

        What goes wrong is the last item, not raised: Ray would wrap it in its own errors.
        """
        try:
            async for event in await Progress.start(partial(self._engine.deliver, orders)):
                if not isinstance(event, Queued):
                    yield event
        except Flux2Error as error:
            yield error

    async def deliver_quietly(self, orders: Sequence[Order]) -> AsyncIterator[Happening | Delivery | Flux2Error]:
        """As ``deliver``, but only that the drawing has begun, and what came out: messages that nobody reads cost."""
        has_begun = False
        async for event in self.deliver(orders):
            if isinstance(event, Delivery | Flux2Error) or (isinstance(event, StepBegun) and not has_begun):
                has_begun = True
                yield event

    async def __del__(self) -> None:
        await self._stack.aclose()
