"""Checks of the services' settings, and of the files and folders that they refer to."""

import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from dotenv.parser import Binding, parse_stream
from pydantic import ValidationError

from flux2_shared.model.subfolders import Service
from flux2_shared.settings import LOOPBACK, ServiceSettings
from generator_service.doctor.check import Check, describe, failed, ok, one_line, warning
from generator_service.doctor.host import Host
from generator_service.doctor.model import Model
from generator_service.doctor.weights_files import BrokenFile, read_shapes
from generator_service.lemica import SHIPPED, LemicaError, ScheduleRegistry, load_schedules
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings

ENV_FILE = Path(".env")
PREFIXES = ("GENERATOR_", "TEXT_ENCODER_", "FLUX2_", "SCHEDULES_")
OTHER_VARIABLES = ("GENERATOR_URL", "GENERATOR_GPU", "GENERATOR_MEMORY")
"""Variables of the command line and docker-compose.yml with the same prefixes."""
SIMILARITY_CUTOFF = 0.85
"""The minimum similarity of a misspelled variable to a setting."""
Settings = TypeVar("Settings", bound=ServiceSettings)


def check_host(host: Host) -> Iterator[Check]:
    yield ok("host", host.describe())


def is_loopback(host: str | None) -> bool:
    return host is not None and host.strip("[]") in LOOPBACK


def describe_services(services: tuple[Service, ...], generator: GeneratorSettings) -> Check:
    """Report which services the host is checked for."""
    names = " and ".join(service.replace("-", " ") for service in services)
    if services == (Service.GENERATOR,):
        return ok("services", f"{names}; the text encoder is at {generator.text_encoder_url}")
    return ok("services", names)


def variable_of(kind: type[ServiceSettings], field: str) -> str:
    """Return the environment variable of a setting."""
    alias = kind.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else f"{kind.model_config.get('env_prefix', '')}{field}".upper()


def check_env_file() -> Iterator[Check]:
    """Check the file ``.env`` of the current folder, if it exists, and look for misspelled variables."""
    names = dict.fromkeys(os.environ)
    if ENV_FILE.is_file():
        try:
            with ENV_FILE.open(encoding="utf-8-sig") as file:
                bindings = list(parse_stream(file))
        except (OSError, UnicodeDecodeError) as error:
            yield failed(".env", f"it cannot be read: {describe(error)}", "make it a readable text file in UTF-8")
            return
        names |= dict.fromkeys(binding.key for binding in bindings if binding.key)
        lines = [_line_of(binding) for binding in bindings if binding.error]
        if lines:
            numbers = ", ".join(map(str, lines))
            yield warning(".env", f"invalid and ignored: line {numbers}", "write NAME=VALUE")
        else:
            yield ok(".env", f"{sum(binding.key is not None for binding in bindings)} variables")
    yield from _misspelled(names)


def _line_of(binding: Binding) -> int:
    """Return the line of a binding, counted from 1; the parser includes the empty lines before it."""
    text = binding.original.string
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _misspelled(names: Iterable[str]) -> Iterator[Check]:
    """Warn about variables that are similar to the name of a setting; both services ignore them."""
    kinds = (GeneratorSettings, TextEncoderSettings)
    known = {*OTHER_VARIABLES, *(variable_of(kind, field) for kind in kinds for field in kind.model_fields)}
    for name in names:
        if name.upper().startswith(PREFIXES) and name.upper() not in known:
            for like in get_close_matches(name.upper(), known, n=1, cutoff=SIMILARITY_CUTOFF):
                yield warning(name, "not a setting; it is ignored", f"did you mean {like}?")


def read_settings(kind: type[Settings]) -> tuple[Settings, list[Check]]:
    """Read the settings of a service. For an invalid one there is a failed check, and its default is used."""
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
    """Return the field of a validation error, whose location is either the field or its variable."""
    name = str(location[0]) if location else ""
    return next((field for field in kind.model_fields if name in {field, variable_of(kind, field)}), name)


def check_keys(settings: ServiceSettings, service: str, published_host: str | None = None) -> Iterator[Check]:
    """Check the API keys that a service requires."""
    name = f"{service} keys"
    variable = variable_of(type(settings), "keys_file")
    try:
        count = len(settings.tokens())
    except (OSError, ValueError) as error:
        yield failed(name, f"{variable} cannot be read: {describe(error)}", fix_of_keys(settings.keys_file))
        return
    address = published_host or settings.host
    weaknesses = list(settings.key_warnings(address))
    if weaknesses:
        yield warning(name, "; ".join(weaknesses), f"create keys with `openssl rand -hex 32` and set {variable}")
    elif count:
        yield ok(name, f"requests need one of {count} keys" if count > 1 else "requests need the one key")
    elif address in LOOPBACK:
        yield ok(name, "none: the service is not authenticated, but listens on a loopback address only")
    else:
        allowed = variable_of(type(settings), "allow_unauthenticated")
        yield ok(name, f"none: {allowed} says that everyone on the network may use the service")


def fix_of_keys(file: Path | None) -> str:
    """Return what to do about a keys file that cannot be read."""
    return f"make {file} a text file that this user can read; in containers that is user 1000"


def check_key_to_send(settings: GeneratorSettings) -> Iterator[Check]:
    """Check that the key which the generator sends to the text encoder can be read."""
    try:
        settings.token_to_send()
    except (OSError, ValueError) as error:
        fix = fix_of_keys(settings.text_encoder_keys_file)
        yield failed("key to send", f"TEXT_ENCODER_KEYS_FILE cannot be read: {describe(error)}", fix)


def check_schedules(settings: GeneratorSettings) -> Iterator[Check]:
    """Check the files of calibrated schedules, and the default schedule."""
    name = "schedules"
    folder = settings.schedules_dir
    try:
        files = sorted(file for each in (SHIPPED, folder) if each for file in each.glob("*.json"))
        if folder is not None:
            os.listdir(folder)  # noqa: PTH208 - glob ignores folders that it cannot read
        schedules = [schedule for file in files for schedule in load_schedules(file)]
    except (LemicaError, OSError) as error:
        yield failed(name, f"SCHEDULES_DIR: {describe(error)}", "correct the file or remove it from the folder")
        return
    if not ScheduleRegistry(schedules).has(settings.default_cache):
        detail = f"GENERATOR_DEFAULT_CACHE: there is no schedule {settings.default_cache!r}"
        yield failed(name, detail, "set it to none, slow, medium, fast, ultra, or a number of computed steps")
    else:
        yield ok(name, f"{len(schedules)} calibrated in {len(files)} files; default {settings.default_cache}")


def check_adapters(settings: GeneratorSettings) -> Iterator[Check]:
    """Check the files of LoRA adapters, if a folder of them is set."""
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
        yield warning("adapters", f"{len(broken)} of {len(files)} cannot be used: {'; '.join(broken)}", "replace them")
    else:
        yield ok("adapters", f"{len(files)} in {settings.lora_dir}")


def check_warm_up_sizes(settings: GeneratorSettings, model: Model) -> Iterator[Check]:
    """Check that the model can generate the sizes that are compiled at startup."""
    multiple = model.pixels_per_token
    for width, height in settings.warm_up_sizes:
        if width % multiple or height % multiple or not 0 < width * height <= settings.max_pixels:
            detail = f"{width}x{height}: sides must be multiples of {multiple}, at most {settings.max_pixels} pixels"
            yield failed("GENERATOR_WARM_UP_SIZES", detail, "correct or remove the size")
