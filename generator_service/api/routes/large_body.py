"""JSON bodies with images: large ones are parsed on a thread, so that they do not block the event loop."""

import json
from typing import Any

from flux2_shared.web.route import JsonRequest, ServiceRoute, parse_json
from generator_service.api.dependencies import generator_state

INLINE_BYTES = 64 * 2**10
"""A body up to this size is parsed at once, in a fraction of a millisecond."""


class LargeBodyRequest(JsonRequest):
    """A request whose JSON may take long to parse."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= INLINE_BYTES:
            return json.loads(body)
        state = await generator_state(self)
        return await state.requests.run(parse_json, body)


class LargeBodyRoute(ServiceRoute):
    """A route whose JSON may contain images."""

    request_class = LargeBodyRequest
    json_hint = f"{ServiceRoute.json_hint}, with images as base64 beside a prompt"
