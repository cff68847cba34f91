"""``flux2 weights``: download a model before the services start, so that they need no access to the hub."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from generator_service.terminal import one_line_errors

out = Console()


class Service(StrEnum):
    """A service that needs a part of the model."""

    TEXT_ENCODER = "text-encoder"
    GENERATOR = "generator"


def weights(
    service: Annotated[Service | None, typer.Option("--for", help="Download only what this service needs.")] = None,
) -> None:
    """Download the model (FLUX2_MODEL at FLUX2_REVISION) from the hub. Cached files are not downloaded again."""
    with one_line_errors():
        from generator_service.pipelines import parts, prompt  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415
        from shared.model_folder import find_model  # noqa: PLC0415

        settings = GeneratorSettings()
        of_service = {Service.TEXT_ENCODER: prompt.PARTS, Service.GENERATOR: parts.PARTS}
        subfolders = of_service[service] if service else tuple(part for each in of_service.values() for part in each)
        folder = find_model(settings.model, settings.revision, subfolders)
        out.print(f"{folder.name} is available at revision {folder.revision}: {', '.join(subfolders)}", highlight=False)
