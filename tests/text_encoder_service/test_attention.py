"""Attention kernels that give NaN for padding are not used."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._inductor.utils import fresh_cache

from demo_model.services import WEIGHTS
from flux2_shared.errors import ModelRefused
from flux2_shared.model.attention import NonFiniteStates, check_finite, run_finite
from flux2_shared.model.folder import ModelFolder
from flux2_shared.schemas import EncoderInfo
from generator_service.pipelines.prompt import embed_prompts
from tests.conftest import CPU, Serve
from tests.kernels import Kernel, broken_kernels, chosen, kept_flags
from tests.text_encoder_service.test_encoder import PROMPTS, encoder
from text_encoder_service.app import load_encoder
from text_encoder_service.encoder import MistralEncoder
from text_encoder_service.fast_layers import TOLERANCES, FastLayers, difference
from text_encoder_service.settings import TextEncoderSettings

CASES: list[tuple[tuple[Kernel, ...], str]] = [
    ((), "any"),
    (("math",), "any"),
    (("cudnn",), "without_cudnn"),
    (("cudnn", "flash"), "math"),
    (("cudnn", "flash", "mem_efficient"), "math"),
]
ALL: tuple[Kernel, ...] = ("cudnn", "flash", "mem_efficient", "math")
FOLDER = ModelFolder("weights", "local", WEIGHTS)


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Restore the kernels after each test."""
    with kept_flags():
        yield


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """The embeddings that every kernel should give."""
    return [embedding.tensor for embedding in encoder(WEIGHTS).encode(PROMPTS)]


def check(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Assert that embeddings are finite, and equal up to rounding, which differs between kernels."""
    for embedding, exact in zip(ours, expected, strict=True):
        assert difference(embedding, exact) <= TOLERANCES[torch.float32]


def served(ours: MistralEncoder) -> list[torch.Tensor]:
    """Embeddings from another thread than the one that loaded the encoder."""
    with ThreadPoolExecutor(1) as pool:
        return [embedding.tensor for embedding in pool.submit(ours.encode, PROMPTS).result()]


@pytest.mark.parametrize(("broken", "attention"), CASES)
def test_a_kernel_that_gives_nan_is_excluded(
    broken: tuple[Kernel, ...], attention: str, expected: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The encoder starts with the first kernels that pass, logs it in one line if some failed, and serves."""
    with broken_kernels(broken), caplog.at_level(logging.WARNING, "flux2"):
        ours = encoder(WEIGHTS)
        assert ours.attention == attention
        check(served(ours), expected)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (attention != "any")
    assert all(repr(attention) in line for line in lines)


@pytest.mark.parametrize("only_compiled", [False, True])
@pytest.mark.parametrize(("broken", "attention"), [CASES[2], CASES[3]])
def test_compiled_layers_are_checked_too(
    broken: tuple[Kernel, ...], attention: str, only_compiled: bool, expected: list[torch.Tensor]
) -> None:
    """If a kernel fails in compiled code, the layers are compiled with the next one, and are still fast."""
    with broken_kernels(broken, only_compiled=only_compiled):
        ours = encoder(WEIGHTS)
        assert ours.attention == ("any" if only_compiled else attention)
        ours.compile(1, "eager")
        assert ours.attention == attention
        assert isinstance(ours._forward, FastLayers)
        check(served(ours), expected)


def test_without_a_compiled_kernel_the_encoder_is_exact(
    expected: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The service starts uncompiled, and logs it."""
    with broken_kernels(ALL, only_compiled=True), caplog.at_level(logging.WARNING, "flux2"):
        ours = encoder(WEIGHTS)
        ours.compile(1, "eager")
        assert "performance=exact" in caplog.text
        assert ours.attention == "math"
        check(served(ours), expected)


def test_without_a_kernel_the_service_does_not_start() -> None:
    """The message says that the kernel may not be the only reason."""
    with broken_kernels(ALL), pytest.raises(ModelRefused, match="not finite numbers, with any of PyTorch's attention"):
        load_encoder(TextEncoderSettings(model=str(WEIGHTS)))


def test_damaged_weights_are_refused_at_the_start(tmp_path: Path) -> None:
    """Weights that are not finite numbers are refused."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelRefused, match="weights are damaged"):
        encoder(folder)


def test_the_command_line_excludes_them_too(expected: list[torch.Tensor]) -> None:
    """``flux2 calibrate`` and ``flux2 generate --local`` use a kernel that passes, or report that there is none."""
    with broken_kernels(["cudnn"]):
        ours = [embedding.tensor for embedding in embed_prompts(FOLDER, PROMPTS, CPU, torch.float32)]
        assert chosen() == "flash"
    check(ours, expected)
    with broken_kernels(ALL), pytest.raises(ModelRefused, match="not finite numbers"):
        embed_prompts(FOLDER, PROMPTS[:1], CPU, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_code_with_an_excluded_kernel_is_not_reused() -> None:
    """Code that was compiled with it, in this process or on disk, is not used again."""
    query, mask = torch.randn(1, 2, 64, 32), torch.ones(64, 64, dtype=torch.bool).tril()
    kernels: list[set[str]] = []

    def work() -> None:
        compiled: Any = torch.compile(torch.nn.functional.scaled_dot_product_attention, fullgraph=True)
        compiled(query, query, query, mask)
        with torch.profiler.profile() as profile:
            compiled(query, query, query, mask)
        kernels.append({event.key for event in profile.key_averages()})
        if len(kernels) < 3:
            raise NonFiniteStates

    with fresh_cache(), torch.inference_mode():
        assert run_finite(work) == (None, "math")
    assert ["aten::_scaled_dot_product_flash_attention_for_cpu" in names for names in kernels] == [True, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_nan_is_enough(value: float) -> None:
    """A single NaN excludes a kernel."""
    states = torch.zeros(2, 3)
    assert check_finite(states) is states
    states[1, 2] = value
    with pytest.raises(NonFiniteStates):
        check_finite(states)


@pytest.mark.anyio
async def test_info_lists_the_kernels(serve_encoder: Serve) -> None:
    """``GET /info`` lists the kernels; the response of an older service is still understood."""
    with broken_kernels(["cudnn"]):
        async with serve_encoder() as http:
            info = (await http.get("/info")).json()
    assert info["attention"] == "without_cudnn"
    del info["attention"]
    assert EncoderInfo(**info).attention is None
