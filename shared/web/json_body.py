"""Bodies of routes that read JSON: what is wrong with one that is something else."""

from typing import Any

from fastapi import Depends, Request

from flux2_shared.errors import MalformedBody, UnsupportedMediaType

JSON_MEDIA_TYPE = "application/json"
HINT = f"send JSON with the content type {JSON_MEDIA_TYPE}"


def require_json(hint: str = HINT) -> Any:
    """Create a dependency that refuses an empty body, and content types other than JSON.

    It applies to routes that read JSON, and belongs after the dependency that requires a token. ``hint`` is part of its
    errors and says what would be right.
    """

    async def check(request: Request) -> None:
        if request.scope["route"].body_field is None:
            return
        if request.headers.get("content-type") != JSON_MEDIA_TYPE:
            check_content_type(request, hint)
        if not await request.body():
            raise MalformedBody(f"the body is empty: {hint}")

    return Depends(check)


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
