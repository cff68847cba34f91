"""JSON bodies with images: large ones are parsed on a thread, so that they do not block the event loop."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from flux2_shared.web.json_body import HINT as JSON_HINT

HINT = f"{JSON_HINT}, with images as base64 beside a prompt"
"""What would be right, for errors about the kind of body."""
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


class LargeBodyRoute(APIRoute):
    """A route that gives FastAPI a ``LargeBodyRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_large_body(request: Request) -> Response:
            return await handle(LargeBodyRequest(request.scope, request.receive))

        return handle_large_body
