"""The page of the API's description, ``/docs``, of both services."""

import re

import pytest

from tests.conftest import Serve

pytestmark = pytest.mark.anyio

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png", "start.js")


@pytest.fixture(params=["encoder", "generator"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Serves the text encoder, then the generator."""
    chosen: Serve = request.getfixturevalue(f"serve_{request.param}")
    return chosen


async def test_the_page_loads_nothing_from_other_hosts(serve: Serve) -> None:
    """Every address in it is the service's own, nothing in it is a script, and its headers allow nothing else."""
    async with serve() as http:
        page = await http.get("/docs")
        links = re.findall(r'(?:href|src|data-url)="([^"]*)"', page.text)
        statuses = {link: (await http.get(link)).status_code for link in links}
    assert set(statuses) == {f"/docs/{name}" for name in FILES} | {"/openapi.json"}
    assert set(statuses.values()) == {200}
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert re.findall(r"<script[^>]*>([^<]+)<", page.text) == []
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


async def test_files_of_the_page_are_typed_and_validated(serve: Serve) -> None:
    """Files have their own content type, are not sniffed, and are sent again only after they have changed."""
    async with serve() as http:
        for name, kind in zip(FILES, ("text/javascript", "text/css", "image/png", "text/javascript"), strict=True):
            response = await http.get(f"/docs/{name}")
            assert response.headers["content-type"].partition(";")[0] == kind
            assert response.headers["x-content-type-options"] == "nosniff"
            if name != "start.js":
                again = await http.get(f"/docs/{name}", headers={"If-None-Match": response.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["__init__.py", "swagger-ui.js", "..%2fmain.py", "%2e%2e%2fmain.py", "redoc"])
async def test_other_files_of_the_package_are_not_served(serve: Serve, name: str) -> None:
    """Only the files that the page needs are served; there is no second page, ``/redoc``."""
    async with serve() as http:
        assert (await http.get(f"/docs/{name}")).status_code == 404
        assert (await http.get("/redoc")).status_code == 404
