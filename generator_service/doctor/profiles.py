"""Checks of the performance profiles that would be chosen, and of the requirements for compiling."""

import getpass
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from flux2_shared.settings import ServiceSettings
from generator_service.doctor.check import Check, failed, ok, one_line, skipped, warning
from generator_service.doctor.host import Host, existing_folder
from generator_service.doctor.libraries import Attention, Gpu, Libraries
from generator_service.doctor.model import Model
from generator_service.pipelines.optimizations.profiles import Machine, Performance, choose
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings

C_COMPILERS = ("cc", "gcc", "clang")
CXX_COMPILERS = ("c++", "g++", "clang++")
INSTALL_COMPILER = "install one: apt install gcc g++ libc6-dev; the Docker images have it"
INSTALL_TORCHAO = "pip install -c constraints.txt '.[quantization]'"
RUNS_UNCOMPILED = "the services would run uncompiled"
TEXT_TOKENS = 512
"""Text tokens when attention is measured, as in ``pipelines.flux2``."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def machine_of(gpu: Gpu | None) -> Machine:
    """Return the ``Machine`` for a GPU, or for the CPU (None)."""
    if gpu is None:
        return Machine("cpu")
    return Machine("cuda", gpu.capability, find_spec("torchao") is not None, gpu.total_bytes)


def dtype_of(settings: ServiceSettings, gpu: Gpu | None) -> str:
    """Resolve the dtype of a service's weights."""
    return settings.dtype if settings.dtype != "auto" else "bfloat16" if gpu else "float32"


def choose_generator_profile(settings: GeneratorSettings, gpu: Gpu | None, weight_bytes: int) -> Performance:
    """Choose the profile as the generator does when it loads the model."""
    return choose(
        settings.performance,
        machine_of(gpu),
        weight_bytes=weight_bytes,
        without=settings.performance_without,
        has_adapters=settings.lora_dir is not None,
    )


def check_generator_profile(settings: GeneratorSettings, gpu: Gpu | None, performance: Performance) -> Iterator[Check]:
    """Report the generator's profile and why it is chosen."""
    name = "generator profile"
    detail = f"GENERATOR_PERFORMANCE={settings.performance}: {performance}"
    if settings.performance == "auto":
        detail += f"; {_why(performance.profile, gpu)}"
    if "offload" in performance.optimizations and settings.lora_dir is not None:
        fix = "unset GENERATOR_LORA_DIR, or choose another GENERATOR_PERFORMANCE"
        yield failed(name, f"{detail}; LoRA adapters cannot be applied to offloaded blocks", fix)
    elif settings.performance not in {"auto", performance.profile}:
        fix = INSTALL_TORCHAO if "torchao" in str(performance) else "see which optimizations are left out"
        yield warning(name, detail, fix)
    else:
        yield ok(name, detail)


def _why(profile: str, gpu: Gpu | None) -> str:
    if gpu is None:
        return "chosen because the CPU is used"
    if profile == "offload":
        return f"chosen because {gpu.total_bytes / 1e9:.0f} GB cannot hold the weights and a large image's activations"
    has = f"chosen because the GPU has compute capability {gpu.capability_text}"
    return f"{has} and holds the weights" if profile == "fast" else f"{has}, and bfloat16 needs 8.0"


