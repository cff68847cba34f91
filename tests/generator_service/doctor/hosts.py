"""Simulated hosts: programs on ``PATH``, files below another root, and the output of libraries."""

import json
import shutil
import textwrap
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from generator_service.doctor.check import Check
from generator_service.doctor.host import Host
from generator_service.doctor.libraries import Gpu, Libraries

GB = 10**9
H100_BYTES = 85 * GB
Shapes = Mapping[str, tuple[int, ...]]
ITEM_BYTES = {"BF16": 2, "F32": 4}
SMI = "GPU-{k}, 580.95.05, NVIDIA H100 80GB HBM3, 81559, {used}, Default, Enabled"


def gpu(index: int = 0, **more: Any) -> Gpu:
    """An unused H100, with the fields in ``more`` replaced."""
    facts = {"name": "NVIDIA H100 80GB HBM3", "capability": (9, 0), "total_bytes": H100_BYTES, "free_bytes": 84 * GB}
    return Gpu(index=index, uuid=f"GPU-{index}", **(facts | more))


def libraries(*gpus: Gpu, **more: Any) -> Libraries:
    """The libraries' facts on a host with these GPUs and torch for CUDA."""
    facts: dict[str, Any] = {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "diffusers": "0.42.1"},
        "cuda": "13.0",
        "architectures": ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
        "gpus": gpus,
    }
    return Libraries.model_validate(facts | more)


def described(tmp_path: Path, **environ: str) -> Host:
    """A host with an empty home, no programs, and an empty tree in place of ``/proc`` and ``/sys``."""
    for name in ("bin", "root", "home"):
        (tmp_path / name).mkdir(exist_ok=True)
    variables = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **environ}
    return Host(variables, tmp_path / "root", program_timeout_s=30)


def install(tmp_path: Path, name: str, script: str) -> None:
    """Put an executable shell script on the ``PATH`` of a ``described`` host."""
    file = tmp_path / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)


def install_nvidia_smi(tmp_path: Path, gpus: str, processes: str = "") -> None:
    """Install an ``nvidia-smi`` that prints these lines for both queries."""
    (tmp_path / "gpus.csv").write_text(gpus, encoding="utf-8")
    (tmp_path / "processes.csv").write_text(processes, encoding="utf-8")
    cat = shutil.which("cat")
    script = f"""
        case "$1" in
        --query-gpu=*) {cat} '{tmp_path}/gpus.csv' ;;
        --query-compute-apps=*) {cat} '{tmp_path}/processes.csv' ;;
        *) exit 9 ;;
        esac"""
    install(tmp_path, "nvidia-smi", textwrap.dedent(script))


def put(root: Path, name: str, text: str) -> None:
    """Write a file below ``root``, with its parent folders."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def install_packages(folder: Path, **sources: str) -> str:
    """Write Python packages with these sources; returns the folder for ``PYTHONPATH``."""
    for name, source in sources.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(textwrap.dedent(source), encoding="utf-8")
    return str(folder)


def torch_with(*gpus: Gpu) -> str:
    """The source of a package ``torch`` with these GPUs, which raises for any other index."""
    facts = [gpu_info.model_dump() for gpu_info in gpus]
    return f"""
        from types import SimpleNamespace

        __version__ = "2.13.0"
        GPUS = {facts!r}
        version = SimpleNamespace(cuda="13.0")

        def properties(index):
            gpu = GPUS[index]
            return SimpleNamespace(name=gpu["name"], uuid=gpu["uuid"], total_memory=gpu["total_bytes"],
                                   major=gpu["capability"][0], minor=gpu["capability"][1])

        cuda = SimpleNamespace(is_available=lambda: bool(GPUS), device_count=lambda: len(GPUS),
                               get_arch_list=lambda: ["sm_80", "sm_90"], get_device_properties=properties,
                               mem_get_info=lambda index: (GPUS[index]["free_bytes"], GPUS[index]["total_bytes"]))
        """


STUBS = {
    "transformers": "__version__ = '5.23.0'\nAutoTokenizer = MistralModel = object",
    "diffusers": "__version__ = '0.42.1'\nAutoencoderKLFlux2 = Flux2Pipeline = Flux2Transformer2DModel = object",
}
"""Sources of packages that can only be imported."""


def write_safetensors(file: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """Write a complete file with sparse data, so that it takes almost no disk space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def write_shards(folder: Path, stem: str, shapes: Shapes, num_shards: int) -> None:
    """Write the same tensors as several shards with their index."""
    names = list(shapes)
    files = {name: f"{stem}-{k % num_shards + 1:05}-of-{num_shards:05}.safetensors" for k, name in enumerate(names)}
    for shard in sorted(set(files.values())):
        write_safetensors(folder / shard, {name: shapes[name] for name in names if files[name] == shard})
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def by_name(checks: list[Check]) -> dict[str, Check]:
    """Checks by their names; if several have the same name, the last one."""
    return {check.name: check for check in checks}
