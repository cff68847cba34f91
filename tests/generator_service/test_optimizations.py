"""Optimisations on the demo model: what they compile and when, and that pictures stay what they are."""

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
"""Of final latents, whose values are around 1: float32 rounding over a few steps."""


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    """Models of other tests, whose blocks have the same code, leave nothing compiled."""
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
    """A small picture."""
    noise = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(seed))
    return Params(noise, side, side, 4.0, seed, schedule_for(cache, num_steps), adapters=adapters)


@pytest.mark.parametrize("optimization", ["attention", "fused_qkv", "vae"])
def test_pictures_stay_the_same_but_for_rounding(optimization: Optimization, demo: Flux2Model) -> None:
    """With one optimization alone, latents and pixels equal those without up to rounding."""
    ours, plain = loaded(optimization).generate(wanted(2)), demo.generate(wanted(2))
    torch.testing.assert_close(ours.latents, plain.latents, atol=TOLERANCE, rtol=0)
    pixels = [torch.frombuffer(bytearray(p.image.tobytes()), dtype=torch.uint8).int() for p in (ours, plain)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, in its compiler
def test_really_compiled_pictures_stay_the_same(demo: Flux2Model) -> None:
    """All of ``fast`` together, compiled by PyTorch's own compiler, equals ``exact`` up to rounding."""
    model = loaded(*PROFILES["fast"])
    (prepared,) = model.warm_up([wanted(2)])
    assert "compile" in model.performance.optimizations
    torch.testing.assert_close(prepared.latents, demo.generate(wanted(2)).latents, atol=TOLERANCE, rtol=0)
    assert torch.equal(prepared.latents, model.generate(wanted(2)).latents)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, in its compiler
def test_really_compiled_code_serves_other_sizes(demo: Flux2Model) -> None:
    """Blocks and decoder, compiled once for any size, give another size's picture without compiling again."""
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
    """After joining, no separate projection keeps its memory."""
    before = sum(weight.numel() for weight in loaded().components.transformer.parameters())
    assert sum(weight.numel() for weight in loaded("fused_qkv").components.transformer.parameters()) == before


def test_the_fastest_attention_is_measured(demo: Flux2Model, caplog: pytest.LogCaptureFixture) -> None:
    """A candidate that does not run here is passed over; the times of the others are told."""
    with caplog.at_level("INFO", "flux2"):
        name = fastest_attention(demo.components.transformer, 64, CPU, ("native", "_native_math", "_native_cudnn"))
    assert name in {"native", "_native_math"}
    assert "native" in caplog.text
    assert "cudnn" not in caplog.text


def test_a_library_that_refuses_is_done_without(monkeypatch: pytest.MonkeyPatch, demo: Flux2Model) -> None:
    """Where torchao cannot quantise, the profile is fast, and nothing was changed."""

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


def test_weights_are_read_at_once_to_their_device(caplog: pytest.LogCaptureFixture) -> None:
    """How much is read, and how fast, is told."""
    with caplog.at_level("INFO", "flux2"):
        loaded()
    assert "loading transformer: 0.0 GB" in caplog.text
    assert "GB/s" in caplog.text


@pytest.mark.slow
def test_torchao_rounds_to_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp8 the blocks' weights take a byte each, and a step's velocity is off by a few per cent."""
    pytest.importorskip("torchao", reason="the extra quantization is not installed")
    import torchao.float8.inference as support  # noqa: PLC0415 - an extra

    monkeypatch.setattr(support, "is_MI300", lambda: True)  # the CPU can do it, too, if slowly
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
