"""The computed work and roofline of a step."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import FULL, TINY
from benchmarks.generator.roofline import FLUX2_DEV, step_work
from benchmarks.generator.synthetic import Source, empty_components


@pytest.fixture(scope="module")
def full_transformer() -> Flux2Transformer2DModel:
    """FLUX.2 [dev]'s transformer without weights."""
    return empty_components(FULL, torch.bfloat16).transformer


def test_full_size_is_flux2_dev(full_transformer: Flux2Transformer2DModel) -> None:
    """The full size has FLUX.2 [dev]'s 8 double and 48 single blocks of 48 heads x 128, 32.22 billion parameters."""
    config = full_transformer.config
    assert {name: config[name] for name in FLUX2_DEV} == FLUX2_DEV
    assert (config.num_layers, config.num_single_layers) == (8, 48)
    assert (config.num_attention_heads, config.attention_head_dim) == (48, 128)
    assert config.joint_attention_dim == 15360
    assert sum(p.numel() for p in full_transformer.parameters()) == pytest.approx(32.22e9, rel=1e-3)
    vae = empty_components(FULL, torch.bfloat16).vae
    assert 4 * vae.config.latent_channels == config.in_channels == 128


@pytest.mark.parametrize(
    ("num_image_tokens", "linear", "attention", "expected_s"),
    [
        (1024, 0.0845, 0.0032, 0.111),
        (4096, 0.2534, 0.0292, 0.358),
        (8192, 0.4785, 0.1043, 0.738),
        (16384, 0.9288, 0.3929, 1.673),
    ],
)
def test_work_and_roofline_of_a_step(
    full_transformer: Flux2Transformer2DModel, num_image_tokens: int, linear: float, attention: float, expected_s: float
) -> None:
    """One step's work in PFLOP equals a count by hand for four sizes, and so does its roofline."""
    work = step_work(full_transformer.config, num_image_tokens)
    assert (work.linear + work.rest) / 1e15 == pytest.approx(linear, abs=6e-5)
    assert work.attention / 1e15 == pytest.approx(attention, abs=6e-5)
    assert work.roofline_s("exact") == work.roofline_s("fast") == pytest.approx(expected_s, abs=6e-4)


def test_fp8_affects_only_the_blocks_linear_layers(full_transformer: Flux2Transformer2DModel) -> None:
    """With fp8 linear layers a step's roofline at 1024x1024 is 0.197 s."""
    assert step_work(full_transformer.config, 4096).roofline_s("fastest") == pytest.approx(0.197, abs=6e-4)


def test_work_equals_torchs_count() -> None:
    """For another configuration the matrix products outside of attention equal torch's own count."""
    source = Source(TINY, device="cpu")
    embedding = source.embedding()
    num_text_tokens = embedding.shape[1]
    with source.components() as components:
        arguments = {
            "hidden_states": torch.randn(1, 64, 32),
            "encoder_hidden_states": embedding,
            "timestep": torch.full([1], 0.5),
            "guidance": torch.full([1], 4.0),
            "img_ids": torch.zeros(1, 64, 4),
            "txt_ids": torch.zeros(1, num_text_tokens, 4),
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            components.transformer(**arguments)
        work = step_work(components.transformer.config, 64, num_text_tokens)
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    assert sum(count for name, count in counts.items() if "attention" not in name) == work.linear + work.rest
