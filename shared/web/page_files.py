"""Files of a page, with headers that allow nothing from other hosts."""

from typing import Any

from fastapi import Response
from fastapi.staticfiles import StaticFiles


def page_headers(policy: str) -> dict[str, str]:
    """Return the headers of a page and its files; ``policy`` is their ``Content-Security-Policy``."""
    return {
        "Cache-Control": "no-cache",  # cached, but validated with its ETag each time: an upgrade shows at once
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


class PageFiles(StaticFiles):
    """Files that are sent with ``headers``; the other arguments are those of ``StaticFiles``."""

    def __init__(self, headers: dict[str, str], **options: Any) -> None:
        super().__init__(**options)
        self._headers = headers

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(self._headers)
        return response
