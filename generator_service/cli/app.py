"""``flux2``: generate images, calibrate schedules, and check and prepare a host.

The modules of commands import nothing that is slow: ``flux2 --help`` needs neither torch nor diffusers.
"""

import typer

from generator_service.cli.download import weights
from generator_service.cli.generate import generate, inspect
from generator_service.cli.schedules import calibrate, schedules
from generator_service.doctor.cli import doctor

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Generate images, calibrate schedules, and check and prepare a host for the services.",
)
for command in (generate, inspect, calibrate, weights, doctor):
    app.command()(command)
app.add_typer(schedules, name="schedules")
