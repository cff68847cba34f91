"""The text encoder's speed."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import MistralConfig

from benchmarks.encoder import BATCHES, measure, table_of
from benchmarks.language_model import FLUX2_DEV, Model, checkpoint, full_size
from demo_model.services import WEIGHTS
from shared.model_folder import PromptFormat

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch warns of its compiler
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """What one test compiled helps no other."""
    yield
    torch.compiler.reset()


def options(**changed: object) -> argparse.Namespace:
    """As the command line gives them, for a look."""
    usual = {"weights": ["full"], "budget_s": 60.0, "seconds": 0.1, "repeats": 2, "backend": "eager"}
    return argparse.Namespace(**usual | changed)


def test_full_size_is_flux2_dev() -> None:
    """The full size has 16.7 billion parameters in 30 layers, and 0.67 billion in its token embeddings."""
    model = full_size(torch.device("meta")).language_model
    embeddings = model.embed_tokens.weight.numel()
    assert embeddings == pytest.approx(0.67e9, rel=2e-3)
    assert sum(p.numel() for p in model.parameters()) - embeddings == pytest.approx(16.7e9, rel=2e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_every_profile_batch_and_length_is_measured() -> None:
    """A result has a row for each, compiles nothing while it measures, and says how far fast is from exact."""
    told = measure(partial(checkpoint, WEIGHTS, CPU), options())
    fast = [(row["batch"], row["prompt_tokens"]) for row in told.rows if row["profile"] == "fast"]
    assert fast == [(batch, num_tokens) for batch in BATCHES for num_tokens in (32, 6)]
    assert sum(row["profile"] == "exact" for row in told.rows) == len(BATCHES)
    assert max(told.difference.values()) < 1e-5
    assert (told.weights, told.left_out, told.compilations_after_warm_up) == ("weights", [], 0)
    assert table_of(told.rows).row_count == len(told.rows)


def test_random_weights_stay_finite() -> None:
    """What random weights give are numbers, and equal under both profiles up to rounding."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig.from_dict(FLUX2_DEV.to_dict() | small | {"head_dim": 16, "vocab_size": 100})
    told = measure(lambda: short(full_size(CPU, config)), options(seconds=0.0, repeats=1))
    assert told.difference
    assert all(0 <= value < 0.15 for value in told.difference.values())


def short(model: Model) -> Model:
    """The same with prompts of 32 tokens."""
    return replace(model, prompt_format=PromptFormat(max_sequence_length=32))


def test_what_does_not_fit_into_the_time_is_listed() -> None:
    """Without time nothing is measured, and that is told."""
    told = measure(partial(checkpoint, WEIGHTS, CPU), options(budget_s=0.0))
    assert told.rows == []
    assert told.left_out == ["full weights: no time was left"]
