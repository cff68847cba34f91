"""What there is to know of a loaded model without having it: enough to check a request and to fill in its defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

from generator_service.lemica import Signature
from generator_service.pipelines.lora import Adapter


@dataclass(frozen=True)
class ModelInfo:
    """A few words and numbers, which can be sent to where the weights are not."""

    name: str
    revision: str
    fingerprint: str
    """Of the transformer's weights."""
    dtype: str
    libraries: str
    """The versions that pictures may depend on."""
    embedding_width: int
    default_side: int
    """Pixels, of a picture whose size nobody says."""
    pixels_per_token: int
    """Along a side."""
    adapters: tuple[str, ...] = ()
    """The LoRA adapters there are."""

    @property
    def default_num_tokens(self) -> int:
        """Of a picture of the default size."""
        return self.num_image_tokens(self.default_side, self.default_side)

    def num_image_tokens(self, width: int, height: int) -> int:
        """How many tokens a picture has in the transformer."""
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
        """What a schedule for such a picture must have been made for: adapters make it another model."""
        return Signature(
            model=" + ".join([self.fingerprint, *map(str, adapters)]),
            num_steps=num_steps,
            image_tokens=self.num_image_tokens(width, height),
            guidance_scale=guidance_scale,
            task="edit" if is_edit else "text-to-image",
            dtype=self.dtype,
            libraries=self.libraries,
        )
