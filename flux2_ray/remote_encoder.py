"""Client of the text encoder's deployment, which returns references to embeddings."""

import asyncio
from contextvars import Context
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from flux2_shared.embedding import Embedding, ModelVersion
from flux2_shared.errors import Flux2Error, OutOfMemory
from flux2_shared.schemas import EncoderInfo
from generator_service.app import with_retries
from generator_service.clients.retrying import RetryingEncoder
from generator_service.clients.text_encoder import MISMATCH, RETRY_MISMATCH_S
from generator_service.errors import EncoderMismatch, EncoderTimeout, EncoderUnavailable
from generator_service.pipelines.model_info import ModelInfo
from generator_service.settings import GeneratorSettings

INFO_TIMEOUT_S = 3.0


class RemoteEncoder:
    """One attempt at a time to ask a text encoder of the cluster.

    Args:
        handle: handle of the ``EncoderReplica`` deployment.
        model: the model that the embeddings must be for; None to accept any.
    """

    def __init__(self, handle: Any, model: ModelVersion | None = None) -> None:
        self._handle = handle
        self._model = model

    async def info(self) -> EncoderInfo:
        """Return the encoder's model and embedding shape.

        Raises:
            EncoderTimeout: it did not respond in time.
            EncoderUnavailable: it died meanwhile.
        """
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                info: EncoderInfo = await self._handle.info.remote()
        except TimeoutError as error:
            raise EncoderTimeout("no text encoder responds") from error
        except (RayError, RayServeException) as error:
            raise EncoderUnavailable("the text encoder was lost") from error
        return info

    async def embed(self, prompt: str) -> Embedding:
        """Return the prompt's embedding, of shape ``[1, L, D]``; raises the errors of ``RetryingEncoder.embed``."""
        try:
            # Outside of the caller's context, because this task handles cancellation, not Serve.
            stored = await Context().run(self._handle.embed.remote, prompt)
            if isinstance(stored, OutOfMemory):
                raise stored  # retrying would not help
            if isinstance(stored, Flux2Error):
                raise EncoderUnavailable(str(stored), retry_after_s=stored.retry_after_s) from stored
            if self._model not in (None, stored.model):
                raise EncoderMismatch(MISMATCH, retry_after_s=RETRY_MISMATCH_S)
            tensor: torch.Tensor = await stored.reference  # copied directly from the encoder's machine
        except RayTaskError:
            raise  # a bug, not a lost machine
        except (RayError, RayServeException) as error:  # the encoder or the machine that stored the embedding died
            raise EncoderUnavailable("the text encoder was lost", retry_after_s=5) from error
        return Embedding(tensor, stored.is_truncated)


def remote_encoder(handle: Any, settings: GeneratorSettings, info: ModelInfo | None = None) -> RetryingEncoder:
    """Create an encoder for a model, or without one for readiness checks.

    It retries until its timeout, because Ray restarts a text encoder that died.
    """
    model = None if info is None else ModelVersion(info.name, info.revision)
    return with_retries(RemoteEncoder(handle, model), settings, model, max_attempts=None)
