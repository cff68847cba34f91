"""The folders in which PyTorch and Triton keep what they compile, and whether they can.

PyTorch makes its folder when its compiler is imported, which diffusers does; where it may not, the import fails. So
nothing of PyTorch is imported here, and a service looks at the folders before it imports the rest of itself.
"""

import atexit
import getpass
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"
CONSEQUENCE = "everything is compiled again at each start"
logger = logging.getLogger("flux2")


def cache_folders() -> dict[str, Path]:
    """The folders that will be used, by the variables that name them. Triton's, if unset, is within the other one."""
    named = {
        variable: Path(os.environ[variable]).absolute() for variable in (INDUCTOR, TRITON) if variable in os.environ
    }
    return {INDUCTOR: default_folder()} | named


def default_folder() -> Path:
    """What PyTorch uses if ``TORCHINDUCTOR_CACHE_DIR`` is not set."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid_{os.getuid()}"
    user = re.sub(r'[\\/:*?"<>|]', "_", user)
    return Path(tempfile.gettempdir(), f"torchinductor_{user}")


def unwritable_caches() -> list[str]:
    """Those of the folders that cannot be written to."""
    return [str(folder) for folder in cache_folders().values() if not is_writable(folder)]


def is_writable(folder: Path) -> bool:
    """Whether a file can be made and filled in ``folder``, which is made itself if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".flux2-", buffering=0) as file:
            file.write(b"x")
    except OSError:
        return False
    return True


def warn_if_caches_unwritable() -> None:
    """A line in the log for each of them: called where something is about to be compiled."""
    for folder in unwritable_caches():
        logger.warning("%s cannot be written to: %s", folder, CONSEQUENCE)


def replace_unwritable_caches() -> None:
    """Use a temporary folder in place of each that cannot be written to, and say so.

    To be called before anything is imported that may import PyTorch's compiler.
    """
    for variable, folder in cache_folders().items():
        if is_writable(folder):
            continue
        other = tempfile.mkdtemp(prefix="flux2-compiled-")
        atexit.register(shutil.rmtree, other, ignore_errors=True)
        os.environ[variable] = other
        logger.warning("%s: %s cannot be written to: %s, for now in %s", variable, folder, CONSEQUENCE, other)
