"""Which profiles would be chosen and why, and the requirements for compiling them."""

import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from generator_service.doctor import profiles as module
from generator_service.doctor.check import Check, Status
from generator_service.doctor.libraries import Attention, Gpu
from generator_service.doctor.model import Model
from generator_service.doctor.profiles import (
    attention_to_measure,
    cache_folders,
    check_allocator,
    check_attention,
    check_caches,
    check_compiler,
    check_encoder_profile,
    check_generator_profile,
    choose_generator_profile,
    dtype_of,
)
from generator_service.settings import GeneratorSettings
from tests.generator_service.doctor.hosts import GB, by_name, described, gpu, install, libraries
from text_encoder_service.settings import TextEncoderSettings

WEIGHT_BYTES = 65 * GB
L40S = gpu(name="NVIDIA L40S", capability=(8, 9), total_bytes=48 * GB)
T4 = gpu(name="Tesla T4", capability=(7, 5), total_bytes=200 * GB)


@pytest.fixture
def has_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an installation with the extra ``quantization``."""
    monkeypatch.setattr(module, "find_spec", lambda name: object() if name == "torchao" else None)


@pytest.fixture
def has_no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an installation without torchao and Triton."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)


def profile_of(where: Gpu | None, **settings: Any) -> Check:
    """The check of the generator's profile."""
    chosen = GeneratorSettings(**settings)
    performance = choose_generator_profile(chosen, where, WEIGHT_BYTES)
    [check] = check_generator_profile(chosen, where, performance)
    return check


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (gpu(), "profile fast: attention, compile, fused_qkv, vae; chosen because the GPU has compute capability 9.0"),
        (L40S, "profile offload: offload; chosen because 48 GB cannot hold the weights"),
        (T4, "profile exact: nothing changed; chosen because the GPU has compute capability 7.5, and bfloat16 needs"),
        (None, "profile exact: nothing changed; chosen because the CPU is used"),
    ],
)
def test_auto_reports_the_reason(where: Gpu | None, message: str) -> None:
    """The check names the profile, its optimizations and the reason for it."""
    check = profile_of(where)
    assert check.status is Status.OK
    assert message in check.detail


@pytest.mark.usefixtures("has_torchao")
def test_fastest_is_used_if_supported() -> None:
    """The profile ``fastest`` is chosen if the GPU and torchao support it."""
    check = profile_of(gpu(), performance="fastest")
    assert check.status is Status.OK
    assert "profile fastest: attention, compile, fp8" in check.detail


@pytest.mark.usefixtures("has_no_packages")
def test_excluded_optimizations_are_a_warning(tmp_path: Path) -> None:
    """A profile that cannot be used as requested is a warning; what adapters exclude is not."""
    check = profile_of(gpu(), performance="fastest")
    assert check.status is Status.WARNING
    assert "fp8 is left out: torchao is not installed" in check.detail
    assert "quantization" in check.fix
    with_adapters = profile_of(gpu(), lora_dir=tmp_path)
    assert with_adapters.status is Status.OK
    assert "fused_qkv is left out" in with_adapters.detail


def test_adapters_with_offload_are_a_failure(tmp_path: Path) -> None:
    """LoRA adapters with offloaded blocks are a failure."""
    assert profile_of(L40S, lora_dir=tmp_path).status is Status.FAILED
    assert profile_of(gpu(), lora_dir=tmp_path, performance="offload").status is Status.FAILED


@pytest.mark.parametrize(
    ("where", "attention", "lines", "status", "message"),
    [
        (None, "", [], Status.OK, "native, PyTorch's default"),
        (gpu(), "_native_cudnn", ["attention _flash_3 does not run here: none", "2 ms"], Status.OK, "_native_cudnn is"),
        (gpu(), "", ["RuntimeError: CUDA"], Status.WARNING, "could not be measured here: RuntimeError: CUDA"),
        (gpu(), "", [], Status.WARNING, "the libraries are not usable"),
    ],
)
def test_the_attention_kernel(
    where: Gpu | None, attention: str, lines: list[str], status: Status, message: str
) -> None:
    """The check names the chosen kernel and those that do not run, or why none could be measured."""
    performance = choose_generator_profile(GeneratorSettings(), where, WEIGHT_BYTES)
    [check] = check_attention(performance, where, libraries(attention=attention, attention_lines=lines))
    assert check.status is status
    assert message in check.detail
    assert attention == "" or "_flash_3 does not run here" in check.detail


def test_the_kernel_on_a_cpu() -> None:
    """On a CPU the kernel is ``native`` with every profile."""
    performance = choose_generator_profile(GeneratorSettings(performance="fast"), None, 0)
    [check] = check_attention(performance, None, libraries(cuda=None))
    assert (check.status, check.detail) == (Status.OK, "native, the only one for a CPU")


def test_attention_is_measured_in_the_models_shape() -> None:
    """Attention is measured in the model's own shape, and only if the profile would choose a kernel."""
    assert attention_to_measure(GeneratorSettings(), Model("x", "main")) == Attention(gpu=0)
    configs: dict[str, dict[str, Any]] = {
        "transformer": {"num_attention_heads": 5, "attention_head_dim": 32},
        "vae": {"sample_size": 128, "block_out_channels": [1, 2, 3, 4]},
    }
    settings = GeneratorSettings(device="cuda:3", dtype="float32")
    measured = attention_to_measure(settings, Model("x", "main", configs=configs))
    assert measured == Attention(gpu=3, heads=5, head_dim=32, num_tokens=64 + 512, dtype="float32")
    for without in (GeneratorSettings(device="cpu"), GeneratorSettings(performance="exact")):
        assert attention_to_measure(without, Model("x", "main")) is None


