"""Finds and checks a model's files, and reads its configuration. Does not load weights.

A model is a diffusers pipeline folder: on disk, or on the hub at a revision. The demo model and FLUX.2 [dev] differ
only in the contents of their folders.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from flux2_shared.errors import ModelRefused

UNSAFE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py"}
"""Pickled weights, and code."""
SUBFOLDER_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Files to download from each required subfolder."""
COMMON_FILES = ("model_index.json", "text_encoder/config.json", "chat_template.*", "processor/chat_template.*")
"""Small files to download for every service: the pipeline's description, and possible chat templates."""
FINGERPRINT_BYTES = 2**20
"""Files up to this size are hashed entirely, larger ones by name, size and ``NUM_BLOCKS`` evenly spaced blocks."""
NUM_BLOCKS = 16
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, SafetensorError)
"""What the libraries raise for files that are missing or broken, or do not fit the configuration."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked model on disk."""

    name: str
    """The hub id, or the folder's name."""
    revision: str
    """The hub commit, or ``local``."""
    path: Path

    def num_bytes(self, *parts: str) -> int:
        """Return the size of the safetensors files in the subfolders ``parts``."""
        return sum(file.stat().st_size for part in parts for file in (self.path / part).glob("*.safetensors"))

    def fingerprint(self, part: str) -> str:
        """Return a short hash of the files in the subfolder ``part``, such as ``transformer``."""
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
    """How prompts are formatted and encoded. The defaults are those of FLUX.2 [dev], constants of its pipeline."""

    hidden_layers: tuple[int, ...] = (10, 20, 30)
    """Hidden states that are concatenated; 0 is the token embeddings."""
    max_sequence_length: int = 512
    """Tokens of a prompt: longer prompts are truncated, shorter ones padded on the left."""
    system_message: str = (
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object"
        " relationships, object\nattribution and actions without speculation."
    )


def find_model(name: str, revision: str, parts: tuple[str, ...]) -> ModelFolder:
    """Find a model: a local folder, or a model on the hub of which only the subfolders ``parts`` are downloaded.

    Raises:
        ModelRefused: the model cannot be found or downloaded, a subfolder is missing, or one holds pickles or code.
    """
    if Path(name).is_dir():
        folder = ModelFolder(Path(name).resolve().name, "local", Path(name).resolve())
    else:
        folder = _download(name, revision, parts)
    for part in parts:
        if not (folder.path / part).is_dir():
            raise ModelRefused(f"{name} has no folder {part!r}: it is not a diffusers pipeline of FLUX.2")
        refuse_unsafe_files(folder.path / part)
    return folder


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    """Yield all of a small file, and enough of a large one to distinguish fine-tuned weights quickly."""
    with file.open("rb") as opened:
        if size <= FINGERPRINT_BYTES:
            yield opened.read()
            return
        length = FINGERPRINT_BYTES // NUM_BLOCKS
        for k in range(NUM_BLOCKS):
            opened.seek(k * (size - length) // (NUM_BLOCKS - 1))
            yield opened.read(length)


def refuse_unsafe_files(folder: Path) -> None:
    """Raise ``ModelRefused`` if a file below ``folder`` could run code when it is loaded."""
    unsafe = sorted(f.name for f in folder.rglob("*") if f.suffix.lower() in UNSAFE_SUFFIXES)
    if unsafe:
        raise ModelRefused(f"{folder.name}/{unsafe[0]} is refused: only safetensors weights are loaded, and no code")


def read_prompt_format(folder: ModelFolder) -> PromptFormat:
    """Read ``flux2_prompt_format`` from ``text_encoder/config.json``; missing keys default to FLUX.2 [dev]'s values.

    Raises:
        ModelRefused: the file cannot be read, or has an unknown key.
    """
    file = folder.path / "text_encoder" / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{file.name} of the text encoder cannot be read") from error
    values = dict(config.get("flux2_prompt_format", {}))
    if "hidden_layers" in values:
        values["hidden_layers"] = tuple(values["hidden_layers"])
    try:
        return PromptFormat(**values)
    except TypeError as error:
        raise ModelRefused("flux2_prompt_format of the text encoder has an unknown key") from error


def download_patterns(parts: tuple[str, ...]) -> list[str]:
    """Return the patterns of the files that are downloaded for the subfolders ``parts``."""
    return [*COMMON_FILES, *(f"{part}/{pattern}" for part in parts for pattern in SUBFOLDER_FILES)]


def _download(name: str, revision: str, parts: tuple[str, ...]) -> ModelFolder:
    try:
        # One file at a time: complete files are kept, so an interruption loses at most one.
        path = Path(snapshot_download(name, revision=revision, allow_patterns=download_patterns(parts), max_workers=1))
    except RepositoryNotFoundError as error:
        raise ModelRefused(f"the hub has no model {name!r}, or its licence must be accepted with HF_TOKEN") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ModelRefused(
            f"{name!r} is neither a local folder nor cached, and could not be downloaded; run flux2 weights first"
        ) from error
    return ModelFolder(name, path.name, path)
