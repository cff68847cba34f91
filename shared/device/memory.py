"""Runs work that may exceed the device's memory, and frees the memory if it does."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from flux2_shared.errors import OutOfMemory

logger = logging.getLogger("flux2")
Result = TypeVar("Result")


def run_within_memory(run: Callable[[], Result], refusal: str, *, num_attempts: int = 1) -> Result:
    """Call ``run`` and return its result.

    Args:
        run: starts over each time it is called.
        refusal: the message for the client if memory is insufficient.
        num_attempts: the most calls. A second attempt often succeeds because the allocator's cache, which may be
            fragmented, was emptied after the first.

    Raises:
        OutOfMemory: every attempt ran out of memory. Everything that the attempts had allocated is free.
    """
    for _ in range(num_attempts):
        try:
            return run()
        except Exception as error:
            if is_device_lost(error) or not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        # The error's traceback references the attempt's frames and their tensors. It is released only outside of the
        # except clause, and for the same reason ``OutOfMemory`` is not raised from it.
        empty_caches()
        logger.warning("%s: %s", refusal, reason)
    raise OutOfMemory(refusal)


def empty_caches() -> None:
    """Free unused memory: reference cycles, and the cache of the device's allocator."""
    gc.collect()
    torch.cuda.empty_cache()
