"""Reads the headers of safetensors files and checks that the files are complete, without loading weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 10**6
"""The limit of the safetensors format."""
LFS_POINTER = b"version https://git-lfs"
INDEX_SUFFIX = ".safetensors.index.json"


class BrokenFile(Exception):
    """A file is missing or invalid; the message names it and says why."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one part of a model."""

    num_bytes: int
    """Total size of the files."""
    num_files: int
    largest_bytes: int
    """Size of the largest file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors by name."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        BrokenFile: the file is missing, unreadable, or not a JSON object.
    """
    if not file.exists():
        raise BrokenFile(f"{file.name} is missing")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenFile(f"{file.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{file.name} is not JSON") from error
    if not isinstance(data, dict):
        raise BrokenFile(f"{file.name} is not a JSON object")
    return data


def read_weights(folder: Path, stem: str) -> Weights:
    """Read the headers of ``STEM.safetensors``, or of the shards in ``STEM.safetensors.index.json``.

    Raises:
        BrokenFile: a file is missing, truncated or invalid, or lacks tensors that the index assigns to it.
    """
    index = folder / f"{stem}{INDEX_SUFFIX}"
    if not index.exists():
        return _join({folder / f"{stem}.safetensors": None})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise BrokenFile(f"{index.name} has no weight_map")
    shards: dict[Path, set[str] | None] = {
        folder / name: {tensor for tensor, shard in weight_map.items() if shard == name}
        for name in sorted(set(weight_map.values()))
    }
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise BrokenFile(f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
    return _join(shards)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in a safetensors file, by name.

    Raises:
        BrokenFile: the file is missing or invalid, or its size does not match its header.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            begin = opened.read(len(LFS_POINTER))
            if begin == LFS_POINTER:
                raise BrokenFile(f"{file.name} is a Git LFS pointer, not the weights")
            length = int.from_bytes(begin[:8], "little")
            if size < 10 or length > MAX_HEADER_BYTES:
                raise BrokenFile(f"{file.name} is {'empty' if size == 0 else 'not a safetensors file'}")
            opened.seek(8)
            header = opened.read(length)
    except FileNotFoundError as error:
        raise BrokenFile(f"{file.name} is missing") from error
    except OSError as error:
        raise BrokenFile(f"{file.name} cannot be read: {error.strerror}") from error
    shapes, data_bytes = _parse(file, header, is_whole=len(header) == length)
    expected = 8 + length + data_bytes
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise BrokenFile(f"{file.name} is {state}: it has {size} bytes, its header says {expected}")
    return shapes


def _parse(file: Path, header: bytes, *, is_whole: bool) -> tuple[dict[str, tuple[int, ...]], int]:
    """Parse the shapes, and the number of bytes that follow the header."""
    if not is_whole:
        raise BrokenFile(f"{file.name} is truncated within its header")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BrokenFile(f"{file.name} does not have a valid safetensors header") from error
    return shapes, max(ends, default=0)


def _join(files: Mapping[Path, set[str] | None]) -> Weights:
    """Read all ``files``. The values are the tensors that a file must contain, if known."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, expected in files.items():
        file_shapes = read_shapes(file)
        missing = sorted(expected - file_shapes.keys()) if expected else []
        if missing:
            raise BrokenFile(f"{file.name} lacks {len(missing)} tensors of the index: {missing[0]}, ...")
        shapes |= file_shapes
    sizes = [file.stat().st_size for file in files]
    return Weights(sum(sizes), len(sizes), max(sizes), shapes)
