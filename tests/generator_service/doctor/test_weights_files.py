"""Whether a safetensors file is complete, by its header."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from generator_service.doctor.weights_files import BrokenFile, read_json, read_shapes, read_weights
from tests.generator_service.doctor.hosts import write_safetensors, write_shards

SHAPES = {"first": (4, 8), "second": (3,), "scalar": ()}
STEM = "model"
FIRST_SHARD = "model-00001-of-00002.safetensors"
SECOND_SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_shapes_are_read_from_the_header(tmp_path: Path) -> None:
    """The shapes of a file that safetensors wrote are read from its header."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_shapes(tmp_path / "x.safetensors") == SHAPES


def cut(file: Path, num_bytes: int) -> None:
    """Truncate a file to its first bytes."""
    file.write_bytes(file.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: cut(file, file.stat().st_size - 1), "is truncated: it has"),
        (lambda file: cut(file, 40), "is truncated within its header"),
        (lambda file: cut(file, 0), "is empty"),
        (lambda file: cut(file, 4), "is not a safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is too long"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
        (lambda file: file.write_text("<html>an error page of a proxy</html>"), "is not a safetensors file"),
        (lambda file: file.write_bytes((4).to_bytes(8, "little") + b"nope"), "not have a valid safetensors header"),
        (lambda file: file.write_bytes((6).to_bytes(8, "little") + b'{"a":1'), "not have a valid safetensors header"),
        (lambda file: file.write_bytes((7).to_bytes(8, "little") + b'{"a":1}'), "not have a valid safetensors header"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.unlink() or file.mkdir(), "cannot be read"),
        (lambda file: file.unlink() or file.symlink_to("gone"), "is missing"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """Every kind of damage raises ``BrokenFile`` with the file's name and the problem."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, SHAPES)
    damage(file)
    with pytest.raises(BrokenFile, match=f"x.safetensors.*{message}"):
        read_shapes(file)


def test_shards_are_one_component(tmp_path: Path) -> None:
    """The shards of an index are read as one component."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    weights = read_weights(tmp_path, STEM)
    sizes = [(tmp_path / name).stat().st_size for name in (FIRST_SHARD, SECOND_SHARD)]
    assert weights.shapes == SHAPES
    assert (weights.num_files, weights.num_bytes, weights.largest_bytes) == (2, sum(sizes), max(sizes))


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    """A shard that the index names and that is absent is reported."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    (tmp_path / SECOND_SHARD).unlink()
    with pytest.raises(BrokenFile, match=f"1 of 2 shards are missing: {SECOND_SHARD}"):
        read_weights(tmp_path, STEM)


def test_a_truncated_shard_is_reported(tmp_path: Path) -> None:
    """A truncated shard is reported."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    cut(tmp_path / SECOND_SHARD, (tmp_path / SECOND_SHARD).stat().st_size - 1)
    with pytest.raises(BrokenFile, match=f"{SECOND_SHARD} is truncated"):
        read_weights(tmp_path, STEM)


def test_a_shard_of_another_model_is_reported(tmp_path: Path) -> None:
    """A shard without the tensors that the index places in it is reported."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    write_safetensors(tmp_path / SECOND_SHARD, {"other": (1,)})
    with pytest.raises(BrokenFile, match=f"{SECOND_SHARD} lacks 1 tensors of the index: second"):
        read_weights(tmp_path, STEM)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_invalid_index_is_reported(tmp_path: Path, index: str) -> None:
    """An index that cannot be parsed is reported."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    (tmp_path / INDEX).write_bytes(index.encode(errors="surrogateescape"))
    with pytest.raises(BrokenFile, match=INDEX):
        read_weights(tmp_path, STEM)


def test_weights_without_index_are_one_file(tmp_path: Path) -> None:
    """Shards without their index are reported as a missing file."""
    write_shards(tmp_path, STEM, SHAPES, 2)
    (tmp_path / INDEX).unlink()
    with pytest.raises(BrokenFile, match=r"model.safetensors is missing"):
        read_weights(tmp_path, STEM)
    write_safetensors(tmp_path / "model.safetensors", SHAPES)
    assert read_weights(tmp_path, STEM).num_files == 1


def test_json_must_be_an_object(tmp_path: Path) -> None:
    """A JSON file that is absent, unreadable or not an object is reported."""
    file = tmp_path / "config.json"
    for content, message in (
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
    ):
        file.write_bytes(content)
        with pytest.raises(BrokenFile, match=f"config.json {message}"):
            read_json(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(BrokenFile, match=r"config.json cannot be read"):
        read_json(file)
    file.rmdir()
    with pytest.raises(BrokenFile, match=r"config.json is missing"):
        read_json(file)
    file.write_text(json.dumps({"a": 1}))
    assert read_json(file) == {"a": 1}
