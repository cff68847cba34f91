"""The cache folders of PyTorch's and Triton's compilers, and a fallback if they cannot be written to.

PyTorch creates its folder when its compiler is imported, which importing diffusers does. If it cannot, the import
fails. This module therefore does not import PyTorch, and a service checks the folders before it imports anything else.
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
    """Return the cache folders by environment variable. If Triton's is not set, it lies within PyTorch's."""
    named = {
        variable: Path(os.environ[variable]).absolute() for variable in (INDUCTOR, TRITON) if variable in os.environ
    }
    return {INDUCTOR: default_folder()} | named


def default_folder() -> Path:
    """Return the folder that PyTorch uses if ``TORCHINDUCTOR_CACHE_DIR`` is not set."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user in a container may have no name
        user = f"uid_{os.getuid()}"
    user = re.sub(r'[\\/:*?"<>|]', "_", user)
    return Path(tempfile.gettempdir(), f"torchinductor_{user}")


def unwritable_caches() -> list[str]:
    return [str(folder) for folder in cache_folders().values() if not is_writable(folder)]


def is_writable(folder: Path) -> bool:
    """Return whether files can be written in ``folder``, which is created if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".flux2-", buffering=0) as file:
            file.write(b"x")
    except OSError:
        return False
    return True


def warn_if_caches_unwritable() -> None:
    """Log a warning for each cache folder that cannot be written to. Call it before compiling."""
    for folder in unwritable_caches():
        logger.warning("%s cannot be written to: %s", folder, CONSEQUENCE)


def replace_unwritable_caches() -> None:
    """Replace each cache folder that cannot be written to with a temporary one, and log a warning.

    Call it before importing anything that may import PyTorch's compiler.
    """
    for variable, folder in cache_folders().items():
        if is_writable(folder):
            continue
        temporary = tempfile.mkdtemp(prefix="flux2-compiled-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        os.environ[variable] = temporary
        logger.warning("%s: %s cannot be written to: %s; using %s instead", variable, folder, CONSEQUENCE, temporary)
