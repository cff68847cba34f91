"""A lock per GPU, so that two services on one GPU do not compile and benchmark at the same time.

Measurements during startup, such as which attention kernel is fastest, would be wrong while another service keeps the
GPU busy. The lock is a file next to the compiled code, in a folder that containers on one host share. The operating
system releases it when its process ends for any reason.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import torch
from filelock import FileLock, Timeout

from flux2_shared.report import Report, ignore

logger = logging.getLogger("flux2")


def lock_file(device: torch.device) -> Path:
    """Return the lock file of a GPU: the same for all processes, whatever index the GPU has in them."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or gettempdir())
    return folder / f"flux2-gpu-{torch.cuda.get_device_properties(device).uuid}.lock"


@contextmanager
def alone_on_gpu(device: torch.device, report: Report = ignore) -> Iterator[None]:
    """Hold the lock of a GPU within the block, so that no other service on this host is in such a block.

    There is no lock for a CPU, because nothing is benchmarked there. If the lock file cannot be written, the block runs
    without it.

    Args:
        device: the service's device.
        report: called if the block has to wait.
    """
    if device.type != "cuda":
        yield
        return
    lock = FileLock(lock_file(device))
    try:
        _acquire(lock, report)
    except OSError as error:
        logger.warning(
            "cannot lock %s (%s): services on one GPU may disturb each other's startup", lock.lock_file, error
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
