"""FLUX.2's architecture with random weights, loaded as the service loads a model."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.architectures import TINY
from benchmarks.generator.engine import GUIDANCE
from benchmarks.generator.synthetic import Source, fill, pipeline_of
from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused
from flux2_shared.model.folder import read_prompt_format
from generator_service.app import load_model
from generator_service.lemica import schedule_for
from generator_service.pipelines.params import Params
from tests.benchmarks.resized import resized

SOURCE = Source(TINY, device="cpu")


def test_activations_stay_finite_over_all_blocks(tmp_path: Path) -> None:
    """In bfloat16, through as many blocks as FLUX.2 [dev] has, random weights give a velocity of ordinary size."""
    deep = resized(TINY, tmp_path / "deep", transformer={"num_layers": 8, "num_single_layers": 48})
    source = Source(deep, device="cpu", dtype="bfloat16")
    with source.components() as components:
        image = pipeline_of(components)(
            prompt_embeds=source.embedding(), width=64, height=64, num_inference_steps=3, output_type="latent"
        ).images
    assert image.isfinite().all()
    assert 0.1 < image.float().std() < 10


def test_components_are_reproducible() -> None:
    """A source creates the same weights each time, and releases earlier ones even if their modules are referenced."""
    with SOURCE.components() as first:
        kept = [parameter.clone() for parameter in first.transformer.parameters()]
    assert list(first.transformer.parameters()) == []
    with SOURCE.components() as second:
        for one, other in zip(kept, second.transformer.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_model_is_loaded_as_the_service_loads_it() -> None:
    """With a checkpoint a source's model is the service's, bit for bit; its random one has the folder's shapes."""
    source = Source(WEIGHTS, has_weights=True, device="cpu")
    service, shape = load_model(source.settings())
    assert source.embedding().shape == (1, *shape)
    request = Params(source.embedding(), 64, 64, GUIDANCE, 0, schedule_for("none", 2))
    expected = service.generate(request).latents
    with source.model("exact") as model:
        assert torch.equal(model.generate(request).latents, expected)
        assert model.info == service.info
    with SOURCE.model("exact") as model:
        assert SOURCE.embedding().shape[2] == model.info.embedding_width
        assert SOURCE.embedding().shape[1] == read_prompt_format(model.folder).max_sequence_length


@pytest.mark.parametrize("has_weights", [False, True])
def test_invalid_models_are_refused_as_by_the_service(tmp_path: Path, *, has_weights: bool) -> None:
    """A folder without a VAE is refused by the service's own check, and so is an absent GPU."""
    shutil.copytree(TINY, tmp_path / "broken", ignore=shutil.ignore_patterns("vae"))
    broken = Source(tmp_path / "broken", has_weights, device="cpu")
    with pytest.raises(ModelRefused, match="has no folder 'vae'"), broken.model("exact"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_refused() -> None:
    """The device is validated by the service's own setting."""
    with pytest.raises(ModelRefused, match="can use no GPU here"), Source(TINY, device="cuda").model("exact"):
        pass


def test_offloaded_blocks_are_created_in_host_memory() -> None:
    """With ``offload`` the service requests the transformer in host memory, and gets it there."""
    with SOURCE.model("offload") as model:
        assert model.performance.profile == "offload"
        request = Params(SOURCE.embedding(), 64, 64, GUIDANCE, 0, schedule_for("none", 2))
        assert model.generate(request).latents.isfinite().all()


def test_an_unknown_buffer_is_refused() -> None:
    """An unknown buffer is an error, since it would hold uninitialized memory."""
    module = nn.Module()
    module.register_buffer("frequencies", torch.empty(3))
    with pytest.raises(ValueError, match="frequencies"):
        fill(module, torch.Generator())
