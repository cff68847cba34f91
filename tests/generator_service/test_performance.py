"""What a profile does, where, and what it says when it cannot."""

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
    ("asked", "machine", "profile"),
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
def test_the_profile_that_is_used(asked: ProfileName, machine: Machine, profile: str) -> None:
    """Auto is fast on a GPU with bfloat16 and exact elsewhere; without 8-bit units, fastest is fast."""
    performance = choose(asked, machine)
    assert performance.profile == profile
    assert performance.optimizations == PROFILES[profile]


@pytest.mark.parametrize(("memory_gb", "profile"), [(24, "offload"), (48, "offload"), (80, "fast"), (141, "fast")])
def test_a_small_gpu_offloads(memory_gb: int, profile: str) -> None:
    """Auto keeps the blocks in host memory where weights and work do not fit: FLUX.2 [dev] takes 64.6 GB and 6."""
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
def test_what_cannot_be_done_is_named(machine: Machine, has_adapters: bool, reason: str) -> None:
    """Without fp8 the description says why, and which profile is used instead."""
    told = str(choose("fastest", machine, has_adapters=has_adapters))
    assert told.startswith("profile fast: ")
    assert f"fp8 is left out: {reason}" in told


@pytest.mark.parametrize("optimization", sorted(PROFILES["fastest"]))
def test_each_can_be_left_out_alone(optimization: Optimization) -> None:
    """An unwanted optimization is not done, all others are, and nothing is said of it."""
    performance = choose("fastest", HOPPER, without=[optimization])
    assert performance.optimizations == PROFILES["fastest"] - {optimization}
    assert performance.left_out == ()


def test_adapters_keep_their_layers() -> None:
    """Where LoRA adapters may be applied, the projections that they change stay separate."""
    assert "fused_qkv" not in choose("fast", HOPPER, has_adapters=True).optimizations


def test_exact_says_so() -> None:
    """The description of the profile that changes nothing is that."""
    assert str(Performance()) == "profile exact: nothing changed"


def test_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are separated by commas, sizes are written WIDTHxHEIGHT."""
    monkeypatch.setenv("GENERATOR_PERFORMANCE", "fastest")
    monkeypatch.setenv("GENERATOR_PERFORMANCE_WITHOUT", "vae, attention")
    monkeypatch.setenv("GENERATOR_WARM_UP_SIZES", "1024x1024,768x1344")
    settings = GeneratorSettings()
    assert settings.performance == "fastest"
    assert settings.performance_without == {"vae", "attention"}
    assert settings.warm_up_sizes == ((1024, 1024), (768, 1344))


@pytest.mark.parametrize("sizes", ["1024", "1024x", "ax16", "64x64;32x32"])
def test_a_wrong_size_is_explained(monkeypatch: pytest.MonkeyPatch, sizes: str) -> None:
    """The error shows how sizes are written."""
    monkeypatch.setenv("GENERATOR_WARM_UP_SIZES", sizes)
    with pytest.raises(ValidationError, match="like 1024x1024,768x1344"):
        GeneratorSettings()


@pytest.mark.anyio
@pytest.mark.parametrize("size", [(60, 64), (4096, 4096), (0, 64)])
async def test_a_size_that_cannot_be_drawn_ends_the_start(serve_generator: Serve, size: tuple[int, int]) -> None:
    """The service does not start, and says which size it was and what it should be."""
    with pytest.raises(
        Exception, match=f"{size[0]}x{size[1]} cannot be generated: sides must be multiples of"
    ) as raised:
        async with serve_generator(warm_up_sizes=(size,)):
            pass
    assert type(raised.value).__name__ == "ModelRefused"
