"""``flux2 generate`` and ``flux2 inspect``: images from a running generator or, with ``--local``, this process."""

import base64
import json
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from flux2_shared.model.compile_cache import replace_unwritable_caches
from generator_service.cli.console import finite, one_line_errors, parse_size, step_timeline
from generator_service.cli.output_file import output_file

if TYPE_CHECKING:
    from generator_service.engine.imaging import ImageFormat

out = Console()
err = Console(stderr=True)

SUFFIXES: "dict[str, ImageFormat]" = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
RANDOM_SEEDS = 2**32
"""Random seeds are below this."""
DEFAULT_OUTPUT = Path("flux2.png")
DEFAULT_SIDE = 1024
BYTES_PER_PIXEL = 3
MAX_PIXELS = 2**24
"""Larger sizes are refused by any service, and need no space."""
MAX_IMAGE_BYTES = 48 * 2**20
"""Largest reference image: the service's default limit of bodies."""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the image shows.")] = None,
    cache: Annotated[str | None, typer.Option(help="none, slow, medium, fast, ultra, or a number of steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="50")] = None,
    seed: Annotated[int | None, typer.Option(help="Random if absent.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="4.0")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A reference image to edit; repeatable.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA adapter, NAME or NAME:SCALE; repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A .png, .jpg or .webp file.", show_default=str(DEFAULT_OUTPUT)),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=f"Replace {DEFAULT_OUTPUT} if it exists.")] = False,
    like: Annotated[
        Path | None, typer.Option(help="Repeat the generation of this image; other options override its parameters.")
    ] = None,
    url: Annotated[str, typer.Option(envvar="GENERATOR_URL", help="URL of the generator.")] = "http://127.0.0.1:8000",
    token: Annotated[str | None, typer.Option(envvar="GENERATOR_TOKEN", help="Bearer token for the generator.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Load the model (FLUX2_MODEL) into this process.")] = False,
) -> None:
    """Generate an image and save it with its parameters as metadata."""
    with one_line_errors():
        file = choose_output(output, force=force)
        body = body_like(like, has_images=bool(image)) if like else {}
        fields = {
            "prompt": prompt,
            "num_inference_steps": steps,
            "seed": seed,
            "guidance_scale": guidance and finite("--guidance", guidance),
            "images": [read_image(each) for each in image] if image else None,
            "lora": [lora_use(text) for text in lora] if lora else None,
            "cache": int(cache) if cache and re.fullmatch("[0-9]{1,9}", cache) else cache,
            "output_format": format_of(file),
        }
        body |= {name: value for name, value in fields.items() if value is not None}
        body |= dict(zip(("width", "height"), parse_size(size), strict=True)) if size else {}
        check_prompt(body)
        body.setdefault("seed", secrets.randbelow(RANDOM_SEEDS))
        generate_file(file, body, None if local else (url, token))


def generate_file(file: Path, body: dict[str, Any], service: tuple[str, str | None] | None) -> None:
    """Generate the image of ``body`` with the service at a URL and with a token, or in this process (None)."""
    with output_file(file, num_bytes=largest_file(body)) as write:
        data, summary = generate_locally(body) if service is None else generate_remotely(*service, body)
        write(data)
    out.print(Text(str(file), "bold"), f" seed {body['seed']}  {summary}", highlight=False, markup=False)


def inspect(file: Annotated[Path, typer.Argument(help="An image that this service generated.")]) -> None:
    """Print the parameters that an image was generated with."""
    from dataclasses import asdict  # noqa: PLC0415

    from generator_service.engine.imaging import read_provenance  # noqa: PLC0415 - --help needs no Pillow

    with one_line_errors():
        check_is_file(file)
        table = Table("parameter", "value", title=f"{file.name}: AI generated")
        for name, value in asdict(read_provenance(file)).items():
            if value is not None:
                table.add_row(name, str(value))
        out.print(table)


