"""Where tensors are on a GPU, and when the host waits for it, tested with a fake GPU."""

import argparse
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.generator.synthetic import source_of
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, read_prompt_format
from generator_service.app import create_app as create_generator
from generator_service.cli.calibration import record
from generator_service.lemica import PREDICTORS, Calibration
from generator_service.pipelines.callbacks import Previews
from generator_service.pipelines.flux2 import Flux2Model, GeneratedImage
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.optimizations import attention
from generator_service.pipelines.optimizations.profiles import Performance
from generator_service.pipelines.params import Params, Reference
from generator_service.pipelines.prompt import embed_prompts
from generator_service.settings import GeneratorSettings, Optimization
from tests import fake_gpu
from tests.conftest import CPU, served
from tests.fake_cuda import Gpus
from tests.fake_gpu import DEVICE, FakeGpuTensor, Gpu
from tests.generator_service.test_lora import adapter_file
from tests.generator_service.test_optimizations import wanted
from text_encoder_service.app import create_app as create_encoder
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.settings import TextEncoderSettings

pytestmark = [
    pytest.mark.skipif(fake_gpu.COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this PyTorch knows real GPUs: benchmarks.generator.trace"
    ),
]

FOLDER = ModelFolder("weights", "local", WEIGHTS)
TOLERANCE = 1e-4
"""For final latents: projections are fused, and the attention kernel is another."""
PROFILES: list[tuple[Optimization, ...]] = [(), ("attention", "fused_qkv", "vae")]


@pytest.fixture(autouse=True)
def native_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not choose a kernel by its speed: all are the CPU's, and diffusers would apply the choice to every model."""
    monkeypatch.setattr(attention, "MAX_TIME_RATIO", 0.0)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """A fake GPU."""
    with fake_gpu.fake_gpus():
        yield


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory, demo: Flux2Model) -> Path:
    """A folder with one adapter."""
    folder = tmp_path_factory.mktemp("lora")
    adapter_file(folder / "ink.safetensors", demo)
    return folder


def on_gpu(*optimizations: Optimization, lora_dir: Path | None = None) -> Flux2Model:
    """The demo model on the fake GPU."""
    performance = Performance("fast", frozenset(optimizations))
    return Flux2Model.load(FOLDER, DEVICE, torch.float32, lora_dir, performance=performance)


def generate_image(model: Flux2Model, request: Params, previews: Previews | None = None) -> GeneratedImage:
    """Generate an image; ``Gpu.waits`` has the waits from the beginning of step 1 to that of the last step."""
    last = request.schedule.num_steps - 1
    between: list[str] = []

    def on_step(step: int, _is_computed: bool) -> None:
        if step == 1:
            Gpu.waits.clear()
        if step == last:
            between.extend(Gpu.waits)

    image = model.generate(request, on_step, previews)
    Gpu.waits = between
    return image


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("encoder_device", "generator_device", "used"),
    [("auto", "cuda", {0}), ("cuda:1", "cuda:1", {1}), ("cuda:0", "cuda:1", {0, 1})],
)
async def test_the_services_start_on_any_gpu(encoder_device: str, generator_device: str, used: set[int]) -> None:
    """From the setting to the image, only the configured GPU is used, on whatever thread."""
    with fake_gpu.fake_gpus(count=2):
        common: dict[str, Any] = {"model": str(WEIGHTS), "dtype": "float32", "performance": "exact"}
        encoder = create_encoder(TextEncoderSettings(device=encoder_device, **common))
        settings = GeneratorSettings(device=generator_device, **common)
        generator = create_generator(settings, httpx.ASGITransport(encoder))
        async with encoder.router.lifespan_context(encoder), served(generator) as http:
            body = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "cache": "none"}
            response = await http.post("/generate", json=body)
            figures = (await http.get("/metrics")).text
        assert Gpus.touched == used
    assert response.status_code == 200, response.text
    assert np.asarray(Image.open(io.BytesIO(response.content))).shape == (64, 64, 3)
    (used_bytes,) = re.findall(r'^flux2_device_memory_bytes{kind="used"} (.+)$', figures, re.MULTILINE)
    assert float(used_bytes) > 0


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.cuda.set_device(torch.device("cuda")),
        lambda: torch.cuda.set_device("cpu"),
        lambda: torch.cuda.set_device(1),
        lambda: torch.cuda.current_stream(torch.device("cuda", 1)),
        lambda: torch.cuda.synchronize(1),
        lambda: torch.cuda.mem_get_info("cuda:1"),
        lambda: torch.cuda.get_device_capability(1),
        lambda: torch.cuda.Event(block=True),  # type: ignore[call-arg, no-untyped-call]
        lambda: torch.cuda.Event().record(0),  # type: ignore[arg-type, no-untyped-call]
        lambda: torch.empty(1, device="cuda:1"),
    ],
)
def test_the_fake_checks_its_arguments(act: Callable[[], object]) -> None:
    """As in PyTorch a device must have an index where PyTorch requires one, and must exist."""
    with pytest.raises((ValueError, RuntimeError, TypeError, AssertionError)):
        act()


