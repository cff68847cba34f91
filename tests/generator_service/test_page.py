"""The page's files, as they are served. What the page does is tested in a browser (``tests/e2e/test_page.py``)."""

import re

import pytest

from generator_service.api.routes.page import FOLDER, INDEX
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

MAX_BYTES = 64 * 1024
KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}


async def test_every_file_is_served_with_its_type(serve_generator: Serve) -> None:
    """Without a key, with its content type, and under a policy that allows nothing from elsewhere or inline."""
    async with serve_generator(token="secret") as http:
        answers = {
            file: await http.get("/" if file.name == INDEX else f"/page/{file.name}") for file in FOLDER.iterdir()
        }
    for file, answer in answers.items():
        assert answer.status_code == 200, file.name
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"].split(";")[0] == KINDS[file.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "unsafe" not in policy


async def test_what_a_browser_has_is_not_sent_again(serve_generator: Serve) -> None:
    """An ETag is asked for each time, and answered with 304 as long as the file is the same."""
    async with serve_generator() as http:
        first = await http.get("/")
        tag = first.headers["etag"]
        again = [await http.get("/", headers={"If-None-Match": given}) for given in (tag, f'"other", W/{tag}')]
        other = await http.get("/", headers={"If-None-Match": '"other"'})
        head = await http.head("/")
    assert first.headers["cache-control"] == "no-cache"
    assert [answer.status_code for answer in again] == [304, 304]
    assert {answer.content for answer in again} == {b""}
    assert (other.status_code, other.content) == (200, first.content)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "..%2Fapp.py", "%2Fetc%2Fpasswd"])
async def test_nothing_else_is_served(serve_generator: Serve, name: str) -> None:
    """Names that are none of the page's files are 404."""
    async with serve_generator() as http:
        answer = await http.get(f"/page/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_the_page_is_small_and_complete() -> None:
    """It weighs little, asks nothing of other hosts, and names each of its modules, so that all are fetched at once."""
    files = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.iterdir()}
    assert sum(map(len, files.values())) < MAX_BYTES
    for name, text in files.items():
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, name
    linked = set(re.findall(r'(?:href|src)="page/([^"]+)"', files[INDEX]))
    assert linked == set(files) - {INDEX}
