"""Asking for embeddings, whatever the encoder is."""

import pytest
import torch

from generator_service.embedder import MAX_ATTEMPTS, Embedder
from shared.errors import EncoderTimeout, EncoderUnavailable

pytestmark = pytest.mark.anyio


class Away:
    """An encoder that is away for the first ``times`` questions."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def __call__(self, prompt: str) -> torch.Tensor:
        """An answer, if it is back."""
        if self.left:
            self.left -= 1
            raise EncoderUnavailable("away")
        return torch.full((1, 2, 3), float(len(prompt)))


async def test_an_encoder_that_comes_back_is_waited_for() -> None:
    """Without a number of attempts it is asked until the time is over, and its answer is kept."""
    embedder = Embedder(Away(MAX_ATTEMPTS + 1), timeout_s=30.0, cache_bytes=1000, max_attempts=None)
    tensor, was_cached = await embedder.embed("four")
    assert (tensor.tolist(), was_cached) == ([[[4.0] * 3] * 2], False)
    assert (await embedder.embed("four"))[1] is True


async def test_attempts_are_counted_otherwise() -> None:
    """By default it is asked four times."""
    away = Away(MAX_ATTEMPTS + 1)
    with pytest.raises(EncoderUnavailable):
        await Embedder(away, timeout_s=30.0, cache_bytes=0).embed("four")
    assert away.left == 1


async def test_patience_ends() -> None:
    """One that does not come back is given up after the time."""
    embedder = Embedder(Away(1000), timeout_s=0.5, cache_bytes=0, max_attempts=None)
    with pytest.raises((EncoderTimeout, EncoderUnavailable)):
        await embedder.embed("four")
