"""The client of the text encoder's deployment, which returns references to embeddings."""

import asyncio
from contextvars import Context
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from generator_service.embedder import Embedder
from generator_service.settings import GeneratorSettings
from shared.errors import EncoderTimeout, EncoderUnavailable, Flux2Error, OutOfMemory
from shared.schemas import EncoderInfo

INFO_TIMEOUT_S = 5.0


class RemoteEncoder:
    """Encodes prompts remotely. It retries until the timeout, since Ray restarts a text encoder that died.

    Args:
        handle: a handle of the deployment of ``EncoderReplica``.
        settings: the generator's settings.
    """

    def __init__(self, handle: Any, settings: GeneratorSettings) -> None:
        self._handle = handle
        self._embedder = Embedder(
            self._ask,
            timeout_s=settings.text_encoder_timeout_s,
            cache_bytes=settings.embedding_cache_bytes,
            max_attempts=None,
        )

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """Return the prompt's embedding ``[1, L, D]``, and whether it was cached; like ``Embedder.embed``."""
        return await self._embedder.embed(prompt)

    async def info(self) -> EncoderInfo:
        """Return the encoder's description of its model.

        Raises:
            EncoderTimeout: the encoder did not respond in time.
            EncoderUnavailable: the encoder died.
        """
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                info: EncoderInfo = await self._handle.info.remote()
        except TimeoutError as error:
            raise EncoderTimeout("no text encoder responds") from error
        except (RayError, RayServeException) as error:
            raise EncoderUnavailable("the text encoder was lost") from error
        self._embedder.answered()
        return info

    async def _ask(self, prompt: str) -> torch.Tensor:
        try:
            # Outside of the caller's context, because this task handles cancellation, not Serve.
            stored = await Context().run(self._handle.embed.remote, prompt)
            if isinstance(stored, OutOfMemory):
                raise stored  # retrying would not help
            if isinstance(stored, Flux2Error):
                raise EncoderUnavailable(str(stored), retry_after_s=stored.retry_after_s) from stored
            tensor: torch.Tensor = await stored.reference  # copied directly from the encoder's machine
        except RayTaskError:
            raise  # an error in the code, not of a machine
        except (RayError, RayServeException) as error:  # the encoder or the machine that stored the embedding died
            raise EncoderUnavailable("the text encoder was lost", retry_after_s=5) from error
        return tensor
