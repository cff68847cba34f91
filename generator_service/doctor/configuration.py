"""The settings of both services, read as they read them, and the files and folders that they name."""

import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from dotenv.parser import Binding, parse_stream
from pydantic import ValidationError

from generator_service.doctor.check import Check, describe, failed, ok, one_line, warning
from generator_service.doctor.host import Host
from generator_service.doctor.model import Model
from generator_service.doctor.weights_files import BrokenFile, read_shapes
from generator_service.lemica import SHIPPED, LemicaError, Shelf, load_schedules
from generator_service.settings import GeneratorSettings
from generator_service.weights import Service
from shared.settings import ServiceSettings
from text_encoder_service.settings import TextEncoderSettings

ENV_FILE = Path(".env")
PREFIXES = ("GENERATOR_", "TEXT_ENCODER_", "FLUX2_", "SCHEDULES_")
OF_OTHERS = ("GENERATOR_URL", "GENERATOR_GPU", "GENERATOR_MEMORY")
"""Variables of the command line and docker-compose.yml with the same prefixes."""
ALIKE = 0.85
"""The similarity from which on a name is taken for a misspelt setting."""
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
Settings = TypeVar("Settings", bound=ServiceSettings)


def check_host(host: Host) -> Iterator[Check]:
    """The operating system, processors and memory."""
    yield ok("host", host.describe())


def is_loopback(host: str | None) -> bool:
    """Whether a URL's host is a loopback address."""
    return host is not None and host.strip("[]") in LOOPBACK


def describe_services(services: tuple[Service, ...], generator: GeneratorSettings) -> Check:
    """Which services the host is checked for."""
    names = " and ".join(service.replace("-", " ") for service in services)
    if services == (Service.GENERATOR,):
        return ok("services", f"{names}; the text encoder is asked at {generator.text_encoder_url}")
    return ok("services", names)


def variable_of(kind: type[ServiceSettings], field: str) -> str:
    """The environment variable of a setting."""
    alias = kind.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else f"{kind.model_config.get('env_prefix', '')}{field}".upper()


def check_env_file() -> Iterator[Check]:
    """The file ``.env`` of this folder, if it exists, and misspelt variables."""
    names = dict.fromkeys(os.environ)
    if ENV_FILE.is_file():
        try:
            with ENV_FILE.open(encoding="utf-8") as file:
                bindings = list(parse_stream(file))
        except (OSError, UnicodeDecodeError) as error:
            yield failed(".env", f"it cannot be read: {describe(error)}", "make it a readable text file in UTF-8")
            return
        names |= dict.fromkeys(binding.key for binding in bindings if binding.key)
        lines = [_line_of(binding) for binding in bindings if binding.error]
        if lines:
            numbers = ", ".join(map(str, lines))
            yield warning(".env", f"not understood and left out: line {numbers}", "write NAME=VALUE")
        else:
            yield ok(".env", f"{sum(binding.key is not None for binding in bindings)} variables")
    yield from _misspelt(names)


def _line_of(binding: Binding) -> int:
    """The line of a binding, counted from 1; the parser counts empty lines before it as part of it."""
    text = binding.original.string
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _misspelt(names: Iterable[str]) -> Iterator[Check]:
    """Variables with our prefixes and almost the name of a setting: both services ignore them."""
    kinds = (GeneratorSettings, TextEncoderSettings)
    known = {*OF_OTHERS, *(variable_of(kind, field) for kind in kinds for field in kind.model_fields)}
    for name in names:
        if name.upper().startswith(PREFIXES) and name.upper() not in known:
            for like in get_close_matches(name.upper(), known, n=1, cutoff=ALIKE):
                yield warning(name, "there is no such setting: it is ignored", f"did you mean {like}?")


def read_settings(kind: type[Settings]) -> tuple[Settings, list[Check]]:
    """The settings, and a failed check for each bad one; in its place its default is taken, so that checks go on."""
    env_file = ENV_FILE if _is_readable_text(ENV_FILE) else None
    try:
        return kind(_env_file=env_file), []
    except ValidationError as error:
        problems = {_field_of(kind, entry["loc"]): str(entry["msg"]) for entry in error.errors(include_input=False)}
    checks = [
        failed(variable_of(kind, field), one_line(message), "correct or unset it; .env.example describes it")
        for field, message in problems.items()
    ]
    defaults: dict[str, Any] = {field: kind.model_fields[field].get_default() for field in problems}
    return kind(_env_file=env_file, **defaults), checks


