"""The truncated text encoder compared with the complete one."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline

from flux2_shared.model.folder import ModelFolder, read_prompt_format
from text_encoder_service.encoder import MistralEncoder

CPU = torch.device("cpu")
PROMPTS = [
    "a small red circle above a large blue square on a white background",
    "A [IMG]cat “é”",
    "",
    "far more words than the encoder has room for " * 8,
]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.06}
"""The largest difference of a batch row from the single result, relative to the largest value, by dtype."""


def encoder(folder: Path, dtype: torch.dtype = torch.float32) -> MistralEncoder:
    """This project's encoder."""
    model = ModelFolder(folder.name, "local", folder)
    return MistralEncoder(model, read_prompt_format(model), CPU, dtype)


def reference(folder: Path, prompts: list[str], dtype: torch.dtype) -> torch.Tensor:
    """Diffusers' pipeline with the complete text encoder."""
    pipeline = Flux2Pipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
    with torch.no_grad():
        embeddings: torch.Tensor
        embeddings, _ = pipeline.encode_prompt(prompts, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))
    return embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 4])
def test_embeddings_equal_the_whole_encoders_bit_for_bit(weights: Path, count: int, dtype: torch.dtype) -> None:
    """For one prompt or a batch the result is ``Flux2Pipeline.encode_prompt``'s with all layers, bit for bit."""
    prompts = PROMPTS[:count]
    ours = torch.cat([embedding.tensor for embedding in encoder(weights, dtype).encode(prompts)])
    assert ours.dtype == dtype
    assert torch.equal(ours, reference(weights, prompts, dtype))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_row_of_a_batch_equals_the_single_result(weights: Path, dtype: torch.dtype) -> None:
    """Batching changes nothing beyond rounding."""
    ours = encoder(weights, dtype)
    for row, prompt in zip(ours.encode(PROMPTS), PROMPTS, strict=True):
        single = ours.encode([prompt])[0].tensor.float()
        assert (row.tensor.float() - single).abs().max() <= TOLERANCES[dtype] * single.abs().max()


def test_an_embedding_does_not_keep_its_batch_alive(weights: Path) -> None:
    """Each row of a batch has its own memory, so that the cache of embeddings holds the bytes it counts."""
    for embedding in encoder(weights).encode(PROMPTS):
        assert embedding.tensor.untyped_storage().nbytes() == embedding.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_embeddings_of_a_gpu_are_complete(weights: Path) -> None:
    """Rows are copied from a GPU through pinned memory, and are complete when ``encode`` returns."""
    model = ModelFolder(weights.name, "local", weights)
    ours = MistralEncoder(model, read_prompt_format(model), torch.device("cuda", 0), torch.float32)
    for row, exact in zip(ours.encode(PROMPTS), encoder(weights).encode(PROMPTS), strict=True):
        assert row.tensor.is_pinned()
        assert torch.allclose(row.tensor, exact.tensor, atol=1e-3 * float(exact.tensor.abs().max()))


def test_only_the_required_layers_are_loaded(weights: Path) -> None:
    """Three of four layers are loaded, without final norm, head and vision tower."""
    model = encoder(weights)._model
    names = {name for name, _ in model.named_parameters()}
    assert len(model.layers) == 3
    assert not any(part in name for name in names for part in ("layers.3", "lm_head", "vision", "projector"))
    assert not any(name.startswith("norm.") for name in names)


def test_long_prompts_are_truncated_and_marked(weights: Path) -> None:
    """A prompt beyond the limit is truncated as the pipeline does it, and marked."""
    assert [embedding.is_truncated for embedding in encoder(weights).encode(PROMPTS)] == [False, False, False, True]


def test_a_prompt_of_maximum_length_is_not_marked(weights: Path) -> None:
    """A prompt that fills its row to the last token is not truncated."""
    ours = encoder(weights)
    fits = "a" + " a" * 28  # 29 words, the template's three tokens
    assert [e.is_truncated for e in ours.encode([fits, fits + " a"])] == [False, True]
