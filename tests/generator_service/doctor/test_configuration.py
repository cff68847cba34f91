"""The settings of both services, and the files and folders that they name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import AnyHttpUrl

from demo_model.services import WEIGHTS
from flux2_shared.model.subfolders import Service
from generator_service.doctor.check import Check, Status
from generator_service.doctor.configuration import (
    check_adapters,
    check_env_file,
    check_key_to_send,
    check_keys,
    check_schedules,
    check_warm_up_sizes,
    describe_services,
    is_loopback,
    read_settings,
    variable_of,
)
from generator_service.doctor.model import Model, inspect
from generator_service.lemica import SHIPPED
from generator_service.settings import GeneratorSettings
from tests.generator_service.doctor.hosts import by_name, write_safetensors
from tests.test_docs import SETTINGS, variables
from text_encoder_service.settings import TextEncoderSettings


def test_each_setting_has_a_variable() -> None:
    """The variable that a check names is the documented one."""
    for kind in SETTINGS:
        assert {variable_of(kind, field): field for field in kind.model_fields} == variables(kind)


def test_each_invalid_setting_is_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each invalid setting is one failed check with the variable's name, not its value, and its default is used."""
    bad = {
        "GENERATOR_PORT": "tcp://10.0.0.1:8000",
        "GENERATOR_TOKEN": "a-secret",
        "GENERATOR_KEYS_FILE": "/no/such/file",
        "GENERATOR_WARM_UP_SIZES": "7777",
        "SCHEDULES_DIR": "/no/such/folder",
        "LOG_LEVEL": "loud",
    }
    for name, value in bad.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GENERATOR_MAX_WAITING", "3")
    settings, checks = read_settings(GeneratorSettings)
    assert {check.name for check in checks} == bad.keys() - {"GENERATOR_TOKEN"}
    assert {check.status for check in checks} == {Status.FAILED}
    assert all(check.detail and check.fix for check in checks)
    assert not any(value in str(checks) for name, value in bad.items() if name != "GENERATOR_KEYS_FILE")
    assert any("/no/such/file does not exist" in check.detail for check in checks)
    assert (settings.port, settings.log_level, settings.max_waiting) == (8000, "info", 3)
    assert settings.token is not None


def test_good_settings_are_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid settings from the environment and ``.env`` give no check."""
    monkeypatch.setenv("TEXT_ENCODER_PORT", "1")
    Path(".env").write_text("TEXT_ENCODER_PORT=2\nTEXT_ENCODER_MAX_BATCH=4\n")
    settings, checks = read_settings(TextEncoderSettings)
    assert (settings.port, settings.max_batch, checks) == (1, 4, [])


def env_file_checks() -> dict[str, Check]:
    """The checks of ``.env`` and of variable names."""
    return by_name(list(check_env_file()))


def test_an_env_file_that_cannot_be_read_is_a_failure() -> None:
    """An unreadable ``.env`` is a failure, and the settings are read without it."""
    assert env_file_checks() == {}
    Path(".env").write_bytes(b"GENERATOR_PORT=1\n\xff\xfe")
    assert env_file_checks()[".env"].status is Status.FAILED
    assert read_settings(GeneratorSettings)[0].port == 8000


def test_invalid_lines_are_reported() -> None:
    """Lines of ``.env`` that cannot be parsed are a warning with their numbers."""
    Path(".env").write_text("# a comment\nGENERATOR_PORT=1\n=nonsense\nexport TEXT_ENCODER_PORT=2\n\n??? !\n")
    check = env_file_checks()[".env"]
    assert check.status is Status.WARNING
    assert check.detail.endswith("line 3, 6")
    Path(".env").write_text("GENERATOR_PORT=1\nexport TEXT_ENCODER_PORT=2\n")
    assert env_file_checks()[".env"] == Check(".env", Status.OK, "2 variables")


def test_a_misspelt_name_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with almost the name of a setting is a warning, except for names that Kubernetes or compose set."""
    for name in ("GENERATOR_PROT", "GENERATOR_SERVICE_HOST", "GENERATOR_PORT_8000_TCP_PORT", "GENERATOR_URL"):
        monkeypatch.setenv(name, "1")
    Path(".env").write_text("FLUX2_MODLE=x\nGENERATOR_GPU=1\nTEXT_ENCODER_KEY_FILE=y\nGENERATOR_TOKEN=z\n")
    checks = {name: check for name, check in env_file_checks().items() if name != ".env"}
    assert {name: check.fix for name, check in checks.items()} == {
        "GENERATOR_PROT": "did you mean GENERATOR_PORT?",
        "FLUX2_MODLE": "did you mean FLUX2_MODEL?",
        "TEXT_ENCODER_KEY_FILE": "did you mean TEXT_ENCODER_KEYS_FILE?",
    }
    assert {check.status for check in checks.values()} == {Status.WARNING}


OPEN = {"allow_unauthenticated": True}
ALL = "0.0.0.0"  # noqa: S104 - as in a container