def test_each_thread_has_a_current_gpu() -> None:
    """It is the first one until the thread sets another, and tensors without an index are created there."""
    with fake_gpu.fake_gpus(count=2), ThreadPoolExecutor(1) as pool:
        torch.cuda.set_device(1)
        here, there = torch.empty(1, device="cuda"), pool.submit(lambda: torch.empty(1, device="cuda")).result()
        assert (str(here.device), str(there.device)) == ("cuda:1", "cuda:0")
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            here + there
        with torch.cuda.device(0):
            assert torch.cuda.current_device() == 0
        assert torch.cuda.memory_allocated() == torch.cuda.memory_allocated(0) == 4


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # a warning of torch's compiler
def test_a_benchmark_loads_as_the_service_does() -> None:
    """Its model comes from ``Flux2Model.load``, on a device with an index."""
    source = source_of(argparse.Namespace(smoke=True, model=WEIGHTS))
    assert source.torch_device == DEVICE
    with source.model("exact") as model:
        assert model.device == DEVICE


def test_the_command_line_embeds_prompts_on_the_gpu() -> None:
    """The whole text encoder is read directly to the GPU, and nothing of it is left there."""
    (embedding,) = embed_prompts(FOLDER, ["a red circle"], DEVICE, torch.float32)
    assert not isinstance(embedding.tensor, FakeGpuTensor)
    assert torch.cuda.memory_allocated() == 0
    (expected,) = embed_prompts(FOLDER, ["a red circle"], CPU, torch.float32)
    assert torch.allclose(embedding.tensor, expected.tensor, atol=1e-4)


def test_the_fake_refuses_and_records() -> None:
    """Tensors of both devices do not mix, and reading or copying a value counts as a wait."""
    there = torch.arange(3, device=DEVICE)
    assert isinstance(there, FakeGpuTensor)
    assert str(there.device) == "cuda:0"
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        there + torch.arange(3)
    assert (there + 1).cpu().tolist() == [1, 2, 3]
    assert there[there > 0].sum().item() == 3
    assert torch.arange(3).to(DEVICE, non_blocking=True).tolist() == [0, 1, 2]
    assert [wait.split(" in ")[0] for wait in Gpu.waits] == [
        "a copy from the GPU",
        "an index of the host, or a mask",
        "aten._local_scalar_dense.default",
        "tolist",
    ]


@pytest.mark.parametrize("optimizations", PROFILES)
def test_the_gpu_never_waits_between_steps(optimizations: tuple[Optimization, ...], demo: Flux2Model) -> None:
    """Computed or reused, first run or later: no value is read or copied between the first and last step.

    So the host only waits for a step a few steps back, and the GPU always has work queued.
    """
    model = on_gpu(*optimizations)
    for request in (wanted("none", num_steps=6), wanted(3, num_steps=6), wanted(2, num_steps=6, seed=1)):
        image = generate_image(model, request)
        assert Gpu.waits == []
        assert (image.latents - demo.generate(request).latents).abs().max() <= TOLERANCE


