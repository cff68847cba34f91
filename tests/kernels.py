"""PyTorch's attention, replaced by one whose kernels may give NaN for rows without a visible key.

It chooses among kernels as PyTorch does, by the flags of the process, and computes the same with each of them.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch.backends import cuda as flags

Kernel = Literal["cudnn", "flash", "mem_efficient", "math"]
exact_attention = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def kept_flags() -> Iterator[None]:
    """Restore the allowed kernels after the block."""
    before = flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled()
    tag = torch.compiler.config.cache_key_tag
    try:
        yield
    finally:
        flags.enable_cudnn_sdp(before[0])
        flags.enable_flash_sdp(before[1])
        flags.enable_mem_efficient_sdp(before[2])
        torch.compiler.config.cache_key_tag = tag
        torch.compiler.reset()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # as PyTorch does: a graph keeps its kernel
def chosen() -> Kernel:
    """The kernel that runs now."""
    if flags.cudnn_sdp_enabled():
        return "cudnn"
    if flags.flash_sdp_enabled():
        return "flash"
    if flags.mem_efficient_sdp_enabled():
        return "mem_efficient"
    assert flags.math_sdp_enabled()
    return "math"


@contextmanager
def broken_kernels(broken: Collection[Kernel], *, only_compiled: bool = False) -> Iterator[None]:
    """Within the block the ``broken`` kernels give NaN for fully masked rows; with ``only_compiled`` restricts it."""

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor, **more: Any
    ) -> torch.Tensor:
        output = exact_attention(query, key, value, attn_mask, **more)
        if chosen() not in broken or (only_compiled and not torch.compiler.is_compiling()):
            return output
        return output.masked_fill(~attn_mask.any(dim=-1, keepdim=True), float("nan"))

    with kept_flags(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        yield
