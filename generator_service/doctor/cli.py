"""The command ``flux2 doctor``."""

from typing import Annotated

import typer
from rich.console import Console

from flux2_shared.model.subfolders import Service

out = Console()
err = Console(stderr=True)


def doctor(
    is_json: Annotated[bool, typer.Option("--json", help="Print the report as a JSON object.")] = False,
    service: Annotated[
        Service | None,
        typer.Option("--for", help="Check for this service only. Default: both, if TEXT_ENCODER_URL is this host."),
    ] = None,
) -> None:
    """Check whether the services can run on this host; exit status 1 if not. Does not load the model."""
    from generator_service.doctor.examination import examine  # noqa: PLC0415 - --help needs none of it
    from generator_service.doctor.host import Host  # noqa: PLC0415
    from generator_service.doctor.report import as_json, is_ok, print_report  # noqa: PLC0415

    with err.status("checking this host"):
        checks = examine(Host(), service)
    if is_json:
        typer.echo(as_json(checks))
    else:
        print_report(checks, out)
    raise typer.Exit(0 if is_ok(checks) else 1)
