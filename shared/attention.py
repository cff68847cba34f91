"""PyTorch's attention kernels: a text encoder uses those that give finite numbers for padding.

A padding token may attend to nothing. For such a row PyTorch promises 0, but a kernel that divides by the sum of its
weights gives NaN, and from the next layer on the prompt's own tokens are NaN too: 0 times NaN is NaN. Which kernel runs
depends on the GPU, the library's version and the shape, so the kernels are tried, and those that fail are ruled out.

They are ruled out by PyTorch's flags, which hold for the process: on whichever thread serves, and for graphs that are
compiled later. The context manager ``torch.nn.attention.sdpa_kernel`` sets the same flags and puts them back, so it
would have to be around every forward pass, and would change the flags under other threads.

A compiled graph keeps the kernel that was chosen when it was compiled, and PyTorch's caches of compiled code, also
those on disk, do not know of the flags. So together with the flags, compiled code is forgotten and the key changed.
"""

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch.backends import cuda as flags

from shared.errors import ModelRefused

Attention = Literal["any", "without_cudnn", "math"]
"""The kernels that PyTorch may choose from: all; all but cuDNN's; only the one that is made of matrix products."""
RULED_OUT: MappingProxyType[Attention, tuple[Callable[[bool], None], ...]] = MappingProxyType(
    {
        "any": (),
        "without_cudnn": (flags.enable_cudnn_sdp,),
        "math": (flags.enable_cudnn_sdp, flags.enable_flash_sdp, flags.enable_mem_efficient_sdp),
    }
)
"""By their switches. The order is that in which they are tried: the later, the slower."""
logger = logging.getLogger("flux2")
T = TypeVar("T")


class NonFiniteStates(ModelRefused):
    """A text encoder gives hidden states that are not finite numbers."""

    def __init__(self) -> None:
        super().__init__(
            "the text encoder's hidden states are not finite numbers, with any of PyTorch's attention kernels:"
            " its weights are damaged, or do not suit the dtype"
        )


def check_finite(states: torch.Tensor) -> torch.Tensor:
    """``states``; raises ``NonFiniteStates`` if one of them is infinite or not a number."""
    if not bool(torch.isfinite(states).all()):
        raise NonFiniteStates
    return states


def run_finite(work: Callable[[], T], attention: Attention = "any") -> tuple[T, Attention]:
    """Do ``work``, with fewer kernels each time that it raises ``NonFiniteStates``.

    Args:
        work: what runs attention, and checks what comes out.
        attention: the kernels that are allowed already.

    Returns:
        What ``work`` returned, and the kernels with which it did.

    Raises:
        NonFiniteStates: with the last one left, too.
    """
    allowed: list[Any] = list(RULED_OUT)
    for name in allowed[allowed.index(attention) :]:
        if name != attention:
            _rule_out(name)
        try:
            result = work()
        except NonFiniteStates:
            continue
        if name != attention:
            logger.warning("an attention kernel gives NaN for padding: kernels are restricted to %r", name)
        return result, name
    raise NonFiniteStates


def _rule_out(attention: Attention) -> None:
    """Rule out kernels for every thread of this process, and for all that is compiled from now on."""
    for enable in RULED_OUT[attention]:
        enable(False)
    torch.compiler.reset()
    torch.compiler.config.cache_key_tag += f" attention {attention}"
