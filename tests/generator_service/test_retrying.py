"""Retries and the cache of embeddings, whatever the encoder is."""

import pytest
import torch

from generator_service.clients.retrying import MAX_ATTEMPTS, RetryingEncoder
from generator_service.errors import EncoderTimeout, EncoderUnavailable

pytestmark = pytest.mark.anyio


class FlakyEncoder:
    """A text encoder that fails the first ``times`` requests."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def info(self) -> None:
        """Not supported."""

    async def embed(self, prompt: str) -> torch.Tensor:
        """An embedding, once it has failed often enough."""
        if self.left:
            self.left -= 1
            raise EncoderUnavailable("unavailable")
        return torch.full((1, 2, 3), float(len(prompt)))


async def test_an_encoder_that_comes_back_is_waited_for() -> None:
    """Without a number of attempts it is asked until the time is over, and its answer is kept."""
    encoder = RetryingEncoder(FlakyEncoder(MAX_ATTEMPTS + 1), timeout_s=30.0, cache_bytes=1000, max_attempts=None)
    tensor, was_cached = await encoder.embed("four")
    assert (tensor.tolist(), was_cached) == ([[[4.0] * 3] * 2], False)
    assert (await encoder.embed("four"))[1] is True


async def test_attempts_are_counted_otherwise() -> None:
    """By default it is asked four times."""
    flaky = FlakyEncoder(MAX_ATTEMPTS + 1)
    with pytest.raises(EncoderUnavailable):
        await RetryingEncoder(flaky, timeout_s=30.0, cache_bytes=0).embed("four")
    assert flaky.left == 1


async def test_patience_ends() -> None:
    """One that does not come back is given up after the time."""
    encoder = RetryingEncoder(FlakyEncoder(1000), timeout_s=0.5, cache_bytes=0, max_attempts=None)
    with pytest.raises((EncoderTimeout, EncoderUnavailable)):
        await encoder.embed("four")
