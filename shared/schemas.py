"""The schemas that both services share: the text encoder's API, and the body of errors."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator
from pydantic_core import PydanticCustomError

Text = Annotated[StrictStr, Field(min_length=0)]
"""Text that can be encoded as UTF-8. Pydantic rejects JSON's lone surrogates only if the field has a constraint."""

ShortText = Annotated[str, Field(max_length=300)]
Size = Annotated[int, Field(ge=0, le=2**31)]
MAX_FIELDS = 100
"""Largest number of fields of an object. An error is built for each that is unknown, which takes microseconds."""
MAX_PROMPTS = 1000
"""Bounds the list of prompts before its items are checked; the text encoder's limit is a setting."""


class Strict(BaseModel):
    """Base class that rejects unknown fields and implicit conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise too_many_fields(len(data))
        return data


def too_many_fields(count: int) -> PydanticCustomError:
    """Return the error about an object with more than ``MAX_FIELDS`` fields."""
    counts = {"count": count, "limit": MAX_FIELDS}
    return PydanticCustomError("too_many_fields", "has {count} fields, more than {limit}", counts)


class PredictRequest(Strict):
    """Body of ``POST /predict``."""

    prompt: Annotated[
        Text | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)],
        Field(description="One prompt, or a list of them; a list gives one row each.", examples=["a red circle"]),
    ]


class EncoderInfo(BaseModel):
    """Body of the text encoder's ``GET /info``, which the generator compares with its own model."""

    model_config = ConfigDict(frozen=True)

    model: ShortText
    revision: ShortText
    hidden_layers: Annotated[tuple[int, ...], Field(max_length=1000)]
    hidden_size: Size
    max_sequence_length: Size
    dtype: ShortText
    version: ShortText
    attention: ShortText | None = None
    """The attention kernels that are used; optional."""

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Shape of one prompt's embedding: tokens and width."""
        return self.max_sequence_length, len(self.hidden_layers) * self.hidden_size

    def mismatch(self, model: str, revision: str, embedding_shape: tuple[int, int] | None) -> str | None:
        """Return why the embeddings do not suit a generator of this model, or None. A shape of None is not compared."""
        if embedding_shape is not None and self.embedding_shape != embedding_shape:
            have, want = list(self.embedding_shape), list(embedding_shape)
            return f"the text encoder's embeddings have shape {have}, this model takes {want}"
        if (self.model, self.revision) != (model, revision):
            return f"the text encoder serves {self.model}@{self.revision}, this is {model}@{revision}"
        return None


class ErrorDetail(BaseModel):
    """The part of an error's body that OpenAI's and Hugging Face's clients read."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """Body of every error (RFC 9457, ``application/problem+json``)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    error: ErrorDetail
