"""Settings of both services, read from the environment or a ``.env`` file at startup."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from flux2_shared.observability.logs import LogFormat

if TYPE_CHECKING:
    import torch

FLUX2_DEV = "black-forest-labs/FLUX.2-dev"
KEY = re.compile(r"[!-~]+")
"""What an ``Authorization`` header can carry after ``Bearer``: visible ASCII characters."""
MIN_KEY_CHARS = 16
"""Shorter keys can be guessed."""
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
PATH_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[\w.~@+-]+)+", re.ASCII)
"""Path segments without a trailing slash. None is empty, or a link with it could lead to another host."""


def read_names(text: Any) -> Any:
    """Split ``a,b`` into a list; a value that is not a string is returned unchanged."""
    return [name.strip() for name in text.split(",") if name.strip()] if isinstance(text, str) else text


def read_path_prefix(text: Any) -> Any:
    """Remove trailing slashes of a path prefix, and check it; a value that is not a string is returned unchanged."""
    prefix = text.strip().rstrip("/") if isinstance(text, str) else text
    if isinstance(prefix, str) and prefix and not PATH_PREFIX.fullmatch(prefix):
        raise ValueError("give a path like /flux2, whose segments consist of letters, digits and _.~@+-")
    return prefix


def read_keys(file: Path) -> tuple[str, ...]:
    """Read one key per line, without repetitions, skipping empty lines and comments.

    Editors may have added a byte order mark, and end lines as any system does.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 text, or a key holds a character that an ``Authorization`` header cannot carry. The
            message has the number of the line, never the key.
    """
    keys = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        key = line.strip()
        if key and not key.startswith("#"):
            if not KEY.fullmatch(key):
                raise ValueError(
                    f"line {number} of {file} is no key: use ASCII letters, digits and signs, without spaces"
                )
            keys[key] = number
    return tuple(keys)


def check_keys_file(file: Path) -> Path:
    """Return ``file``; raise ``ValueError`` if no keys can be read from it."""
    try:
        if not file.is_file():
            raise ValueError(f"{file} is not a file" if file.exists() else f"{file} does not exist")
        read_keys(file)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; save it with that encoding") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return file


def require_key(file: Path | None, prefix: str, *, is_open_allowed: bool) -> Path | None:
    """Return ``file``; raise ``ValueError`` if it holds no key, unless that is allowed.

    An empty file is more often a mistake, such as a secret that was not filled, than a decision for an open service.
    """
    if file is not None and not is_open_allowed and not read_keys(file):
        meant = f"if requests need no key, set {prefix}ALLOW_UNAUTHENTICATED=true"
        raise ValueError(f"{prefix}KEYS_FILE: {file} holds no key; add one, or {meant}")
    return file


KeysFile = Annotated[Path, AfterValidator(check_keys_file)]


def read_token(text: Any) -> Any:
    """Remove whitespace around a token, such as the line break of a file; other values are returned unchanged.

    A blank token is refused, because an empty one would mean that none is required; so is one that no header can carry.
    """
    if isinstance(text, str) and text and not text.strip():
        raise ValueError("the token is blank")
    if isinstance(text, str) and not (text.isascii() and text.strip().isprintable()):
        raise ValueError("the token may hold ASCII letters, digits, signs and inner spaces only")
    return text.strip() if isinstance(text, str) else text


Token = Annotated[SecretStr, BeforeValidator(read_token)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s]+)$", to_lower=True)]


class ServiceSettings(BaseSettings):
    """Common settings. Names without an alias get the service's prefix (``TEXT_ENCODER_``, ``GENERATOR_``)."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file=".env",
        env_file_encoding="utf-8-sig",  # with or without a byte order mark
        env_ignore_empty=True,
        extra="ignore",
        populate_by_name=True,
    )

    model: str = Field(FLUX2_DEV, validation_alias="FLUX2_MODEL")
    """A hub id, or a folder with a diffusers pipeline."""
    revision: str = Field("main", validation_alias="FLUX2_REVISION")
    """The hub revision; pin it to a commit in production."""
    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)
    device: str = "auto"
    """``cpu``, ``cuda`` (the first GPU), ``cuda:N``, or ``auto``: the first GPU if there is one, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    max_body_bytes: int = Field(gt=0)
    max_bodies_bytes: int = Field(256 * 2**20, gt=0)
    """Total size of the bodies of all requests that are being served; further ones are rejected with 429."""
    max_connections: int = Field(4096, ge=1)
    """Open connections; fewer if the limit of open files (``ulimit -n``) is lower."""
    max_waiting: int = Field(ge=1)
    """Requests that may wait for the device; further ones are rejected with 429."""
    max_prompt_chars: int = Field(20_000, ge=1)
    embedding_cache_bytes: int = Field(512 * 2**20, ge=0)
    token: Token | None = None
    """If set, requests need it as ``Authorization: Bearer``; health and metrics stay open."""
    allow_unauthenticated: bool = False
    """Whether the service may start with a keys file that holds no key, and then serve everyone."""
    keys_file: KeysFile | None = None
    """A file with one API key per line. Each is accepted like ``token``, and sees only its own jobs."""
    root_path: Annotated[str | None, BeforeValidator(read_path_prefix)] = None
    """Path prefix under which a proxy publishes the service, like ``/flux2``; every link starts with it."""
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(read_names)] = ()
    """Addresses or networks of proxies whose ``X-Forwarded-Prefix``, ``-For`` and ``-Proto`` are used."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(read_names)] = ()
    """Names by which browsers reach a service without keys, besides addresses, names without a dot and private ones:
    ``flux2.example.com``, ``*.example.com``, or ``*`` for any name."""
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(read_names)] = ()
    """Origins whose pages may use the service in a browser (CORS), such as ``https://app.example.com``; ``*``: all."""
    drain_s: int = Field(300, ge=1)
    """Seconds for running requests to complete after SIGTERM. A container's grace period must be longer."""
    log_format: LogFormat = Field("text", validation_alias="LOG_FORMAT")
    """``text``, or ``json`` with one object per line."""
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", validation_alias="LOG_LEVEL")

    @field_validator("keys_file")
    @classmethod
    def _require_key(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        is_open_allowed = bool(info.data.get("allow_unauthenticated") or info.data.get("token"))
        return require_key(file, cls.model_config["env_prefix"], is_open_allowed=is_open_allowed)

    def tokens(self) -> tuple[str, ...]:
        """Return all accepted bearer tokens; if there are none, no authentication is required."""
        single = [self.token.get_secret_value()] if self.token else []
        return (*single, *(read_keys(self.keys_file) if self.keys_file else ()))

    def key_warnings(self, address: str) -> Iterator[str]:
        """Yield what is weak about the authentication of the service, which clients reach at ``address``."""
        tokens, prefix = self.tokens(), self.model_config["env_prefix"]
        if not tokens and not self.allow_unauthenticated and address not in LOOPBACK:
            yield f"listening on {address} without authentication; set {prefix}KEYS_FILE"
        num_short = sum(len(token) < MIN_KEY_CHARS for token in tokens)
        if num_short:
            yield f"{num_short} of {len(tokens)} keys have fewer than {MIN_KEY_CHARS} characters and could be guessed"

    def torch_device(self) -> "torch.device":
        """Resolve the device; a GPU has an index.

        Raises:
            ModelRefused: the device is not supported or not available.
        """
        from flux2_shared.device.resolve import resolve_device  # noqa: PLC0415 - settings can be read where torch cannot be imported

        return resolve_device(self.device, f"{self.model_config['env_prefix']}DEVICE")

    def torch_dtype(self) -> "torch.dtype":
        """Resolve the dtype of the model's weights."""
        import torch  # noqa: PLC0415 - as above

        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]
