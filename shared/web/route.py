"""Routes of the services: what is checked before a body is received, and before its JSON is parsed.

FastAPI parses the body of a request before it calls any dependency, so keys are checked here instead.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from flux2_shared.errors import Flux2Error, MalformedBody, UnsupportedMediaType
from flux2_shared.web.auth import authenticate

JSON_MEDIA_TYPE = "application/json"
MAX_COMMAS = 100_000
"""Largest number of commas in a body of more than ``LARGE_BYTES``, which is large because of images. Each list item and
field has one, and millions of them would stop the service while they are parsed."""
LARGE_BYTES = 2**20


class JsonRequest(Request):
    """A request whose JSON is bounded in what it may contain."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class ServiceRoute(APIRoute):
    """A route that needs a key, and whose JSON body is checked before it is received and parsed."""

    request_class: ClassVar[type[JsonRequest]] = JsonRequest
    json_hint: ClassVar[str] = f"send JSON with the content type {JSON_MEDIA_TYPE}"
    """What would be right, for errors about the kind of body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_checked(request: Request) -> Response:
            request.state.owner = authenticate(request.headers, request.app.state.tokens)
            checked = self.request_class(request.scope, request.receive)
            if self.body_field is not None and request.headers.get("content-type") != JSON_MEDIA_TYPE:
                check_content_type(checked, self.json_hint)
            if self.body_field is not None and not await checked.body():
                raise MalformedBody(f"the body is empty: {self.json_hint}")
            try:
                return await handle(checked)
            except HTTPException as error:
                if isinstance(error.__cause__, Flux2Error):  # raised while the body was received or parsed
                    raise error.__cause__ from None
                raise

        return handle_checked


def check_content_type(request: Request, hint: str) -> None:
    """Raise ``UnsupportedMediaType``, with the hint, if a request has a body that is not declared as JSON."""
    content_type = media_type_of(request)
    if content_type == JSON_MEDIA_TYPE or (content_type.startswith("application/") and content_type.endswith("+json")):
        return
    if content_type:
        raise UnsupportedMediaType(f"content-type: must not be {content_type[:100]}; {hint}")
    if request.headers.get("content-length") != "0":
        raise UnsupportedMediaType(f"content-type: is missing; {hint}")


def media_type_of(request: Request) -> str:
    """Return the media type of a request's body in lower case, without parameters; empty if it has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes) -> Any:
    """Parse JSON; raise ``MalformedBody`` if it has too many values to be a request."""
    if len(body) > LARGE_BYTES and body.count(b",") > MAX_COMMAS:
        raise MalformedBody("the body has too many values")
    return json.loads(body)
