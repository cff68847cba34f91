"""The page at ``/``: the files of ``generator_service/page``. They need no key; the routes that they call may."""

import html
import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from flux2_shared.web.page_files import PageFiles, page_headers

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "page"
INDEX = "index.html"
INDEX_HTML = (FOLDER / INDEX).read_text(encoding="utf-8")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = page_headers(POLICY)
mimetypes.add_type("text/javascript", ".js")  # some hosts have another type, which browsers refuse for modules


files = PageFiles(HEADERS, directory=FOLDER)


@router.get("/")
async def index(request: Request) -> Response:
    """The page. Its addresses are relative to itself, or to the path prefix of a proxy, if that is known."""
    root_path = request.scope["root_path"]
    if not root_path:
        return await files.get_response(INDEX, request.scope)
    base = f'<head>\n  <base href="{html.escape(root_path)}/">'  # the page's address may lack the slash
    return HTMLResponse(INDEX_HTML.replace("<head>", base, 1), headers=HEADERS)


@router.get("/page/{name}")
async def page_file(name: str, request: Request) -> Response:
    """One of the files that the page consists of."""
    return await files.get_response(name, request.scope)
