"""Asks a chat model to rewrite a prompt, as FLUX.2's authors recommend, before it is drawn.

The endpoint speaks OpenAI's chat completions and is the operator's choice. What comes back is bounded and checked.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Self

import httpx
from PIL.Image import Image
from pydantic import BaseModel, SecretStr, ValidationError

from flux2_shared.thread_pool import ThreadPool
from generator_service.clients.bounded_body import IDENTITY, BodyRefused, read_body
from generator_service.errors import BadUpsamplerResponse, UpsamplerUnavailable
from generator_service.pipelines.prompt import LARGEST_UPSAMPLING_AREA, UPSAMPLING_MESSAGE, UPSAMPLING_MESSAGE_EDIT

TEMPERATURE = 0.15
MAX_TOKENS = 512
"""Both as in ``Flux2Pipeline``."""
MAX_ANSWER_BYTES = 256 * 2**10
MAX_PROMPT_CHARS = 8000
RETRY_AFTER_S = 5.0


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice]


class Upsampler:
    """A client of one endpoint. Enter it as a context.

    Args:
        url: the API's base, such as ``http://host:8080/v1``.
        model: the chat model's name there.
        token: sent as a bearer token.
        timeout_s: for one prompt.
        transport: replaces the network.
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
        headers = IDENTITY | ({"Authorization": f"Bearer {token.get_secret_value()}"} if token else {})
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout_s, transport=transport, follow_redirects=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._pool.__aexit__()

    async def rewrite(self, prompt: str, references: Sequence[Image] = ()) -> str:
        """The prompt with more of what the model needs to know; for an edit the chat model sees the pictures.

        Raises:
            UpsamplerUnavailable: no connection, no answer in time, or the endpoint says it cannot answer now.
            BadUpsamplerResponse: the answer holds no prompt.
        """
        try:
            question = await self._pool.run(self._question, prompt, references)
            async with self._http.stream("POST", self._url, json=question) as response:
                raise_for_status(response.status_code)
                return rewritten(await read_body(response, MAX_ANSWER_BYTES))
        except BodyRefused as error:
            raise BadUpsamplerResponse(f"the prompt upsampler's answer is {error}") from error
        except httpx.TransportError as error:
            raise UpsamplerUnavailable("the prompt upsampler cannot be reached", retry_after_s=RETRY_AFTER_S) from error

    def _question(self, prompt: str, references: Sequence[Image]) -> dict[str, Any]:
        pictures = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in references]
        system = UPSAMPLING_MESSAGE_EDIT if pictures else UPSAMPLING_MESSAGE
        content: Any = [*pictures, {"type": "text", "text": prompt}] if pictures else prompt
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return {"model": self._model, "messages": messages, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}


def data_uri(picture: Image) -> str:
    """A picture as JPEG, no larger than a chat model needs it."""
    scale = min(1.0, math.sqrt(LARGEST_UPSAMPLING_AREA / (picture.width * picture.height)))
    small = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def raise_for_status(status: int) -> None:
    """Tell what may pass from what will not."""
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        told = f"the prompt upsampler cannot answer now (status {status})"
        raise UpsamplerUnavailable(told, retry_after_s=RETRY_AFTER_S)
    if status != HTTPStatus.OK:
        raise BadUpsamplerResponse(f"the prompt upsampler answered with status {status}")


def rewritten(body: bytes) -> str:
    """The prompt in a chat completion."""
    try:
        (choice, *_) = _Completion.model_validate(json.loads(body)).choices
    except (ValueError, ValidationError):
        raise BadUpsamplerResponse("the prompt upsampler's answer is no chat completion") from None
    prompt = choice.message.content.strip()
    if not 0 < len(prompt) <= MAX_PROMPT_CHARS:
        raise BadUpsamplerResponse("the prompt upsampler's answer is empty or too long")
    return prompt
