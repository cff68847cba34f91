"""Selects the fastest available attention backend by measurement."""

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import logging as diffusers_logging

CANDIDATES = {"cuda": ("native", "_native_cudnn", "_native_flash", "_flash_3"), "cpu": ("native",)}
"""Diffusers' names of exact backends: PyTorch's default, two of its kernels, and FlashAttention 3."""
MAX_TIME_RATIO = 0.97
"""Another backend replaces PyTorch's default only if its time is at most this share."""
RUNS = 5
TOLERANCE = 0.02
"""Largest relative error compared to PyTorch's default; rounding to bfloat16 gives about 0.005."""
logger = logging.getLogger("flux2")


def fastest_attention(
    transformer: Any, num_tokens: int, device: torch.device, candidates: Sequence[str] | None = None
) -> str:
    """Return the fastest backend for an attention of ``transformer`` over ``num_tokens``.

    Backends that fail, or whose result differs from PyTorch's default, are skipped.
    """
    config = transformer.config
    shape = (1, num_tokens, config.num_attention_heads, config.attention_head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=transformer.dtype) for _ in range(3))
    expected = dispatch_attention_fn(query, key, value, backend="native").float()
    seconds: dict[str, float] = {}
    for backend in candidates or CANDIDATES.get(device.type, ("native",)):
        try:
            output = dispatch_attention_fn(query, key, value, backend=backend).float()
            if (output - expected).norm() <= TOLERANCE * expected.norm():
                seconds[backend] = _seconds(backend, (query, key, value), device)
        except Exception as error:  # noqa: BLE001 - each library raises other exceptions
            logger.debug("attention backend %s failed: %s", backend, error)
    timings = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    logger.info("attention over %d tokens: %s", num_tokens, timings)
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= MAX_TIME_RATIO * seconds.get("native", float("inf")) else "native"


def use_attention(transformer: Any, backend: str) -> None:
    """Set the attention backend of a transformer."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # diffusers warns that backends are experimental
    try:
        transformer.set_attention_backend(backend)
    finally:
        diffusers_logging.set_verbosity(level)


def _seconds(backend: str, tensors: Sequence[torch.Tensor], device: torch.device) -> float:
    """Return the median time of ``RUNS`` runs, in seconds."""
    seconds = []
    for _ in range(RUNS):
        _wait(device)
        began = time.perf_counter()
        dispatch_attention_fn(*tensors, backend=backend)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
