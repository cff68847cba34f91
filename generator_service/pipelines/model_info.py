"""Properties of a loaded model that are needed to check requests and to fill in defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

from generator_service.lemica import Signature
from generator_service.pipelines.lora import Adapter


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model. Picklable, because Ray sends it to processes without the weights."""

    name: str
    revision: str
    fingerprint: str
    """Fingerprint of the transformer's weights."""
    dtype: str
    libraries: str
    """Library versions that images may depend on."""
    embedding_width: int
    default_side: int
    """Default width and height in pixels."""
    pixels_per_token: int
    """Pixels per token along each side."""
    adapters: tuple[str, ...] = ()
    """Names of the available LoRA adapters."""

    @property
    def default_num_tokens(self) -> int:
        """Number of tokens of an image of the default size."""
        return self.num_image_tokens(self.default_side, self.default_side)

    def num_image_tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of an image in the transformer."""
        return width * height // self.pixels_per_token**2

    def signature(
        self,
        *,
        num_steps: int,
        width: int,
        height: int,
        guidance_scale: float,
        is_edit: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> Signature:
        """Return the signature that a schedule for such an image must match. Adapters are part of the model."""
        return Signature(
            model=" + ".join([self.fingerprint, *map(str, adapters)]),
            num_steps=num_steps,
            image_tokens=self.num_image_tokens(width, height),
            guidance_scale=guidance_scale,
            task="edit" if is_edit else "text-to-image",
            dtype=self.dtype,
            libraries=self.libraries,
        )
