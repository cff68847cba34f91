"""The benchmark of the text encoder."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import FULL
from benchmarks.encoder.language_model import EncoderSource, empty_model
from benchmarks.encoder.latency import BATCHES, measure, table_of
from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused
from tests.benchmarks.resized import resized
from text_encoder_service.app import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # a warning of torch's compiler
DEMO = EncoderSource(WEIGHTS, has_weights=True, device="cpu")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Discard compiled code after each test."""
    yield
    torch.compiler.reset()


def options(**changed: object) -> argparse.Namespace:
    """Options as from the command line, for the smallest run."""
    usual = {"weights": ["full"], "budget_s": 60.0, "seconds": 0.1, "repeats": 2, "backend": "eager"}
    return argparse.Namespace(**usual | changed)


def test_full_size_is_flux2_dev() -> None:
    """The full size has 16.7 billion parameters in 30 layers, and 0.67 billion in its token embeddings."""
    model = empty_model(FULL).language_model
    embeddings = model.embed_tokens.weight.numel()
    assert embeddings == pytest.approx(0.67e9, rel=2e-3)
    assert sum(p.numel() for p in model.parameters()) - embeddings == pytest.approx(16.7e9, rel=2e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_every_profile_batch_and_length_is_measured() -> None:
    """The report has a row for each, compiles nothing while it measures, and has the difference of fast and exact."""
    report = measure(DEMO, options())
    fast = [(row["batch"], row["prompt_tokens"]) for row in report.rows if row["profile"] == "fast"]
    assert fast == [(batch, num_tokens) for batch in BATCHES for num_tokens in (32, 6)]
    assert sum(row["profile"] == "exact" for row in report.rows) == len(BATCHES)
    assert max(report.difference.values()) < 1e-5
    assert (report.weights, report.left_out, report.compilations_after_warm_up) == ("the demo model", [], 0)
    assert table_of(report.rows).row_count == len(report.rows)


def test_random_weights_stay_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings with random weights are finite, and equal with both profiles up to rounding."""
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    encoder = {"text_config": narrow | {"head_dim": 16}, "flux2_prompt_format": {"max_sequence_length": 32}}
    path = resized(FULL, tmp_path / "narrow", text_encoder=encoder)
    monkeypatch.setattr("benchmarks.encoder.latency.BATCHES", (1,))
    report = measure(EncoderSource(path, device="cpu"), options(budget_s=600.0))
    assert report.difference
    assert all(0 <= value < 0.15 for value in report.difference.values())


def test_a_language_model_is_loaded_as_the_service_loads_it(tmp_path: Path) -> None:
    """With a checkpoint a source's layers are the service's; a model that the service refuses is refused."""
    encoder, _ = load_encoder(DEMO.settings())
    ours = DEMO.load("full").language_model.state_dict()
    for name, weight in encoder.language_model.state_dict().items():
        assert torch.equal(ours[name], weight)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelRefused, match="has no folder"):
        EncoderSource(tmp_path / "empty", device="cpu").load("full")


def test_skipped_measurements_are_listed() -> None:
    """If no time is left nothing is measured, and the report says so."""
    report = measure(DEMO, options(budget_s=0.0))
    assert report.rows == []
    assert report.left_out == ["full weights: no time was left"]