def body_like(file: Path, *, has_images: bool) -> dict[str, Any]:
    """Return the request body that repeats the generation of ``file``, without its reference images."""
    from generator_service.engine.imaging import NoProvenance, read_provenance  # noqa: PLC0415 - as in ``inspect``

    check_is_file(file)
    record = read_provenance(file)
    if record.references_sha256 and not has_images:
        count = len(record.references_sha256)
        raise NoProvenance(f"{file.name} was generated with {count} reference images; add them with --image")
    if record.prompt is None:
        raise NoProvenance(f"{file.name} was generated from embeddings, which the file does not contain")
    names = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "cache")
    return {name: getattr(record, name) for name in names} | ({"lora": record.lora} if record.lora else {})


def lora_use(text: str) -> dict[str, Any]:
    """Parse ``NAME`` or ``NAME:SCALE``."""
    name, _, scale = text.partition(":")
    try:
        return {"name": name} | ({"scale": finite("--lora", float(scale))} if scale else {})
    except ValueError:
        raise typer.BadParameter(f"--lora must be NAME or NAME:SCALE, not {text!r}") from None


def choose_output(output: Path | None, *, force: bool) -> Path:
    """Return the file to write; the default file is not replaced unless ``force`` is set."""
    if output is None and DEFAULT_OUTPUT.exists() and not force:
        raise FileExistsError(f"{DEFAULT_OUTPUT} exists; give a name with -o, or replace it with --force")
    return DEFAULT_OUTPUT if output is None else output


def largest_file(body: dict[str, Any]) -> int:
    """Return the size of the image without compression, in bytes."""
    width, height = (int(body.get(name, DEFAULT_SIDE)) for name in ("width", "height"))
    return BYTES_PER_PIXEL * min(width * height, MAX_PIXELS)


def read_image(file: Path) -> str:
    """Read a reference image as base64."""
    check_is_file(file)
    if file.stat().st_size > MAX_IMAGE_BYTES:
        raise OSError(f"{file} is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    return base64.b64encode(file.read_bytes()).decode()


def check_is_file(file: Path) -> None:
    """Raise ``OSError`` if ``file`` is missing or something else."""
    if not file.is_file():
        raise OSError(f"{file} is not a file" if file.exists() else f"{file} does not exist")


def check_prompt(body: dict[str, Any]) -> None:
    """Raise ``BadParameter`` if there is no prompt, or if bytes of another encoding in a terminal are not UTF-8."""
    if "prompt" not in body:
        raise typer.BadParameter("give a prompt, or --like FILE")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the prompt and all names must be UTF-8") from None


def format_of(file: Path) -> "ImageFormat":
    """Return the image format for a file name."""
    if file.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"the output's name must end in one of {', '.join(SUFFIXES)}")
    return SUFFIXES[file.suffix.lower()]


def generate_remotely(url: str, token: str | None, body: dict[str, Any]) -> tuple[bytes, str]:
    """Generate with a running generator; return the file and a summary."""
    from generator_service.cli.client import stream_generate  # noqa: PLC0415 - --help needs no httpx

    with err.status("generating") as status:
        response = stream_generate(url, body, StepTimeline(status).on_step, token)
    headers = response.headers
    steps = f"{headers['x-steps-computed']} of {headers['x-steps-total']} steps computed, {headers['x-schedule']}"
    if headers.get("x-prompt-truncated") == "true":
        warn_of_truncation()
    return response.data, f"{steps}, {float(headers['x-denoise-ms']) / 1000:.2f} s"


def generate_locally(body: dict[str, Any]) -> tuple[bytes, str]:
    """Load the model into this process and generate; return the file and a summary."""
    with err.status("loading the model") as status:
        replace_unwritable_caches()
        from generator_service.cli.local import generate  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        result = generate(body, GeneratorSettings(), StepTimeline(status).on_step)
    schedule = result.params.schedule
    steps = f"{schedule.num_computed} of {schedule.num_steps} steps computed, {schedule}"
    if result.params.is_truncated:
        warn_of_truncation()
    return result.data, f"{steps}, {result.denoise_s:.2f} s"


def warn_of_truncation() -> None:
    err.print("flux2: the prompt is longer than the text encoder's maximum; its end was ignored", highlight=False)


class StepTimeline:
    """Shows the finished steps: computed ones as blocks, reused ones as dots."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._timeline = Text()

    def on_step(self, _step: int, is_computed: bool) -> None:
        self._timeline.append(step_timeline([is_computed]))
        self._status.update(self._timeline)
