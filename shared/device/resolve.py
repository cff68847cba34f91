"""Resolves a device setting to a ``torch.device`` that has an index if it is a GPU.

Some PyTorch functions take ``cuda`` without an index as the thread's current GPU, others reject it
(``torch.cuda.set_device``). The index is therefore resolved once, when the setting is read.
"""

import re

import torch

from flux2_shared.errors import ModelRefused

_NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]*))?")


def resolve_device(name: str, setting: str) -> torch.device:
    """Resolve a device name.

    Args:
        name: ``cpu``, ``cuda`` (the first GPU), ``cuda:N``, or ``auto``: the first GPU if there is one, else the CPU.
        setting: the name of the setting, for error messages.

    Raises:
        ModelRefused: the device is not supported or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = _NAME.fullmatch(name)
    if match is None:
        raise ModelRefused(f"{setting}={name}: no such device is supported; set it to auto, cpu, cuda, or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        reason = f"PyTorch, built for {built_for}, can use no GPU here"
        raise ModelRefused(f"{setting}={name}: {reason}; see nvidia-smi, or set it to cpu")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        seen, usable = ("1 GPU", "cuda:0") if count == 1 else (f"{count} GPUs", f"cuda:0 to cuda:{count - 1}")
        raise ModelRefused(f"{setting}={name}: PyTorch sees {seen} here; set it to {usable}")
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Set a GPU as this thread's current device, for libraries that use the default; threads start with GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
