"""Runs what may not fit into a device's memory, so that whatever comes after it finds the memory free again."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from shared.device_errors import is_device_lost, is_out_of_memory
from shared.errors import OutOfMemory

logger = logging.getLogger("flux2")
Result = TypeVar("Result")


def run_within_memory(run: Callable[[], Result], refusal: str, *, num_attempts: int = 1) -> Result:
    """``run``'s result.

    Args:
        run: starts from the beginning each time it is called.
        refusal: what the client reads if there is too little memory.
        num_attempts: how often it is called. A second attempt often succeeds: memory that the allocator had cached in
            pieces of other sizes has been given back by then.

    Raises:
        OutOfMemory: it did not fit, each time. Everything that the attempts had allocated is free.
    """
    for _ in range(num_attempts):
        try:
            return run()
        except Exception as error:
            if is_device_lost(error) or not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        # The error's traceback held the frames of the attempt, and they its tensors. It is gone only here, outside of
        # the except clause; for the same reason ``OutOfMemory`` is not raised from it.
        empty_caches()
        logger.warning("%s: %s", refusal, reason)
    raise OutOfMemory(refusal)


def empty_caches() -> None:
    """Give back the memory that nobody uses: what cycles of objects hold, and what the device's allocator keeps."""
    gc.collect()
    torch.cuda.empty_cache()
