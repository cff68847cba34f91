"""The embedding of a prompt, and the header that reports truncated prompts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRUNCATED_HEADER = "x-truncated-prompts"
"""Response header of ``POST /predict``: the indices of truncated prompts, separated by commas."""


@dataclass(frozen=True)
class Embedding:
    """The embedding of one prompt."""

    tensor: "torch.Tensor"
    """``[1, L, layers * hidden]`` on the CPU."""
    is_truncated: bool = False
    """Whether the prompt was longer than the model's maximum, so that its end was ignored."""

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def truncated_indices(embeddings: Iterable[Embedding]) -> str:
    """Return the value of ``TRUNCATED_HEADER``; empty if no prompt was truncated."""
    return ",".join(str(index) for index, each in enumerate(embeddings) if each.is_truncated)
