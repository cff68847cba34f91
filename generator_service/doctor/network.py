"""Checks of the services' ports, and of the services that the generator depends on."""

import errno
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import Any

import httpx
from pydantic import SecretStr, ValidationError

from flux2_shared.model.subfolders import Service
from flux2_shared.schemas import EncoderInfo
from flux2_shared.settings import ServiceSettings
from generator_service.doctor.check import Check, describe, failed, ok, one_line, warning
from generator_service.doctor.model import Model
from generator_service.settings import GeneratorSettings

TIMEOUT_S = 5.0
MAX_BYTES = 4 * 2**20
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not listened on
TITLES = {Service.GENERATOR: "FLUX.2 generator", Service.TEXT_ENCODER: "FLUX.2 text encoder"}
"""Titles in the services' OpenAPI documents."""


@dataclass(frozen=True)
class Answer:
    """The status and body of a response."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Parse the body as JSON; return None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def get(url: str, token: SecretStr | None = None) -> Answer:
    """Send a GET request with limits on the size and the time of the response.

    Raises:
        httpx.HTTPError: the response is late, too long or incomplete.
    """
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    headers["Accept-Encoding"] = "identity"
    until = monotonic() + TIMEOUT_S
    body = bytearray()
    with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT_S, trust_env=False) as response:  # as the services
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise httpx.ReadError("the response is too long")
            if monotonic() > until:
                raise httpx.ReadTimeout("the response takes too long")
        return Answer(response.status_code, bytes(body))


def check_port(service: Service, settings: ServiceSettings) -> tuple[Check, bool]:
    """Check whether a service could listen on its port; also return whether the service is already running."""
    name, where = f"{service.replace('-', ' ')} port", f"port {settings.port} of {settings.host}"
    variable = f"{service.replace('-', '_').upper()}_PORT"
    problem = bind_problem(settings.host, settings.port)
    if problem is None:
        return ok(name, f"{where} is free"), False
    if problem.errno != errno.EADDRINUSE:
        fix = f"set {variable} to 1024 or more, and {variable.replace('_PORT', '_HOST')} to an address of this host"
        return failed(name, f"{where} cannot be used: {problem.strerror or describe(problem)}", fix), False
    user, is_running = identify_listener(service, settings)
    if is_running:
        return ok(name, f"{where} is used by {user}"), True
    return failed(name, f"{where} is used by {user}", f"stop it (ss -ltnp), or set {variable} to another port"), False


def check_ports_differ(settings: Mapping[Service, ServiceSettings]) -> Iterator[Check]:
    """Check that the services are set to different ports."""
    ports = [each.port for each in settings.values() if each.port]
    if len(set(ports)) < len(ports):
        detail = f"both services are set to port {ports[0]}"
        yield failed("ports", detail, "set GENERATOR_PORT or TEXT_ENCODER_PORT to another")


def bind_problem(host: str, port: int) -> OSError | None:
    """Try to listen on a port; return the error, or None if it is possible."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            return error
    return None


def identify_listener(service: Service, settings: ServiceSettings) -> tuple[str, bool]:
    """Describe the program that uses a service's port, and return whether it is the service itself, alive."""
    url = address(settings)
    try:
        live = get(f"{url}/health/live")
        title = title_of(get(f"{url}/openapi.json"))
    except httpx.HTTPError as error:
        return f"a program that is not one of these services ({describe(error)})", False
    if title not in TITLES.values():
        return "another program", False
    if title != TITLES[service]:
        return f"the {title}", False
    if live.status != HTTPStatus.OK:
        return f"this service, whose /health/live has status {live.status}: restart it", False
    return f"this service, which is running{_readiness(settings)}", True


def _readiness(settings: ServiceSettings) -> str:
    try:
        answer = get(f"{address(settings)}/health/ready")
    except httpx.HTTPError:
        return ""
    data = answer.json()
    if answer.status == HTTPStatus.OK:
        reason = data.get("degraded") if isinstance(data, dict) else None
        return " and ready" + (f", but {one_line(str(reason))}" if reason else "")
    return f"; not ready: {one_line(str(data.get('reason', '')))}" if isinstance(data, dict) else ""


