"""``flux2 weights``: download a model before the services start, so that they need no access to the hub."""

from typing import Annotated

import typer
from rich.console import Console

from generator_service.cli.console import one_line_errors
from generator_service.settings import Service

out = Console()


def weights(
    service: Annotated[Service | None, typer.Option("--for", help="Download only what this service needs.")] = None,
) -> None:
    """Download the model (FLUX2_MODEL at FLUX2_REVISION) from the hub. Cached files are not downloaded again."""
    with one_line_errors():
        from flux2_shared.model.folder import find_model  # noqa: PLC0415
        from generator_service.pipelines import components as parts  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.pipelines import prompt  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        settings = GeneratorSettings()
        of_service = {Service.TEXT_ENCODER: prompt.PARTS, Service.GENERATOR: parts.PARTS}
        subfolders = of_service[service] if service else tuple(part for each in of_service.values() for part in each)
        folder = find_model(settings.model, settings.revision, subfolders)
        out.print(f"{folder.name} is available at revision {folder.revision}: {', '.join(subfolders)}", highlight=False)
