"""``flux2``: pictures from the command line, by a running generator or, with ``--local``, by this process."""

import base64
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from flux2_shared.model.compile_cache import replace_unwritable_caches
from generator_service.cli import download as weights
from generator_service.cli import schedules as schedules_cli
from generator_service.cli.client import stream_generate
from generator_service.cli.console import one_line_errors, parse_size, step_timeline
from generator_service.doctor.cli import doctor
from generator_service.engine.imaging import ImageFormat, NoProvenance, Provenance, read_provenance

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.add_typer(schedules_cli.schedules, name="schedules")
app.command()(schedules_cli.calibrate)
app.command()(weights.weights)
app.command()(doctor)
out = Console()
err = Console(stderr=True)

SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
DRAWN_SEEDS = 2**32


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    cache: Annotated[str | None, typer.Option(help="none, slow, medium, fast, ultra, or a number of steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="50")] = None,
    seed: Annotated[int | None, typer.Option(help="Drawn if absent.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="4.0")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A reference image to edit; repeatable.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA adapter, NAME or NAME:SCALE; repeatable.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .jpg or .webp file.")] = Path("flux2.png"),
    like: Annotated[Path | None, typer.Option(help="Repeat this picture; other options change it.")] = None,
    url: Annotated[str, typer.Option(envvar="GENERATOR_URL", help="The generator.")] = "http://127.0.0.1:8000",
    token: Annotated[str | None, typer.Option(envvar="GENERATOR_TOKEN", help="Its bearer token.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Load the model (FLUX2_MODEL) into this process.")] = False,
) -> None:
    """Draw a picture and save it, with how it was made inside."""
    with one_line_errors():
        images = [file.read_bytes() for file in image or []]
        body = body_like(like, has_images=bool(images)) if like else {}
        body |= {"images": [base64.b64encode(data).decode() for data in images]} if images else {}
        body |= given(prompt=prompt, num_inference_steps=steps, seed=seed, guidance_scale=guidance)
        body |= {"lora": [lora_use(text) for text in lora]} if lora else {}
        body |= {"cache": int(cache) if cache.isdigit() else cache} if cache else {}
        body |= dict(zip(("width", "height"), parse_size(size), strict=True)) if size else {}
        if "prompt" not in body:
            raise typer.BadParameter("give a prompt, or --like FILE")
        body["output_format"] = format_of(output)
        body.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
        data, told = draw_local(body) if local else draw_remote(url, body, token)
        write_file(output, data)
        out.print(f"[bold]{output}[/bold]  seed {body['seed']}  {told}", highlight=False)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A picture made by this service.")]) -> None:
    """Print how a picture was made."""
    with one_line_errors():
        table = Table("parameter", "value", title=f"{file.name}: AI generated")
        for name, value in asdict(read_provenance(file)).items():
            if value is not None:
                table.add_row(name, str(value))
        out.print(table)


def given(**options: Any) -> dict[str, Any]:
    """Only the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def body_like(file: Path, *, has_images: bool) -> dict[str, Any]:
    """The request that made ``file``, but for its reference images."""
    made: Provenance = read_provenance(file)
    if made.references_sha256 and not has_images:
        count = len(made.references_sha256)
        raise NoProvenance(f"{file.name} was made with {count} reference images: give them with --image")
    if made.prompt is None:
        raise NoProvenance(f"{file.name} was made from embeddings that the file does not hold")
    names = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "cache")
    return {name: getattr(made, name) for name in names} | ({"lora": made.lora} if made.lora else {})


def lora_use(text: str) -> dict[str, Any]:
    """``NAME``, or ``NAME:SCALE``."""
    name, _, scale = text.partition(":")
    try:
        return {"name": name} | ({"scale": float(scale)} if scale else {})
    except ValueError:
        raise typer.BadParameter(f"--lora must be NAME or NAME:SCALE, not {text!r}") from None


def format_of(file: Path) -> ImageFormat:
    """The image format that the file's name asks for."""
    if file.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"the output's name must end in one of {', '.join(SUFFIXES)}")
    return SUFFIXES[file.suffix.lower()]


def write_file(file: Path, data: bytes) -> None:
    """Write all of it or nothing."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error.strerror}") from error


def draw_remote(url: str, body: dict[str, Any], token: str | None) -> tuple[bytes, str]:
    """Ask a running generator."""
    with err.status("drawing") as status:
        answer = stream_generate(url, body, StepTimeline(status).on_step, token)
    headers = answer.headers
    told = f"{headers['x-steps-computed']} of {headers['x-steps-total']} steps computed, {headers['x-schedule']}"
    return answer.data, f"{told}, {float(headers['x-denoise-ms']) / 1000:.2f} s"


def draw_local(body: dict[str, Any]) -> tuple[bytes, str]:
    """Load the model and draw in this process, with a bar that tells computed from reused steps."""
    with err.status("loading the model") as status:
        replace_unwritable_caches()
        from generator_service.cli.local import generate  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        timeline = StepTimeline(status)
        result = generate(body, GeneratorSettings(), timeline.on_step)
    schedule = result.params.schedule
    told = f"{schedule.num_computed} of {schedule.num_steps} steps computed, {schedule}"
    return result.data, f"{told}, {result.denoise_s:.2f} s"


class StepTimeline:
    """A growing timeline of steps: computed ones are blocks, reused ones dots."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._timeline = Text()

    def on_step(self, _step: int, is_computed: bool) -> None:
        """Add one step."""
        self._timeline.append(step_timeline([is_computed]))
        self._status.update(self._timeline)
