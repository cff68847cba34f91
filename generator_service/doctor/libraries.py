"""Checks of Python, the installed packages, and the libraries, which are imported in a separate process."""

import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux2_shared.model.subfolders import Service
from generator_service.doctor.check import Check, failed, ok, one_line, skipped
from generator_service.doctor.host import Host, Output

PROJECT = "flux2-services"
INSTALL = "pip install -c constraints.txt '.[text-encoder,generator]'"
EXTRAS: Mapping[Service, str] = {Service.GENERATOR: "generator", Service.TEXT_ENCODER: "text-encoder"}
PROBE = "import sys; sys.path.append(sys.argv[1]); from generator_service.doctor.probe import main; main(sys.argv[2])"
"""The program of the process that imports the libraries; its first argument is the folder of this project."""
IMPORTS = {"torch": "both services", "transformers": "both services", "diffusers": "the generator"}


class Gpu(BaseModel):
    """A GPU as reported by torch."""

    model_config = ConfigDict(frozen=True)

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int = 0
    uuid: str = ""
    error: str = ""
    """Why CUDA cannot be initialized on it."""

    @property
    def capability_text(self) -> str:
        """The compute capability in NVIDIA's notation."""
        return ".".join(map(str, self.capability))


class Libraries(BaseModel):
    """The facts that ``probe`` prints."""

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str] = Field(default_factory=dict)
    errors: dict[str, str] = Field(default_factory=dict)
    """Why a library cannot be imported."""
    cuda: str | None = None
    """The CUDA version that torch was built for; None for a CPU build."""
    architectures: tuple[str, ...] = ()
    """Architectures that torch has kernels for, such as ``sm_90``."""
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    attention: str = ""
    """The chosen attention kernel, if it was measured."""
    attention_lines: tuple[str, ...] = ()
    running: str = ""
    """The step at which the process exited prematurely."""

    @property
    def has_torch(self) -> bool:
        return "torch" in self.versions


@dataclass(frozen=True)
class Attention:
    """The shape for which an attention kernel is chosen, and the GPU."""

    gpu: int
    heads: int = 48
    head_dim: int = 128
    num_tokens: int = 4096 + 512
    """The defaults are those of FLUX.2 [dev] at 1024x1024."""
    dtype: str = "bfloat16"


def read_libraries(host: Host, attention: Attention | None = None) -> Libraries:
    """Run ``probe`` and parse its output, even if it crashed or timed out."""
    question = json.dumps(None if attention is None else vars(attention))
    packages = str(Path(__file__).parents[2])
    output = host.run(sys.executable, "-c", PROBE, packages, question, timeout_s=host.import_timeout_s)
    facts = _last_facts(output.stdout)
    if output.status == 0 and not facts.running:
        return facts
    reason = _describe_exit(output, host)
    errors = facts.errors
    if facts.running in IMPORTS:
        errors = errors | {facts.running: f"importing it {reason}"}
    elif not facts.versions:
        errors = errors | {"torch": f"the process that imports it {reason}"}
    gpu_error = facts.gpu_error or (f"listing them {reason}" if facts.running == "the GPUs" else "")
    lines = (*facts.attention_lines, *([f"the measurement {reason}"] if facts.running.startswith("the att") else []))
    return facts.model_copy(update={"errors": errors, "gpu_error": gpu_error, "attention_lines": lines})


def _last_facts(printed: str) -> Libraries:
    """Parse the last complete line of facts; libraries may have printed other lines."""
    for line in reversed(printed.splitlines()):
        if line.startswith('{"versions"'):
            try:
                return Libraries.model_validate_json(line)
            except ValidationError:
                continue
    return Libraries()


def _describe_exit(output: Output, host: Host) -> str:
    if output.status is None:
        return f"took longer than {host.import_timeout_s:g} s"
    last = one_line((output.stderr.strip().splitlines() or [""])[-1])
    how = f"by signal {-output.status}" if output.status < 0 else f"with status {output.status}"
    return f"ended the process {how}" + (f": {last}" if last else "")


def check_python() -> Iterator[Check]:
    yield ok("python", f"{platform.python_version()} ({platform.python_implementation()})")


def check_packages(services: tuple[Service, ...]) -> Iterator[Check]:
    """Check whether this package and the requirements of the services' extras are installed."""
    try:
        required = _requirements(requires(PROJECT) or [], {EXTRAS[service] for service in services})
    except PackageNotFoundError:
        yield failed("packages", f"{PROJECT} is not installed, and the services need its version", INSTALL)
        return
    missing = sorted(name for name in required if not _is_installed(name))
    if missing:
        yield failed("packages", f"not installed: {', '.join(missing)}", INSTALL)
    else:
        yield ok("packages", f"{PROJECT} {version(PROJECT)} and its {len(required)} required packages")


def _requirements(lines: list[str], extras: set[str]) -> set[str]:
    """Return the names of the packages that are required in any case or by one of ``extras``."""
    names = set()
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == [\"']([\w-]+)[\"']", marker)
        name = re.match(r"[\w.-]+", requirement)
        if name and (extra is None or extra[1] in extras):
            names.add(name[0])
    return names


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def check_libraries(libraries: Libraries, services: tuple[Service, ...]) -> Iterator[Check]:
    """Check whether torch, transformers and diffusers can be imported."""
    for name, user in IMPORTS.items():
        if name == "diffusers" and Service.GENERATOR not in services:
            continue
        if name in libraries.versions:
            yield ok(name, f"{libraries.versions[name]}{_built_for(libraries) if name == 'torch' else ''}")
        elif name in libraries.errors:
            reason = one_line(libraries.errors[name])
            yield failed(name, f"{user} cannot import it: {reason}", f"reinstall it: {INSTALL}")
        else:
            yield skipped(name, "not imported, since torch cannot be imported")


def _built_for(libraries: Libraries) -> str:
    return f", built for CUDA {libraries.cuda}" if libraries.cuda else ", built for the CPU only"