@pytest.mark.parametrize("optimizations", PROFILES)
def test_references_and_batches_do_not_wait_either(optimizations: tuple[Optimization, ...], demo: Flux2Model) -> None:
    """With a reference image, and for two images in one run, there are no waits, and the images equal the host's."""
    model = on_gpu(*optimizations)
    reference = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    edit = replace(wanted(3, num_steps=6), references=(Reference.of(reference),))
    assert (generate_image(model, edit).latents - demo.generate(edit).latents).abs().max() <= TOLERANCE
    assert Gpu.waits == []
    two = [wanted(2, seed=seed) for seed in (1, 2)]
    for ours, theirs in zip(model.generate_batch(two), demo.generate_batch(two), strict=True):
        assert (ours.latents - theirs.latents).abs().max() <= TOLERANCE


def test_only_previews_wait() -> None:
    """A preview waits for the steps before it, to measure them, and for its pixels."""
    shown: list[Image.Image] = []
    generate_image(on_gpu(), wanted(3, num_steps=6), Previews(frozenset([2]), shown.append))
    assert len(shown) == 1
    assert [wait.split(" in ")[0] for wait in Gpu.waits] == ["synchronize", "a copy from the GPU"]


def test_adapters_are_loaded_to_the_gpu(lora_dir: Path) -> None:
    """With an adapter, and again without it, the images equal the host's, without waits."""
    ours = on_gpu(lora_dir=lora_dir)
    theirs = Flux2Model.load(FOLDER, CPU, torch.float32, lora_dir)
    for request in (wanted(3, num_steps=6, adapters=(Adapter("ink"),)), wanted(3, num_steps=6)):
        assert (generate_image(ours, request).latents - theirs.generate(request).latents).abs().max() <= TOLERANCE
        assert Gpu.waits == []


@pytest.mark.parametrize(("predictor", "keep"), [("reuse", "gpu"), ("velocity", "host"), ("fitted", "files")])
def test_calibrations_run_on_the_gpu(predictor: str, keep: str, tmp_path: Path, demo: Flux2Model) -> None:
    """Wherever the runs are stored, exact and approximate errors of edges equal the host's."""
    measured = []
    for model in (on_gpu(), demo):
        chosen = PREDICTORS[predictor]
        where = {"gpu": None, "host": CPU, "files": tmp_path}[keep]
        runs = [record(model, wanted(num_steps=5, seed=seed), chosen.feature, where) for seed in (0, 1)]
        calibration = Calibration(model.components.transformer, runs, chosen)
        signature = wanted(num_steps=5).schedule.signature
        graphs = [calibration.measure(signature, 3, is_exact=is_exact) for is_exact in (True, False)]
        schedule = wanted(3, num_steps=5).schedule
        measured.append(
            [graph.errors for graph in graphs] + [dict(enumerate(calibration.errors_of_schedule(schedule)))]
        )
    for ours, theirs in zip(*measured, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_a_batch_of_prompts_waits_once() -> None:
    """The tokens are copied to the GPU, and all embeddings to the host before a single wait."""
    prompts = ["a red circle", "a blue square on the left of a green triangle"]
    prompt_format = read_prompt_format(FOLDER)
    ours, theirs = (MistralEncoder(FOLDER, prompt_format, device, torch.float32) for device in (DEVICE, CPU))
    Gpu.waits.clear()
    embeddings = ours.encode(prompts)
    assert [wait.split(" in ")[0] for wait in Gpu.waits] == ["a copy to the GPU", "a copy to the GPU", "the stream"]
    for row, expected in zip(embeddings, theirs.encode(prompts), strict=True):
        assert torch.allclose(row.tensor, expected.tensor, atol=1e-4)
