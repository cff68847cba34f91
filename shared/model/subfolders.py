"""The two services, and which subfolders of a diffusers pipeline each of them loads."""

from collections.abc import Mapping
from enum import StrEnum


class Service(StrEnum):
    """The two services, as commands name them."""

    TEXT_ENCODER = "text-encoder"
    GENERATOR = "generator"


SUBFOLDERS: Mapping[Service, tuple[str, ...]] = {
    Service.TEXT_ENCODER: ("text_encoder", "tokenizer"),
    Service.GENERATOR: ("scheduler", "transformer", "vae"),
}
ALL_SUBFOLDERS = tuple(name for names in SUBFOLDERS.values() for name in names)
