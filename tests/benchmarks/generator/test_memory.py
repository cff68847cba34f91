"""Memory accounting, and the committed counts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.architectures import FULL, TINY
from benchmarks.encoder.language_model import empty_model
from benchmarks.generator.engine import Shape
from benchmarks.generator.memory import (
    CASES,
    SCHEDULE,
    Case,
    Peaks,
    count_peaks,
    offloaded,
    request,
    workspace,
)
from benchmarks.generator.meta_model import META, Fp8Linear, meta_model, num_bytes, on_meta
from benchmarks.generator.peak_memory import PeakMemory
from benchmarks.generator.synthetic import Source, empty_components
from benchmarks.report.memory_tables import GIB, GPUS, fitting, needs, verdicts
from benchmarks.report.page import RESULTS
from generator_service.pipelines.components import Components
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.optimizations.fp8 import quantize_blocks
from generator_service.pipelines.optimizations.profiles import WORKING_BYTES
from generator_service.settings import GeneratorSettings
from tests.benchmarks.resized import resized
from tests.conftest import CPU
from text_encoder_service.settings import TextEncoderSettings

PROFILES = ("exact", "fast", "fastest", "offload")


@pytest.fixture(scope="module")
def committed() -> Any:
    """The committed counts of FLUX.2 [dev]."""
    return json.loads((RESULTS / "memory-flux2-dev.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_components() -> Components:
    """FLUX.2 [dev] on the meta device."""
    return empty_components(FULL, torch.bfloat16)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Flux2Model]:
    """A small model of the same architecture, on the CPU."""
    with Source(TINY, device="cpu").model("exact") as model:
        yield model


@pytest.fixture
def few_blocks(tmp_path: Path) -> Path:
    """FLUX.2 [dev] with one block of each type; blocks run in turn, so that more of them do not raise the peak."""
    return resized(FULL, tmp_path / "few", transformer={"num_layers": 1, "num_single_layers": 1})


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator had allocated at once while ``work`` ran, from PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    now, peak = 0, 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def tracked_peak(work: Callable[[], object], module: nn.Module, *inputs: torch.Tensor, **options: Any) -> int:
    """The same from ``PeakMemory``."""
    memory = PeakMemory(CPU, **options)
    memory.add([*module.parameters(), *module.buffers(), *inputs])
    before = memory.take_peak()
    with memory:
        work()
    return memory.take_peak() - before


def test_memory_is_counted_until_it_is_freed() -> None:
    """Views and in-place changes take nothing, freed memory is subtracted, and the peak can be reset."""
    memory = PeakMemory(CPU)
    with memory:
        first = torch.zeros(1000)
        first[10:].add_(1)
        assert memory.num_bytes == memory.take_peak() == 4000
        second = first + 1
        del first, second
        assert memory.num_bytes == 0
        assert memory.take_peak() == 8000
        assert memory.take_peak() == 0
        torch.zeros(7, device=META)
    assert memory.take_peak() == 0, "another device is not counted"


@torch.no_grad()
def test_a_step_equals_the_allocators_peak(tiny: Flux2Model) -> None:
    """The count for a transformer's step on a CPU is within 2 % of PyTorch's own allocator."""
    inputs = {
        "hidden_states": torch.zeros(1, 1024, 32),
        "encoder_hidden_states": torch.zeros(1, 16, 96),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "img_ids": torch.zeros(1, 1024, 4),
        "txt_ids": torch.zeros(1, 16, 4),
    }

    def step() -> None:
        tiny.components.transformer(**inputs)

    step()  # buffers that are kept after the first run do not count
    counted_bytes = tracked_peak(step, tiny.components.transformer, *inputs.values())
    assert counted_bytes == pytest.approx(allocated_peak(step), rel=0.02)


@torch.no_grad()
def test_the_allowance_covers_copies_of_convolutions(tiny: Flux2Model) -> None:
    """Decoding takes more than its tensors, since convolutions copy maps; the allowance covers it."""
    latents = torch.zeros(1, 8, 32, 32)

    def decode() -> None:
        tiny.components.vae.decode(latents)

    decode()
    without = tracked_peak(decode, tiny.components.vae, latents)
    allowed = tracked_peak(decode, tiny.components.vae, latents, workspace=workspace)
    assert without <= allocated_peak(decode) <= allowed


@pytest.mark.parametrize("num_images", [1, 2])
def test_meta_tensors_live_as_long_as_those_of_a_cpu(tiny: Flux2Model, num_images: int) -> None:
    """The service's model on the meta device takes, within 1 %, what it takes on a CPU for the same request."""
    case = Case(Shape(256), num_images)
    peaks = []
    for model, device in ((tiny, CPU), (meta_model(TINY, "exact", torch.float32), META)):
        memory = PeakMemory(device)
        memory.add(
            t for module in (model.components.transformer, model.components.vae) for t in module.state_dict().values()
        )
        before = memory.take_peak()
        requests = [request(case, TINY, model.dtype)] * num_images
        if device == META:
            with on_meta(), memory:
                model.generate_batch(requests)
        else:
            with memory:
                model.generate_batch(requests)
        peaks.append(memory.take_peak() - before)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.parametrize("profile_name", ["exact", "fast", "fastest"])
