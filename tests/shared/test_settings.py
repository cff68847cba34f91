"""Which environment variables a setting is read from."""

import pytest

from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings


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
