"""The command ``flux2 doctor``."""

from typing import Annotated

import typer
from rich.console import Console

from generator_service.weights import Service

out = Console()
err = Console(stderr=True)


def doctor(
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    service: Annotated[
        Service | None,
        typer.Option("--for", help="Only what this service needs; else both, if TEXT_ENCODER_URL is this host."),
    ] = None,
) -> None:
    """Say what this host has and lacks for the services; status 1 if they would not start. Loads no model."""
    from generator_service.doctor.examination import examine  # noqa: PLC0415 - --help needs none of it
    from generator_service.doctor.host import Host  # noqa: PLC0415
    from generator_service.doctor.report import as_json, is_ok, print_report  # noqa: PLC0415

    with err.status("looking at this host"):
        checks = examine(Host(), service)
    if is_json:
        typer.echo(as_json(checks))
    else:
        print_report(checks, out)
    raise typer.Exit(0 if is_ok(checks) else 1)
