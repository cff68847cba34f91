"""The version of the product that runs."""

from importlib.metadata import PackageNotFoundError, version


def product_version() -> str:
    """As it was installed; ``unknown`` where it runs from a bare copy of its source."""
    try:
        return version("flux2-services")
    except PackageNotFoundError:
        return "unknown"
