"""Prompts that do not fit into the device's memory: the fallbacks, and the state afterwards."""

from collections.abc import Callable

import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.errors import OutOfMemory
from tests.memory_errors import EVERY_KIND, KINDS
from tests.text_encoder_service.test_encoder import PROMPTS, encoder
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.fast_layers import Tokens

Forward = Callable[[Tokens], torch.Tensor]


@pytest.fixture(scope="module")
def ours() -> MistralEncoder:
    """The demo model's encoder."""
    return encoder(WEIGHTS)


class SmallDevice:
    """Runs at most ``room`` prompts at once, and fails for larger batches.

    Args:
        forward: runs the prompts.
        room: the number of prompts that fit.
        kind: how larger batches fail.
        num_failures: the maximum number of failures.
    """

    def __init__(self, forward: Forward, room: int, kind: str, num_failures: int = 100) -> None:
        self.sizes: list[int] = []
        self._forward, self._room, self._kind, self._num_failures = forward, room, kind, num_failures

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        """A ``Forward`` that fails after its work is done, when memory use is highest."""
        self.sizes.append(len(tokens.ids))
        states = self._forward(tokens)
        if len(tokens.ids) > self._room and self._num_failures > 0:
            self._num_failures -= 1
            error = KINDS[self._kind]()
            raise error
        return states


@EVERY_KIND
def test_a_batch_that_does_not_fit_is_divided(ours: MistralEncoder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It is halved until its parts fit; the embeddings are in order, and the next batch is bit-identical."""
    expected = ours.encode(PROMPTS)
    with monkeypatch.context() as patch:
        device = SmallDevice(ours._forward, 1, kind)
        patch.setattr(ours, "_forward", device)
        divided = ours.encode(PROMPTS[:3])
    assert device.sizes == [3, 1, 2, 1, 1]
    for embedding, alone in zip(divided, PROMPTS[:3], strict=True):
        assert torch.equal(embedding.tensor, ours.encode([alone])[0].tensor)
    assert [embedding.is_truncated for embedding in divided] == [each.is_truncated for each in expected[:3]]
    assert all(map(torch.equal, (e.tensor for e in ours.encode(PROMPTS)), (e.tensor for e in expected)))


@EVERY_KIND
def test_a_prompt_that_never_fits_is_refused(ours: MistralEncoder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """After a second attempt it is ``OutOfMemory`` without the library's message; the next prompt is bit-identical."""
    expected = ours.encode(PROMPTS[:1])[0].tensor
    with monkeypatch.context() as patch:
        device = SmallDevice(ours._forward, 0, kind)
        patch.setattr(ours, "_forward", device)
        with pytest.raises(OutOfMemory, match=r"^a prompt does not fit into the device's memory now$"):
            ours.encode(PROMPTS[:2])
    assert device.sizes == [2, 1, 1]
    assert torch.equal(ours.encode(PROMPTS[:1])[0].tensor, expected)


def test_a_retry_gives_the_same_embedding(ours: MistralEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single failure does not change the result."""
    expected = ours.encode(PROMPTS[:1])[0].tensor
    device = SmallDevice(ours._forward, 0, "cublas", num_failures=1)
    monkeypatch.setattr(ours, "_forward", device)
    assert torch.equal(ours.encode(PROMPTS[:1])[0].tensor, expected)
    assert device.sizes == [1, 1]


def test_an_ordinary_error_is_not_retried(ours: MistralEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A programming error is neither retried nor reported as lack of memory."""
    sizes: list[int] = []

    def fail(tokens: Tokens) -> torch.Tensor:
        sizes.append(len(tokens.ids))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x4)")

    monkeypatch.setattr(ours, "_forward", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        ours.encode(PROMPTS[:2])
    assert sizes == [2]