def _is_readable_text(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _field_of(kind: type[ServiceSettings], location: tuple[int | str, ...]) -> str:
    """The setting of a validation error, which names either the field or its variable."""
    named = str(location[0]) if location else ""
    return next((field for field in kind.model_fields if named in {field, variable_of(kind, field)}), named)


def check_keys(settings: ServiceSettings, service: str, published_host: str | None = None) -> Iterator[Check]:
    """The keys that a service requires."""
    name = f"{service} keys"
    variable = variable_of(type(settings), "keys_file")
    try:
        count = len(settings.tokens())
    except (OSError, UnicodeDecodeError) as error:
        fix = f"make {settings.keys_file} readable for this user; in containers that is user 1000"
        yield failed(name, f"{variable} cannot be read: {describe(error)}", fix)
        return
    if count:
        yield ok(name, f"requests need one of {count} keys" if count > 1 else "requests need the one key")
    elif (published_host or settings.host) in LOOPBACK and (settings.keys_file is None or published_host):
        yield ok(name, "none: requests need no key, and only this machine can send them")
    else:
        why = f"{variable} holds none" if settings.keys_file else f"the service listens on {settings.host}"
        yield warning(
            name, f"none, and {why}: everyone who reaches the service may use it", f"write keys, set {variable}"
        )


def check_key_to_send(settings: GeneratorSettings) -> Iterator[Check]:
    """The key that the generator sends to the text encoder; nothing if it can be read."""
    try:
        settings.token_to_send()
    except (OSError, UnicodeDecodeError) as error:
        fix = f"make {settings.text_encoder_keys_file} readable for this user; in containers that is user 1000"
        yield failed("key to send", f"TEXT_ENCODER_KEYS_FILE cannot be read: {describe(error)}", fix)


def check_schedules(settings: GeneratorSettings) -> Iterator[Check]:
    """Files of calibrated schedules, and the schedule that requests get by default."""
    name = "schedules"
    folder = settings.schedules_dir
    try:
        files = sorted(file for each in (SHIPPED, folder) if each for file in each.glob("*.json"))
        if folder is not None:
            os.listdir(folder)  # noqa: PTH208 - glob finds nothing where it may not look
        found = [schedule for file in files for schedule in load_schedules(file)]
    except (LemicaError, OSError) as error:
        yield failed(name, f"SCHEDULES_DIR: {describe(error)}", "correct the file or take it out of the folder")
        return
    if not Shelf(found).knows(settings.default_cache):
        detail = f"GENERATOR_DEFAULT_CACHE: there is no schedule {settings.default_cache!r}"
        yield failed(name, detail, "set it to none, slow, medium, fast, ultra, or a number of computed steps")
    else:
        yield ok(name, f"{len(found)} calibrated in {len(files)} files; by default {settings.default_cache}")


def check_adapters(settings: GeneratorSettings) -> Iterator[Check]:
    """Files of LoRA adapters, if a folder of them is set."""
    if settings.lora_dir is None:
        return
    files = sorted(settings.lora_dir.glob("*.safetensors"))
    broken = []
    for file in files:
        try:
            read_shapes(file)
        except BrokenFile as error:
            broken.append(str(error))
    if broken:
        yield warning("adapters", f"of {len(files)} {len(broken)} cannot be used: {'; '.join(broken)}", "replace them")
    else:
        yield ok("adapters", f"{len(files)} in {settings.lora_dir}")


def check_warm_up_sizes(settings: GeneratorSettings, model: Model) -> Iterator[Check]:
    """Whether the model can generate the sizes that are compiled at start."""
    multiple = model.pixels_per_token
    for width, height in settings.warm_up_sizes:
        if width % multiple or height % multiple or not 0 < width * height <= settings.max_pixels:
            detail = f"{width}x{height}: sides must be multiples of {multiple}, at most {settings.max_pixels} pixels"
            yield failed("GENERATOR_WARM_UP_SIZES", detail, "correct the size or leave it out")
