"""Bodies of responses, read up to a limit."""

import httpx

IDENTITY = {"Accept-Encoding": "identity"}
"""Headers that forbid compression: 500 compressed bytes can expand to gigabytes."""


class BodyRefused(ValueError):
    """The body was not read. The message completes the sentence "the answer is ..."."""


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """The whole body, given up as soon as it is larger than ``limit``.

    Raises:
        BodyRefused: it is larger, or compressed.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise BodyRefused("compressed, which was not asked for")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            raise BodyRefused("too large")
    return bytes(body)
