"""LoRA adapters by name, with the demo model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import save_file

from demo_model.services import WEIGHTS
from flux2_shared.errors import InvalidRequest
from flux2_shared.model.folder import ModelFolder
from generator_service.engine.imaging import read_provenance
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.params import Params
from tests.conftest import CPU, Serve
from tests.generator_service.test_generate import SMALL, pixels

MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out", "proj_out")
RANK = 2


def adapter_file(
    file: Path, model: Flux2Model, seed: int = 0, modules: tuple[str, ...] = MODULES, prefix: str = "transformer."
) -> None:
    """A random adapter for some of the model's linear layers."""
    noise = torch.Generator().manual_seed(seed)
    layers = dict(model.components.transformer.named_modules())
    tensors = {}
    for name in modules:
        linear = layers.get(name, torch.nn.Linear(8, 8))
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=noise) * 0.3
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(linear.out_features, RANK, generator=noise) * 0.3
    save_file(tensors, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo: Flux2Model) -> Path:
    """Three valid adapters, and three invalid files."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("ink", "clay", "wool")):
        adapter_file(folder / f"{name}.safetensors", demo, seed)
    adapter_file(folder / "other-model.safetensors", demo, modules=("double_blocks.0.attn",))
    adapter_file(folder / "half.safetensors", demo, modules=("proj_out", "double_blocks.0.attn"))
    narrow = {f"transformer.proj_out.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(narrow, folder / "narrow.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"\x08" + bytes(20))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Flux2Model:
    """The demo model with a capacity of two adapters."""
    return Flux2Model.load(ModelFolder("weights", "local", WEIGHTS), CPU, torch.float32, folder, max_loras=2)


def request(*adapters: Adapter, cache: str = "fast") -> Params:
    """A small image with adapters."""
    embeds = torch.zeros(1, 32, 384)
    return Params(embeds, 64, 64, 4.0, 7, schedule_for(cache, 8), adapters=adapters)


def latents_of(model: Flux2Model, *adapters: Adapter) -> torch.Tensor:
    return model.generate(request(*adapters)).latents


def test_an_adapter_changes_only_its_own_image(model: Flux2Model) -> None:
    """With an adapter the image changes, more with a larger scale; afterwards it is bit-identical to before."""
    plain = latents_of(model)
    weak, strong = (latents_of(model, Adapter("ink", scale)) for scale in (0.5, 1.0))
    assert 0 < (weak - plain).abs().mean() < (strong - plain).abs().mean()
    assert torch.equal(latents_of(model), plain)
    assert torch.equal(latents_of(model, Adapter("ink", 0.0)), plain)


def test_an_adapter_of_the_time_embedding_applies_at_every_step(tmp_path: Path, demo: Flux2Model) -> None:
    """Time embeddings that were cached without an adapter that changes them are not used with it.

    The image equals that of a model that never ran without the adapter, also at its reused steps.
    """
    layers = ("time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.guidance_embedder.linear_2")
    adapter_file(tmp_path / "dusk.safetensors", demo, modules=layers)
    fresh, used = (
        Flux2Model.load(ModelFolder("weights", "local", WEIGHTS), CPU, torch.float32, tmp_path) for _ in range(2)
    )
    plain = latents_of(used)
    with_adapter = latents_of(used, Adapter("dusk"))
    assert torch.equal(with_adapter, latents_of(fresh, Adapter("dusk")))
    assert not torch.equal(with_adapter, plain)
    assert torch.equal(latents_of(used), plain)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_equal_the_librarys(model: Flux2Model, folder: Path) -> None:
    """The pixels equal those of ``Flux2Pipeline`` with the same adapters and scales."""
    loaded = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
    loaded.load_lora_weights(folder, weight_name="ink.safetensors", adapter_name="ink")
    loaded.load_lora_weights(folder, weight_name="clay.safetensors", adapter_name="clay")
    loaded.set_adapters(["ink", "clay"], [0.7, -0.4])
    wanted = request(Adapter("ink", 0.7), Adapter("clay", -0.4), cache="none")
    expected = loaded(
        prompt_embeds=wanted.prompt_embeds,
        width=64,
        height=64,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(np.asarray(model.generate(wanted).image), np.asarray(expected))


def test_the_number_of_loaded_adapters_is_bounded(model: Flux2Model) -> None:
    """When three adapters take turns, the least recently used one is unloaded, and the images stay right."""
    first = [latents_of(model, Adapter(name)) for name in ("ink", "clay", "wool")]
    again = [latents_of(model, Adapter(name)) for name in ("ink", "clay", "wool")]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(model.components.transformer.peft_config) == 2


def test_an_adapter_is_removed_after_a_failure(model: Flux2Model) -> None:
    """A generation with an adapter that fails does not affect the next one."""
    plain = latents_of(model)

    def fail(step: int, _is_computed: bool) -> None:
        if step == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(request(Adapter("ink")), fail)
    assert torch.equal(latents_of(model), plain)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("other-model", "0 of the 1 modules"),
        ("half", "1 of the 2 modules"),
        ("narrow", "its shapes"),
        ("damaged", "it is not a LoRA file"),
    ],
)
def test_adapters_of_other_models_are_refused(model: Flux2Model, name: str, why: str) -> None:
    """A file for other modules or other shapes is refused, never silently ignored, and no trace of it stays."""
    plain = latents_of(model)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=f"lora: '{name}' cannot be used with this model: {why}"):
            latents_of(model, Adapter(name))
        assert torch.equal(latents_of(model), plain)
    assert (latents_of(model, Adapter("ink")) - plain).abs().mean() > 0


@pytest.mark.anyio
async def test_over_http(serve_generator: Serve, folder: Path, tmp_path: Path) -> None:
    """A request names one adapter, or several with scales; the file records them; no calibrated schedule is used."""
    body = SMALL | {"cache": "medium", "num_inference_steps": 50, "width": 128, "height": 128}
    async with serve_generator(lora_dir=folder) as http:
        plain = await http.post("/generate", json=body)
        ink = await http.post("/generate", json=body | {"lora": "ink"})
        both = [{"name": "ink", "scale": 1}, {"name": "clay", "scale": 0.25}]
        two = await http.post("/generate", json=body | {"lora": both})
        bad = await http.post("/generate", json=body | {"lora": "other-model"})
        again = await http.post("/generate", json=body)
        openai = await http.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "lora": "unknown"})
    assert "source=calibrated" in plain.headers["x-schedule"]
    assert "source=published" in ink.headers["x-schedule"]
    images = [pixels(response.content).astype(float) for response in (plain, ink, two)]
    assert all(np.abs(images[a] - images[b]).mean() > 0.2 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert np.array_equal(pixels(again.content), images[0])
    (tmp_path / "two.png").write_bytes(two.content)
    assert read_provenance(tmp_path / "two.png").lora == [
        {"name": "ink", "scale": 1.0},
        {"name": "clay", "scale": 0.25},
    ]
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "lora")
    assert (openai.status_code, openai.json()["error"]["param"]) == (422, "lora")


@pytest.mark.anyio
async def test_negative_scales_are_applied(serve_generator: Serve, folder: Path, tmp_path: Path) -> None:
    """A negative scale is applied and recorded as it was sent."""
    scales, images, records = (0.5, -0.5, -4), [], []
    async with serve_generator(lora_dir=folder) as http:
        for scale in scales:
            response = await http.post("/generate", json=SMALL | {"lora": [{"name": "ink", "scale": scale}]})
            images.append(pixels(response.content).tobytes())
            (tmp_path / "image.png").write_bytes(response.content)
            records.append(read_provenance(tmp_path / "image.png").lora)
    assert len(set(images)) == len(scales)
    assert records == [[{"name": "ink", "scale": scale}] for scale in scales]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("lora", "detail"),
    [
        ("unknown", "there is no adapter 'unknown'; available are clay, damaged, half, ink, narrow, other-model, wool"),
        ("../ink", "there is no adapter '../ink'"),
        ("", "there is no adapter ''"),
        ([{"name": "ink"}, {"name": "ink"}], "names an adapter twice"),
        ([{"name": "ink", "scale": 5}], "less than or equal to 4"),
        ([{"name": "ink", "weight": 1}], "weight"),
        ([], "at least 1"),
    ],
)
async def test_bad_requests_are_refused(serve_generator: Serve, folder: Path, lora: Any, detail: str) -> None:
    """Invalid adapters are refused before anything is generated, with a message that names valid ones."""
    async with serve_generator(lora_dir=folder) as http:
        response = await http.post("/generate", json=SMALL | {"lora": lora})
    assert response.status_code == 422
    assert detail in response.json()["detail"]
    assert "lora" in response.json()["error"]["param"]


@pytest.mark.anyio
async def test_adapters_need_a_folder(serve_generator: Serve) -> None:
    """Without an adapter folder a request with an adapter is refused with that reason."""
    async with serve_generator() as http:
        response = await http.post("/generate", json=SMALL | {"lora": "ink"})
    assert response.json()["detail"] == "lora: there is no adapter 'ink'; this service has none"
