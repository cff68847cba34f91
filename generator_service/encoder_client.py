"""Asks a text encoder service for prompt embeddings: ours, or any of the same protocol.

Nothing that comes back is trusted: bodies are bounded while they arrive and parsed by ``shared.wire``.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Self

import httpx
import torch
from pydantic import BaseModel, SecretStr, ValidationError

from generator_service.embedder import Embedder
from generator_service.http_body import IDENTITY, BodyRefused, read_body
from shared.errors import BadEncoderResponse, EncoderTimeout, EncoderUnavailable, InvalidRequest, OutOfMemory
from shared.logs import request_id
from shared.schemas import EncoderInfo
from shared.thread_pool import ThreadPool
from shared.tracing import Tracing
from shared.wire import (
    EMBEDDING_DTYPES,
    MAX_HEADER_BYTES,
    SAFETENSORS_MEDIA_TYPE,
    TORCH_MEDIA_TYPE,
    WireError,
    parse_safetensors,
    parse_torch,
)

ACCEPT = {"Accept": f"{SAFETENSORS_MEDIA_TYPE}, {TORCH_MEDIA_TYPE};q=0.9"} | IDENTITY
RETRIED_STATUSES = {502, 503, 504}
MAX_INFO_BYTES = 64 * 2**10
CONNECT_TIMEOUT_S = 2.0
"""One lost packet is sent again after a second."""
INFO_TIMEOUT_S = 5.0
"""Readiness probes are short."""


class _ProblemCode(BaseModel):
    """What of an error's body is read."""

    code: str


class EncoderClient:
    """The generator's only way out. ``embedding_shape`` is what the model needs: ``(tokens, width)``."""

    def __init__(
        self,
        url: str,
        embedding_shape: tuple[int, int],
        *,
        token: SecretStr | None = None,
        timeout_s: float = 30.0,
        cache_bytes: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/predict")
        self._shape = embedding_shape
        self._timeout_s = timeout_s
        self._pool = ThreadPool("embeddings")
        self._embedder = Embedder(self._embed_once, timeout_s=timeout_s, cache_bytes=cache_bytes)
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            follow_redirects=False,
        )

    def trace(self, tracing: Tracing) -> None:
        """Its requests become spans, and the encoder's spans lie within them."""
        tracing.trace_client(self._http)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._pool.__aexit__()

    async def embed(self, prompt: str) -> tuple[torch.Tensor, bool]:
        """The prompt's embedding ``[1, L, D]``, and whether it was cached; as ``Embedder.embed``."""
        return await self._embedder.embed(prompt)

    async def info(self) -> EncoderInfo | None:
        """What the service says of itself, or None if it is one of the kind that does not.

        An answer also ends the time in which prompts are refused, so a probe of readiness brings the service back.

        Raises:
            EncoderUnavailable: it cannot be reached.
            EncoderTimeout: it does not answer in time.
            BadEncoderResponse: it says something that is not an ``EncoderInfo``.
        """
        try:
            async with asyncio.timeout(min(INFO_TIMEOUT_S, self._timeout_s)), self._answer("GET", "/info") as response:
                if response.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
                    _raise_for_status(response)
                self._embedder.answered()
                if response.status_code != HTTPStatus.OK:
                    return None
                return EncoderInfo.model_validate_json(await _read(response, MAX_INFO_BYTES))
        except ValidationError as error:
            raise BadEncoderResponse("the text encoder's /info is not understood") from error
        except TimeoutError as error:
            raise EncoderTimeout("the text encoder's /info takes too long") from error

    async def _embed_once(self, prompt: str) -> torch.Tensor:
        tokens, width = self._shape
        limit = tokens * width * max(dtype.itemsize for dtype in EMBEDDING_DTYPES) + MAX_HEADER_BYTES
        async with self._answer("POST", "/predict", {"prompt": prompt}) as response:
            await _raise_if_out_of_memory(response)
            _raise_for_status(response)
            body = await _read(response, limit)
            media_type = response.headers.get("content-type", "").split(";")[0]
        parse = parse_safetensors if media_type == SAFETENSORS_MEDIA_TYPE else parse_torch
        try:
            return await self._pool.run(parse, body, (1, tokens, width))
        except WireError as error:
            raise BadEncoderResponse("the text encoder's answer is not this model's prompt embedding") from error

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: dict[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        try:
            headers = ACCEPT | ({"x-request-id": request_id.get()} if request_id.get() else {})
            async with self._http.stream(method, self._base + path, json=body, headers=headers) as response:
                yield response
        except httpx.RemoteProtocolError as error:
            raise BadEncoderResponse("the text encoder's answer broke off") from error
        except httpx.ConnectTimeout as error:  # a host that is gone mostly says nothing at all
            raise EncoderUnavailable("the text encoder cannot be reached", retry_after_s=5) from error
        except httpx.TimeoutException as error:
            raise EncoderTimeout("the text encoder did not answer in time") from error
        except httpx.TransportError as error:
            raise EncoderUnavailable("the text encoder cannot be reached", retry_after_s=5) from error


async def _raise_if_out_of_memory(response: httpx.Response) -> None:
    """Asking again would end in the same way, so this must not look like a service that is overloaded."""
    if response.status_code != OutOfMemory.status:
        return
    try:
        problem = _ProblemCode.model_validate_json(await read_body(response, MAX_INFO_BYTES))
    except (BodyRefused, ValidationError):
        return  # the status says enough
    if problem.code == OutOfMemory.code:
        raise OutOfMemory("the text encoder has too little memory for this prompt now")


def _raise_for_status(response: httpx.Response) -> None:
    status = response.status_code
    if status == HTTPStatus.OK:
        return
    if status in RETRIED_STATUSES or status == HTTPStatus.TOO_MANY_REQUESTS:
        raise EncoderUnavailable(f"the text encoder cannot answer now (status {status})", retry_after_s=5)
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY):
        raise InvalidRequest("prompt: the text encoder refuses it, it may be too long", param="prompt")
    raise BadEncoderResponse(f"the text encoder answered with status {status}")


async def _read(response: httpx.Response, limit: int) -> bytes:
    try:
        return await read_body(response, limit)
    except BodyRefused as error:
        raise BadEncoderResponse(f"the text encoder's answer is {error}") from error
