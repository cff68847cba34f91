"""The environment variables of the settings, and the devices that they may name."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from pydantic import ValidationError

from flux2_shared.errors import InvalidRequest, ModelRefused
from generator_service.cli.calibration import read_prompts, resolve_storage
from generator_service.cli.client import post_generate
from generator_service.doctor.configuration import check_env_file
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings

ROOT = Path(__file__).parents[2]


def test_common_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """``MODEL``, ``REVISION`` or ``PORT`` of another program are not read."""
    for name in ("MODEL", "REVISION", "PORT", "HOST", "TOKEN", "DEVICE"):
        monkeypatch.setenv(name, "other")
    settings = GeneratorSettings()
    assert (settings.model, settings.revision) == ("black-forest-labs/FLUX.2-dev", "main")
    assert (settings.port, settings.token) == (8000, None)


def test_one_variable_sets_the_model_of_both_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FLUX2_MODEL`` and ``FLUX2_REVISION`` apply to both services."""
    monkeypatch.setenv("FLUX2_MODEL", "a/model")
    monkeypatch.setenv("FLUX2_REVISION", "0123")
    for settings in (GeneratorSettings(), TextEncoderSettings()):
        assert (settings.model, settings.revision) == ("a/model", "0123")


def test_the_encoders_keys_file_authenticates_the_generator(tmp_path: Path) -> None:
    """One keys file configures both: the encoder requires its keys, the generator sends one; an explicit token wins."""
    keys = tmp_path / "keys"
    keys.write_text("# keys\n\n first-key \nsecond-key\n")
    assert TextEncoderSettings(keys_file=keys).tokens() == ("first-key", "second-key")
    sent = GeneratorSettings(text_encoder_keys_file=keys).token_to_send()
    assert sent is not None
    assert sent.get_secret_value() == "first-key"
    sent = GeneratorSettings(text_encoder_keys_file=keys, text_encoder_token="own").token_to_send()
    assert sent is not None
    assert sent.get_secret_value() == "own"
    keys.write_text("# none\n")
    open_encoder = GeneratorSettings(text_encoder_keys_file=keys, text_encoder_allow_unauthenticated=True)
    assert open_encoder.token_to_send() is None


NO_KEYS = ("", "\n\n \t\r\n", "# a comment\n  # another\n", "\ufeff", "\ufeff# a comment\r\n")


@pytest.mark.parametrize("content", NO_KEYS)
@pytest.mark.parametrize("variable", ["GENERATOR_KEYS_FILE", "TEXT_ENCODER_KEYS_FILE"])
@pytest.mark.parametrize("kind", [GeneratorSettings, TextEncoderSettings])
def test_a_keys_file_without_keys_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[GeneratorSettings | TextEncoderSettings],
    variable: str,
    content: str,
) -> None:
    """It neither opens the service nor makes the generator send no key, unless a setting allows it."""
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    monkeypatch.setenv(variable, str(tmp_path / "keys"))
    if (kind, variable) == (TextEncoderSettings, "GENERATOR_KEYS_FILE"):
        assert kind().tokens() == ()  # another service's
        return
    allowed = variable.replace("KEYS_FILE", "ALLOW_UNAUTHENTICATED")
    with pytest.raises(
        ValidationError, match=f"{variable}: {tmp_path}/keys holds no key; add one, or .*{allowed}=true"
    ):
        kind()
    monkeypatch.setenv(allowed, "true")
    assert kind().tokens() == ()
    monkeypatch.delenv(allowed)
    monkeypatch.setenv(variable.replace("KEYS_FILE", "TOKEN"), "a-token")
    assert variable.startswith("TEXT") or kind().tokens() == ("a-token",)


def test_keys_are_required_although_none_would_be_allowed(tmp_path: Path) -> None:
    """The permission to serve everyone does not cancel keys that are there; repeated keys count once."""
    (tmp_path / "keys").write_text("one-key\r\nanother\r\none-key\r\n", newline="")
    settings = GeneratorSettings(keys_file=tmp_path / "keys", allow_unauthenticated=True)
    assert settings.tokens() == ("one-key", "another")


BAD_KEYS = (
    "SECRET two",
    "SECRET\u00e9",
    "SECRET\tb",
    "SECRET\x00b",
    "a\x0bSECRET",
    "a\u2028SECRET",
    "a\x85SECRET",
    "SECRET # old",
)


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize("setting", ["keys_file", "text_encoder_keys_file"])
def test_keys_that_no_header_can_carry_are_refused(tmp_path: Path, setting: str, key: str) -> None:
    """A key with spaces, control characters or characters beyond ASCII is named by its line, and never quoted."""
    keys = tmp_path / "keys"
    keys.write_text(f"# keys\n\na-good-key\n{key}\n", encoding="utf-8")
    with pytest.raises(ValidationError, match=f"line 4 of {keys} is no key") as refused:
        GeneratorSettings.model_validate({setting: keys, setting.upper(): keys})
    assert "SECRET" not in "".join(error["msg"] for error in refused.value.errors())
    (tmp_path / "keys").write_text("!#$%&'()*+,-./:;<=>?@[]^_`{|}~", encoding="utf-8")
    assert GeneratorSettings(keys_file=keys).tokens() == ("!#$%&'()*+,-./:;<=>?@[]^_`{|}~",)


