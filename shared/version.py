"""The installed version of this package."""

from importlib.metadata import PackageNotFoundError, version


def product_version() -> str:
    """Return the installed version, or ``unknown`` if the package runs from source without being installed."""
    try:
        return version("flux2-services")
    except PackageNotFoundError:
        return "unknown"
