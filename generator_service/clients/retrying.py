"""Adds a cache, retries and a circuit breaker to a text encoder."""

import asyncio
import logging
import math
import time
from typing import Protocol

import stamina

from flux2_shared.embedding import Embedding, ModelVersion
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.schemas import EncoderInfo
from generator_service.clients.breaker import OPEN_S, CircuitBreaker, CircuitOpen
from generator_service.errors import BadEncoderResponse, EncoderTimeout, EncoderUnavailable

logger = logging.getLogger("flux2")

MAX_ATTEMPTS = 4
MAX_BACKOFF_S = 1.0
"""Longest backoff between attempts, in seconds."""
MAX_PATIENCE_S = 5.0
"""Longest time without an answer to any prompt until those that wait count as failures, in seconds."""


class TextEncoder(Protocol):
    """One attempt at a time to ask a text encoder."""

    async def embed(self, prompt: str) -> Embedding:
        """Return the prompt's embedding, of shape ``[1, L, D]``."""

    async def info(self) -> EncoderInfo | None:
        """Return the encoder's model and embedding shape; None if it does not report them."""


class RetryingEncoder:
    """A text encoder with a cache, retries and a circuit breaker.

    Args:
        encoder: makes a single attempt.
        timeout_s: timeout for one prompt, including retries.
        cache_bytes: largest size of the cache of embeddings.
        max_attempts: largest number of attempts; None to retry until the timeout, however long there is no answer.
        model: the model that the embeddings are for; a part of the cache's key.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        timeout_s: float,
        cache_bytes: int,
        max_attempts: int | None = MAX_ATTEMPTS,
        model: ModelVersion | None = None,
    ) -> None:
        self._encoder = encoder
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._model = model
        self._cache = ByteBoundedCache[Embedding](cache_bytes)
        patience_s = math.inf if max_attempts is None else min(timeout_s / 3, MAX_PATIENCE_S)
        self._breaker = CircuitBreaker((EncoderUnavailable, EncoderTimeout, TimeoutError), patience_s)
        self.last_answer: float | None = None
        """When the service last answered, in ``time.monotonic``'s seconds; None if it never has."""

    @property
    def is_circuit_open(self) -> bool:
        """Whether requests fail fast, because the last ones failed."""
        return self._breaker.is_open

    def is_cached(self, prompt: str) -> bool:
        """Return whether ``embed`` would not have to ask the service."""
        return (self._model, prompt) in self._cache

    async def info(self) -> EncoderInfo | None:
        """Call ``encoder.info``. Any response closes the circuit, so that probes detect a recovered encoder."""
        try:
            info = await self._encoder.info()
        except BadEncoderResponse:
            self._breaker.record_reachable()
            raise
        self._breaker.record_reachable()
        self.last_answer = time.monotonic()
        return info

    async def embed(self, prompt: str) -> tuple[Embedding, bool]:
        """Return the prompt's embedding, of shape ``[1, L, D]``, and whether it was cached.

        Raises:
            EncoderUnavailable: the service cannot be reached or is overloaded; raised after retries, or immediately
                while the circuit is open, or when it opens.
            EncoderTimeout: no response within ``timeout_s``.
            EncoderMismatch: the service has another model or revision.
            BadEncoderResponse: the response is not an embedding; raised after one retry.
            InvalidRequest: the service rejected the prompt.
            OutOfMemory: the service has too little memory for the prompt.
        """
        key = self._model, prompt
        cached = self._cache.get(key)
        if cached is not None:
            return cached, True
        began, limit = time.monotonic(), asyncio.timeout(self._timeout_s)
        try:
            with self._breaker.sending(limit):
                async with limit:
                    embedding = await self._embed_with_retries(prompt)
        except CircuitOpen as error:
            raise EncoderUnavailable("the text encoder is unavailable", retry_after_s=OPEN_S) from error
        except TimeoutError as error:
            waited_s = time.monotonic() - began
            detail = f"the text encoder did not respond within {round(waited_s, 1):g} s"
            if waited_s < self._timeout_s:  # the circuit was opened meanwhile
                raise EncoderUnavailable(detail, retry_after_s=OPEN_S) from error
            raise EncoderTimeout(detail) from error
        self.last_answer = time.monotonic()
        self._cache.put(key, embedding)
        return embedding, False

    async def _embed_with_retries(self, prompt: str) -> Embedding:
        num_bad_responses = 0
        last_error: Exception | None = None

        def is_worth_retrying(error: Exception) -> bool:
            nonlocal num_bad_responses, last_error
            last_error = error
            is_bad = isinstance(error, BadEncoderResponse)
            num_bad_responses += is_bad
            return isinstance(error, EncoderUnavailable) or (is_bad and num_bad_responses == 1)

        async for attempt in stamina.retry_context(
            on=is_worth_retrying,
            attempts=self._max_attempts,
            timeout=self._timeout_s,
            wait_initial=0.1,
            wait_max=MAX_BACKOFF_S,
            wait_jitter=0.1,
        ):
            if last_error is not None:
                logger.warning(
                    "embedding a prompt: attempt %d, because the last one failed: %s", attempt.num, last_error
                )
            with attempt:
                return await self._encoder.embed(prompt)
        raise AssertionError  # the loop returns or raises
