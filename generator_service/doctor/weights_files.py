"""Headers of safetensors files: which tensors a file holds, and whether it is complete. No weights are loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 10**6
"""The format's own limit."""
LFS_POINTER = b"version https://git-lfs"
INDEX_SUFFIX = ".safetensors.index.json"


class BrokenFile(Exception):
    """A file is not what it must be; the text names it and says why."""


@dataclass(frozen=True)
class Weights:
    """The weights of one part of a model."""

    num_bytes: int
    """Of its files."""
    num_files: int
    largest_bytes: int
    """Of one of its files."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the tensors' names."""


def read_json(file: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        BrokenFile: it is absent, unreadable, or something else.
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
    """The weights ``STEM.safetensors``, or the shards that ``STEM.safetensors.index.json`` names.

    Raises:
        BrokenFile: a file is absent, cut off or of another kind, or lacks tensors that the index places in it.
    """
    index = folder / f"{stem}{INDEX_SUFFIX}"
    if not index.exists():
        return _joined({folder / f"{stem}.safetensors": None})
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise BrokenFile(f"{index.name} has no weight_map")
    shards: dict[Path, set[str] | None] = {
        folder / name: {tensor for tensor, shard in places.items() if shard == name}
        for name in sorted(set(places.values()))
    }
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise BrokenFile(f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
    return _joined(shards)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name.

    Raises:
        BrokenFile: it is absent, or its size is not the one that its header says.
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
        what = "cut off" if size < expected else "too long"
        raise BrokenFile(f"{file.name} is {what}: it has {size} bytes, its header says {expected}")
    return shapes


def _parse(file: Path, header: bytes, *, is_whole: bool) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes, and the number of bytes that follow the header."""
    if not is_whole:
        raise BrokenFile(f"{file.name} is cut off within its header")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BrokenFile(f"{file.name} has a header that is not of the safetensors format") from error
    return shapes, max(ends, default=0)


def _joined(files: Mapping[Path, set[str] | None]) -> Weights:
    """All ``files`` as one; beside each are the tensors that must be in it, if that is known."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, expected in files.items():
        found = read_shapes(file)
        lacking = sorted(expected - found.keys()) if expected else []
        if lacking:
            raise BrokenFile(f"{file.name} lacks {len(lacking)} tensors that the index places in it: {lacking[0]}, ...")
        shapes |= found
    sizes = [file.stat().st_size for file in files]
    return Weights(sum(sizes), len(sizes), max(sizes), shapes)
