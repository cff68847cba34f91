"""The text encoder as others see it: a handle that gives references to embeddings."""

import asyncio
from contextvars import Context
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from flux2_shared.errors import EncoderTimeout, EncoderUnavailable, Flux2Error, OutOfMemory
from flux2_shared.schemas import EncoderInfo
from generator_service.app import with_retries
from generator_service.clients.retrying import RetryingEncoder
from generator_service.settings import GeneratorSettings

INFO_TIMEOUT_S = 5.0


class RemoteEncoder:
    """One attempt at a time to ask a text encoder of the cluster.

    Args:
        handle: of the deployment of ``EncoderReplica``.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def info(self) -> EncoderInfo:
        """What the encoder reports about itself.

        Raises:
            EncoderTimeout: it does not answer in time.
            EncoderUnavailable: it died meanwhile.
        """
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                info: EncoderInfo = await self._handle.info.remote()
        except TimeoutError as error:
            raise EncoderTimeout("no text encoder answers") from error
        except (RayError, RayServeException) as error:
            raise EncoderUnavailable("the text encoder was lost") from error
        return info

    async def embed(self, prompt: str) -> torch.Tensor:
        """The prompt's embedding ``[1, L, D]``; the errors are those of ``RetryingEncoder.embed``."""
        try:
            # Outside of the caller's context: who cancels is this task's business, not Serve's.
            stored = await Context().run(self._handle.embed.remote, prompt)
            if isinstance(stored, OutOfMemory):
                raise stored  # asking again would end in the same way
            if isinstance(stored, Flux2Error):
                raise EncoderUnavailable(str(stored), retry_after_s=stored.retry_after_s) from stored
            tensor: torch.Tensor = await stored.reference  # from the encoder's machine to this one, past all others
        except RayTaskError:
            raise  # not the machines but the code
        except (RayError, RayServeException) as error:  # the encoder, or the machine that kept the embedding, is gone
            raise EncoderUnavailable("the text encoder was lost", retry_after_s=5) from error
        return tensor


def remote_encoder(handle: Any, settings: GeneratorSettings) -> RetryingEncoder:
    """Asks until the time is over: Ray restarts a text encoder that died, perhaps on another machine."""
    return with_retries(RemoteEncoder(handle), settings, max_attempts=None)
