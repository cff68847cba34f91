"""Ports, and the services that the generator depends on, over real sockets."""

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest
from pydantic import AnyHttpUrl, SecretStr

from demo_model.services import WEIGHTS
from flux2_shared.model.subfolders import Service
from generator_service.doctor import network
from generator_service.doctor.check import Check, Status
from generator_service.doctor.model import Model, inspect
from generator_service.doctor.network import check_encoder, check_port, check_ports_differ, check_upsampler, get
from generator_service.settings import GeneratorSettings
from text_encoder_service.settings import TextEncoderSettings

OPENAPI = {"info": {"title": "FLUX.2 generator"}}
CLOSED_PORT = "http://127.0.0.1:9"


class Handler(BaseHTTPRequestHandler):
    """Responds to each path in ``routes``, and with 404 to any other."""

    routes: ClassVar[dict[str, tuple[int, bytes]]] = {}
    received: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.received.append((self.path, self.headers.get("Authorization", "")))
        status, body = self.routes.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Suppress the log."""


@contextmanager
def serving(**routes: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A server's address, and the requests it received. Paths have ``_`` for ``/``; bodies are bytes or JSON."""
    bodies = {
        "/" + path.replace("_", "/"): (status, body if isinstance(body, bytes) else json.dumps(body).encode())
        for path, (status, body) in routes.items()
    }
    received: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"routes": bodies, "received": received}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def port_of(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


def generator_at(url: str) -> tuple[Check, bool]:
    """The check of the generator's port."""
    return check_port(Service.GENERATOR, GeneratorSettings(port=port_of(url)))


def test_a_free_port_is_free() -> None:
    """A free port is reported as free and stays free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(2):
        check, is_running = check_port(Service.GENERATOR, GeneratorSettings(port=port))
        assert (check.name, check.status, is_running) == ("generator port", Status.OK, False)


def test_a_running_service_is_recognized(generator_url: str, encoder_url: str) -> None:
    """A port used by the service itself is fine, and one used by the other service a failure."""
    check, is_running = generator_at(generator_url)
    assert (check.status, is_running) == (Status.OK, True)
    assert "is used by this service, which is running and ready" in check.detail
    check, is_running = generator_at(encoder_url)
    assert (check.status, is_running) == (Status.FAILED, False)
    assert "is used by the FLUX.2 text encoder" in check.detail
    assert "GENERATOR_PORT" in check.fix
    settings = TextEncoderSettings(port=port_of(encoder_url))
    assert check_port(Service.TEXT_ENCODER, settings)[1]


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({}, "is used by another program"),
        ({"health_live": (200, b""), "openapi.json": (200, {"info": {"title": "x"}})}, "is used by another program"),
        ({"openapi.json": (200, b"[1]")}, "is used by another program"),
        ({"openapi.json": (200, {"info": 1})}, "is used by another program"),
        ({"openapi.json": (200, OPENAPI), "health_live": (500, b"")}, "/health/live has status 500"),
    ],
)
def test_a_port_of_another_program_is_a_failure(routes: dict[str, Any], message: str) -> None:
    """A port used by another program, or by a service that is not alive, is a failure."""
    with serving(**routes) as (url, _):
        check, is_running = generator_at(url)
    assert (check.status, is_running) == (Status.FAILED, False)
    assert message in check.detail


@pytest.mark.parametrize(
    ("ready", "message"),
    [
        ((200, {"status": "ready"}), "running and ready"),
        ((200, b"[]"), "running and ready"),
        ((200, {"status": "ready", "degraded": "the encoder\nis away"}), "running and ready, but the encoder is away"),
        ((503, {"reason": "warming up: 3 of 8, 1024x1024, 95 s"}), "not ready: warming up: 3 of 8, 1024x1024, 95 s"),
        ((503, b"nonsense"), "which is running"),
    ],
)
def test_the_readiness_of_a_running_service(ready: tuple[int, Any], message: str) -> None:
    """A running service's readiness is reported with its own reason."""
    routes = {"openapi.json": (200, OPENAPI), "health_live": (200, b""), "health_ready": ready}
    with serving(**routes) as (url, _):
        check, is_running = generator_at(url)
    assert (check.status, is_running) == (Status.OK, True)
    assert message in check.detail


def test_a_silent_port_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port with a process that does not respond is a failure."""
    monkeypatch.setattr(network, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        check, is_running = check_port(Service.GENERATOR, GeneratorSettings(port=server.getsockname()[1]))
    assert (check.status, is_running) == (Status.FAILED, False)
    assert "a program that is not one of these services (ReadTimeout" in check.detail


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "not an address"])
def test_an_address_of_another_host_is_a_failure(host: str) -> None:
    """An address that is not this host's is a failure."""
    check, _ = check_port(Service.GENERATOR, GeneratorSettings(host=host, port=0))
    assert check.status is Status.FAILED
    assert "GENERATOR_HOST" in check.fix


def test_equal_ports_are_a_failure() -> None:
    """Two services with the same port are a failure."""
    same = {Service.GENERATOR: GeneratorSettings(port=1), Service.TEXT_ENCODER: TextEncoderSettings(port=1)}
    [check] = check_ports_differ(same)
    assert check.status is Status.FAILED
    any_port = {Service.GENERATOR: GeneratorSettings(port=0), Service.TEXT_ENCODER: TextEncoderSettings(port=0)}
    assert list(check_ports_differ(any_port)) == []
    assert list(check_ports_differ({Service.GENERATOR: GeneratorSettings(port=1)})) == []


def test_responses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are bounded in size and total time."""
    with serving(long=(200, bytes(100))) as (url, _):
        assert get(f"{url}/long").status == 200
        monkeypatch.setattr(network, "MAX_BYTES", 99)
        with pytest.raises(httpx.ReadError, match="too long"):
            get(f"{url}/long")
        monkeypatch.setattr(network, "MAX_BYTES", 1000)
        hours = itertools.count(step=3600)
        monkeypatch.setattr(network, "monotonic", lambda: next(hours))
        with pytest.raises(httpx.ReadTimeout, match="takes too long"):
            get(f"{url}/long")


@pytest.fixture(scope="module")
def demo_model() -> Model:
    """The demo model, read from its files."""
    return inspect(Model("weights", "local", WEIGHTS), ("scheduler", "transformer", "vae"))[0]


def encoder_at(url: str, model: Model, token: str | None = None) -> Check:
    """The check of a text encoder."""
    settings = GeneratorSettings(
        text_encoder_url=AnyHttpUrl(url), text_encoder_token=SecretStr(token) if token else None
    )
    [check] = check_encoder(settings, model)
    return check


@pytest.mark.parametrize("path", ["", "/predict"])
def test_a_matching_text_encoder(encoder_url: str, demo_model: Model, path: str) -> None:
    """The detail names its model, revision and embeddings."""
    check = encoder_at(encoder_url + path, demo_model)
    assert check.status is Status.OK
    assert "serves weights@local, embeddings [32, 384] float32" in check.detail


def test_a_text_encoder_of_another_model_is_a_failure(encoder_url: str, demo_model: Model) -> None:
    """A text encoder of another model is a failure, with the reason that the generator's readiness would have."""
    other = replace(demo_model, name="other", revision="main")
    check = encoder_at(encoder_url, other)
    assert check.status is Status.FAILED
    assert check.detail == "the text encoder serves weights@local, this is other@main"
    assert encoder_at(encoder_url, Model("other", "main")).status is Status.OK


INFO = {
    "model": "weights",
    "revision": "local",
    "hidden_layers": [1, 2, 3],
    "hidden_size": 64,
    "max_sequence_length": 32,
    "dtype": "float32",
    "version": "1",
}


@pytest.mark.parametrize(
    ("info", "status", "message"),
    [
        ((200, INFO), Status.FAILED, "embeddings have shape [32, 192], this model takes [32, 384]"),
        ((200, b"<html>"), Status.FAILED, "is not the text encoder"),
        ((200, {"model": "x"}), Status.FAILED, "is not the text encoder"),
        ((401, b""), Status.FAILED, "rejects the key"),
        ((403, b""), Status.FAILED, "rejects the key"),
        ((404, b""), Status.OK, "has no /info"),
        ((405, b""), Status.OK, "has no /info"),
        (
            (503, {"detail": "the service is starting: loading"}),
            Status.WARNING,
            "now: the service is starting: loading",
        ),
        ((503, b""), Status.WARNING, "is not available now: status 503"),
        ((429, b"[]"), Status.WARNING, "is not available now: status 429"),
        ((302, b""), Status.FAILED, "has status 302"),
        ((500, b""), Status.FAILED, "has status 500"),
    ],
)
def test_bad_responses_of_a_text_encoder(
    demo_model: Model, info: tuple[int, Any], status: Status, message: str
) -> None:
    """Responses with which the generator would never become ready are failures."""
    with serving(info=info) as (url, received):
        check = encoder_at(url, demo_model, "the-key")
    assert (check.name, check.status) == ("text encoder", status)
    assert message in check.detail
    assert received == [("/info", "Bearer the-key")]
    assert "the-key" not in str(check)


@pytest.mark.parametrize("url", [CLOSED_PORT, "http://no-such-host.invalid:8006"])
def test_an_unavailable_text_encoder_is_a_warning(demo_model: Model, url: str) -> None:
    """A text encoder that does not respond is a warning, since it may be started later."""
    check = encoder_at(url, demo_model)
    assert check.status is Status.WARNING
    assert "does not respond (ConnectError" in check.detail


def upsampler_at(url: str | None, **settings: Any) -> list[Check]:
    """The check of a chat model, if there is one."""
    return list(check_upsampler(GeneratorSettings(upsampler_url=AnyHttpUrl(url) if url else None, **settings)))


def test_an_upsampler_is_checked_only_if_it_is_set() -> None:
    """An upsampler is checked only if it is set, and is never a failure."""
    assert upsampler_at(None) == []
    [check] = upsampler_at(f"{CLOSED_PORT}/v1")
    assert check.status is Status.WARNING


@pytest.mark.parametrize(
    ("models", "status", "message"),
    [
        ((200, {"data": [{"id": "default"}]}), Status.OK, "responds"),
        ((200, {"data": [{"id": "llama"}, 7]}), Status.WARNING, "has llama, not 'default'"),
        ((200, {"data": "x"}), Status.OK, "responds"),
        ((200, b"x"), Status.OK, "responds"),
        ((404, b""), Status.OK, "responds"),
        ((401, b""), Status.WARNING, "rejects the token"),
    ],
)
def test_responses_of_an_upsampler(models: tuple[int, Any], status: Status, message: str) -> None:
    """An upsampler that does not list the configured model, or refuses the token, is a warning."""
    with serving(v1_models=models) as (url, received):
        [check] = upsampler_at(f"{url}/v1/", upsampler_token=SecretStr("secret"))
    assert check.status is status
    assert message in check.detail
    assert received == [("/v1/models", "Bearer secret")]
