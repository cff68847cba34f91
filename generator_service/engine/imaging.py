"""Encodes images with their parameters as metadata, and reads the metadata back."""

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
"""Run-length matching only: after PNG's filters, generated images hardly contain other repetitions."""
DEFAULT_QUALITY = 95
PREVIEW_QUALITY = 80
MAX_JPEG_PROMPT_BYTES = 60_000
"""Longest prompt, as JSON, in a JPEG file: EXIF is limited to 64 KiB, which includes the other parameters."""


@dataclass(frozen=True)
class Provenance:
    """The parameters of an image: sufficient to generate it again."""

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
    """Hashes of the files of the reference images, in order."""
    lora: list[dict[str, Any]] = field(default_factory=list)
    """Names and scales of LoRA adapters."""
    performance: str = "exact"
    """The optimization profile: images of different profiles differ by rounding."""
    prompt_truncated: bool = False
    """Whether the end of the prompt was ignored, because it is longer than the text encoder's maximum."""

    @classmethod
    def of(cls, params: "Params", model: "Flux2Model") -> "Provenance":
        """Describe an image that ``model`` generated; contains a hash of the embedding if there is no prompt."""
        from flux2_shared.model.cpu_tensors import float32_sha256  # noqa: PLC0415 - reading metadata needs no torch

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
            prompt_truncated=params.is_truncated,
            references_sha256=[reference.sha256 for reference in params.references],
        )


class NoProvenance(ValueError):
    """The file is not an image, or has no metadata of this service."""


def encode_image(
    image: Image.Image, image_format: ImageFormat, provenance: Provenance, quality: int = DEFAULT_QUALITY
) -> bytes:
    """Encode an image. PNG text chunks, or EXIF for JPEG and WebP, contain ``provenance`` and the AI note.

    ``quality``, 0 to 100, applies to JPEG and WebP.
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
    """Return the name and, if the package is installed, the version of this software."""
    try:
        return f"flux2-services {version('flux2-services')}"
    except PackageNotFoundError:
        return "flux2-services"


def preview_file(image: Image.Image) -> bytes:
    """Encode a preview as JPEG."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = NOTE
    image.save(buffer, "JPEG", exif=exif, quality=PREVIEW_QUALITY)
    return buffer.getvalue()


def read_provenance(file: Path) -> Provenance:
    """Read the metadata of an image file.

    Raises:
        NoProvenance: the file is not a readable image with metadata of this service.
    """
    try:
        # PIL warns about damage and about many pixels, which are not decoded here.
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.format == "PNG":
                parameters = json.loads(str(image.info[PARAMETERS]))
            else:
                parameters = json.loads(image.getexif()[ExifTags.Base.ImageDescription])[PARAMETERS]
        return Provenance(**parameters)
    except Exception as error:  # PIL may raise anything for a damaged or hostile file
        raise NoProvenance(f"{file.name} was not generated by this service, or its metadata was removed") from error
