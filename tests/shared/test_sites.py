"""Requests that browsers send for other sites, and hosts that are not this service."""

import pytest

from flux2_shared.settings import ServiceSettings
from tests.conftest import Serve
from tests.generator_service.test_generate import SMALL

pytestmark = pytest.mark.anyio

KNOWN_HOSTS = (
    "localhost",
    "LocalHost:8000",
    "127.0.0.1",
    "127.0.0.1:8000",
    "192.168.1.20:8000",
    "[::1]",
    "[::1]:8000",
    "[2001:db8::1]:80",
    "generator",
    "gpu-host:8000",
    "flux2.localhost:8000",
    "host.docker.internal:8000",
    "generator.flux2.svc",
    "generator.flux2.svc.cluster.local.:8000",
)
UNKNOWN_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "localhost@evil.example",
    "evil.example#localhost",
    "generator.svc.example",
    "internal.example.",
    "[::1].evil.example",
    "127.0.0.1:8000:evil.example",
    "user@127.0.0.1",
    "[evil.example]",
    "",
    " ",
)


@pytest.mark.parametrize("host", KNOWN_HOSTS)
async def test_private_names_and_addresses_are_known(serve_encoder: Serve, host: str) -> None:
    """A service without keys answers to addresses and to names that no one else can register."""
    async with serve_encoder() as http:
        assert (await http.get("/info", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", UNKNOWN_HOSTS)
async def test_other_names_are_refused(serve_encoder: Serve, host: str) -> None:
    """Any other ``Host`` is 421 on every route, because the name may be made to resolve to this service."""
    async with serve_encoder() as http:
        for path in ("/info", "/health/live", "/metrics", "/docs", "/nothing"):
            response = await http.get(path, headers={"Host": host})
            assert (response.status_code, response.json()["code"]) == (421, "unknown_host")
        response = await http.post("/predict", headers={"Host": host}, json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["param"]) == (421, "host")


async def test_names_can_be_allowed(serve_encoder: Serve) -> None:
    """``ALLOWED_HOSTS`` names hosts, all hosts below a domain, or all."""
    names = {"flux2.example.com": True, "a.example.org:443": True, "a.b.example.org": True, "example.org": False}
    names |= {"xexample.org": False, "other.example.com": False, "FLUX2.example.com.": True}
    async with serve_encoder(allowed_hosts="Flux2.Example.com, *.example.org") as http:
        given = {name: (await http.get("/info", headers={"Host": name})).status_code == 200 for name in names}
    assert given == names
    async with serve_encoder(allowed_hosts="*") as http:
        assert (await http.get("/info", headers={"Host": "evil.example"})).status_code == 200


async def test_a_service_with_keys_has_any_name(serve_encoder: Serve) -> None:
    """A browser does not send the key of a service by itself, so its name is not checked."""
    async with serve_encoder(token="secret") as http:
        key = {"Authorization": "Bearer secret"}
        assert (await http.get("/info", headers={"Host": "flux2.example.com"} | key)).status_code == 200
        assert (await http.get("/info", headers={"Host": "flux2.example.com"})).status_code == 401


OWN: tuple[dict[str, str], ...] = (
    {},
    {"Origin": "http://test"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://proxy.example"},
)
OWN += ({"Sec-Fetch-Site": "none"}, {"Origin": "https://test:443"}, {"Origin": "https://TEST"})
FOREIGN = (
    {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://test"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://test:3000"},
    {"Sec-Fetch-Site": "unknown"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://test:3000"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://test.evil.example"},
    {"Origin": "http://[::1"},
    {"Origin": "test"},
)


@pytest.mark.parametrize("headers", OWN)
async def test_requests_of_the_own_page_are_served(serve_encoder: Serve, headers: dict[str, str]) -> None:
    """Programs, which send neither header, and pages of the same origin are served."""
    async with serve_encoder() as http:
        assert (await http.post("/predict", json={"prompt": "a"}, headers=headers)).status_code == 200


@pytest.mark.parametrize("headers", FOREIGN)
async def test_requests_of_other_pages_are_refused(serve_encoder: Serve, headers: dict[str, str]) -> None:
    """A request for a page of another origin is 403 if it may change something, with and without keys."""
    for settings in ({}, {"token": "secret"}):
        async with serve_encoder(**settings) as http:
            key = {"Authorization": "Bearer secret"}
            response = await http.post("/predict", json={"prompt": "a"}, headers=headers | key)
            assert (response.status_code, response.json()["code"]) == (403, "cross_site_request")
            assert (await http.get("/info", headers=headers | key)).status_code == 200  # its response is not readable


async def test_forms_of_other_pages_generate_nothing(serve_generator: Serve) -> None:
    """A multipart form, which a browser sends without asking first, does not start a generation."""
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    async with serve_generator() as http:
        files = {"image": ("a.png", b"", "image/png")}
        refused = [
            await http.post("/v1/images/edits", data={"prompt": "a"}, files=files, headers=headers),
            await http.post("/generate", json=SMALL, headers=headers),
            await http.post("/jobs", json=SMALL, headers=headers),
            await http.delete("/jobs/0", headers=headers),
        ]
        metrics = (await http.get("/metrics")).text
    assert [response.status_code for response in refused] == [403] * 4
    assert "flux2_queue_depth 0.0" in metrics


async def test_origins_can_be_allowed(serve_encoder: Serve) -> None:
    """``ALLOWED_ORIGINS`` lets pages of an origin send requests and read the responses (CORS)."""
    allowed, other = {"Origin": "https://app.example.com"}, {"Origin": "https://evil.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with serve_encoder(allowed_origins="https://App.example.com", token="secret") as http:
        asked = await http.options("/predict", headers=allowed | preflight)
        key = {"Authorization": "Bearer secret", "Sec-Fetch-Site": "cross-site"}
        served = await http.post("/predict", json={"prompt": "a"}, headers=allowed | key)
        refused = await http.post("/predict", json={"prompt": "a"}, headers=other | key)
        without_key = await http.post("/predict", json={"prompt": "a"}, headers=allowed)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-headers"] == "authorization"
    assert served.headers["access-control-allow-origin"] == allowed["Origin"]
    assert (served.status_code, refused.status_code, without_key.status_code) == (200, 403, 401)
    assert without_key.headers["access-control-allow-origin"] == allowed["Origin"]  # so that the page can read it
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/", "ftp://example.com", "https://"])
def test_origins_must_be_origins(origin: str) -> None:
    """A setting that no ``Origin`` can equal is refused."""
    with pytest.raises(ValueError, match="allowed_origins"):
        ServiceSettings(port=0, max_body_bytes=1, max_waiting=1, allowed_origins=origin)
