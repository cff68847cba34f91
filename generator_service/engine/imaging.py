"""Pictures to bytes, with how they were made inside, and back."""

import io
import json
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image, PngImagePlugin

if TYPE_CHECKING:
    from generator_service.pipelines.flux2 import Flux2Model
    from generator_service.pipelines.params import Params

ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
NOTE = "AI generated"
PARAMETERS = "flux2"
"""The key of the PNG text chunk with the parameters as JSON."""
PNG_STRATEGY = zlib.Z_RLE
"""Matches only runs of one byte. Noise, which generated images have, holds no others after PNG's filters."""
DEFAULT_QUALITY = 95
PREVIEW_QUALITY = 80
MAX_JPEG_PROMPT_BYTES = 60_000
"""Of a prompt as JSON: a JPEG file's EXIF ends at 64 KiB, and the rest of the record takes some of it."""


@dataclass(frozen=True)
class Provenance:
    """How a picture was made: enough to make it again."""

    prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    cache: str | int | dict[str, float]
    schedule: str
    computed_steps: list[int]
    model: str
    revision: str
    prompt_embeds_sha256: str | None = None
    references_sha256: list[str] = field(default_factory=list)
    """Of the reference images' files, in order."""
    lora: list[dict[str, Any]] = field(default_factory=list)
    """Names and scales of LoRA adapters."""
    performance: str = "exact"
    """The profile: two of them generate images that differ by rounding."""

    @classmethod
    def of(cls, params: "Params", model: "Flux2Model") -> "Provenance":
        """The record of an image that ``model`` generated; with a hash of the embedding if there is no prompt."""
        from flux2_shared.model.cpu_tensors import float32_sha256  # noqa: PLC0415 - files are read without torch

        return cls(
            prompt=params.prompt,
            width=params.width,
            height=params.height,
            num_inference_steps=params.schedule.num_steps,
            guidance_scale=params.guidance_scale,
            seed=params.seed,
            cache=params.cache,
            schedule=str(params.schedule),
            computed_steps=list(params.schedule.computed_steps),
            model=model.info.name,
            revision=model.info.revision,
            performance=model.performance.profile,
            prompt_embeds_sha256=float32_sha256(params.embeddings) if params.prompt is None else None,
            lora=[asdict(adapter) for adapter in params.adapters],
            references_sha256=[reference.sha256 for reference in params.references],
        )


class NoProvenance(ValueError):
    """The file is no picture, or says nothing of how it was made."""


def encode_image(
    image: Image.Image, image_format: ImageFormat, provenance: Provenance, quality: int = DEFAULT_QUALITY
) -> bytes:
    """The picture as a file: PNG text chunks, or EXIF for JPEG and WebP, carry ``provenance`` and the AI note.

    ``quality``, 0 to 100, is of JPEG and WebP.
    """
    buffer = io.BytesIO()
    parameters = json.dumps(asdict(provenance))
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("Software", software())
        chunks.add_text("Comment", NOTE)
        chunks.add_text(PARAMETERS, parameters)
        image.save(buffer, "PNG", pnginfo=chunks, compress_type=PNG_STRATEGY)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = software()
        exif[ExifTags.Base.ImageDescription] = json.dumps({"note": NOTE, PARAMETERS: asdict(provenance)})
        image.save(buffer, image_format.upper(), exif=exif, quality=quality)
    return buffer.getvalue()


def software() -> str:
    """What wrote the file; without its version where it runs from a bare copy of its source."""
    try:
        return f"flux2-services {version('flux2-services')}"
    except PackageNotFoundError:
        return "flux2-services"


def preview_file(image: Image.Image) -> bytes:
    """An unfinished picture as a small JPEG file."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = NOTE
    image.save(buffer, "JPEG", exif=exif, quality=PREVIEW_QUALITY)
    return buffer.getvalue()


def read_provenance(file: Path) -> Provenance:
    """How the picture in ``file`` was made.

    Raises:
        NoProvenance: it is no readable picture of this service.
    """
    try:
        # Warnings: of damage, or many pixels, which stay compressed here.
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.format == "PNG":
                found = json.loads(str(image.info[PARAMETERS]))
            else:
                found = json.loads(image.getexif()[ExifTags.Base.ImageDescription])[PARAMETERS]
        return Provenance(**found)
    except Exception as error:  # a damaged or hostile file can raise anything in PIL
        raise NoProvenance(f"{file.name} is no picture made by this service, or its record was removed") from error
