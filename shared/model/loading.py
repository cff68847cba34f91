"""What may go wrong while weights are loaded, as errors that an operator can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flux2_shared.device.errors import is_device_lost, is_out_of_memory
from flux2_shared.errors import Flux2Error, ModelRefused, OutOfMemory
from flux2_shared.model.folder import LOADING_ERRORS


@contextmanager
def loading_errors(name: str, device: torch.device) -> Iterator[None]:
    """Translate what a library raises within the block.

    Args:
        name: what is loaded, for the text of the errors.
        device: where to.

    Raises:
        OutOfMemory: the weights do not fit.
        ModelRefused: a file is missing or broken.
    """
    try:
        yield
    except Flux2Error:
        raise
    except Exception as error:
        if is_device_lost(error):
            raise
        if is_out_of_memory(error):
            advice = "`flux2 doctor` shows what is needed and what is free"
            raise OutOfMemory(f"{name} does not fit into the memory of {device}: {advice}") from error
        if isinstance(error, LOADING_ERRORS):
            raise ModelRefused(f"{name} cannot be loaded: a file is missing or broken") from error
        raise
