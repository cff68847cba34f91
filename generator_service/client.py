"""A client of a running generator, for the command line."""

from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0


class GeneratorError(RuntimeError):
    """The generator refused or could not be reached; the text is for people."""


@dataclass(frozen=True)
class Answer:
    """A picture file and the headers that came with it."""

    data: bytes
    headers: dict[str, str]


def post_generate(
    url: str, body: dict[str, Any], token: str | None = None, transport: httpx.BaseTransport | None = None
) -> Answer:
    """``POST /generate``.

    Raises:
        GeneratorError: no connection, or an answer other than 200; the text is the service's own.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        with httpx.Client(headers=headers, timeout=timeout, transport=transport) as http:
            response = http.post(f"{url.rstrip('/')}/generate", json=body)
    except httpx.HTTPError as error:
        raise GeneratorError(f"no answer from {url}: is the generator running? ({type(error).__name__})") from error
    if response.status_code != httpx.codes.OK:
        raise GeneratorError(_detail(response))
    return Answer(response.content, dict(response.headers))


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the generator answered with status {response.status_code}"
