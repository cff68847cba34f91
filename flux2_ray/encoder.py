"""The text encoder as a deployment: embeddings lie in Ray's object store, and callers get references."""

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import ray

from flux2_shared.device.thread import DeviceThread
from flux2_shared.errors import Flux2Error
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.compile_cache import replace_unwritable_caches
from flux2_shared.observability.logs import set_up_logs
from flux2_shared.observability.metrics import Metrics
from flux2_shared.schemas import EncoderInfo
from text_encoder_service.app import running_encoder
from text_encoder_service.settings import TextEncoderSettings

logger = logging.getLogger("flux2")


@dataclass(frozen=True)
class Stored:
    """An embedding in the object store. In an object, so that Ray does not fetch it where only its name is wanted."""

    reference: ray.ObjectRef = field(repr=False)
    nbytes: int


class EncoderReplica:
    """One text encoder on one GPU. What goes wrong is returned, not raised: Ray would wrap it in its own errors."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = TextEncoderSettings()
        set_up_logs(settings.log_level, settings.log_format)
        replace_unwritable_caches()
        self._stack = AsyncExitStack()
        self._thread = await self._stack.enter_async_context(DeviceThread())
        encoder = running_encoder(settings, Metrics(), self._thread, logger.info)
        self._state = await self._stack.enter_async_context(encoder)
        self._stored = ByteBoundedCache[Stored](settings.embedding_cache_bytes)

    def check_health(self) -> None:
        """Raise if the device is lost: Serve asks every few seconds, and replaces a replica that raises."""
        self._thread.refuse_if_lost()

    async def info(self) -> EncoderInfo:
        """What its embeddings are."""
        return self._state.info

    async def embed(self, prompt: str) -> Stored | Flux2Error:
        """The prompt's embedding: the same object for everybody who asks for the same prompt."""
        stored = self._stored.get(prompt)
        if stored is not None:
            return stored
        try:
            with self._state.queue.admit():
                answer = await self._state.queue.submit(prompt)
        except Flux2Error as error:
            return error
        stored = Stored(ray.put(answer.value.tensor), answer.value.nbytes)
        self._stored.put(prompt, stored)
        return stored

    async def __del__(self) -> None:
        await self._stack.aclose()
