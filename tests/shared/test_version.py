"""The product's version."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from flux2_shared import version as module


def test_the_version_is_the_installed_one() -> None:
    """It is what the package manager knows."""
    assert module.product_version() == version("flux2-services")


def test_a_bare_copy_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is installed the version is unknown, which is no error."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    assert module.product_version() == "unknown"
