"""The page's static files as they are served; ``tests/e2e/test_page.py`` tests the page in a browser."""

import re

import pytest

from generator_service.api.routes.page import FOLDER, INDEX
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

MAX_BYTES = 64 * 1024
KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}


async def test_every_file_is_served_with_its_type(serve_generator: Serve) -> None:
    """Each file is served without a key, with its content type and a policy that allows nothing foreign or inline."""
    async with serve_generator(token="secret") as http:
        responses = {
            file: await http.get("/" if file.name == INDEX else f"/page/{file.name}") for file in FOLDER.iterdir()
        }
    for file, response in responses.items():
        assert response.status_code == 200, file.name
        assert response.content == file.read_bytes()
        assert response.headers["content-type"].split(";")[0] == KINDS[file.suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "unsafe" not in policy


async def test_unchanged_files_are_304(serve_generator: Serve) -> None:
    """Browsers revalidate each file by its ETag, and get 304 while it is unchanged."""
    async with serve_generator() as http:
        first = await http.get("/")
        tag = first.headers["etag"]
        again = [await http.get("/", headers={"If-None-Match": etag}) for etag in (tag, f'"other", W/{tag}')]
        other = await http.get("/", headers={"If-None-Match": '"other"'})
        head = await http.head("/")
    assert first.headers["cache-control"] == "no-cache"
    assert [response.status_code for response in again] == [304, 304]
    assert {response.content for response in again} == {b""}
    assert (other.status_code, other.content) == (200, first.content)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "..%2Fapp.py", "%2Fetc%2Fpasswd"])
async def test_other_files_are_404(serve_generator: Serve, name: str) -> None:
    async with serve_generator() as http:
        response = await http.get(f"/page/{name}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_the_page_is_small_and_complete() -> None:
    """The page is small, loads nothing from other hosts, and preloads each of its modules."""
    files = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.iterdir()}
    assert sum(map(len, files.values())) < MAX_BYTES
    for name, text in files.items():
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, name
    linked = set(re.findall(r'(?:href|src)="page/([^"]+)"', files[INDEX]))
    assert linked == set(files) - {INDEX}