def attention_to_measure(settings: GeneratorSettings, model: Model) -> Attention | None:
    """Return the attention that the generator would measure on a GPU, or None if its profile does not measure."""
    if settings.device == "cpu" or settings.performance in {"exact", "offload"}:
        return None
    index = settings.device.removeprefix("cuda:")
    config, side = model.configs.get("transformer", {}), model.configs.get("vae", {}).get("sample_size", 1024)
    return Attention(
        gpu=int(index) if index.isdigit() else 0,
        heads=int(config.get("num_attention_heads", 48)),
        head_dim=int(config.get("attention_head_dim", 128)),
        num_tokens=(int(side) // model.pixels_per_token) ** 2 + TEXT_TOKENS,
        dtype="bfloat16" if settings.dtype == "auto" else settings.dtype,
    )


def check_attention(performance: Performance, gpu: Gpu | None, libraries: Libraries) -> Iterator[Check]:
    """Report the attention kernels that run here, and the one that would be chosen."""
    name = "attention"
    lines = "; ".join(one_line(line) for line in libraries.attention_lines)
    if "attention" not in performance.optimizations:
        yield ok(name, f"native, PyTorch's default: the profile {performance.profile} does not measure others")
    elif gpu is None:
        yield ok(name, "native, the only one for a CPU")
    elif libraries.attention:
        yield ok(name, f"{libraries.attention} is chosen by measurement: {lines}")
    else:
        fix = "see the checks of torch and diffusers, and what else uses the GPU"
        yield warning(name, f"it could not be measured here: {lines or 'the libraries are not usable'}", fix)


def check_encoder_profile(settings: TextEncoderSettings, gpu: Gpu | None) -> Iterator[Check]:
    """Report the text encoder's profile, and check whether its weights can be quantized as configured."""
    name = "text encoder profile"
    profile = settings.profile_on(gpu.capability if gpu else None)
    where = f"compute capability {gpu.capability_text}" if gpu else "the CPU"
    detail = f"TEXT_ENCODER_PERFORMANCE={settings.performance}: {profile} on {where}, weights {settings.weights}"
    if settings.weights != "full" and find_spec("torchao") is None:
        yield failed(name, f"{detail}, which need torchao", INSTALL_TORCHAO)
    elif settings.weights == "int4" and (gpu is None or dtype_of(settings, gpu) != "bfloat16"):
        yield failed(name, f"{detail}, which need a GPU and bfloat16", "set TEXT_ENCODER_WEIGHTS to full or int8")
    else:
        yield ok(name, detail)


def check_compiler(host: Host, libraries: Libraries, *, is_compiled: bool, has_gpu: bool) -> Iterator[Check]:
    """Check for a C compiler and Python's headers, which Triton needs; on a CPU for a C++ compiler."""
    name = "compiler"
    if not is_compiled:
        yield skipped(name, "nothing is compiled with these profiles")
        return
    variable, candidates = ("CC", C_COMPILERS) if has_gpu else ("CXX", CXX_COMPILERS)
    configured = host.environ.get(variable, "").split()
    compiler = next(filter(None, map(host.which, configured[:1] or candidates)), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None:
        missing = f"{variable}={configured[0]}" if configured else " or ".join(candidates)
        yield warning(name, f"{missing} is not on PATH: {RUNS_UNCOMPILED}", INSTALL_COMPILER)
    elif not header.exists():
        fix = f"install Python's headers: apt install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield warning(name, f"{compiler}, but {header} is missing: {RUNS_UNCOMPILED}", fix)
    else:
        yield ok(name, compiler)
    if has_gpu and sys.platform == "linux" and libraries.cuda:
        if find_spec("triton") is None:
            yield warning("triton", f"not installed: {RUNS_UNCOMPILED}", "reinstall torch from PyPI")
        else:
            yield ok("triton", "installed")


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders of compiled code, determined like PyTorch and Triton do."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    inductor = Path(environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{user}"))
    triton = Path(environ.get("TRITON_CACHE_DIR") or inductor / "triton")
    return {"TORCHINDUCTOR_CACHE_DIR": inductor, "TRITON_CACHE_DIR": triton}


def check_caches(host: Host, *, is_compiled: bool) -> Iterator[Check]:
    """Check whether compiled code can be cached over a restart."""
    name = "compile cache"
    if not is_compiled:
        yield skipped(name, "nothing is compiled with these profiles")
        return
    for variable, folder in cache_folders(host.environ).items():
        existing = existing_folder(folder)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            fix = f"set {variable} to a writable folder; otherwise every start compiles for minutes"
            yield warning(name, f"{variable}: {folder} cannot be written to", fix)
            continue
        kept = "" if host.environ.get(variable) else ", but may be emptied when the machine restarts"
        yield ok(name, f"{variable}: {folder} can be written to{kept}")


def check_allocator(host: Host, *, has_gpu: bool) -> Iterator[Check]:
    """Check PyTorch's allocator: without expandable segments, fragmentation can exhaust a nearly full GPU."""
    name = "allocator"
    configured = {variable: host.environ[variable] for variable in ALLOCATOR if host.environ.get(variable)}
    detail = ", ".join(f"{variable}={value}" for variable, value in configured.items()) or f"{ALLOCATOR[0]} is not set"
    fix = f"set {ALLOCATOR[0]}=expandable_segments:True"
    if not has_gpu:
        yield skipped(name, f"no service uses a GPU; {detail}")
    elif len(set(configured.values())) > 1:
        yield warning(name, f"{detail}: they differ", f"{fix} and unset {ALLOCATOR[1]}")
    elif "expandable_segments:true" not in detail.lower():
        yield warning(name, f"{detail}: varying image sizes fragment the GPU's memory", fix)
    else:
        yield ok(name, detail)
