"""Adds a cache, retries and a circuit breaker to a text encoder."""

import asyncio
import logging
from typing import Protocol

import stamina

from flux2_shared.embedding import Embedding
from flux2_shared.errors import InvalidRequest, OutOfMemory
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.schemas import EncoderInfo
from generator_service.clients.breaker import OPEN_S, CircuitBreaker
from generator_service.errors import BadEncoderResponse, EncoderTimeout, EncoderUnavailable

logger = logging.getLogger("flux2")

MAX_ATTEMPTS = 4
MAX_BACKOFF_S = 1.0
"""Longest backoff between attempts, in seconds."""


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
        max_attempts: largest number of attempts; None to retry until the timeout.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        timeout_s: float,
        cache_bytes: int,
        max_attempts: int | None = MAX_ATTEMPTS,
    ) -> None:
        self._encoder = encoder
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._cache = ByteBoundedCache[Embedding](cache_bytes)
        self._breaker = CircuitBreaker()

    @property
    def is_circuit_open(self) -> bool:
        """Whether requests fail fast, because the last ones failed."""
        return self._breaker.is_open

    def is_cached(self, prompt: str) -> bool:
        """Return whether ``embed`` responds at once; the cache is not changed."""
        return prompt in self._cache

    async def info(self) -> EncoderInfo | None:
        """Call ``encoder.info``. Any response closes the circuit, so readiness probes detect a recovered encoder."""
        try:
            info = await self._encoder.info()
        except BadEncoderResponse:
            self._breaker.record_success()
            raise
        self._breaker.record_success()
        return info

    async def embed(self, prompt: str) -> tuple[Embedding, bool]:
        """Return the prompt's embedding, of shape ``[1, L, D]``, and whether it was cached.

        Raises:
            EncoderUnavailable: the service cannot be reached or is overloaded; raised after retries, or immediately
                while the circuit is open.
            EncoderTimeout: no response within ``timeout_s``.
            BadEncoderResponse: the response is not an embedding; raised after one retry.
            InvalidRequest: the service rejected the prompt.
            OutOfMemory: the service has too little memory for the prompt.
        """
        cached = self._cache.get(prompt)
        if cached is not None:
            return cached, True
        if not self._breaker.allow_request():
            raise EncoderUnavailable("the text encoder is unavailable", retry_after_s=OPEN_S)
        try:
            async with asyncio.timeout(self._timeout_s):
                embedding = await self._embed_with_retries(prompt)
        except TimeoutError as error:
            self._breaker.record_failure()
            raise EncoderTimeout(f"the text encoder did not respond within {self._timeout_s:g} s") from error
        except (EncoderUnavailable, EncoderTimeout):
            self._breaker.record_failure()
            raise
        except (BadEncoderResponse, InvalidRequest, OutOfMemory):
            self._breaker.record_success()
            raise
        self._breaker.record_success()
        self._cache.put(prompt, embedding)
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
