"""Adapter files by unusual names, and files that are damaged or fail to load."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from flux2_shared.errors import InvalidRequest
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.lora import Adapter
from tests.generator_service.lora_samples import OUT, SHAPES, latents_of, load, lora, request, structure, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the valid adapter ``ink``."""
    write(tmp_path / "ink.safetensors", lora(SHAPES))
    return tmp_path


@pytest.fixture(scope="module")
def plain(demo: Flux2Model) -> torch.Tensor:
    """The image without adapters."""
    return latents_of(demo)


def test_names_may_be_anything_that_a_file_can_be_called(folder: Path, plain: torch.Tensor) -> None:
    """Names with dots, names of attributes of PyTorch's classes, and empty-looking ones are names like others."""
    names = ["style-v1.2", "keys", "type", "items", "forward", "lora_A", "adapter_0", "a b", "ünï", "..", "weight", "-"]
    for name in names:
        os.link(folder / "ink.safetensors", folder / f"{name}.safetensors")
    model = load(folder, max_loras=3)
    ink = latents_of(model, Adapter("ink"))
    assert set(model.info.adapters) == {*names, "ink"}
    for name in names:
        assert torch.equal(latents_of(model, Adapter(name)), ink)
    assert torch.equal(latents_of(model), plain)


def test_what_is_not_a_file_has_no_name(folder: Path) -> None:
    """Folders, pipes, broken links, and files without a printable name are not adapters; links to files are."""
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "broken.safetensors").symlink_to(folder / "nothing")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "link.safetensors").symlink_to(folder / "ink.safetensors")
    for name in (b".safetensors", b"two\nlines.safetensors", b"\xff.safetensors"):
        (folder / os.fsdecode(name)).write_bytes(b"")
    model = load(folder)
    assert model.info.adapters == ("ink", "link")
    assert torch.equal(latents_of(model, Adapter("ink")), latents_of(model, Adapter("link")))


HEADERS = {
    "nested metadata": "[" * 100_000,
    "list": "[1]",
    "text encoder": '{"text_encoder.r": 4}',
    "long metadata": " " * 2**21,
}
CONTENTS = {"empty": b"", "large header": (2**63).to_bytes(8, "little") + b"{}", "text": b"version https://git-lfs"}


def damage(file: Path, how: str) -> None:
    """Make a file unusable."""
    data = file.read_bytes()
    file.unlink()
    if how in HEADERS:
        save_file(lora(SHAPES), file, metadata={"lora_adapter_metadata": HEADERS[how]})
    elif how in CONTENTS:
        file.write_bytes(CONTENTS[how])
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "pickle":
        torch.save({"a": torch.ones(2)}, file)
    elif how == "huge":
        with file.open("wb") as opened:
            opened.truncate(2**40)
    elif how in ("truncated", "longer"):
        file.write_bytes(data[:-1] if how == "truncated" else data + b"0")


@pytest.mark.parametrize(
    ("how", "reason"),
    {
        "missing": "its file no longer exists",
        "folder": "its file no longer exists",
        "pipe": "its file no longer exists",
        "truncated": "it is not a LoRA file",
        "longer": "it is not a LoRA file",
        "empty": "it is not a LoRA file",
        "text": "it is not a LoRA file",
        "pickle": "it is not a LoRA file",
        "large header": "it is not a LoRA file",
        "huge": "its file is larger than the transformer",
        "nested metadata": "its metadata is not valid JSON",
        "list": "its metadata is not that of a transformer",
        "text encoder": "its metadata is not that of a transformer",
        "long metadata": "its metadata is too long",
    }.items(),
)
def test_files_that_are_damaged_later_are_refused(folder: Path, plain: torch.Tensor, how: str, reason: str) -> None:
    """A file that is damaged after the start is refused; one that is loaded remains as it was."""
    os.link(folder / "ink.safetensors", folder / "other.safetensors")
    model = load(folder)
    other = latents_of(model, Adapter("other"))
    damage(folder / "ink.safetensors", how)
    with pytest.raises(InvalidRequest, match=f"^lora: 'ink' cannot be used with this model: {reason}"):
        latents_of(model, Adapter("ink"))
    assert torch.equal(latents_of(model), plain)
    write(folder / "other.safetensors", lora({OUT: (32, 160)}))
    assert torch.equal(latents_of(model, Adapter("other")), other)


def test_an_adapter_that_is_too_strong_is_refused(folder: Path, plain: torch.Tensor) -> None:
    """Finite weights and alphas with which the latents become infinite or NaN are refused, with and without a cache."""
    write(folder / "weights.safetensors", {key: tensor * 1e19 for key, tensor in lora(SHAPES).items()})
    write(folder / "alpha.safetensors", lora(SHAPES), {"r": 4, "lora_alpha": 1e38})
    model = load(folder)
    for params in (request(Adapter("weights")), request(Adapter("ink"), Adapter("alpha"))):
        for each in (params, replace(params, schedule=schedule_for("fast", 8))):
            with pytest.raises(InvalidRequest, match=f"the image with .*'{params.adapters[-1].name}' is not finite"):
                model.generate(each)
    assert torch.equal(latents_of(model), plain)


@pytest.mark.parametrize("stage", ["inject_adapter_in_model", "set_peft_model_state_dict"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_load_that_fails_half_way_leaves_no_trace(
    folder: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch, stage: str, loaded: bool
) -> None:
    """After an error in the middle of a load, the transformer has the layers and the configuration of before."""
    os.link(folder / "ink.safetensors", folder / "other.safetensors")
    model = load(folder)
    if loaded:
        latents_of(model, Adapter("other"))
    before, step = structure(model), getattr(peft, stage)

    def fail(*args: Any, **more: Any) -> Any:
        result = step(*args, **more)
        if "trial" not in (more.get("adapter_name"), *args[2:]):
            raise KeyError("an error of the library")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(peft, stage, fail)
        with pytest.raises(KeyError):
            latents_of(model, Adapter("ink"))
    assert structure(model) == before
    assert torch.equal(latents_of(model), plain)
    assert torch.equal(latents_of(model, Adapter("ink")), latents_of(model, Adapter("other")))
