"""FLUX.2's architecture with random weights."""

import pytest
import torch
from torch import nn

from benchmarks.synthetic import TINY, Size, Source, fill, pipeline_of

CPU = torch.device("cpu")


def test_activations_stay_finite_over_all_blocks() -> None:
    """In bfloat16, through as many blocks as FLUX.2 [dev] has, random weights give a velocity of ordinary size."""
    deep = dict(TINY.transformer) | {"num_layers": 8, "num_single_layers": 48}
    source = Source(Size("deep", deep, TINY.vae, TINY.num_text_tokens), CPU, torch.bfloat16)
    with source.parts() as parts:
        picture = pipeline_of(parts)(
            prompt_embeds=source.embedding(parts), width=64, height=64, num_inference_steps=3, output_type="latent"
        ).images
    assert picture.isfinite().all()
    assert 0.1 < picture.float().std() < 10


def test_the_same_parts_again() -> None:
    """A source makes the same weights each time, and those before are gone although somebody still holds the parts."""
    source = Source(TINY, CPU, torch.float32)
    with source.parts() as first:
        kept = [parameter.clone() for parameter in first.transformer.parameters()]
    assert list(first.transformer.parameters()) == []
    with source.parts() as second:
        for one, other in zip(kept, second.transformer.parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_unknown_buffer_is_refused() -> None:
    """A buffer that nobody knows how to fill would hold whatever memory held: it is an error."""
    module = nn.Module()
    module.register_buffer("frequencies", torch.empty(3))
    with pytest.raises(ValueError, match="frequencies"):
        fill(module, torch.Generator())
