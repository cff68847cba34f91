"""Quantized weights."""

import sys
from pathlib import Path

import pytest
import torch

from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused
from flux2_shared.model.folder import ModelFolder, read_prompt_format
from tests.text_encoder_service.test_encoder import CPU, PROMPTS
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.fast_layers import FastLayers
from text_encoder_service.settings import Weights

ERROR = 0.05
"""Measured for int8 with the demo model's prompts: up to 0.006 in float32, 0.011 in bfloat16; others are higher."""


def encoder(weights: Weights, dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> MistralEncoder:
    """The demo model's encoder with quantized weights."""
    model = ModelFolder(folder.name, "local", folder)
    return MistralEncoder(model, read_prompt_format(model), CPU, dtype, weights)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test without torchao."""
    pytest.importorskip("torchao.quantization", exc_type=ImportError)


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_close_to_full_precision(dtype: torch.dtype) -> None:
    """Every hidden state lies within 5 % of that of full weights; all linear weights of the layers are quantized."""
    ours, full = encoder("int8", dtype), encoder("full", dtype)
    for quantised, exact in zip(ours.encode(PROMPTS), full.encode(PROMPTS), strict=True):
        error, states = (t.float().view(-1, 3, 128) for t in (quantised.tensor - exact.tensor, exact.tensor))
        assert (error.norm(dim=(0, 2)) / states.norm(dim=(0, 2))).max() < ERROR
        assert error.norm() > 0
    linears = [module for module in ours._model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(linear.weight).__name__ for linear in linears} == {"Int8Tensor"}


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
def test_int8_can_be_fast() -> None:
    """Quantized layers are trimmed and compiled like others, with equal results up to rounding."""
    ours = encoder("int8")
    exact = ours.encode(PROMPTS)[0].tensor
    ours.compile(1, "eager")
    assert isinstance(ours._forward, FastLayers)
    assert (ours.encode(PROMPTS[:1])[0].tensor - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_a_missing_torchao_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchao the service refuses to start, and names the extra."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelRefused, match=r"TEXT_ENCODER_WEIGHTS=int8 .* flux2-services\[quantization\]"):
        encoder("int8")


def test_int4_is_refused_without_a_gpu() -> None:
    """Without a GPU the service refuses to start, and names the setting."""
    with pytest.raises(ModelRefused, match="TEXT_ENCODER_WEIGHTS=int4 needs an NVIDIA GPU"):
        encoder("int4")
