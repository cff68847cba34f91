"""The generator's readiness: what its text encoder says, asked for all probes together."""

import asyncio
import time
from contextvars import Context
from typing import Protocol

from flux2_shared.errors import Flux2Error
from flux2_shared.schemas import EncoderInfo
from flux2_shared.web.health import READY, Readiness
from generator_service.pipelines.model_info import ModelInfo

SHARED_S = 1.0
"""Time that probes share an answer, in seconds."""


class HasInfo(Protocol):
    """A text encoder that reports which model it embeds for."""

    last_answer: float | None
    """When it last answered, in ``time.monotonic``'s seconds; None if it never has."""

    async def info(self) -> EncoderInfo | None:
        """Return None if the service does not report it; raise a ``Flux2Error`` if the service is unavailable."""


class EncoderCheck:
    """A readiness check: the text encoder must serve the same model, and must have been available recently.

    A generator whose encoder restarts stays ready, because cached prompts, running streams and kept results do not need
    it. At most one request to the encoder is in flight, however many probes there are. Close it before the encoder.

    Args:
        encoder: the text encoder.
        info: the generator's model.
        shape: tokens and width of its prompt embeddings.
        grace_s: time that the generator stays ready after the encoder's last answer, in seconds.
    """

    def __init__(self, encoder: HasInfo, info: ModelInfo, shape: tuple[int, int], grace_s: float) -> None:
        self._encoder = encoder
        self._info = info
        self._shape = shape
        self._grace_s = grace_s
        self._answer: asyncio.Task[Readiness] | None = None
        self._ask_again = 0.0

    async def __call__(self) -> Readiness:
        """Return the encoder's last answer, if it is recent, or ask again, together with other probes."""
        if self._answer is None or (self._answer.done() and time.monotonic() >= self._ask_again):
            # In a context of its own, because it belongs to no request.
            self._answer = asyncio.create_task(self._ask(), name="readiness", context=Context())
        return await asyncio.shield(self._answer)  # other probes need the answer when this one's client leaves

    async def aclose(self) -> None:
        """Stop asking."""
        if self._answer is not None:
            self._answer.cancel()
            await asyncio.gather(self._answer, return_exceptions=True)

    async def _ask(self) -> Readiness:
        try:
            info = await self._encoder.info()
            mismatch = info and info.mismatch(self._info.name, self._info.revision, self._shape)
            return Readiness(is_ready=False, reason=mismatch) if mismatch else READY
        except Flux2Error as error:
            last = self._encoder.last_answer
            is_recent = last is not None and time.monotonic() - last < self._grace_s
            return Readiness(is_ready=is_recent, reason=str(error))
        finally:
            self._ask_again = time.monotonic() + SHARED_S
