"""HTTP client of the text encoder service, or of another service with the same protocol.

Responses are untrusted: bodies are read up to a limit and parsed by ``flux2_shared.wire``.
"""

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Self

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from flux2_shared.embedding import TRUNCATED_HEADER, Embedding, ModelVersion
from flux2_shared.errors import Flux2Error, InvalidRequest, OutOfMemory
from flux2_shared.observability.logs import request_id
from flux2_shared.observability.tracing import Tracing
from flux2_shared.schemas import EncoderInfo
from flux2_shared.thread_pool import ThreadPool
from flux2_shared.wire import (
    EMBEDDING_DTYPES,
    MAX_HEADER_BYTES,
    SAFETENSORS_MEDIA_TYPE,
    TORCH_MEDIA_TYPE,
    WireError,
    parse_safetensors,
    parse_torch,
)
from generator_service.clients.bounded_body import BodyRefused, read_body
from generator_service.clients.peer import PeerClient
from generator_service.errors import BadEncoderResponse, EncoderMismatch, EncoderTimeout, EncoderUnavailable

ACCEPT = {"Accept": f"{SAFETENSORS_MEDIA_TYPE}, {TORCH_MEDIA_TYPE};q=0.9"}
RETRIED_STATUSES = {502, 503, 504}
MISMATCH = "the text encoder serves another model or revision than this generator"
RETRY_MISMATCH_S = 30.0
"""``Retry-After`` while the encoder has another model: until a deployment has replaced one of the two."""
MAX_INFO_BYTES = 64 * 2**10
CONNECT_TIMEOUT_S = 2.0
"""Allows for one retransmission, which TCP sends after one second."""
INFO_TIMEOUT_S = 3.0
"""Timeout of ``/info``, which readiness probes wait for."""


class _ProblemCode(BaseModel):
    """The field of problem details that the client reads."""

    code: str


class TextEncoderClient:
    """Client that makes one attempt per call. Use it as an async context manager.

    Args:
        url: URL of the service, with or without ``/predict``.
        embedding_shape: tokens and width that the transformer expects.
        model: the model that the embeddings must be for; None to accept any.
        token: sent as a bearer token.
        timeout_s: timeout for one attempt.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        embedding_shape: tuple[int, int],
        model: ModelVersion | None = None,
        *,
        token: SecretStr | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/predict")
        self._shape = embedding_shape
        self._model = model
        self._is_other_model = False
        """What the last ``/info`` said, for encoders whose embeddings do not."""
        self._timeout_s = timeout_s
        self._threads = ThreadPool("embeddings")
        open_client = partial(
            PeerClient, _own_error, token, timeout_s=timeout_s, connect_timeout_s=CONNECT_TIMEOUT_S, transport=transport
        )
        self._prompts = open_client()
        self._probes = open_client(max_connections=1)  # of their own, so that neither waits for the other

    def trace(self, tracing: Tracing) -> None:
        """Record prompts as spans and propagate the trace context."""
        self._prompts.trace(tracing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._threads.__aexit__()

    async def info(self) -> EncoderInfo | None:
        """Return the service's model and embedding shape; None if it has no ``/info``.

        Raises:
            EncoderUnavailable: the service cannot be reached.
            EncoderTimeout: the service did not respond in time.
            BadEncoderResponse: the response is not an ``EncoderInfo``.
        """
        try:
            async with (
                asyncio.timeout(min(INFO_TIMEOUT_S, self._timeout_s)),
                self._probes.stream("GET", f"{self._base}/info", headers=ACCEPT) as response,
            ):
                if response.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
                    self._is_other_model = False
                    return None
                if response.status_code != HTTPStatus.OK:
                    raise await _error_of(response)
                info = EncoderInfo.model_validate_json(await read_body(response, MAX_INFO_BYTES))
        except ValidationError as error:
            raise BadEncoderResponse("the text encoder's /info is not valid") from error
        except TimeoutError as error:
            raise EncoderTimeout("the text encoder's /info did not respond in time") from error
        own = self._model
        self._is_other_model = own is not None and info.mismatch(own.name, own.revision, self._shape) is not None
        return info

    async def embed(self, prompt: str) -> Embedding:
        """Return the prompt's embedding, of shape ``[1, L, D]``; raises the errors of ``RetryingEncoder.embed``."""
        tokens, width = self._shape
        limit = tokens * width * max(dtype.itemsize for dtype in EMBEDDING_DTYPES) + MAX_HEADER_BYTES
        headers = ACCEPT | ({"x-request-id": request_id.get()} if request_id.get() else {})
        body, url = {"prompt": prompt}, f"{self._base}/predict"
        async with self._prompts.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != HTTPStatus.OK:
                raise await _error_of(response)
            is_other_model = self._model is not None and self._model.mismatches(response.headers)
            if self._is_other_model if is_other_model is None else is_other_model:
                raise EncoderMismatch(MISMATCH, retry_after_s=RETRY_MISMATCH_S)
            content = await read_body(response, limit)
            media_type = response.headers.get("content-type", "").split(";")[0]
        parse = parse_safetensors if media_type == SAFETENSORS_MEDIA_TYPE else parse_torch
        try:
            tensor = await self._threads.run(parse, content, (1, tokens, width))
        except WireError as error:
            raise BadEncoderResponse("the text encoder's response is not a prompt embedding for this model") from error
        truncated = [index.strip() for index in response.headers.get(TRUNCATED_HEADER, "").split(",")]
        return Embedding(tensor, is_truncated="0" in truncated)


def _own_error(error: Exception) -> Flux2Error:
    """Return the error that a failed request or a refused body stands for."""
    match error:
        case BodyRefused():
            return BadEncoderResponse(f"the text encoder's response is {error}")
        case httpx.RemoteProtocolError():
            return BadEncoderResponse("the text encoder's response is incomplete")
        case httpx.ReadTimeout() | httpx.WriteTimeout():
            return EncoderTimeout("the text encoder did not respond in time")
        case _:  # such as a timeout while connecting, which is usual for a host that is down
            return EncoderUnavailable("the text encoder cannot be reached", retry_after_s=5)


async def _error_of(response: httpx.Response) -> Flux2Error:
    """Return the error that a status other than 200 stands for."""
    status = response.status_code
    if status == OutOfMemory.status and await _error_code(response) == OutOfMemory.code:  # retrying would not help
        return OutOfMemory("the text encoder has too little memory for this prompt now")
    if status in RETRIED_STATUSES or status == HTTPStatus.TOO_MANY_REQUESTS:
        return EncoderUnavailable(f"the text encoder is unavailable (status {status})", retry_after_s=5)
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY):
        return InvalidRequest("prompt: rejected by the text encoder; it may be too long", param="prompt")
    return BadEncoderResponse(f"the text encoder responded with status {status}")


async def _error_code(response: httpx.Response) -> str | None:
    """Return the ``code`` of problem details, if the body has one."""
    try:
        return _ProblemCode.model_validate_json(await read_body(response, MAX_INFO_BYTES)).code
    except (BodyRefused, ValidationError):
        return None  # the status is sufficient
