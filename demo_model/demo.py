"""``make demo``: one prompt in every cache mode, through both services, as pictures and a table."""

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
from generator_service.cli.client import Answer, GeneratorError, post_generate
from generator_service.engine.similarity import psnr

PROMPT = "a small red circle above a large blue square on a white background"
MODES = ("none", "slow", "medium", "fast", "ultra")
SEED = 0
OUTPUT = Path("demo-output")
CAPTION_HEIGHT = 30


@dataclass(frozen=True)
class Shot:
    """One mode's picture and how long its denoising took."""

    mode: str
    answer: Answer

    @property
    def steps(self) -> str:
        """Computed of all steps."""
        return f"{self.answer.headers['x-steps-computed']}/{self.answer.headers['x-steps-total']}"

    @property
    def seconds(self) -> float:
        """Time in the denoising loop."""
        return float(self.answer.headers["x-denoise-ms"]) / 1000

    def image(self) -> Image.Image:
        """The picture."""
        return Image.open(io.BytesIO(self.answer.data)).convert("RGB")

    def pixels(self) -> np.ndarray:
        """The picture as ``[H, W, 3]``, 0..255."""
        return np.asarray(self.image(), dtype=np.float64)


def shoot(url: str) -> list[Shot]:
    """The demo's prompt in every mode, after one picture to warm up."""
    body = {"prompt": PROMPT, "seed": SEED}
    post_generate(url, {**body, "cache": "none"})
    return [Shot(mode, post_generate(url, {**body, "cache": mode})) for mode in MODES]


def contact_sheet(shots: Sequence[Shot]) -> Image.Image:
    """All pictures side by side, each with its mode below."""
    images = [shot.image() for shot in shots]
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height + CAPTION_HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (shot, image) in enumerate(zip(shots, images, strict=True)):
        sheet.paste(image, (column * width, 0))
        pen.text((column * width + 4, height + 2), f"{shot.mode}\n{shot.steps} steps", fill="black")
    return sheet


def table(shots: Sequence[Shot]) -> Table:
    """What each mode computed, took, and changed."""
    reference = shots[0]
    result = Table("mode", "computed", "seconds", "speed-up", "PSNR against none", title=PROMPT)
    for shot in shots:
        ratio = psnr(shot.pixels(), reference.pixels(), peak=255)
        result.add_row(
            shot.mode,
            shot.steps,
            f"{shot.seconds:.2f}",
            f"{reference.seconds / shot.seconds:.2f}x",
            "same" if ratio == float("inf") else f"{ratio:.1f} dB",
        )
    return result


def save(shots: Sequence[Shot], folder: Path) -> list[Path]:
    """Write every picture and the contact sheet."""
    files = [folder / f"{shot.mode}.png" for shot in shots]
    for file, shot in zip(files, shots, strict=True):
        file.write_bytes(shot.answer.data)
    sheet = folder / "contact-sheet.png"
    contact_sheet(shots).save(sheet)
    return [*files, sheet]


def main() -> int:
    """Run the demo; 0 if all went well."""
    try:
        OUTPUT.mkdir(parents=True, exist_ok=True)  # first: it may be impossible
        with running_services() as services:
            shots = shoot(services.generator_url)
        files = save(shots, OUTPUT)
    except KeyboardInterrupt:
        return 130
    except (DemoError, GeneratorError) as error:
        print(f"flux2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"flux2: {error.filename or OUTPUT} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    Console().print(table(shots))
    print("pictures:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
