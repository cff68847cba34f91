"""Performance profiles: how they are chosen, and what they report."""

import pytest
from pydantic import ValidationError

from generator_service.pipelines.optimizations.profiles import PROFILES, Machine, Performance, choose
from generator_service.settings import GeneratorSettings, Optimization, ProfileName
from tests.conftest import Serve

CPU = Machine("cpu")
LARGE = 80 * 10**9
HOPPER = Machine("cuda", (9, 0), has_torchao=True, memory_bytes=LARGE)
AMPERE = Machine("cuda", (8, 0), has_torchao=True, memory_bytes=LARGE)
TURING = Machine("cuda", (7, 5), memory_bytes=LARGE)


@pytest.mark.parametrize(
    ("setting", "machine", "profile"),
    [
        ("auto", CPU, "exact"),
        ("auto", TURING, "exact"),
        ("auto", AMPERE, "fast"),
        ("auto", HOPPER, "fast"),
        ("exact", HOPPER, "exact"),
        ("fastest", HOPPER, "fastest"),
        ("fastest", AMPERE, "fast"),
        ("fastest", CPU, "fast"),
    ],
)
def test_the_profile_that_is_used(setting: ProfileName, machine: Machine, profile: str) -> None:
    """Auto is fast on a GPU with bfloat16 and exact elsewhere; without fp8 support, fastest becomes fast."""
    performance = choose(setting, machine)
    assert performance.profile == profile
    assert performance.optimizations == PROFILES[profile]


@pytest.mark.parametrize(("memory_gb", "profile"), [(24, "offload"), (48, "offload"), (80, "fast"), (141, "fast")])
def test_a_small_gpu_offloads(memory_gb: int, profile: str) -> None:
    """Auto offloads the blocks if weights and working memory do not fit: FLUX.2 [dev] takes 64.6 GB and 6."""
    machine = Machine("cuda", (9, 0), memory_bytes=memory_gb * 10**9)
    assert choose("auto", machine, weight_bytes=64_600_000_000).profile == profile
    assert choose("exact", machine, weight_bytes=64_600_000_000).profile == "exact"


@pytest.mark.parametrize(
    ("machine", "has_adapters", "reason"),
    [
        (CPU, False, "it needs a GPU"),
        (AMPERE, False, "the GPU has compute capability 8.0, and 8.9 is required"),
        (Machine("cuda", (9, 0)), False, "torchao is not installed"),
        (HOPPER, True, "LoRA adapters cannot be applied to 8-bit layers"),
    ],
)
def test_unsupported_optimizations_are_reported(machine: Machine, has_adapters: bool, reason: str) -> None:
    """Without fp8 the description has the reason and the profile that is used instead."""
    description = str(choose("fastest", machine, has_adapters=has_adapters))
    assert description.startswith("profile fast: ")
    assert f"fp8 is left out: {reason}" in description


@pytest.mark.parametrize("optimization", sorted(PROFILES["fastest"]))
def test_each_optimization_can_be_excluded(optimization: Optimization) -> None:
    """An optimization that is excluded is not applied, all others are, and the description does not mention it."""
    performance = choose("fastest", HOPPER, without=[optimization])
    assert performance.optimizations == PROFILES["fastest"] - {optimization}
    assert performance.left_out == ()


def test_adapters_keep_their_layers() -> None:
    """If LoRA adapters may be applied, the projections that they change are not fused."""
    assert "fused_qkv" not in choose("fast", HOPPER, has_adapters=True).optimizations


def test_the_description_of_exact() -> None:
    assert str(Performance()) == "profile exact: nothing changed"


def test_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are separated by commas, and sizes have the form WIDTHxHEIGHT."""
    monkeypatch.setenv("GENERATOR_PERFORMANCE", "fastest")
    monkeypatch.setenv("GENERATOR_PERFORMANCE_WITHOUT", "vae, attention")
    monkeypatch.setenv("GENERATOR_WARM_UP_SIZES", "1024x1024,768x1344")
    settings = GeneratorSettings()
    assert settings.performance == "fastest"
    assert settings.performance_without == {"vae", "attention"}
    assert settings.warm_up_sizes == ((1024, 1024), (768, 1344))


@pytest.mark.parametrize("sizes", ["1024", "1024x", "ax16", "64x64;32x32"])
def test_a_wrong_size_is_explained(monkeypatch: pytest.MonkeyPatch, sizes: str) -> None:
    """The error shows the expected form."""
    monkeypatch.setenv("GENERATOR_WARM_UP_SIZES", sizes)
    with pytest.raises(ValidationError, match="like 1024x1024,768x1344"):
        GeneratorSettings()


@pytest.mark.anyio
@pytest.mark.parametrize("size", [(60, 64), (4096, 4096), (0, 64)])
async def test_an_impossible_warm_up_size_is_refused_at_start(serve_generator: Serve, size: tuple[int, int]) -> None:
    """The service refuses to start, and names the size and what it should be."""
    with pytest.raises(
        Exception, match=f"{size[0]}x{size[1]} cannot be generated: sides must be multiples of"
    ) as raised:
        async with serve_generator(warm_up_sizes=(size,)):
            pass
    assert type(raised.value).__name__ == "ModelRefused"
