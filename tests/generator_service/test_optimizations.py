"""Optimizations on the demo model: what they compile, and that images stay the same."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.model.compilation import num_compilations
from flux2_shared.model.folder import ModelFolder
from generator_service.lemica import schedule_for, small_example
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from generator_service.pipelines.optimizations import apply as optimised
from generator_service.pipelines.optimizations.attention import fastest_attention
from generator_service.pipelines.optimizations.profiles import PROFILES, Performance
from generator_service.pipelines.params import Params
from generator_service.settings import Optimization
from tests.conftest import CPU

SIDE = 64
OTHER_SIDE = 96
TOLERANCE = 1e-4
"""For final latents, whose values are around 1: float32 rounding over a few steps."""


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    """Discard compiled code of models of other tests, whose blocks have the same code."""
    torch.compiler.reset()


def loaded(*optimizations: Optimization, backend: Any = "inductor", **more: Any) -> Flux2Model:
    """The demo model with some optimizations."""
    performance = Performance("fast", frozenset(optimizations), backend=backend)
    return Flux2Model.load(
        ModelFolder("weights", "local", WEIGHTS), CPU, torch.float32, performance=performance, **more
    )


def wanted(
    cache: str | int = "none",
    *,
    side: int = SIDE,
    seed: int = 0,
    num_steps: int = 4,
    adapters: tuple[Adapter, ...] = (),
) -> Params:
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(seed))
    return Params(noise, side, side, 4.0, seed, schedule_for(cache, num_steps), adapters=adapters)


@pytest.mark.parametrize("optimization", ["attention", "fused_qkv", "vae"])
def test_images_stay_the_same_up_to_rounding(optimization: Optimization, demo: Flux2Model) -> None:
    """With a single optimization latents and pixels equal those without it up to rounding."""
    ours, plain = loaded(optimization).generate(wanted(2)), demo.generate(wanted(2))
    torch.testing.assert_close(ours.latents, plain.latents, atol=TOLERANCE, rtol=0)
    pixels = [torch.frombuffer(bytearray(p.image.tobytes()), dtype=torch.uint8).int() for p in (ours, plain)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a warning inside PyTorch's compiler
def test_compiled_images_stay_the_same_up_to_rounding(demo: Flux2Model) -> None:
    """The profile ``fast``, compiled by PyTorch's own compiler, equals ``exact`` up to rounding."""
    model = loaded(*PROFILES["fast"])
    (prepared,) = model.warm_up([wanted(2)])
    assert "compile" in model.performance.optimizations
    torch.testing.assert_close(prepared.latents, demo.generate(wanted(2)).latents, atol=TOLERANCE, rtol=0)
    assert torch.equal(prepared.latents, model.generate(wanted(2)).latents)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a warning inside PyTorch's compiler
def test_really_compiled_code_serves_other_sizes(demo: Flux2Model) -> None:
    """Blocks and decoder that were compiled with dynamic shapes generate another size without compiling again."""
    model = loaded("compile", "vae")
    model.warm_up([replace(wanted(2), width=128, height=64)], "dynamic")
    before = num_compilations()
    ours, plain = (each.generate(wanted(2, side=OTHER_SIDE)) for each in (model, demo))
    assert num_compilations() == before
    assert model.performance.left_out == ()
    torch.testing.assert_close(ours.latents, plain.latents, atol=TOLERANCE, rtol=0)
    pixels = [torch.frombuffer(bytearray(p.image.tobytes()), dtype=torch.uint8).int() for p in (ours, plain)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_joined_projections_replace_the_separate_ones() -> None:
    """After projections are fused, no separate projection keeps its memory."""
    before = sum(weight.numel() for weight in loaded().components.transformer.parameters())
    assert sum(weight.numel() for weight in loaded("fused_qkv").components.transformer.parameters()) == before


def test_the_fastest_attention_is_measured(demo: Flux2Model, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that does not run on this machine is skipped; the times of the others are reported."""
    with caplog.at_level("INFO", "flux2"):
        name = fastest_attention(demo.components.transformer, 64, CPU, ("native", "_native_math", "_native_cudnn"))
    assert name in {"native", "_native_math"}
    assert "native" in caplog.text
    assert "cudnn" not in caplog.text


def test_a_failing_library_is_not_used(monkeypatch: pytest.MonkeyPatch, demo: Flux2Model) -> None:
    """If torchao cannot quantize, the profile is fast, and the model is unchanged."""

    def refuse(_transformer: object) -> None:
        raise AssertionError("wrong GPU")

    monkeypatch.setattr(optimised, "quantize_blocks", refuse)
    model = Flux2Model.load(
        ModelFolder("weights", "local", WEIGHTS),
        CPU,
        torch.float32,
        performance=Performance("fastest", frozenset({"fp8"})),
    )
    assert str(model.performance) == "profile fast: nothing changed; fp8 is left out: torchao failed (AssertionError)"
    assert torch.equal(model.generate(wanted(2)).latents, demo.generate(wanted(2)).latents)


def test_weights_are_read_directly_to_their_device(caplog: pytest.LogCaptureFixture) -> None:
    """The size and speed of loading are logged."""
    with caplog.at_level("INFO", "flux2"):
        loaded()
    assert "loading transformer: 0.0 GB" in caplog.text
    assert "GB/s" in caplog.text


@pytest.mark.slow
def test_torchao_rounds_to_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp8 the blocks' weights take one byte each, and a step's velocity differs by a few per cent."""
    pytest.importorskip("torchao", reason="the extra quantization is not installed")
    import torchao.float8.inference as support  # noqa: PLC0415 - an extra

    monkeypatch.setattr(support, "is_MI300", lambda: True)  # the CPU supports it, too, but slowly
    fp8 = Flux2Model.load(
        ModelFolder("weights", "local", WEIGHTS),
        CPU,
        torch.bfloat16,
        performance=Performance("fastest", frozenset({"fp8", "fused_qkv"})),
    )
    plain = Flux2Model.load(ModelFolder("weights", "local", WEIGHTS), CPU, torch.bfloat16)
    assert "fp8" in fp8.performance.optimizations
    weight = fp8.components.transformer.single_transformer_blocks[0].attn.to_out.weight
    assert weight.qdata.dtype == torch.float8_e4m3fn
    example = small_example(plain.components.transformer, CPU, torch.bfloat16) | {"return_dict": False}
    with torch.no_grad():
        ours, theirs = (model.components.transformer(**example)[0].float() for model in (fp8, plain))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.1
