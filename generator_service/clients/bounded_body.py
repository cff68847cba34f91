"""Reads response bodies up to a size limit."""

import httpx

IDENTITY = {"Accept-Encoding": "identity"}
"""Request headers that forbid compression, because a small compressed body can expand to gigabytes."""


class BodyRefused(ValueError):
    """The body was rejected. The message completes the sentence "the response is ..."."""


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """Read a whole body.

    Raises:
        BodyRefused: the body is larger than ``limit`` bytes, or compressed.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise BodyRefused("compressed, although the request forbids it")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            raise BodyRefused("too large")
    return bytes(body)
