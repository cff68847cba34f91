"""A model in the layout of FLUX.2 [dev]'s repository is loaded by both services and by the command line."""

import gc
import shutil
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration, MistralModel

from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused, OutOfMemory
from flux2_shared.model.folder import ModelFolder, find_model
from generator_service.app import load_model
from generator_service.lemica import ErrorGraph
from generator_service.pipelines import prompt
from generator_service.pipelines.prompt import embed_prompts
from generator_service.settings import GeneratorSettings
from tests.conftest import CPU
from tests.dev_layout import lay_out_as_dev, read_json, write_json
from tests.generator_service.test_cli import pixels, run
from tests.generator_service.test_optimizations import wanted
from tests.memory_errors import EVERY_KIND, KINDS
from tests.text_encoder_service.test_encoder import PROMPTS, encoder
from text_encoder_service.app import load_encoder
from text_encoder_service.settings import TextEncoderSettings

ROPE_THETA = 1e6
"""Differs from the library's default, which it uses if it finds no value."""
LAST_TENSOR = "language_model.model.layers.2.mlp.up_proj.weight"
"""A tensor of a layer that the service loads."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as written by the current libraries, with a ``rope_theta`` whose loss would be noticed."""
    folder = shutil.copytree(WEIGHTS, tmp_path_factory.mktemp("plain") / "weights")
    config = read_json(folder / "text_encoder" / "config.json")
    config["text_config"]["rope_parameters"]["rope_theta"] = ROPE_THETA
    write_json(folder / "text_encoder" / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def dev(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the layout of [dev]."""
    return lay_out_as_dev(plain, tmp_path_factory.mktemp("dev") / "weights")


def local(folder: Path) -> ModelFolder:
    """The checked model in ``folder``."""
    return find_model(str(folder), "main", ("text_encoder", "tokenizer", "transformer", "vae", "scheduler"))


def generator(folder: Path) -> object:
    """The generator's model."""
    return load_model(GeneratorSettings(model=str(folder)))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_diffusers_cannot_load_it(dev: Path) -> None:
    """The folder has what keeps diffusers from loading [dev] here: a processor for images."""
    with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision|pixtral"):
        Flux2Pipeline.from_pretrained(dev, transformer=None, vae=None)


def test_the_vae_is_float32_and_the_rest_is_not(dev: Path) -> None:
    """The VAE is float32 as in [dev]'s repository, whatever dtype is set."""
    vae = load_file(dev / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in vae.values() if tensor.is_floating_point()} == {torch.float32}
    for part in ("text_encoder", "transformer"):
        for shard in (dev / part).glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}


def test_the_generator_loads_it(plain: Path, dev: Path) -> None:
    """The images equal those of the same weights in one file."""
    (theirs, shape), (ours, _) = (load_model(GeneratorSettings(model=str(folder))) for folder in (plain, dev))
    assert shape == (32, ours.info.embedding_width)
    request = wanted("none", num_steps=3)
    assert torch.equal(ours.generate(request).latents, theirs.generate(request).latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_in_either_dtype(dev: Path, dtype: torch.dtype) -> None:
    """The VAE is loaded in float32 whatever its file has."""
    name = str(dtype).removeprefix("torch.")
    model, _ = load_model(GeneratorSettings(model=str(dev), dtype=name))
    text_encoder, info = load_encoder(TextEncoderSettings(model=str(dev), dtype=name))
    assert (model.dtype, model.components.vae.dtype, text_encoder.dtype, info.dtype) == (dtype, dtype, dtype, name)


def test_the_text_encoder_loads_it(plain: Path, dev: Path) -> None:
    """The embeddings equal those of the same weights in one file, bit for bit."""
    ours, _ = load_encoder(TextEncoderSettings(model=str(dev)))
    for row, expected in zip(ours.encode(PROMPTS), encoder(plain).encode(PROMPTS), strict=True):
        assert torch.equal(row.tensor, expected.tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_line_embeds_as_the_pipeline_does(plain: Path, dev: Path, dtype: torch.dtype) -> None:
    """``embed_prompts`` equals ``Flux2Pipeline.from_pretrained`` where that can load the model."""
    pipeline = Flux2Pipeline.from_pretrained(plain, transformer=None, vae=None, dtype=dtype)
    for folder in (plain, dev):
        for text, embedding in zip(PROMPTS, embed_prompts(local(folder), PROMPTS, CPU, dtype), strict=True):
            with torch.no_grad():
                expected, _ = pipeline.encode_prompt(text, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))
            assert torch.equal(embedding.tensor, expected)


def test_the_command_line_generates_and_calibrates_with_it(plain: Path, dev: Path, tmp_path: Path) -> None:
    """``flux2 generate --local`` gives the same image as with one file, and ``flux2 calibrate`` a graph."""
    options = ("--steps", "3", "--size", "64x64", "--seed", "7", "--cache", "none", "--local")
    for folder in (plain, dev):
        output = tmp_path / f"{folder.parent.name[:3]}.png"
        result = run("generate", PROMPTS[0], *options, "-o", output, FLUX2_MODEL=str(folder))
        assert result.exit_code == 0, result.output
    assert (pixels(tmp_path / "dev.png") == pixels(tmp_path / "pla.png")).all()
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    arguments = ("--model", dev, "--prompts", tmp_path / "prompts.txt", "--steps", 3, "--size", "64x64", "--seeds", 1)
    result = run("calibrate", *arguments, "-o", tmp_path / "graph.json")
    assert result.exit_code == 0, result.output
    assert ErrorGraph.load(tmp_path / "graph.json").num_steps == 3


def test_the_text_encoder_is_released_before_the_transformer_is_loaded(
    dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 48 GB and the transformer's 65 do not fit together, so it is released when ``embed_prompts`` returns."""
    references: list[weakref.ref[Any]] = []
    load = prompt.load_pipeline

    def watched(*arguments: Any) -> Any:
        pipeline = load(*arguments)
        module = pipeline.text_encoder
        module.cycle = [module]  # as caches and hooks of the libraries may create them
        references.append(weakref.ref(module))
        return pipeline

    monkeypatch.setattr(prompt, "load_pipeline", watched)
    gc.disable()
    try:
        embed_prompts(local(dev), PROMPTS[:1], CPU, torch.float32)
        assert [ref() for ref in references] == [None]
    finally:
        gc.enable()


@pytest.fixture
def damaged(dev: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return shutil.copytree(dev, tmp_path / "model")


def embed_by_command_line(folder: Path) -> None:
    """Embed as ``flux2 calibrate`` and ``flux2 generate --local`` do."""
    embed_prompts(local(folder), PROMPTS[:1], CPU, torch.float32)


LOADERS = [
    (embed_by_command_line, Mistral3ForConditionalGeneration),
    (encoder, MistralModel),
    (generator, Flux2Transformer2DModel),
    (generator, AutoencoderKLFlux2),
]
"""The loader, and the library's class that reads the files."""


def shard_of(folder: Path, tensor: str) -> Path:
    """The file of the text encoder that contains ``tensor``."""
    index = read_json(folder / "text_encoder" / "model.safetensors.index.json")
    return folder / "text_encoder" / str(index["weight_map"][tensor])


@pytest.mark.parametrize("load", [embed_by_command_line, encoder])
@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:5000])])
def test_missing_and_broken_shards_are_refused(
    damaged: Path, damage: Callable[[Path], object], load: Callable[[Path], object]
) -> None:
    """The service and the command line report it in one line."""
    damage(shard_of(damaged, LAST_TENSOR))
    with pytest.raises(ModelRefused, match=r"the text encoder (of model )?cannot be loaded"):
        load(damaged)


