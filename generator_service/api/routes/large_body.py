"""JSON bodies with images: large ones are parsed on a thread, so that they do not block the event loop."""

import asyncio
import json
from typing import Any

from fastapi import Request

from flux2_shared.web.json_route import JSONRoute

INLINE_BYTES = 64 * 2**10
"""A body up to this size is parsed at once, in a fraction of a millisecond."""


class LargeBodyRequest(Request):
    """A request whose JSON may take long to parse."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= INLINE_BYTES:
            return json.loads(body)
        state = getattr(self.app.state, "generator", None)
        run = asyncio.to_thread if state is None else state.requests.run  # there is no state while the service starts
        return await run(json.loads, body)


class LargeBodyRoute(JSONRoute):
    """A route that gives FastAPI a ``LargeBodyRequest``."""

    request_class = LargeBodyRequest
    hint = f"{JSONRoute.hint}, with images as base64 beside a prompt"