@pytest.mark.parametrize(
    ("content", "settings", "published", "status", "message"),
    [
        (None, {}, None, Status.OK, "loopback address only"),
        (None, {"token": "a-token-of-24-characters"}, None, Status.OK, "requests need the one key"),
        (None, {"token": "t"}, None, Status.WARNING, "1 of 1 keys have fewer than 16 characters"),
        ("a-key-of-20-letters-\n# no\n\nb-key-of-20-letters-\n", {}, None, Status.OK, "requests need one of 2 keys"),
        ("# none\n", OPEN, None, Status.OK, "loopback address only"),
        ("# none\n", OPEN | {"host": ALL}, "127.0.0.1", Status.OK, "loopback address only"),
        ("# none\n", OPEN | {"host": ALL}, ALL, Status.OK, "GENERATOR_ALLOW_UNAUTHENTICATED says that everyone"),
        (None, {"host": ALL}, None, Status.WARNING, "listening on 0.0.0.0 without authentication"),
    ],
)
def test_missing_authentication_is_a_warning(
    tmp_path: Path, content: str | None, settings: dict[str, Any], published: str | None, status: Status, message: str
) -> None:
    """A reachable service without keys is a warning unless a setting says that it is meant, and so are short keys."""
    more: dict[str, Any] = {}
    if content is not None:
        more = {"keys_file": tmp_path / "keys"}
        (tmp_path / "keys").write_text(content)
    [check] = check_keys(GeneratorSettings(**settings, **more), "generator", published)
    assert check.status is status
    assert message in check.detail


def test_a_keys_file_without_keys_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The doctor reports the line with which the service would refuse to start."""
    (tmp_path / "keys").write_text("# none\n")
    for variable in ("GENERATOR_KEYS_FILE", "TEXT_ENCODER_KEYS_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "keys"))
    for kind, names in (
        (GeneratorSettings, {"GENERATOR_KEYS_FILE", "TEXT_ENCODER_KEYS_FILE"}),
        (TextEncoderSettings, {"TEXT_ENCODER_KEYS_FILE"}),
    ):
        _, checks = read_settings(kind)
        assert {check.name for check in checks} == names
        assert {check.status for check in checks} == {Status.FAILED}
        assert all("keys holds no key" in check.detail for check in checks)


def test_keys_that_cannot_be_read_are_a_failure(tmp_path: Path) -> None:
    """A keys file that was damaged is a failure, both for required keys and for keys that are sent."""
    file = tmp_path / "keys"
    file.write_text("a-key")
    encoder, generator = TextEncoderSettings(keys_file=file), GeneratorSettings(text_encoder_keys_file=file)
    file.write_bytes(b"\xff\xfe\x00")
    [check] = check_keys(encoder, "text encoder")
    assert check.status is Status.FAILED
    assert "TEXT_ENCODER_KEYS_FILE cannot be read: UnicodeDecodeError" in check.detail
    [check] = check_key_to_send(generator)
    assert check.status is Status.FAILED
    assert list(check_key_to_send(GeneratorSettings())) == []


def test_invalid_schedules_are_failures(tmp_path: Path) -> None:
    """A file without schedules and an unknown default schedule are failures."""
    [check] = check_schedules(GeneratorSettings())
    assert check.status is Status.OK
    folder = tmp_path / "schedules"
    folder.mkdir()
    [check] = check_schedules(GeneratorSettings(schedules_dir=folder, default_cache="mine"))
    assert check.status is Status.FAILED
    assert "GENERATOR_DEFAULT_CACHE: there is no schedule 'mine'" in check.detail
    (folder / "x.json").write_text("{")
    [check] = check_schedules(GeneratorSettings(schedules_dir=folder))
    assert check.status is Status.FAILED
    assert "x.json is not a file of schedules" in check.detail
    for file in SHIPPED.glob("*.json"):
        (folder / "x.json").write_bytes(file.read_bytes())
    assert next(iter(check_schedules(GeneratorSettings(schedules_dir=folder)))).status is Status.OK


def test_a_missing_schedules_folder_is_a_failure(tmp_path: Path) -> None:
    """A schedules folder that disappears after the settings were read is a failure."""
    folder = tmp_path / "schedules"
    folder.mkdir()
    settings = GeneratorSettings(schedules_dir=folder)
    folder.rmdir()
    [check] = check_schedules(settings)
    assert check.status is Status.FAILED


def test_broken_adapters_are_reported(tmp_path: Path) -> None:
    """A broken adapter is a warning with the name of the file."""
    assert list(check_adapters(GeneratorSettings())) == []
    write_safetensors(tmp_path / "good.safetensors", {"a": (1,)})
    [check] = check_adapters(GeneratorSettings(lora_dir=tmp_path))
    assert (check.status, check.detail) == (Status.OK, f"1 in {tmp_path}")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    [check] = check_adapters(GeneratorSettings(lora_dir=tmp_path))
    assert check.status is Status.WARNING
    assert "1 of 2 cannot be used: bad.safetensors is empty" in check.detail


def test_sizes_to_warm_up_must_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up sizes that the model cannot generate are failures."""
    model, _ = inspect(Model("weights", "local", WEIGHTS), ("scheduler", "transformer", "vae"))
    monkeypatch.setenv("GENERATOR_WARM_UP_SIZES", "128x128,100x128,4096x4096")
    settings = GeneratorSettings()
    checks = list(check_warm_up_sizes(settings, model))
    assert [check.detail.split(":")[0] for check in checks] == ["100x128", "4096x4096"]
    assert {check.status for check in checks} == {Status.FAILED}


def test_the_checked_services_are_reported() -> None:
    """The report has the checked services, and the address of a text encoder on another host."""
    assert is_loopback("127.0.0.1")
    assert is_loopback("[::1]")
    assert not is_loopback("text-encoder")
    assert not is_loopback(None)
    settings = GeneratorSettings(text_encoder_url=AnyHttpUrl("http://text-encoder:8006"))
    assert describe_services(tuple(Service), settings).detail == "text encoder and generator"
    assert "the text encoder is at http://text-encoder:8006" in describe_services((Service.GENERATOR,), settings).detail
