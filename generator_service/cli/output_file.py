"""Output files: checked before the work, and replaced atomically after it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def output_file(file: Path, num_bytes: int = 0) -> Iterator[Callable[[bytes], None]]:
    """Check that ``file`` can be written, and yield a function that writes it.

    The file is complete or, if the block fails, as it was before.

    Args:
        file: the file to create or replace.
        num_bytes: reserved on the disk, so that a full disk is an error now and not after the work.

    Raises:
        OSError: the file cannot be written; the message says why.
    """
    with writing_errors(file):
        is_folder = file.is_dir()
    if is_folder:
        raise OSError(f"{file} is a folder; give the name of a file")
    partial = file.with_name(f".{file.name}.partial")
    try:
        with writing_errors(file), partial.open("wb") as opened:
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, num_bytes)

        def write(data: bytes) -> None:
            with writing_errors(file):
                with partial.open("r+b") as opened:  # keeps the reserved space until the data is there
                    opened.write(data)
                    opened.truncate()
                    opened.flush()
                    os.fsync(opened.fileno())
                partial.replace(file)

        yield write
    finally:
        with suppress(OSError):
            partial.unlink()


def check_writable(file: Path) -> None:
    """Raise ``OSError`` if ``file`` cannot be written."""
    with output_file(file):
        pass


@contextmanager
def writing_errors(file: Path) -> Iterator[None]:
    """Turn errors of the system into one line that names ``file`` and the reason."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror}") from error
