"""``make demo``: generates one prompt in every cache mode through both services, and prints a table."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from demo_model.services import DemoError, running_services
from generator_service.cli.client import GeneratedFile, GeneratorError, post_generate

PROMPT = "a small red circle above a large blue square on a white background"
MODES = ("none", "slow", "medium", "fast", "ultra")
SEED = 0
OUTPUT = Path("demo-output")
CAPTION_HEIGHT = 30


@dataclass(frozen=True)
class Result:
    """The response of one mode."""

    mode: str
    answer: GeneratedFile

    @property
    def steps(self) -> str:
        """Computed steps / all steps."""
        return f"{self.answer.headers['x-steps-computed']}/{self.answer.headers['x-steps-total']}"

    @property
    def seconds(self) -> float:
        """Denoising time."""
        return float(self.answer.headers["x-denoise-ms"]) / 1000

    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.answer.data)).convert("RGB")

    def pixels(self) -> np.ndarray:
        """Return the image as ``[H, W, 3]``, 0..255."""
        return np.asarray(self.image(), dtype=np.float64)


def generate_all(url: str) -> list[Result]:
    """Generate the prompt in every mode, after one image to warm up."""
    body = {"prompt": PROMPT, "seed": SEED}
    post_generate(url, {**body, "cache": "none"})
    return [Result(mode, post_generate(url, {**body, "cache": mode})) for mode in MODES]


def contact_sheet(results: Sequence[Result]) -> Image.Image:
    """Place all images side by side, each with its mode below."""
    images = [result.image() for result in results]
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height + CAPTION_HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (result, image) in enumerate(zip(results, images, strict=True)):
        sheet.paste(image, (column * width, 0))
        pen.text((column * width + 4, height + 2), f"{result.mode}\n{result.steps} steps", fill="black")
    return sheet


def table(results: Sequence[Result]) -> Table:
    """Tabulate the computed steps, time and PSNR of each mode."""
    from generator_service.engine.quality import psnr  # noqa: PLC0415 - takes seconds; errors are reported before

    reference = results[0]
    rows = Table("mode", "computed", "seconds", "speed-up", "PSNR against none", title=PROMPT)
    for result in results:
        ratio = psnr(result.pixels(), reference.pixels(), peak=255)
        rows.add_row(
            result.mode,
            result.steps,
            f"{result.seconds:.2f}",
            f"{reference.seconds / result.seconds:.2f}x",
            "same" if ratio == float("inf") else f"{ratio:.1f} dB",
        )
    return rows


def save(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write every image and the contact sheet."""
    files = [folder / f"{result.mode}.png" for result in results]
    for file, result in zip(files, results, strict=True):
        file.write_bytes(result.answer.data)
    sheet = folder / "contact-sheet.png"
    contact_sheet(results).save(sheet)
    return [*files, sheet]


def main() -> int:
    """Run the demo and return the exit status."""
    try:
        OUTPUT.mkdir(parents=True, exist_ok=True)  # fails before the services are started
        with running_services() as services:
            results = generate_all(services.generator_url)
        files = save(results, OUTPUT)
    except KeyboardInterrupt:
        return 130
    except (DemoError, GeneratorError) as error:
        print(f"flux2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"flux2: {error.filename or OUTPUT} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    Console().print(table(results))
    print("images:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
