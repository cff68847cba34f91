"""The profile ``fast`` against the library's forward pass."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from demo_model.services import WEIGHTS
from shared.compilation import compile_parts, num_compilations
from tests.conftest import Serve
from tests.text_encoder_service.test_encoder import PROMPTS, TOLERANCES, encoder
from text_encoder_service import fast_layers
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.settings import TextEncoderSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch warns of its compiler


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """What one test compiled helps no other."""
    yield
    torch.compiler.reset()


def fast_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, max_batch: int = 4, backend: str = "eager"
) -> MistralEncoder:
    """Ours, with graphs captured and, with another ``backend``, compiled."""
    ours = encoder(folder, dtype)
    ours.speed_up(max_batch, backend)
    return ours


def refuse_uncompiled() -> AbstractContextManager[None]:
    """Within the block it is an error to run what was not compiled before."""
    return torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fast_equals_exact_up_to_rounding(weights: Path, dtype: torch.dtype) -> None:
    """Batches of any size give the library's embeddings, in order, and tell of the same cuts."""
    exact, fast = encoder(weights, dtype).encode(PROMPTS), fast_encoder(weights, dtype)
    for chosen in (slice(0, 1), slice(1, 4), slice(0, 4)):
        for ours, theirs in zip(fast.encode(PROMPTS[chosen]), exact[chosen], strict=True):
            error = (ours.tensor.float() - theirs.tensor.float()).abs().max()
            assert error <= TOLERANCES[dtype] * theirs.tensor.float().abs().max()
            assert (ours.tensor.shape, ours.is_truncated) == (theirs.tensor.shape, theirs.is_truncated)


def test_all_layers_share_one_graph_for_each_shape(weights: Path) -> None:
    """Three layers and batches of 1, 2 and 4 are three graphs."""
    before = num_compilations()
    fast_encoder(weights)
    assert num_compilations() - before == 3


def test_all_that_is_served_was_compiled_at_the_start(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch up to the largest meets a shape that is new."""
    ours = fast_encoder(weights)
    monkeypatch.setattr(fast_layers, "compiling_nothing_new", refuse_uncompiled)
    for batch in range(1, 5):
        assert len(ours.encode(PROMPTS[:batch])) == batch


def test_a_larger_batch_runs_uncompiled(weights: Path) -> None:
    """A shape that is new is not compiled while others wait; it runs as it is."""
    ours, before = fast_encoder(weights, max_batch=2), num_compilations()
    assert len(ours.encode(PROMPTS)) == 4
    assert num_compilations() == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_code_equals_exact_up_to_rounding() -> None:
    """The same for code that is really compiled, here by the C++ compiler."""
    exact = encoder(WEIGHTS).encode(PROMPTS[:1])[0].tensor
    fast = fast_encoder(WEIGHTS, max_batch=1, backend="inductor").encode(PROMPTS[:1])[0].tensor
    assert (fast - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_what_cannot_be_compiled_is_exact(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no compiler the service starts all the same, bit-equal to the library, and says so."""
    with caplog.at_level(logging.WARNING, "flux2"):
        ours = fast_encoder(weights, backend="no such backend")
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["performance is exact"]
    assert torch.equal(ours.encode(PROMPTS)[0].tensor, encoder(weights).encode(PROMPTS)[0].tensor)


def test_what_is_compiled_wrongly_is_not_served(
    weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled layers that differ from the library's by more than rounding are put back, with a line in the log."""
    monkeypatch.setitem(fast_layers.TOLERANCES, torch.float32, -1.0)
    with caplog.at_level(logging.WARNING, "flux2"):
        ours = fast_encoder(weights)
    assert "more than rounding" in caplog.text
    before = num_compilations()
    assert torch.equal(ours.encode(PROMPTS)[0].tensor, encoder(weights).encode(PROMPTS)[0].tensor)
    assert num_compilations() == before


@pytest.mark.anyio
async def test_the_service_can_be_fast(serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """``performance=fast`` serves compiled layers: what the load compiles on its thread, the device thread runs."""
    monkeypatch.setattr(fast_layers, "compile_parts", lambda parts, _: compile_parts(parts, "eager"))
    monkeypatch.setattr(fast_layers, "compiling_nothing_new", refuse_uncompiled)
    async with serve_encoder(performance="fast", max_batch=2) as http:
        response = await http.post("/predict", json={"prompt": PROMPTS[:3]})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("performance", "capability", "profile"),
    [("auto", (9, 0), "fast"), ("auto", (8, 0), "fast"), ("auto", (7, 5), "exact"), ("exact", (9, 0), "exact")],
)
def test_auto_is_fast_on_recent_gpus(
    performance: str, capability: tuple[int, int], profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` is fast on GPUs of capability 8.0 and more, exact elsewhere; what is asked for is done."""
    assert TextEncoderSettings(performance=performance).profile() == "exact"  # on this CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert TextEncoderSettings(performance=performance, device="cuda").profile() == profile
