"""A lock for each GPU, so that two services on the same one do not compile and measure at the same time.

What a service measures at its start, such as which attention kernel is the fastest, would be wrong while another one
keeps the GPU busy. The lock is a file beside the compiled code, in a folder that containers on one host share; the
operating system releases it when its process ends, however it ends.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import torch
from filelock import FileLock, Timeout

from shared.report import Report, ignore

logger = logging.getLogger("flux2")


def lock_file(device: torch.device) -> Path:
    """The file that stands for the GPU ``device``: the same for each process, whatever index the GPU has there."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or gettempdir())
    return folder / f"flux2-gpu-{torch.cuda.get_device_properties(device).uuid}.lock"


@contextmanager
def alone_on_gpu(device: torch.device, report: Report = ignore) -> Iterator[None]:
    """Within the block no other service of this host is in such a block for the same GPU.

    A CPU needs none: nothing is chosen by measurement there. Where the file cannot be written, the block runs at once.

    Args:
        device: the one that the service uses.
        report: hears that the block has to wait.
    """
    if device.type != "cuda":
        yield
        return
    lock = FileLock(lock_file(device))
    try:
        _acquire(lock, report)
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): services on one GPU may disturb each other's start", lock.lock_file, error
        )
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, report: Report) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report("waiting for another service that warms up on this GPU")
        lock.acquire()
