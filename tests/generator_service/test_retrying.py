"""Retries and the embedding cache, for any encoder."""

import pytest
import torch

from flux2_shared.embedding import Embedding
from generator_service.clients.retrying import MAX_ATTEMPTS, RetryingEncoder
from generator_service.errors import EncoderTimeout, EncoderUnavailable

pytestmark = pytest.mark.anyio


class FlakyEncoder:
    """A text encoder that fails the first ``times`` requests."""

    def __init__(self, times: int) -> None:
        self.num_failures = times

    async def info(self) -> None:
        """Not supported."""

    async def embed(self, prompt: str) -> Embedding:
        if self.num_failures:
            self.num_failures -= 1
            raise EncoderUnavailable("unavailable")
        return Embedding(torch.full((1, 2, 3), float(len(prompt))), is_truncated=True)


async def test_an_encoder_that_recovers_is_waited_for() -> None:
    """Without a limit of attempts it is retried until the time limit, and its result is cached."""
    encoder = RetryingEncoder(FlakyEncoder(MAX_ATTEMPTS + 1), timeout_s=30.0, cache_bytes=1000, max_attempts=None)
    embedding, was_cached = await encoder.embed("four")
    assert (embedding.tensor.tolist(), was_cached) == ([[[4.0] * 3] * 2], False)
    assert embedding.is_truncated
    assert await encoder.embed("four") == (embedding, True)


async def test_attempts_are_limited_by_default() -> None:
    """By default there are four attempts."""
    flaky = FlakyEncoder(MAX_ATTEMPTS + 1)
    with pytest.raises(EncoderUnavailable):
        await RetryingEncoder(flaky, timeout_s=30.0, cache_bytes=0).embed("four")
    assert flaky.num_failures == 1


async def test_retries_end_after_the_time_limit() -> None:
    """An encoder that does not recover is given up after the time limit."""
    encoder = RetryingEncoder(FlakyEncoder(1000), timeout_s=0.5, cache_bytes=0, max_attempts=None)
    with pytest.raises((EncoderTimeout, EncoderUnavailable)):
        await encoder.embed("four")
