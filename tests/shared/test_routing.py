"""HEAD, trailing slashes, and path prefixes of proxies, of both services."""

import asyncio
import re
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from pydantic import ValidationError

from flux2_shared.web.routing import is_in
from generator_service.settings import GeneratorSettings
from tests.conftest import Serve
from tests.control import ModelControl
from tests.generator_service.test_generate import LONG, SMALL
from tests.generator_service.test_jobs import ended

pytestmark = pytest.mark.anyio

SERVICES = ["encoder", "generator"]
UNDOCUMENTED = ["/docs", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json"]
PAGE = ["/", "/page/page.js"]
PREFIX = "/tools/flux-2"
TRUSTED = {"X-Forwarded-Prefix": PREFIX}
HOSTILE = {"Host": "evil.example", "X-Forwarded-Host": "evil.example"}


@pytest.fixture(params=SERVICES)
def serve(request: pytest.FixtureRequest) -> Serve:
    """Serves the text encoder, then the generator."""
    chosen: Serve = request.getfixturevalue(f"serve_{request.param}")
    return chosen


async def get_paths(http: httpx.AsyncClient) -> list[str]:
    """Every path of a service that has a route for GET, without parameters."""
    paths: dict[str, dict[str, object]] = (await http.get("/openapi.json")).json()["paths"]
    documented = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    return [*documented, *UNDOCUMENTED, *(PAGE if "/generate" in paths else [])]


def stable(response: httpx.Response) -> dict[str, str]:
    """The headers that do not differ between two requests; the length of metrics does."""
    changing = {"x-request-id", *(["content-length"] if "version=" in response.headers["content-type"] else [])}
    return {name: value for name, value in response.headers.items() if name not in changing}


async def test_head_is_get_without_the_body(serve: Serve) -> None:
    """HEAD has the status and headers of GET, for every path."""
    async with serve() as http:
        paths = await get_paths(http)
        for path in paths:
            got, head = await http.get(path), await http.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            assert stable(head) == stable(got), path
    assert {"/health", "/metrics", "/docs"} <= set(paths)


async def test_head_of_a_job(serve_generator: Serve, model_control: ModelControl) -> None:
    """HEAD of a job's routes needs the key, and HEAD of its events ends at once while the job goes on."""
    key = {"Authorization": "Bearer secret"}
    async with serve_generator(token="secret") as http:
        with model_control.holding():
            url = (await http.post("/jobs", json=LONG, headers=key)).headers["location"]
            async with asyncio.timeout(10):
                events = await http.head(f"{url}/events", headers=key)
            refused, absent = await http.head(url), await http.head("/jobs/none", headers=key)
        await ended_with(http, url, key)
        result = await http.head(f"{url}/result", headers=key)
        metrics = (await http.get("/metrics")).text
    assert (events.status_code, events.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert (refused.status_code, absent.status_code) == (401, 404)
    assert (result.status_code, result.headers["content-type"], result.content) == (200, "image/png", b"")
    assert 'route="/jobs/{job_id}/events"' in metrics


async def ended_with(http: httpx.AsyncClient, url: str, key: dict[str, str]) -> None:
    """Wait until the job has completed."""
    while (job := (await http.get(url, headers=key)).json())["status"] != "completed":
        assert job["status"] in {"queued", "running"}
        await asyncio.sleep(0.01)


async def test_head_of_other_routes_is_405(serve_generator: Serve) -> None:
    """Where there is no GET there is no HEAD, and ``Allow`` lists HEAD beside GET."""
    async with serve_generator() as http:
        head, wrong = await http.head("/generate"), await http.put("/modes")
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")


def test_head_over_a_socket(encoder_url: str) -> None:
    """A connection can be used again after HEAD."""
    with httpx.Client(base_url=encoder_url) as client:
        for path in ("/health/live", "/metrics", "/docs", "/info"):
            assert client.head(path).status_code == 200
            assert client.get(path).status_code == 200


async def test_trailing_slashes_are_ignored(serve: Serve) -> None:
    """A path with a trailing slash is the same resource, without a redirect that would follow a hostile ``Host``."""
    async with serve(allowed_hosts=("*",)) as http:
        for path in await get_paths(http):
            response = await http.get(f"{path}/", headers=HOSTILE)
            assert response.status_code == (await http.get(path)).status_code, path
            assert "evil.example" not in str(response.headers)
            assert "location" not in response.headers


async def test_trailing_slashes_of_other_methods(serve_generator: Serve) -> None:
    """``/v1/models/`` is the list, and a body reaches its route."""
    async with serve_generator(allowed_hosts=("*",)) as http:
        listed = await http.get("/v1/models/")
        created = await http.post("/jobs/", json=SMALL, headers=HOSTILE)
        generated = await http.post("/generate/", json=SMALL)
        await ended(http, created.json()["id"])
    assert listed.json()["object"] == "list"
    assert (created.status_code, created.headers["location"]) == (202, f"/jobs/{created.json()['id']}")
    assert generated.headers["content-type"] == "image/png"


def behind_proxy(serve: Serve, is_configured: bool) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """A service that knows its prefix, or whose proxy tells it the prefix."""
    setting = {"root_path": f"{PREFIX}/"} if is_configured else {"trusted_proxies": "10.0.0.0/8, 127.0.0.1"}
    return serve(allowed_hosts="*", **setting)


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "kept"])
@pytest.mark.parametrize("is_configured", [True, False], ids=["setting", "header"])
async def test_links_stay_inside_a_proxys_prefix(serve_generator: Serve, is_configured: bool, is_removed: bool) -> None:
    """Links of jobs, the API's description and the page start with the prefix, whether the proxy removes it or not."""
    headers = HOSTILE | ({} if is_configured else TRUSTED)
    before = "" if is_removed else PREFIX
    async with behind_proxy(serve_generator, is_configured) as http:
        created = await http.post(f"{before}/jobs", json=SMALL, headers=headers)
        followed = await http.get(created.headers["location"], headers=headers)
        schema = (await http.get(f"{before}/openapi.json", headers=headers)).json()
        docs = await http.get(f"{before}/docs", headers=headers)
        page = await http.get(f"{before}/", headers=headers)
        pages = [page, await http.get(f"{PREFIX}", headers=headers)]
        script = await http.get(f"{before}/page/page.js", headers=headers)
        listed = await http.get(f"{before}/v1/models/", headers=headers)
        await ended_with(http, created.headers["location"], headers)
    assert created.headers["location"] == f"{PREFIX}/jobs/{created.json()['id']}"
    assert followed.json()["id"] == created.json()["id"]
    assert schema["servers"] == [{"url": PREFIX}]
    assert f'data-url="{PREFIX}/openapi.json"' in docs.text
    assert not re.findall(r'(?:href|src)="/(?!tools/flux-2/)', docs.text)
    assert [response.status_code for response in (*pages, script, listed)] == [200] * 4
    assert all(f'<base href="{PREFIX}/">' in response.text for response in pages)
    assert not re.findall(r'(?:href|src)="/(?!tools/flux-2/")', page.text)
    assert "base-uri 'self'" in page.headers["content-security-policy"]