@pytest.mark.parametrize(("where", "profile"), [(gpu(), "fast"), (T4, "exact"), (None, "exact")])
def test_the_encoders_profile(where: Gpu | None, profile: str) -> None:
    """The text encoder is ``fast`` on GPUs from Ampere on, else ``exact``."""
    [check] = check_encoder_profile(TextEncoderSettings(), where)
    assert check.status is Status.OK
    assert f"TEXT_ENCODER_PERFORMANCE=auto: {profile} on" in check.detail


@pytest.mark.usefixtures("has_torchao")
@pytest.mark.parametrize(
    ("where", "settings", "status"),
    [
        (gpu(), {"weights": "int4"}, Status.OK),
        (gpu(), {"weights": "int4", "dtype": "float32"}, Status.FAILED),
        (None, {"weights": "int4"}, Status.FAILED),
        (None, {"weights": "int8"}, Status.OK),
    ],
)
def test_weights_that_the_device_does_not_support_are_a_failure(
    where: Gpu | None, settings: dict[str, Any], status: Status
) -> None:
    """int4 weights without a GPU or bfloat16 are a failure."""
    [check] = check_encoder_profile(TextEncoderSettings(**settings), where)
    assert check.status is status


@pytest.mark.usefixtures("has_no_packages")
def test_fewer_bits_need_torchao() -> None:
    """Quantized weights without torchao are a failure."""
    [check] = check_encoder_profile(TextEncoderSettings(weights="int8"), gpu())
    assert check.status is Status.FAILED
    assert "quantization" in check.fix


def test_the_dtype_depends_on_the_device() -> None:
    """The dtype is the setting's, else bfloat16 on a GPU and float32 on a CPU."""
    assert dtype_of(GeneratorSettings(), gpu()) == "bfloat16"
    assert dtype_of(GeneratorSettings(), None) == "float32"
    assert dtype_of(GeneratorSettings(dtype="bfloat16"), None) == "bfloat16"


@pytest.mark.usefixtures("has_no_packages")
def test_a_compiler_is_needed_only_for_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler or header is a warning, and only if something is compiled."""
    header = tmp_path / "include"
    header.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(header)})
    host = described(tmp_path)

    def look(*, has_gpu: bool, is_compiled: bool = True, **environ: str) -> dict[str, Check]:
        there = described(tmp_path, **environ)
        return by_name(list(check_compiler(there, libraries(), is_compiled=is_compiled, has_gpu=has_gpu)))

    assert look(has_gpu=True, is_compiled=False)["compiler"].status is Status.SKIPPED
    missing = look(has_gpu=True)["compiler"]
    assert missing.status is Status.WARNING
    assert "cc or gcc or clang is not on PATH" in missing.detail
    install(tmp_path, "gcc", "")
    assert "Python.h is missing" in look(has_gpu=True)["compiler"].detail
    (header / "Python.h").touch()
    assert look(has_gpu=True)["compiler"] == Check("compiler", Status.OK, str(host.which("gcc")))
    assert look(has_gpu=True, CC="icx -O2")["compiler"].detail.startswith("CC=icx is not on PATH")
    assert "c++ or g++" in look(has_gpu=False)["compiler"].detail
    assert "triton" not in look(has_gpu=False)


@pytest.mark.parametrize(("fixture", "status"), [("has_no_packages", Status.WARNING), (None, Status.OK)])
def test_triton_is_needed_by_torch_for_cuda(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixture: str | None, status: Status
) -> None:
    """A missing Triton is a warning on Linux with CUDA."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    if fixture is not None:
        request.getfixturevalue(fixture)
    checks = by_name(list(check_compiler(described(tmp_path), libraries(), is_compiled=True, has_gpu=True)))
    assert checks["triton"].status is status


def test_the_default_cache_folders_are_pytorchs() -> None:
    """The default cache folders are those of PyTorch."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # noqa: PLC0415 - PyTorch's own location

    folders = cache_folders({})
    assert str(folders["TORCHINDUCTOR_CACHE_DIR"]) == default_cache_dir()
    assert folders["TRITON_CACHE_DIR"].is_relative_to(folders["TORCHINDUCTOR_CACHE_DIR"])
    variables = {"TORCHINDUCTOR_CACHE_DIR": "/a", "TRITON_CACHE_DIR": "/b"}
    assert cache_folders(variables) == {name: Path(folder) for name, folder in variables.items()}


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    """A cache folder that cannot be written is a warning, and no folder is created."""
    (tmp_path / "file").touch()
    good, bad = tmp_path / "new" / "inductor", tmp_path / "file" / "triton"
    host = described(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(good), TRITON_CACHE_DIR=str(bad))
    first, second = check_caches(host, is_compiled=True)
    assert (first.status, second.status) == (Status.OK, Status.WARNING)
    assert f"TRITON_CACHE_DIR: {bad} cannot be written to" in second.detail
    assert not good.exists()
    [skipped] = check_caches(host, is_compiled=False)
    assert skipped.status is Status.SKIPPED


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, Status.WARNING),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, Status.OK),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"}, Status.OK),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, Status.WARNING),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "x:1"}, Status.WARNING),
    ],
)
def test_expandable_segments_are_recommended(tmp_path: Path, environ: dict[str, str], status: Status) -> None:
    """Missing expandable segments and contradicting variables are warnings on a GPU."""
    host = described(tmp_path, **environ)
    [check] = check_allocator(host, has_gpu=True)
    assert check.status is status
    assert all(f"{name}={value}" in check.detail for name, value in environ.items())
    [check] = check_allocator(host, has_gpu=False)
    assert check.status is Status.SKIPPED
