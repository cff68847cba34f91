"""Which environment variables a setting is read from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generator_service.settings import GeneratorSettings
from shared.errors import ModelRefused
from text_encoder_service.settings import TextEncoderSettings

ROOT = Path(__file__).parents[2]


def test_common_names_of_the_environment_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """``MODEL``, ``REVISION`` or ``PORT`` of some other program mean nothing here."""
    for name in ("MODEL", "REVISION", "PORT", "HOST", "TOKEN", "DEVICE"):
        monkeypatch.setenv(name, "other")
    settings = GeneratorSettings()
    assert (settings.model, settings.revision) == ("black-forest-labs/FLUX.2-dev", "main")
    assert (settings.port, settings.token) == (8000, None)


def test_one_variable_sets_the_model_of_both_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FLUX2_MODEL`` and ``FLUX2_REVISION`` hold for both."""
    monkeypatch.setenv("FLUX2_MODEL", "a/model")
    monkeypatch.setenv("FLUX2_REVISION", "0123")
    for settings in (GeneratorSettings(), TextEncoderSettings()):
        assert (settings.model, settings.revision) == ("a/model", "0123")


def test_the_encoders_keys_open_it_to_the_generator(tmp_path: Path) -> None:
    """One file serves both: what the encoder asks for, the generator sends; a token of its own goes first."""
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
    assert GeneratorSettings(text_encoder_keys_file=keys).token_to_send() is None


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with what PyTorch was built for; ``auto`` takes the CPU instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert GeneratorSettings().torch_device() == torch.device("cpu")
    with pytest.raises(ModelRefused, match=r"built for CUDA 13.0, can use no GPU here"):
        GeneratorSettings(device="cuda").torch_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert GeneratorSettings(device="cuda:1").torch_device() == torch.device("cuda:1")


def test_settings_need_no_torch(tmp_path: Path) -> None:
    """Settings are read and profiles are chosen where torch cannot be imported, so that a check can name it."""
    code = """
import sys
sys.modules["torch"] = None
from generator_service.pipelines.performance import Machine, choose
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings
print(choose(GeneratorSettings().performance, Machine("cpu")).profile, TextEncoderSettings().profile_on((9, 0)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact fast\n", "")
