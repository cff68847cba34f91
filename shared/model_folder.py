"""Where a model's files are, whether they may be loaded, and what its folder says of itself.

A model is a diffusers pipeline folder: on disk, or on the hub at a revision. The demo model and FLUX.2 [dev] differ
only in what their folders contain. Nothing here loads weights.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from shared.errors import ModelRefused

UNSAFE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py"}
"""Weights that unpickle, and code."""
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Of a part."""
FILES_BESIDE_PARTS = ("model_index.json", "text_encoder/config.json", "chat_template.*", "processor/chat_template.*")
"""Small ones that are wanted whatever the parts: what describes the pipeline, and where a chat template may be."""
FINGERPRINT_BYTES = 2**20
"""Files up to this size enter a folder's fingerprint whole, larger ones by name, size, and evenly spread blocks."""
NUM_BLOCKS = 16
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, SafetensorError)
"""What the libraries raise for files that are missing or broken, or do not fit the configuration."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked model on this machine's disk."""

    name: str
    """The hub id, or the folder's own name."""
    revision: str
    """The hub commit, or ``local``."""
    path: Path

    def num_bytes(self, *parts: str) -> int:
        """The size of the weights of ``parts`` on disk."""
        return sum(file.stat().st_size for part in parts for file in (self.path / part).glob("*.safetensors"))

    def fingerprint(self, part: str) -> str:
        """A short hash of what ``part`` (``transformer``, ``text_encoder``, ...) consists of."""
        digest = hashlib.sha256()
        for file in sorted((self.path / part).rglob("*")):
            if file.is_file():
                size = file.stat().st_size
                digest.update(f"{file.relative_to(self.path)}:{size}\n".encode())
                for block in _blocks(file, size):
                    digest.update(block)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PromptFormat:
    """How a model's prompts become embeddings. The defaults are FLUX.2 [dev]'s, constants of its pipeline."""

    hidden_layers: tuple[int, ...] = (10, 20, 30)
    """Hidden states that are joined, counted from 0 = the token embeddings."""
    max_sequence_length: int = 512
    """Tokens of a prompt: longer ones are cut, shorter ones padded on the left."""
    system_message: str = (
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object"
        " relationships, object\nattribution and actions without speculation."
    )


def find_model(name: str, revision: str, parts: tuple[str, ...]) -> ModelFolder:
    """The folder ``name``, or the hub's model of that name with only ``parts`` of it fetched.

    Raises:
        ModelRefused: there is no such model, a part is missing, or a part holds pickles or code.
    """
    if Path(name).is_dir():
        folder = ModelFolder(Path(name).resolve().name, "local", Path(name).resolve())
    else:
        folder = _fetch(name, revision, parts)
    for part in parts:
        if not (folder.path / part).is_dir():
            raise ModelRefused(f"{name} has no folder {part!r}: not a diffusers pipeline of FLUX.2")
        refuse_unsafe_files(folder.path / part)
    return folder


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    """The whole of a small file, and enough of a large one to tell fine-tuned weights apart quickly."""
    with file.open("rb") as opened:
        if size <= FINGERPRINT_BYTES:
            yield opened.read()
            return
        length = FINGERPRINT_BYTES // NUM_BLOCKS
        for k in range(NUM_BLOCKS):
            opened.seek(k * (size - length) // (NUM_BLOCKS - 1))
            yield opened.read(length)


def refuse_unsafe_files(folder: Path) -> None:
    """Raise ``ModelRefused`` if anything below ``folder`` could run code when it is loaded."""
    unsafe = sorted(f.name for f in folder.rglob("*") if f.suffix.lower() in UNSAFE_SUFFIXES)
    if unsafe:
        raise ModelRefused(f"{folder.name}/{unsafe[0]} is refused: only safetensors weights and no code are loaded")


def read_prompt_format(folder: ModelFolder) -> PromptFormat:
    """What ``text_encoder/config.json`` says under ``flux2_prompt_format``, else FLUX.2 [dev]'s."""
    file = folder.path / "text_encoder" / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{file.name} of the text encoder cannot be read") from error
    told = dict(config.get("flux2_prompt_format", {}))
    if "hidden_layers" in told:
        told["hidden_layers"] = tuple(told["hidden_layers"])
    try:
        return PromptFormat(**told)
    except TypeError as error:
        raise ModelRefused("flux2_prompt_format of the text encoder has an unknown key") from error


def wanted_patterns(parts: tuple[str, ...]) -> list[str]:
    """Which files of a model on the hub are fetched for ``parts``."""
    return [*FILES_BESIDE_PARTS, *(f"{part}/{wanted}" for part in parts for wanted in WANTED_FILES)]


def _fetch(name: str, revision: str, parts: tuple[str, ...]) -> ModelFolder:
    try:
        # One file after the other: files that are there in full are kept, so an interruption costs one at most.
        path = Path(snapshot_download(name, revision=revision, allow_patterns=wanted_patterns(parts), max_workers=1))
    except RepositoryNotFoundError as error:
        raise ModelRefused(f"the hub has no model {name!r}, or its licence must be accepted with HF_TOKEN") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        told = f"{name!r} is no folder, not here, and not to be had from the hub now; flux2 weights fetches it ahead"
        raise ModelRefused(told) from error
    return ModelFolder(name, path.name, path)
