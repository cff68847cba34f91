"""Embeddings from a text encoder that may be slow, wrong or away; how it is asked is the caller's business.

They are cached, retried, given up after a time, and refused at once while the encoder is known to be away.
"""

import asyncio
from collections.abc import Awaitable, Callable

import stamina
import torch

from generator_service.breaker import OPEN_S, Breaker
from shared.byte_cache import ByteBoundedCache
from shared.errors import BadEncoderResponse, EncoderTimeout, EncoderUnavailable, InvalidRequest, OutOfMemory

MAX_ATTEMPTS = 4
MAX_WAIT_S = 1.0
"""Between two attempts."""


class Embedder:
    """Asks as often as it takes.

    Args:
        ask: one attempt for one prompt's embedding ``[1, L, D]``.
        timeout_s: for one prompt, in all.
        cache_bytes: how much is kept.
        max_attempts: None tries until the time is over, for an encoder that somebody starts again.
    """

    def __init__(
        self,
        ask: Callable[[str], Awaitable[torch.Tensor]],
        *,
        timeout_s: float,
        cache_bytes: int,
        max_attempts: int | None = MAX_ATTEMPTS,
    ) -> None:
        self._ask = ask
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._cache = ByteBoundedCache[torch.Tensor](cache_bytes)
        self._breaker = Breaker()

    def answered(self) -> None:
        """The encoder is there, as somebody else has seen."""
        self._breaker.answered()

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """The prompt's embedding ``[1, L, D]``, and whether it was cached.

        Raises:
            EncoderUnavailable: no connection, or the service says it cannot answer now; after retries, or at once while
                it is known to be away.
            EncoderTimeout: no answer within ``timeout_s`` in all.
            BadEncoderResponse: the answer is not an embedding; after one retry.
            InvalidRequest: the service refuses the prompt.
            OutOfMemory: the service has too little memory for the prompt.
        """
        cached = self._cache.get(prompt)
        if cached is not None:
            return cached, True
        if not self._breaker.allows():
            raise EncoderUnavailable("the text encoder is away", retry_after_s=OPEN_S)
        try:
            async with asyncio.timeout(self._timeout_s):
                tensor = await self._ask_with_retries(prompt)
        except TimeoutError as error:
            self._breaker.failed()
            raise EncoderTimeout(f"the text encoder did not answer within {self._timeout_s:g} s") from error
        except (EncoderUnavailable, EncoderTimeout):
            self._breaker.failed()
            raise
        except (BadEncoderResponse, InvalidRequest, OutOfMemory):
            self._breaker.answered()
            raise
        self._breaker.answered()
        self._cache.put(prompt, tensor)
        return tensor, False

    async def _ask_with_retries(self, prompt: str) -> torch.Tensor:
        bad_answers = 0

        def is_worth_retrying(error: Exception) -> bool:
            nonlocal bad_answers
            bad_answers += isinstance(error, BadEncoderResponse)
            return isinstance(error, EncoderUnavailable) or (bad_answers == 1 and isinstance(error, BadEncoderResponse))

        async for attempt in stamina.retry_context(
            on=is_worth_retrying,
            attempts=self._max_attempts,
            timeout=self._timeout_s,
            wait_initial=0.1,
            wait_max=MAX_WAIT_S,
            wait_jitter=0.1,
        ):
            with attempt:
                return await self._ask(prompt)
        raise AssertionError  # the loop returns or raises