async def test_the_text_encoder_has_a_prefix_too(serve_encoder: Serve) -> None:
    async with serve_encoder(root_path=PREFIX) as http:
        predicted = await http.post(f"{PREFIX}/predict", json={"prompt": "a"})
        schema = (await http.get("/openapi.json")).json()
        statuses = [(await http.get(path)).status_code for path in ("/health", f"{PREFIX}/health", f"{PREFIX}x/health")]
    assert predicted.status_code == 200
    assert schema["servers"] == [{"url": PREFIX}]
    assert statuses == [200, 200, 404]


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8", "::1"])
async def test_other_clients_cannot_set_the_prefix(serve_generator: Serve, trusted: str) -> None:
    """``X-Forwarded-Prefix`` is ignored unless a trusted proxy has opened the connection."""
    headers = TRUSTED | {"X-Forwarded-For": "10.0.0.1"}
    async with serve_generator(trusted_proxies=trusted) as http:
        schema = (await http.get("/openapi.json", headers=headers)).json()
        page = await http.get("/", headers=headers)
    assert "servers" not in schema
    assert "<base" not in page.text


@pytest.mark.parametrize(
    "prefix",
    ["//evil.example", "/a//b", "http://evil.example", "evil", "/..", "/a/../b", "/'x", '/"><script>', "/ü", "/"],
)
async def test_invalid_prefixes_are_ignored(serve_generator: Serve, prefix: str) -> None:
    """A prefix that could lead to another host, or out of the markup, is not used, not even a trusted proxy's."""
    async with serve_generator(trusted_proxies="127.0.0.1") as http:
        page = await http.get("/", headers=[(b"x-forwarded-prefix", prefix.encode())])
    assert "<base" not in page.text
    if prefix != "/":
        with pytest.raises(ValidationError, match="give a path like /flux2"):
            GeneratorSettings(root_path=prefix)


async def test_prefixes_of_several_proxies_are_joined(serve_generator: Serve) -> None:
    async with serve_generator(trusted_proxies="127.0.0.1") as http:
        schema = (await http.get("/openapi.json", headers={"X-Forwarded-Prefix": "/outer/, /inner"})).json()
    assert schema["servers"] == [{"url": "/outer/inner"}]


@pytest.mark.parametrize(("host", "is_inside"), [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("11.0.0.1", False)])
def test_networks_of_either_version(host: str, is_inside: bool) -> None:
    """An IPv4 client of an IPv6 socket is in its IPv4 network; the name of a Unix socket is in none."""
    networks = GeneratorSettings(trusted_proxies="10.0.0.0/8,::1").trusted_proxies
    assert is_in(host, networks) == is_inside
    assert not is_in("", networks)


def test_proxies_are_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is a list, separated by commas; other names are refused."""
    monkeypatch.setenv("GENERATOR_TRUSTED_PROXIES", " 10.0.0.0/8 , ::1,")
    assert [str(network) for network in GeneratorSettings().trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    monkeypatch.setenv("GENERATOR_TRUSTED_PROXIES", "proxy.local")
    with pytest.raises(ValidationError):
        GeneratorSettings()