def test_weak_authentication_is_described(tmp_path: Path) -> None:
    """Short keys are counted, and an open service beyond loopback is named unless that is meant."""
    (tmp_path / "keys").write_text("short\nfifteen-letters\nsixteen-letters!\n")
    settings = GeneratorSettings(keys_file=tmp_path / "keys")
    assert list(settings.key_warnings("::1")) == ["2 of 3 keys have fewer than 16 characters and could be guessed"]
    open_one = TextEncoderSettings()
    assert list(open_one.key_warnings("localhost")) == []
    assert list(open_one.key_warnings("::")) == ["listening on :: without authentication; set TEXT_ENCODER_KEYS_FILE"]
    assert list(TextEncoderSettings(allow_unauthenticated=True).key_warnings("::")) == []


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_keys_files_of_any_editor(tmp_path: Path, mark: str, newline: str) -> None:
    """A byte order mark, line breaks of any system, spaces, empty lines and indented comments are no part of a key."""
    keys = tmp_path / "keys"
    for first in ("# keys", "first-key"):
        lines = [first, "", "  ", "first-key  ", "  # old: third-key", "\t#", "\tsecond-key\t"]
        keys.write_bytes((mark + newline.join(lines)).encode())
        assert tuple(dict.fromkeys(GeneratorSettings(keys_file=keys).tokens())) == ("first-key", "second-key")


@pytest.mark.parametrize("setting", ["keys_file", "text_encoder_keys_file"])
def test_keys_files_that_cannot_be_read_are_refused(tmp_path: Path, setting: str) -> None:
    """A keys file in another encoding, or one that is missing, is an invalid setting with the reason."""
    keys = tmp_path / "keys"
    for content in ("key".encode("utf-16"), b"cl\xe9"):
        keys.write_bytes(content)
        with pytest.raises(ValidationError, match="keys is not UTF-8 text; save it with that encoding"):
            GeneratorSettings.model_validate({setting: keys, setting.upper(): keys})
    keys.unlink()
    with pytest.raises(ValidationError, match="keys does not exist"):
        GeneratorSettings.model_validate({setting: keys, setting.upper(): keys})
    with pytest.raises(ValidationError, match=f"{tmp_path} is not a file"):
        GeneratorSettings.model_validate({setting: tmp_path, setting.upper(): tmp_path})


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_env_files_of_any_editor(tmp_path: Path, newline: str) -> None:
    """The first setting of a ``.env`` file with a byte order mark is read, and ``flux2 doctor`` sees no misspelling."""
    lines = ["GENERATOR_PORT=8123", "", "  # a comment", " GENERATOR_TOKEN = secret ", "TEXT_ENCODER_PORT=8124", ""]
    (tmp_path / ".env").write_bytes(("\ufeff" + newline.join(lines)).encode())
    settings = GeneratorSettings()
    assert (settings.port, settings.tokens(), TextEncoderSettings().port) == (8123, ("secret",), 8124)
    assert [check.detail for check in check_env_file()] == ["3 variables"]


@pytest.mark.parametrize("name", ["GENERATOR_TOKEN", "TEXT_ENCODER_TOKEN", "GENERATOR_UPSAMPLER_TOKEN"])
def test_whitespace_around_tokens_is_removed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A token may come from a file with a line break; a blank one is refused, rather than taken for none."""
    monkeypatch.setenv(name, " secret\r\n")
    settings = GeneratorSettings()
    tokens = (settings.token, settings.text_encoder_token, settings.upsampler_token)
    assert [token.get_secret_value() for token in tokens if token] == ["secret"]
    monkeypatch.setenv(name, " \n")
    with pytest.raises(ValidationError, match="the token is blank"):
        GeneratorSettings()


@pytest.mark.parametrize("token", ["s\u00e9cret", "a\nb", "a\tb", "a\x00b", "\u201cquoted\u201d"])
def test_tokens_that_no_header_can_carry_are_refused(token: str) -> None:
    """A token that no client can send is refused, because nobody could use the service; it is not quoted."""
    with pytest.raises(ValidationError, match="the token may hold ASCII") as refused:
        GeneratorSettings(token=token)
    assert token not in refused.value.errors()[0]["msg"]
    assert GeneratorSettings(token="inner spaces are sent").tokens() == ("inner spaces are sent",)


def test_other_text_files_and_tokens_are_read_alike(tmp_path: Path) -> None:
    """The prompts of a calibration and the token of the command line may come from any editor too."""
    (tmp_path / "prompts").write_bytes("\ufeffa red circle \r\n\r\n a blue one\r\n".encode())
    assert read_prompts(tmp_path / "prompts") == ("a red circle", "a blue one")

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=request.headers["authorization"])

    response = post_generate("http://test", {}, " secret\r\n", httpx.MockTransport(respond))
    assert response.data == b"Bearer secret"


def has_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Simulate this number of GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "device"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_gpus_have_an_index(monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    """PyTorch refuses to select a GPU without an index, so the settings always have one."""
    has_gpus(monkeypatch, 2)
    for settings in (GeneratorSettings(device=name), TextEncoderSettings(device=name)):
        assert str(settings.torch_device()) == device
    bfloat16 = device != "cpu"
    assert GeneratorSettings(device=name).torch_dtype() == (torch.bfloat16 if bfloat16 else torch.float32)


def test_without_a_gpu_auto_selects_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is requested by name is refused, with the build of PyTorch."""
    has_gpus(monkeypatch, 0)
    assert GeneratorSettings().torch_device() == torch.device("cpu")
    for version, built_for in (("13.0", "CUDA 13.0"), (None, "the CPU alone")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(
            ModelRefused, match=f"GENERATOR_DEVICE=cuda: PyTorch, built for {built_for}, can use no GPU"
        ):
            GeneratorSettings(device="cuda").torch_device()


@pytest.mark.parametrize(
    ("count", "right"), [(1, "1 GPU here; set it to cuda:0"), (2, "2 GPUs here; set it to cuda:0 to cuda:1")]
)
def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, right: str) -> None:
    """The message has the number of GPUs and their indices."""
    has_gpus(monkeypatch, count)
    with pytest.raises(ModelRefused, match=f"^TEXT_ENCODER_DEVICE=cuda:7: PyTorch sees {right}$"):
        TextEncoderSettings(device="cuda:7").torch_device()