@pytest.mark.parametrize("case", [Case(Shape(1024, 1)), Case(Shape(512), 4)], ids=str)
def test_the_committed_count_is_current(committed: Any, profile_name: str, case: Case, few_blocks: Path) -> None:
    """The committed phases of a run at full size equal, to the byte, those of the current code."""
    (row,) = (
        row for row in committed["generator"]["rows"] if (row["profile"], row["image"]) == (profile_name, str(case))
    )
    peaks = count_peaks(few_blocks, profile_name, case)
    assert peaks == Peaks(*(row[phase] for phase in ("references", "step", "predicted_step", "decode")))


def test_the_committed_weights_are_those_of_the_configurations(committed: Any, full_components: Components) -> None:
    """64.4 GB in the transformer, 34.7 GB in 30 layers of the text encoder, in bfloat16; 64 GiB are pinned."""
    weights = committed["generator"]["weights"]
    everything = num_bytes(full_components.transformer, full_components.vae)
    assert weights["exact"] == weights["fast"] == {"running": everything, "loading": everything, "host": 0}
    assert weights["offload"] == offloaded(full_components)
    assert weights["offload"]["host"] == 64 * GIB
    assert num_bytes(full_components.transformer) == pytest.approx(64.4e9, rel=1e-3)
    assert committed["encoder"]["weights"] == num_bytes(empty_model(FULL).language_model)
    assert committed["encoder"]["weights"] == pytest.approx(34.7e9, rel=1e-3)
    assert weights["fastest"]["running"] < 0.52 * everything, "a byte for most weights, and their scales"


def test_the_default_limits_fit_80_gb(committed: Any) -> None:
    """An image with the default maximum of tokens fits 80 GB with every profile, and so do the encoder's batches."""
    largest = max((case for case in CASES if case.num_images == 1), key=num_tokens)
    assert num_tokens(largest) == GeneratorSettings().max_image_tokens
    for name in PROFILES:
        assert list(verdicts(needs(committed, name)))[list(GPUS).index("80 GB")] == "all"
    assert committed["encoder"]["batches"][-1]["batch"] == TextEncoderSettings().max_batch
    assert committed["encoder"]["batches"][-1]["total"] <= GPUS["80 GB"] * GIB


def num_tokens(case: Case) -> int:
    """The tokens in the transformer of one image with its references."""
    return case.shape.num_image_tokens(16)


def test_auto_leaves_room_for_the_default_size(committed: Any) -> None:
    """A GPU on which ``auto`` keeps the weights has room for an image of 1024x1024 beside them."""
    running = committed["generator"]["weights"]["fast"]["running"]
    assert needs(committed, "fast")["1024x1024"] - running <= WORKING_BYTES


def test_predictors_keep_three_features() -> None:
    """The counted run has as many cached features as any predictor, and ends with a reused step."""
    assert SCHEDULE.predictor.num_past == 3
    assert not SCHEDULE.is_computed(SCHEDULE.num_steps - 1)
    model = meta_model(TINY, "exact")
    steps: list[bool] = []
    with on_meta():
        model.generate(
            request(Case(Shape(64)), TINY, model.dtype), lambda _step, is_computed: steps.append(is_computed)
        )
    assert steps == [True, True, True, True, False]


def test_eight_bit_layers_are_stored_as_torchao_stores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that replace torchao's take the same bytes, layer by layer."""
    pytest.importorskip("torchao", reason="the extra quantization is not installed")
    import torchao.float8.inference as support  # noqa: PLC0415 - an extra

    monkeypatch.setattr(support, "is_MI300", lambda: True)  # its check needs a GPU
    theirs = empty_components(TINY, torch.bfloat16).transformer
    quantize_blocks(theirs)
    ours = meta_model(TINY, "fastest")
    replaced = [name for name, module in ours.components.transformer.named_modules() if isinstance(module, Fp8Linear)]
    assert replaced
    for name in set(replaced) & {name for name, _ in theirs.named_modules()}:  # the other projections are fused
        weight = theirs.get_submodule(name).weight
        inner, _ = weight.__tensor_flatten__()
        stored = sum(getattr(weight, module).nbytes for module in inner)
        assert num_bytes(ours.components.transformer.get_submodule(name)) == stored


def test_a_gpu_holds_everything_or_one_component_or_nothing() -> None:
    """For a GPU that cannot hold everything, the largest component that it holds is named."""
    needed = {"small": 20 * GIB, "large": 40 * GIB, "huge": 80 * GIB}
    assert list(verdicts(needed)) == ["small", "small", "small", "large", "large", "all", "all"]
    assert list(verdicts({"huge": 200 * GIB})) == ["no"] * len(GPUS)
    assert fitting(needed, "48 GB") == ["small", "large"]