def address(settings: ServiceSettings) -> str:
    """Return the URL of a service on this host."""
    host = WILDCARDS.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def title_of(answer: Answer) -> str | None:
    """Return the title of a service's OpenAPI document."""
    document = answer.json()
    info = document.get("info") if isinstance(document, dict) else None
    title = info.get("title") if isinstance(info, dict) else None
    return title if isinstance(title, str) else None


def check_encoder(settings: GeneratorSettings, model: Model) -> Iterator[Check]:
    """Check whether the text encoder responds and suits the model, as the generator's readiness check does."""
    name = "text encoder"
    url = str(settings.text_encoder_url).rstrip("/").removesuffix("/predict")
    try:
        answer = get(f"{url}/info", settings.token_to_send())
    except httpx.HTTPError as error:
        detail = f"{url} does not respond ({describe(error)}): until it does, the generator is not ready"
        yield warning(name, detail, "start the text encoder, or correct TEXT_ENCODER_URL")
        return
    if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        fix = "set TEXT_ENCODER_KEYS_FILE or TEXT_ENCODER_TOKEN to one of the text encoder's keys"
        yield failed(name, f"{url} rejects the key (status {answer.status})", fix)
    elif answer.status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
        yield ok(name, f"{url} responds; it has no /info, so its model is assumed to match")
    elif answer.status in {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}:
        yield warning(name, f"{url} is not available now: {_reason(answer)}", "wait until it is ready")
    elif answer.status != HTTPStatus.OK:
        yield failed(name, f"{url}/info has status {answer.status}", "correct TEXT_ENCODER_URL; see its log")
    else:
        yield _check_info(name, url, answer, model)


def _reason(answer: Answer) -> str:
    """Return why a request was rejected: the problem's detail, or the status."""
    problem = answer.json()
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return one_line(detail) if isinstance(detail, str) else f"status {answer.status}"


def _check_info(name: str, url: str, answer: Answer, model: Model) -> Check:
    try:
        info = EncoderInfo.model_validate_json(answer.body)
    except ValidationError:
        return failed(name, f"{url}/info is not the text encoder's: another program?", "correct TEXT_ENCODER_URL")
    mismatch = info.mismatch(model.name, model.revision, model.embedding_shape) if model.path else None
    if mismatch is not None:
        return failed(name, mismatch, "start both with the same FLUX2_MODEL and FLUX2_REVISION")
    return ok(name, f"{url} serves {info.model}@{info.revision}, embeddings {list(info.embedding_shape)} {info.dtype}")


def check_upsampler(settings: GeneratorSettings) -> Iterator[Check]:
    """Check the chat model for prompt upsampling, if one is set."""
    if settings.upsampler_url is None:
        return
    name, url = "upsampler", str(settings.upsampler_url).rstrip("/")
    try:
        answer = get(f"{url}/models", settings.upsampler_token)
    except httpx.HTTPError as error:
        yield warning(
            name, f"{url} does not respond ({describe(error)})", "start it, or correct GENERATOR_UPSAMPLER_URL"
        )
        return
    if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        yield warning(name, f"{url} rejects the token (status {answer.status})", "set GENERATOR_UPSAMPLER_TOKEN")
        return
    data = answer.json()
    models = [entry.get("id") for entry in data["data"] if isinstance(entry, dict)] if _is_list_of_models(data) else []
    if models and settings.upsampler_model not in models:
        detail = f"{url} has {', '.join(map(str, models[:5]))}, not {settings.upsampler_model!r}"
        yield warning(name, detail, "set GENERATOR_UPSAMPLER_MODEL; some servers accept any name")
    else:
        yield ok(name, f"{url} responds")


def _is_list_of_models(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("data"), list)