@pytest.mark.parametrize(
    "name",
    ["cuda:-1", "gpu", "mps", "xpu", "cuda:x", "cpu:3", "cpu:0", "meta", "cuda:", "cuda:01", "cuda:٣", " cuda", "CUDA"],
)
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Devices that are not supported, though PyTorch knows them, are refused with variable, value and valid values."""
    has_gpus(monkeypatch, 2)
    for settings, variable in (
        (GeneratorSettings(device=name), "GENERATOR_DEVICE"),
        (TextEncoderSettings(device=name), "TEXT_ENCODER_DEVICE"),
    ):
        with pytest.raises(ModelRefused) as refused:
            settings.torch_device()
        message = f"{variable}={name}: no such device is supported; set it to auto, cpu, cuda, or cuda:N"
        assert str(refused.value) == message


def test_an_index_that_is_too_large_for_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared before PyTorch sees it, which keeps only eight bits."""
    has_gpus(monkeypatch, 2)
    with pytest.raises(ModelRefused, match="sees 2 GPUs"):
        GeneratorSettings(device="cuda:256").torch_device()


@pytest.mark.parametrize("service", ["generator_service", "text_encoder_service"])
def test_a_service_does_not_start_with_a_keys_file_without_keys(service: str, tmp_path: Path) -> None:
    """It ends with status 1 and one line that names the variable and the file, before it listens."""
    prefix = service.removesuffix("_service").upper()
    (tmp_path / "keys").write_text("# to be filled\n")
    variables = {f"{prefix}_KEYS_FILE": str(tmp_path / "keys"), f"{prefix}_PORT": "0", "FLUX2_MODEL": "no/such"}
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", service], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("flux2: bad setting: ")
    assert f"{prefix}_KEYS_FILE: {tmp_path / 'keys'} holds no key" in line


@pytest.mark.parametrize("service", ["generator_service", "text_encoder_service"])
def test_a_service_reports_it_in_one_line(service: str, tmp_path: Path) -> None:
    """It ends with status 1 before it looks for a model."""
    variable = f"{service.removesuffix('_service').upper()}_DEVICE"
    environment = os.environ | {variable: "cuda:x", "FLUX2_MODEL": "no/such", "PYTHONPATH": str(ROOT)}
    environment |= {f"{variable.removesuffix('DEVICE')}PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", service], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = [message for message in done.stderr.splitlines() if message.startswith("flux2:")]
    assert lines == [f"flux2: {variable}=cuda:x: no such device is supported; set it to auto, cpu, cuda, or cuda:N"]
    assert "Traceback" not in done.stderr


def test_the_option_keep_has_an_index_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``--keep`` is parsed like the settings."""
    has_gpus(monkeypatch, 2)
    assert str(resolve_storage("cuda")) == "cuda:0"
    assert resolve_storage(str(tmp_path)) == tmp_path
    with pytest.raises(InvalidRequest, match="--keep=cuda:2: PyTorch sees 2 GPUs here; set it to cuda:0 to cuda:1, or"):
        resolve_storage("cuda:2")


def test_settings_need_no_torch(tmp_path: Path) -> None:
    """Settings are read and profiles chosen even if torch cannot be imported, so that a check can report it."""
    code = """
import sys
sys.modules["torch"] = None
from generator_service.pipelines.optimizations.profiles import Machine, choose
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings
print(choose(GeneratorSettings().performance, Machine("cpu")).profile, TextEncoderSettings().profile_on((9, 0)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact fast\n", "")
