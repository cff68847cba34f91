"""Selection of PyTorch attention kernels that give finite values for padding tokens.

A padding token may have no token to attend to. PyTorch specifies 0 for such a row, but a kernel that divides by the sum
of its weights gives NaN. From the next layer on the prompt's own tokens are NaN too, since 0 times NaN is NaN. Which
kernel runs depends on the GPU, the library version and the shape, so kernels are tested and those that fail are
disabled.

Kernels are disabled by PyTorch's flags, which are global: they hold for all threads, and for graphs that are compiled
later. The context manager ``torch.nn.attention.sdpa_kernel`` sets and restores the same flags, so it would be needed
around every forward pass and would change the flags under other threads.

A compiled graph keeps the kernel that was selected when it was compiled, and neither PyTorch's in-memory nor its
on-disk caches of compiled code depend on the flags. Compiled code is therefore reset and the cache key changed whenever
the flags change.
"""

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch.backends import cuda as flags

from flux2_shared.errors import ModelRefused

Attention = Literal["any", "without_cudnn", "math"]
"""The kernels that PyTorch may choose from: all, all but cuDNN's, or only the unfused one."""
DISABLED: MappingProxyType[Attention, tuple[Callable[[bool], None], ...]] = MappingProxyType(
    {
        "any": (),
        "without_cudnn": (flags.enable_cudnn_sdp,),
        "math": (flags.enable_cudnn_sdp, flags.enable_flash_sdp, flags.enable_mem_efficient_sdp),
    }
)
"""The flags to turn off, in the order in which the settings are tried: from fast to slow."""
logger = logging.getLogger("flux2")
T = TypeVar("T")


class NonFiniteStates(ModelRefused):
    """A text encoder's hidden states are infinite or NaN."""

    def __init__(self) -> None:
        super().__init__(
            "the text encoder's hidden states are not finite numbers, with any of PyTorch's attention kernels:"
            " its weights are damaged or not suited to the dtype"
        )


def check_finite(states: torch.Tensor) -> torch.Tensor:
    """Return ``states``; raise ``NonFiniteStates`` if a value is infinite or NaN."""
    if not bool(torch.isfinite(states).all()):
        raise NonFiniteStates
    return states


def run_finite(work: Callable[[], T], attention: Attention = "any") -> tuple[T, Attention]:
    """Call ``work``, allowing fewer kernels each time it raises ``NonFiniteStates``.

    Args:
        work: a function that runs attention and checks the result.
        attention: the kernels that are allowed at first.

    Returns:
        The result of ``work``, and the kernels that it ran with.

    Raises:
        NonFiniteStates: ``work`` raised it with every setting.
    """
    settings: list[Any] = list(DISABLED)
    for name in settings[settings.index(attention) :]:
        if name != attention:
            _disable_kernels(name)
        try:
            result = work()
        except NonFiniteStates:
            continue
        if name != attention:
            logger.warning("an attention kernel gives NaN for padding; restricting kernels to %r", name)
        return result, name
    raise NonFiniteStates


def _disable_kernels(attention: Attention) -> None:
    """Disable kernels for all threads of this process, and for everything that is compiled from now on."""
    for enable in DISABLED[attention]:
        enable(False)
    torch.compiler.reset()
    torch.compiler.config.cache_key_tag += f" attention {attention}"
