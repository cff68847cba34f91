"""Bodies of other services' answers, which are not trusted to be as long as they should."""

import httpx

IDENTITY = {"Accept-Encoding": "identity"}
"""What to ask for: 500 compressed bytes can unpack to gigabytes."""


class BodyRefused(ValueError):
    """The body is not read; the text goes on after "the answer is"."""


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
            raise BodyRefused("larger than any that is right")
    return bytes(body)
