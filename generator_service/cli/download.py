"""``flux2 weights``: download a model before the services start, so that they need no access to the hub."""

from typing import Annotated

import typer
from rich.console import Console

from flux2_shared.model.subfolders import ALL_SUBFOLDERS, SUBFOLDERS, Service
from generator_service.cli.console import one_line_errors

out = Console()


def weights(
    service: Annotated[Service | None, typer.Option("--for", help="Download only what this service needs.")] = None,
) -> None:
    """Download the model (FLUX2_MODEL at FLUX2_REVISION) from the hub. Cached files are not downloaded again."""
    with one_line_errors():
        from flux2_shared.model.folder import find_model  # noqa: PLC0415
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        settings = GeneratorSettings()
        subfolders = SUBFOLDERS[service] if service else ALL_SUBFOLDERS
        folder = find_model(settings.model, settings.revision, subfolders)
        out.print(f"{folder.name} is available at revision {folder.revision}: {', '.join(subfolders)}", highlight=False)
