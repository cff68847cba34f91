"""Checks the configuration of PEFT that diffusers writes into the header of a LoRA file."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig

KEY = "lora_adapter_metadata"
PREFIX = "transformer."
MAX_CHARS = 2**20
MAX_PATTERNS = 512
"""Largest number of patterns; with more, Python's cache of regular expressions would not hold them."""
PATTERN = re.compile(r"\^?[\w.\-\\]*([*+]?[\w.\-\\]*)?\$?", re.ASCII)
"""Module names and simple regular expressions, with which no match takes long."""
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that change no other weights of the model."""
UNUSED = frozenset(
    [
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the weights' names say which
        *("fan_in_fan_out", "megatron_config", "megatron_core", "eva_config", "qalora_group_size"),
        *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"),  # for training
        "use_effective_conv2d",
    ]
)
"""Settings without an effect on images."""


class LoraRefused(Exception):
    """A LoRA file cannot be used. The message is for clients: it does not contain parts of the file."""


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite float32 number."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= torch.finfo(torch.float32).max


def is_rank(value: Any) -> bool:
    """Return whether ``value`` is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_flag(value: Any) -> bool:
    """Return whether ``value`` is a boolean."""
    return isinstance(value, bool)


def patterns_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check for a dictionary from patterns of module names to values."""

    def is_patterns(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MAX_PATTERNS
            and all(PATTERN.fullmatch(key) and is_valid(each) for key, each in value.items())
        )

    return is_patterns


COMMON = {"r": is_rank, "rank_pattern": patterns_of(is_rank), "alpha_pattern": patterns_of(is_number)}
LORA = COMMON | {"lora_alpha": is_number, "use_rslora": is_flag, "lora_bias": is_flag, "use_dora": is_flag}
LOKR = COMMON | {
    "alpha": is_number,
    "decompose_both": is_flag,
    "decompose_factor": lambda value: value == -1 or is_rank(value),
}
"""Settings that are applied, and what their values must be."""


def parse_metadata(header: Mapping[str, str], modules: Iterable[str], *, is_lokr: bool) -> dict[str, Any] | None:
    """Return the arguments of PEFT's configuration, or None if the header has none.

    Args:
        header: the file's metadata.
        modules: names of the modules that the file changes.
        is_lokr: whether the file is LoKr, not LoRA.

    Raises:
        LoraRefused: a setting is unknown, or has a value that is not applied.
    """
    text = header.get(KEY)
    if not text:
        return None
    if len(text) > MAX_CHARS:
        raise LoraRefused("its metadata is too long")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraRefused("its metadata is not valid JSON") from error
    if metadata is None:
        return None
    if not metadata or not isinstance(metadata, dict) or not all(key.startswith(PREFIX) for key in metadata):
        raise LoraRefused("its metadata is not that of a transformer")
    settings = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    checks, defaults = (LOKR, LoKrConfig()) if is_lokr else (LORA, LoraConfig())
    for name, value in settings.items():
        if not is_understood(name, value, checks, defaults):
            raise LoraRefused(f"its metadata has a value of {printable(name)} that is not supported")
    applied = {name: value for name, value in settings.items() if name in checks}
    return applied | {"target_modules": list(modules)}


def is_understood(name: str, value: Any, checks: Mapping[str, Callable[[Any], bool]], defaults: Any) -> bool:
    """Return whether a setting is applied as it is, or has no effect."""
    if name in checks:
        return checks[name](value)
    if name == "init_lora_weights":
        return value in INITIALIZATIONS
    return name in UNUSED or bool(hasattr(defaults, name) and value == getattr(defaults, name))


def printable(name: str) -> str:
    """Return the name of a setting, unless it could be anything."""
    return name if re.fullmatch(r"\w{1,40}", name, re.ASCII) else "an unknown setting"
