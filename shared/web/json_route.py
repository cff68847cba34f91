"""Routes that read JSON, and say what is wrong with a body that is something else."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from flux2_shared.errors import MalformedBody, UnsupportedMediaType

JSON_MEDIA_TYPE = "application/json"


class JSONRoute(APIRoute):
    """A route that refuses an empty body, and content types other than JSON, with what would be right."""

    request_class: type[Request] = Request
    """The class of requests that FastAPI gets."""
    hint = f"send JSON with the content type {JSON_MEDIA_TYPE}"
    """What would be right, for errors about the kind of body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        reads_json = self.body_field is not None

        async def handle_json(request: Request) -> Response:
            json_request = self.request_class(request.scope, request.receive)
            if reads_json:
                if request.headers.get("content-type") != JSON_MEDIA_TYPE:
                    check_content_type(json_request, self.hint)
                if not await json_request.body():
                    raise MalformedBody(f"the body is empty: {self.hint}")
            return await handle(json_request)

        return handle_json


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
