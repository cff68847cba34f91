"""Checks of the model folder: its location, completeness and configuration. Does not use the network."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

from flux2_shared.errors import ModelRefused
from flux2_shared.model.folder import (
    ModelFolder,
    PromptFormat,
    download_patterns,
    read_prompt_format,
    refuse_unsafe_files,
)
from generator_service.doctor.check import Check, describe, failed, ok, warning
from generator_service.doctor.host import Host
from generator_service.doctor.weights_files import BrokenFile, Weights, read_json, read_weights

WEIGHT_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
}
KINDS = {
    "transformer": ("_class_name", "Flux2Transformer2DModel"),
    "vae": ("_class_name", "AutoencoderKLFlux2"),
    "text_encoder": ("model_type", "mistral3"),
}
VOCABULARIES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Model:
    """A model and the contents of its files. Missing and broken parts are in neither mapping."""

    name: str
    revision: str
    path: Path | None = None
    """None if the model is not on this machine."""
    is_incomplete: bool = False
    """Whether some of the files on the hub were not downloaded."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, Weights] = field(default_factory=dict)
    prompt_format: PromptFormat = field(default_factory=PromptFormat)

    @property
    def embedding_shape(self) -> tuple[int, int] | None:
        """Shape of the prompt embeddings that the transformer takes: tokens and width."""
        width = self.configs.get("transformer", {}).get("joint_attention_dim")
        return (self.prompt_format.max_sequence_length, width) if isinstance(width, int) else None

    @property
    def pixels_per_token(self) -> int:
        """The side of the image patch of one token, in pixels, computed as in ``Flux2Pipeline``."""
        channels = self.configs.get("vae", {}).get("block_out_channels")
        return 2 ** len(channels) if isinstance(channels, list) else 16


def hub_cache(host: Host) -> Path:
    """Return the folder in which huggingface_hub caches models."""
    environ = host.environ
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    return hub_home(host) / "hub"


def hub_home(host: Host) -> Path:
    """Return huggingface_hub's home folder, which also contains the token."""
    cache = Path(host.environ.get("XDG_CACHE_HOME") or host.home() / ".cache")
    return Path(host.environ.get("HF_HOME") or cache / "huggingface").expanduser()


def find(name: str, revision: str, parts: tuple[str, ...], host: Host) -> Model:
    """Find a model like ``flux2_shared.model.folder.find_model``, but without downloading anything.

    Raises:
        BrokenFile: the name is invalid, or the cache cannot be read.
    """
    if Path(name).is_dir():
        return Model(Path(name).resolve().name, "local", Path(name).resolve())
    try:
        path = snapshot_download(
            name,
            revision=revision,
            cache_dir=hub_cache(host),
            allow_patterns=download_patterns(parts),
            local_files_only=True,
        )
    except IncompleteSnapshotError as error:
        path = error.snapshot_path
        return Model(name, Path(path).name, Path(path), is_incomplete=True)
    except LocalEntryNotFoundError:
        return Model(name, revision)
    except (ValueError, OSError) as error:
        raise BrokenFile(f"{name} is neither a folder nor a model in the hub's cache: {describe(error)}") from error
    return Model(name, Path(path).name, Path(path))


def inspect(model: Model, parts: tuple[str, ...]) -> tuple[Model, dict[str, str]]:
    """Read the model's files; return the model with their contents, and the problem of each broken part."""
    configs: dict[str, Mapping[str, Any]] = {}
    weights: dict[str, Weights] = {}
    problems: dict[str, str] = {}
    assert model.path is not None
    for part in parts:
        try:
            configs[part] = _read_part(model.path / part)
            if part in WEIGHT_STEMS:
                weights[part] = read_weights(model.path / part, WEIGHT_STEMS[part])
        except (BrokenFile, ModelRefused) as error:
            problems[part] = str(error)
        except OSError as error:
            problems[part] = describe(error)
    prompt_format = _prompt_format(model, problems)
    inspected = replace(model, configs=configs, weights=weights, prompt_format=prompt_format)
    return inspected, _mismatch(inspected) | problems


def check_parts(model: Model, problems: Mapping[str, str], parts: tuple[str, ...], fix: str) -> Iterator[Check]:
    """Report each part of a present model, and all problems."""
    for part in dict.fromkeys((*parts, *problems)):
        if part in problems:
            yield failed(part, problems[part], fix)
        elif part in model.weights:
            weights = model.weights[part]
            files = "1 file" if weights.num_files == 1 else f"{weights.num_files} files"
            yield ok(part, f"{files}, {weights.num_bytes / 1e9:.2f} GB, sizes match the headers")
        else:
            yield ok(part, "complete")


def check_leftovers(model: Model, host: Host) -> Iterator[Check]:
    """Look for the files of interrupted downloads."""
    assert model.path is not None
    folder = model.path.parents[1] / "blobs" if model.revision != "local" else model.path
    sizes = [file.stat().st_size for file in folder.rglob("*.incomplete")]
    if sizes:
        command = f"find {folder} -name '*.incomplete' -delete"
        where = "docker compose run --rm weights " if host.is_our_image else ""
        detail = f"{len(sizes)} interrupted downloads in {folder}, {sum(sizes) / 1e9:.1f} GB"
        yield warning("downloads", detail, f"once the model is complete: {where}{command}")


def _read_part(folder: Path) -> Mapping[str, Any]:
    """Read the configuration of a part, and check its other small files.

    Raises:
        BrokenFile: a file is missing or broken, or the part is not FLUX.2's.
        ModelRefused: the folder holds pickles or code.
    """
    if not folder.is_dir():
        raise BrokenFile(f"the folder {folder.name} is missing")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise BrokenFile(f"the folder {folder.name} is not readable")
    refuse_unsafe_files(folder)
    config = read_json(folder / CONFIGS[folder.name])
    key, kind = KINDS.get(folder.name, ("", None))
    if config.get(key) != kind:
        raise BrokenFile(f"{CONFIGS[folder.name]} has {key} {config.get(key)!r}, FLUX.2 has {kind!r}")
    if folder.name == "tokenizer":
        _check_tokenizer(folder, config)
    return config


def _check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise BrokenFile(f"there is no vocabulary: {' or '.join(VOCABULARIES)}")
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json")
    if not config.get("chat_template") and not _has_chat_template(folder):
        raise BrokenFile("there is no chat template: chat_template.jinja or chat_template.json")


def _has_chat_template(folder: Path) -> bool:
    file = folder / "chat_template.json"
    return (folder / "chat_template.jinja").exists() or (file.exists() and bool(read_json(file).get("chat_template")))


def _prompt_format(model: Model, problems: dict[str, str]) -> PromptFormat:
    """Read the prompt format, which the generator needs even without the text encoder."""
    assert model.path is not None
    try:
        return read_prompt_format(ModelFolder(model.name, model.revision, model.path))
    except ModelRefused as error:
        problems.setdefault("text_encoder", str(error))
        return PromptFormat()


def _mismatch(model: Model) -> dict[str, str]:
    """Find inconsistencies between parts that are valid by themselves."""
    text = model.configs.get("text_encoder", {}).get("text_config", {})
    width, layers = text.get("hidden_size"), model.prompt_format.hidden_layers
    num_layers = text.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers < max(layers):
        return {"text_encoder": f"it has {num_layers} layers, but the output of layer {max(layers)} is needed"}
    shape = model.embedding_shape
    if shape is not None and isinstance(width, int) and shape[1] != width * len(layers):
        return {"text_encoder": f"its embeddings have {width * len(layers)} numbers, the transformer takes {shape[1]}"}
    return {}