@pytest.mark.parametrize("load", [embed_by_command_line, encoder])
def test_a_checkpoint_with_missing_tensors_is_refused(damaged: Path, load: Callable[[Path], object]) -> None:
    """The library would replace missing tensors by random numbers."""
    shard = shard_of(damaged, LAST_TENSOR)
    tensors = load_file(shard)
    del tensors[LAST_TENSOR]
    save_file(tensors, shard, {"format": "pt"})
    file = damaged / "text_encoder" / "model.safetensors.index.json"
    index = read_json(file)
    del index["weight_map"][LAST_TENSOR]
    write_json(file, index)
    with pytest.raises(ModelRefused, match="lacks 1 tensors"):
        load(damaged)


@EVERY_KIND
@pytest.mark.parametrize(("load", "loaded"), LOADERS)
def test_out_of_memory_is_not_reported_as_a_broken_file(
    dev: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], object], loaded: Any, kind: str
) -> None:
    """However a library reports it, the error of both services and of the command line names the device."""

    def from_pretrained(*_: object, **_more: object) -> None:
        error = KINDS[kind]()
        raise error

    monkeypatch.setattr(loaded, "from_pretrained", from_pretrained)
    with pytest.raises(OutOfMemory, match="does not fit into the memory of cpu: `flux2 doctor` shows"):
        load(dev)


@pytest.mark.parametrize(("load", "loaded"), LOADERS)
def test_a_programming_error_is_not_reported_as_a_broken_file(
    dev: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], object], loaded: Any
) -> None:
    """An error that no file can cause keeps its type."""

    def from_pretrained(*_: object, **_more: object) -> None:
        raise AttributeError("nothing")

    monkeypatch.setattr(loaded, "from_pretrained", from_pretrained)
    with pytest.raises(AttributeError):
        load(dev)
