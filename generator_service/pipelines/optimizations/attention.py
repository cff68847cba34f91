"""Which of the attention kernels that are here is the fastest for a picture."""

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import logging as diffusers_logging

CANDIDATES = {"cuda": ("native", "_native_cudnn", "_native_flash", "_flash_3"), "cpu": ("native",)}
"""Diffusers' names of exact kernels: PyTorch's own choice, two of its kernels by name, and FlashAttention 3."""
WORTH = 0.97
"""PyTorch's own choice is left for what takes at most this share of its time: it is the best tried."""
RUNS = 5
TOLERANCE = 0.02
"""Of the relative error against PyTorch's own choice: bfloat16 leaves about 0.005."""
logger = logging.getLogger("flux2")


def fastest_attention(
    transformer: Any, num_tokens: int, device: torch.device, candidates: Sequence[str] | None = None
) -> str:
    """The name of the fastest backend for one attention of ``transformer`` over ``num_tokens``, by measurement.

    One that does not run here, or whose result differs from that of PyTorch's own choice, is passed over.
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
        except Exception as error:  # noqa: BLE001 - each library refuses in its own way
            logger.debug("attention %s does not run here: %s", backend, error)
    told = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    logger.info("attention over %d tokens: %s", num_tokens, told)
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= WORTH * seconds.get("native", float("inf")) else "native"


def use_attention(transformer: Any, backend: str) -> None:
    """Have ``transformer`` use diffusers' attention ``backend``."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns that backends are experimental
    try:
        transformer.set_attention_backend(backend)
    finally:
        diffusers_logging.set_verbosity(level)


def _seconds(backend: str, tensors: Sequence[torch.Tensor], device: torch.device) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(RUNS):
        _wait(device)
        began = time.perf_counter()
        dispatch_attention_fn(*tensors, backend=backend)
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
