"""Client of a chat model that rewrites prompts before generation, as the authors of FLUX.2 recommend.

The endpoint must be compatible with OpenAI's chat completions. Its responses are bounded and checked.
"""

import asyncio
import base64
import io
import json
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Self

import httpx
from PIL.Image import Image
from pydantic import BaseModel, SecretStr

from flux2_shared.errors import Flux2Error
from flux2_shared.thread_pool import ThreadPool
from generator_service.clients.bounded_body import BodyRefused, read_body
from generator_service.clients.peer import PeerClient
from generator_service.errors import BadUpsamplerResponse, UpsamplerUnavailable
from generator_service.pipelines.prompt import LARGEST_UPSAMPLING_AREA, UPSAMPLING_MESSAGE, UPSAMPLING_MESSAGE_EDIT

TEMPERATURE = 0.15
MAX_TOKENS = 512
"""Temperature and maximum tokens are those of ``Flux2Pipeline``."""
MAX_RESPONSE_BYTES = 256 * 2**10
MAX_PROMPT_CHARS = 8000
MAX_PROMPT_BYTES = 60_000
"""Longest prompt as JSON, which the metadata of every image format can hold."""
HEADERS = {"Content-Type": "application/json"}
RETRY_AFTER_S = 5.0


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice]


class Upsampler:
    """Client of a chat completions endpoint. Use it as an async context manager.

    Args:
        url: base URL of the API, such as ``http://host:8080/v1``.
        model: name of the chat model.
        token: sent as a bearer token.
        timeout_s: timeout for one prompt, from its first image to the end of the response.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        token: SecretStr | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model = model
        self._pool = ThreadPool("upsampling", 1)
        self._timeout_s = timeout_s
        self._http = PeerClient(
            _own_error, token, timeout_s=timeout_s, connect_timeout_s=timeout_s, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.__aexit__()

    async def rewrite(self, prompt: str, references: Sequence[Image] = ()) -> str:
        """Return a more detailed prompt. For an edit, the chat model also gets the reference images.

        Raises:
            UpsamplerUnavailable: the endpoint cannot be reached, timed out, or is overloaded.
            BadUpsamplerResponse: the response does not contain a prompt.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._pool.run(self._completion_request, prompt, references)
                async with self._http.stream("POST", self._url, content=body, headers=HEADERS) as response:
                    raise_for_status(response.status_code)
                    return rewritten(await read_body(response, MAX_RESPONSE_BYTES))
        except TimeoutError as error:
            detail = f"the prompt upsampler did not respond within {self._timeout_s:g} s"
            raise UpsamplerUnavailable(detail, retry_after_s=RETRY_AFTER_S) from error

    def _completion_request(self, prompt: str, references: Sequence[Image]) -> bytes:
        """Encode the request on a thread: images are scaled, and a body with images has megabytes."""
        images = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in references]
        system = UPSAMPLING_MESSAGE_EDIT if images else UPSAMPLING_MESSAGE
        content: Any = [*images, {"type": "text", "text": prompt}] if images else prompt
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        body = {"model": self._model, "messages": messages, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
        return json.dumps(body).encode()


def _own_error(error: Exception) -> Flux2Error:
    """Return the error that a failed request or a refused body stands for."""
    if isinstance(error, BodyRefused):
        return BadUpsamplerResponse(f"the prompt upsampler's response is {error}")
    return UpsamplerUnavailable("the prompt upsampler cannot be reached", retry_after_s=RETRY_AFTER_S)


def data_uri(image: Image) -> str:
    """Encode an image as JPEG, downscaled to ``LARGEST_UPSAMPLING_AREA``."""
    scale = min(1.0, math.sqrt(LARGEST_UPSAMPLING_AREA / (image.width * image.height)))
    small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def raise_for_status(status: int) -> None:
    """Raise ``UpsamplerUnavailable`` for errors that may be temporary, else ``BadUpsamplerResponse``."""
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        detail = f"the prompt upsampler is unavailable (status {status})"
        raise UpsamplerUnavailable(detail, retry_after_s=RETRY_AFTER_S)
    if status != HTTPStatus.OK:
        raise BadUpsamplerResponse(f"the prompt upsampler responded with status {status}")


def rewritten(body: bytes) -> str:
    """Parse a chat completion and return the prompt."""
    try:  # pydantic's parser bounds the nesting and refuses lone surrogates
        (choice, *_) = _Completion.model_validate_json(body).choices
    except ValueError:
        raise BadUpsamplerResponse("the prompt upsampler's response is not a chat completion") from None
    prompt = choice.message.content.strip()
    is_visible = any(character.isprintable() and not character.isspace() for character in prompt)
    if not is_visible or len(prompt) > MAX_PROMPT_CHARS or len(json.dumps(prompt)) > MAX_PROMPT_BYTES:
        raise BadUpsamplerResponse("the prompt upsampler's response is blank or too long")
    return prompt
