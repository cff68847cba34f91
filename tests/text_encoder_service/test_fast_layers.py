"""The profile ``fast`` compared with the library's forward pass."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.errors import OutOfMemory
from flux2_shared.model.compilation import compile_parts, num_compilations
from tests.conftest import Serve
from tests.memory_errors import KINDS
from tests.text_encoder_service.test_encoder import PROMPTS, TOLERANCES, encoder
from text_encoder_service import fast_layers
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.fast_layers import FastLayers, difference, fast_forward
from text_encoder_service.settings import TextEncoderSettings
from text_encoder_service.shapes import ShapeBuckets

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # a warning of torch's compiler


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Discard compiled code after each test."""
    yield
    torch.compiler.reset()


def fast_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, max_batch: int = 2, backend: str = "eager"
) -> MistralEncoder:
    """This project's encoder with captured graphs, compiled by ``backend``."""
    ours = encoder(folder, dtype)
    ours.compile(max_batch, backend)
    return ours


def refuse_uncompiled() -> AbstractContextManager[None]:
    """Within the block it is an error to run an uncompiled shape."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("fail_on_recompile")
    return stance


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fast_equals_exact_up_to_rounding(weights: Path, dtype: torch.dtype) -> None:
    """Batches of any size and length give the library's embeddings, in order, and mark the same truncations."""
    exact, fast = encoder(weights, dtype).encode(PROMPTS), fast_encoder(weights, dtype, max_batch=4)
    for chosen in (slice(0, 1), slice(0, 3), slice(1, 4), slice(0, 4)):
        for ours, theirs in zip(fast.encode(PROMPTS[chosen]), exact[chosen], strict=True):
            error = (ours.tensor.float() - theirs.tensor.float()).abs().max()
            assert error <= TOLERANCES[dtype] * theirs.tensor.float().abs().max()
            assert (ours.tensor.shape, ours.is_truncated) == (theirs.tensor.shape, theirs.is_truncated)


def test_all_layers_share_one_graph_for_each_shape() -> None:
    """Three layers, batches of 1 and 2, and prompts of 8, 16, 24 and 32 tokens are eight graphs."""
    before = num_compilations()
    fast_encoder(WEIGHTS)
    assert num_compilations() - before == 8


def test_every_served_shape_is_compiled_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch up to the largest has a new shape."""
    ours = fast_encoder(WEIGHTS, max_batch=4)
    monkeypatch.setattr(fast_layers, "eager_on_recompile", refuse_uncompiled)
    for batch in range(1, 5):
        assert len(ours.encode(PROMPTS[:batch])) == batch


def test_a_larger_batch_runs_uncompiled() -> None:
    """A new shape is not compiled while other requests wait; it runs uncompiled."""
    ours, before = fast_encoder(WEIGHTS), num_compilations()
    assert len(ours.encode(PROMPTS)) == 4
    assert num_compilations() == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_code_equals_exact_up_to_rounding() -> None:
    """The same for code that is really compiled, here by the C++ compiler."""
    ours = encoder(WEIGHTS)
    tokens = ours._tokenize(PROMPTS[:1])
    with torch.inference_mode():
        fast = fast_forward(ours._model, (1, 2, 3), ShapeBuckets((1,), (24, 32)), ours._exact, [tokens])
        assert isinstance(fast, FastLayers)
        assert difference(fast(tokens), ours._exact(tokens)) <= fast_layers.TOLERANCES[torch.float32]


def test_a_failing_compiler_falls_back_to_exact(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a compiler the service starts, bit-identical to the library, and logs it."""
    with caplog.at_level(logging.WARNING, "flux2"):
        ours = fast_encoder(weights, backend="no such backend")
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == ["using performance=exact"]
    assert torch.equal(ours.encode(PROMPTS)[0].tensor, encoder(weights).encode(PROMPTS)[0].tensor)


def test_incorrectly_compiled_layers_are_not_used(
    weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled layers that differ from the library's by more than rounding are replaced by it, and a line is logged."""

    def miscompile(layers: Sequence[Any], _: str) -> None:
        for layer in layers:
            layer._compiled_call_impl = lambda hidden, **_: 2 * hidden

    monkeypatch.setattr(fast_layers, "compile_parts", miscompile)
    with caplog.at_level(logging.WARNING, "flux2"):
        ours = fast_encoder(weights)
    assert "more than rounding; using performance=exact" in caplog.text
    assert torch.equal(ours.encode(PROMPTS)[0].tensor, encoder(weights).encode(PROMPTS)[0].tensor)


@pytest.mark.parametrize("kind", ["torch", "triton", "compiler"])
def test_batches_that_do_not_fit_are_an_error_at_start(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Too little memory for the largest batch is one line with the setting's name, before anything is served."""

    def run_out(*_: object) -> None:
        error = KINDS[kind]()
        raise error

    monkeypatch.setattr(FastLayers, "_run", run_out)
    with pytest.raises(OutOfMemory, match="TEXT_ENCODER_MAX_BATCH"):
        fast_encoder(WEIGHTS)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_padding_is_computed_once(weights: Path, dtype: torch.dtype) -> None:
    """Whatever a padding token's embedding is, its states at every position are the library's, bit for bit."""
    ours = encoder(weights, dtype)
    with torch.no_grad():  # in these models it is 0, and so are the states
        ours._model.embed_tokens.weight[ours._tokenizer.pad_token_id].normal_()
    exact = torch.cat([embedding.tensor for embedding in ours.encode(PROMPTS)])
    ours.compile(2, "eager")
    fast = torch.cat([ours.encode([prompt])[0].tensor for prompt in PROMPTS])
    is_padding = ours._tokenize(PROMPTS).mask == 0
    assert exact[is_padding].abs().min(dim=0).values.max() > 0.1
    assert torch.equal(fast[is_padding], exact[is_padding])
    assert difference(fast, exact) <= fast_layers.TOLERANCES[dtype]


def test_prompts_that_cannot_be_trimmed_stay_padded(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If trimming changes the result, here because padding is on the other side, the whole prompt is computed."""
    ours = encoder(weights)
    ours._tokenizer.padding_side = "right"
    exact, before = ours.encode(PROMPTS), num_compilations()
    with caplog.at_level(logging.WARNING, "flux2"):
        ours.compile(2, "eager")
    assert "prompts are padded" in caplog.text
    assert num_compilations() - before == 2
    assert difference(ours.encode(PROMPTS[:1])[0].tensor, exact[0].tensor) <= fast_layers.TOLERANCES[torch.float32]


@pytest.mark.anyio
async def test_the_service_can_be_fast(serve_encoder: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """``performance=fast`` serves compiled layers: code that is compiled while loading runs on the device thread."""
    monkeypatch.setattr(fast_layers, "compile_parts", lambda modules, _: compile_parts(modules, "eager"))
    monkeypatch.setattr(fast_layers, "eager_on_recompile", refuse_uncompiled)
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
    """``auto`` is fast on GPUs of capability 8.0 and more, exact elsewhere; an explicit setting is applied."""
    assert TextEncoderSettings(performance=performance).profile() == "exact"  # on this CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert TextEncoderSettings(performance=performance, device="cuda").profile() == profile
