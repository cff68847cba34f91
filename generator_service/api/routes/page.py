"""The web page at ``/``: serves the files of ``generator_service/page`` without authentication."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # browsers revalidate with the ETag each time, so upgrades take effect at once
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, ready to send."""

    data: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Read all files of the page, by name. No other files are served."""
    return {file.name: read_page_file(file) for file in FOLDER.iterdir()}


def read_page_file(file: Path) -> PageFile:
    """Read a file; its ETag is a hash of the content."""
    data = file.read_bytes()
    return PageFile(data, MEDIA_TYPES[file.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')


@router.api_route("/", methods=["GET", "HEAD"])
async def index(if_none_match: Annotated[str, Header()] = "") -> Response:
    """Return the page."""
    return file_response(INDEX, if_none_match)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(name: str, if_none_match: Annotated[str, Header()] = "") -> Response:
    """Return a file that the page loads."""
    return file_response(name, if_none_match)


def file_response(name: str, if_none_match: str) -> Response:
    """Return the file, or 304 if the client has the current version."""
    file = page_files().get(name)
    if file is None:
        raise HTTPException(404)
    headers = HEADERS | {"ETag": file.etag}
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    if file.etag in tags:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)
