"""The embedding of a prompt, and the headers of ``POST /predict`` that say where it comes from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    import torch

TRUNCATED_HEADER = "x-truncated-prompts"
"""Response header of ``POST /predict``: the indices of truncated prompts, separated by commas."""

MODEL_HEADER = "x-model"
REVISION_HEADER = "x-model-revision"
"""Response headers of ``POST /predict``: the encoder's model and its revision, percent-encoded UTF-8."""


@dataclass(frozen=True)
class ModelVersion:
    """The weights that a service has loaded: a hub id and a commit, or a folder's name and ``local``."""

    name: str
    revision: str

    def headers(self) -> dict[str, str]:
        """Return the headers that name this version."""
        return {MODEL_HEADER: quote(self.name), REVISION_HEADER: quote(self.revision)}

    def mismatches(self, headers: Mapping[str, str]) -> bool | None:
        """Return whether the headers of a response name another version; None if they name none."""
        named = {header: unquote(headers[header]) for header in (MODEL_HEADER, REVISION_HEADER) if header in headers}
        own = {MODEL_HEADER: self.name, REVISION_HEADER: self.revision}
        return any(own[header] != name for header, name in named.items()) if named else None


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
