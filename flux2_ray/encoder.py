"""The text encoder as a deployment: embeddings are in Ray's object store, and callers get references to them."""

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import ray

from flux2_shared.device.thread import DeviceThread
from flux2_shared.embedding import ModelVersion
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
class StoredEmbedding:
    """A reference to an embedding in the object store, wrapped so that Ray does not resolve it automatically."""

    reference: ray.ObjectRef = field(repr=False)
    nbytes: int
    is_truncated: bool
    model: ModelVersion


class EncoderReplica:
    """One text encoder on one GPU. Errors are returned instead of raised, because Ray would wrap them."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = TextEncoderSettings()
        set_up_logs(settings.log_level, settings.log_format)
        replace_unwritable_caches()
        self._stack = AsyncExitStack()
        self._thread = await self._stack.enter_async_context(DeviceThread())
        encoder = running_encoder(settings, Metrics(), self._thread, logger.info)
        self._state = await self._stack.enter_async_context(encoder)
        self._stored = ByteBoundedCache[StoredEmbedding](settings.embedding_cache_bytes)

    def check_health(self) -> None:
        """Raise ``DeviceLost`` if the device is lost. Serve polls it and replaces replicas that raise."""
        self._thread.refuse_if_lost()

    async def info(self) -> EncoderInfo:
        """Describe the model and its embeddings."""
        return self._state.info

    async def embed(self, prompt: str) -> StoredEmbedding | Flux2Error:
        """Encode a prompt; all callers with the same prompt get the same object."""
        stored = self._stored.get(prompt)
        if stored is not None:
            return stored
        try:
            with self._state.queue.admit():
                completed = await self._state.queue.submit(prompt)
        except Flux2Error as error:
            return error
        embedding = completed.value
        reference, info = ray.put(embedding.tensor), self._state.info
        model = ModelVersion(info.model, info.revision)
        stored = StoredEmbedding(reference, embedding.nbytes, embedding.is_truncated, model)
        self._stored.put(prompt, stored)
        return stored

    async def __del__(self) -> None:
        await self._stack.aclose()
