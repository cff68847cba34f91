"""``flux2 weights``: a model's files, fetched once and ahead of the services, which can then do without the hub."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from generator_service.terminal import one_line_errors

out = Console()


class Service(StrEnum):
    """Whose part of the model."""

    TEXT_ENCODER = "text-encoder"
    GENERATOR = "generator"


def weights(
    service: Annotated[Service | None, typer.Option("--for", help="Only what this service needs.")] = None,
) -> None:
    """Fetch the model (FLUX2_MODEL at FLUX2_REVISION) from the hub. What is there is not fetched again."""
    with one_line_errors():
        from generator_service.pipelines import parts, prompt  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415
        from shared.model_folder import find_model  # noqa: PLC0415

        settings = GeneratorSettings()
        of_service = {Service.TEXT_ENCODER: prompt.PARTS, Service.GENERATOR: parts.PARTS}
        wanted = of_service[service] if service else tuple(part for each in of_service.values() for part in each)
        folder = find_model(settings.model, settings.revision, wanted)
        out.print(f"{folder.name} is here at revision {folder.revision}: {', '.join(wanted)}", highlight=False)
