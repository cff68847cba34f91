"""The product's version."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from flux2_shared import version as module


def test_the_version_is_the_installed_one() -> None:
    assert module.product_version() == version("flux2-services")


def test_a_bare_copy_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installation the version is unknown, which is not an error."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    assert module.product_version() == "unknown"
