"""Ports that the services listen on, and the services that the generator asks."""

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

from generator_service.doctor.check import Check, describe, failed, ok, one_line, warning
from generator_service.doctor.model import Model
from generator_service.settings import GeneratorSettings
from generator_service.weights import Service
from shared.schemas import EncoderInfo
from shared.settings import ServiceSettings

TIMEOUT_S = 5.0
MAX_BYTES = 4 * 2**20
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not listened on
TITLES = {Service.GENERATOR: "FLUX.2 generator", Service.TEXT_ENCODER: "FLUX.2 text encoder"}
"""Titles in the services' OpenAPI documents."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON, None if it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def get(url: str, token: SecretStr | None = None) -> Answer:
    """Send a GET request; the answer is bounded in size and time.

    Raises:
        httpx.HTTPError: the answer is late, too long or incomplete.
    """
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    headers["Accept-Encoding"] = "identity"
    until = monotonic() + TIMEOUT_S
    body = bytearray()
    with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise httpx.ReadError("the answer is too long")
            if monotonic() > until:
                raise httpx.ReadTimeout("the answer takes too long")
        return Answer(response.status_code, bytes(body))


def check_port(service: Service, settings: ServiceSettings) -> tuple[Check, bool]:
    """Whether a service could listen on its port, and whether it is the service itself that already does."""
    name, where = f"{service.replace('-', ' ')} port", f"port {settings.port} of {settings.host}"
    variable = f"{service.replace('-', '_').upper()}_PORT"
    problem = bind_problem(settings.host, settings.port)
    if problem is None:
        return ok(name, f"{where} is free"), False
    if problem.errno != errno.EADDRINUSE:
        fix = f"set {variable} to 1024 or more, and {variable.replace('_PORT', '_HOST')} to an address of this host"
        return failed(name, f"{where} cannot be used: {problem.strerror or describe(problem)}", fix), False
    user, is_running = who_listens(service, settings)
    if is_running:
        return ok(name, f"{where} is used by {user}"), True
    return failed(name, f"{where} is used by {user}", f"end it (ss -ltnp), or set {variable} to another port"), False


def check_ports_differ(settings: Mapping[Service, ServiceSettings]) -> Iterator[Check]:
    """Two services cannot listen on one port."""
    ports = [each.port for each in settings.values() if each.port]
    if len(set(ports)) < len(ports):
        detail = f"both services are set to port {ports[0]}"
        yield failed("ports", detail, "set GENERATOR_PORT or TEXT_ENCODER_PORT to another")


def bind_problem(host: str, port: int) -> OSError | None:
    """Why a port cannot be listened on, if so."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            return error
    return None


def who_listens(service: Service, settings: ServiceSettings) -> tuple[str, bool]:
    """Who uses a service's port, and whether it is the service itself, alive."""
    url = address(settings)
    try:
        live = get(f"{url}/health/live")
        title = title_of(get(f"{url}/openapi.json"))
    except httpx.HTTPError as error:
        return f"a program that does not answer as ours do ({describe(error)})", False
    if title not in TITLES.values():
        return "another program", False
    if title != TITLES[service]:
        return f"the {title}", False
    if live.status != HTTPStatus.OK:
        return f"this service, which answers /health/live with status {live.status}: restart it", False
    return f"this service, which is running{_readiness(settings)}", True


def _readiness(settings: ServiceSettings) -> str:
    try:
        answer = get(f"{address(settings)}/health/ready")
    except httpx.HTTPError:
        return ""
    if answer.status == HTTPStatus.OK:
        return " and ready"
    said = answer.json()
    return f"; not ready: {one_line(str(said.get('reason', '')))}" if isinstance(said, dict) else ""


def address(settings: ServiceSettings) -> str:
    """Where a service can be reached from this host."""
    host = WILDCARDS.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def title_of(answer: Answer) -> str | None:
    """What a service calls itself in its OpenAPI document."""
    document = answer.json()
    info = document.get("info") if isinstance(document, dict) else None
    title = info.get("title") if isinstance(info, dict) else None
    return title if isinstance(title, str) else None


def check_encoder(settings: GeneratorSettings, model: Model) -> Iterator[Check]:
    """Whether the text encoder answers, and embeds for this model; as the generator's readiness asks."""
    name = "text encoder"
    url = str(settings.text_encoder_url).rstrip("/").removesuffix("/predict")
    try:
        answer = get(f"{url}/info", settings.token_to_send())
    except httpx.HTTPError as error:
        detail = f"{url} does not answer ({describe(error)}): until it does, the generator is not ready"
        yield warning(name, detail, "start the text encoder, or correct TEXT_ENCODER_URL")
        return
    if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        fix = "set TEXT_ENCODER_KEYS_FILE or TEXT_ENCODER_TOKEN to one of the text encoder's keys"
        yield failed(name, f"{url} refuses the key (status {answer.status})", fix)
    elif answer.status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
        yield ok(name, f"{url} answers; it has no /info, so its model is taken to be this one")
    elif answer.status in {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}:
        yield warning(name, f"{url} cannot answer now: {_reason(answer)}", "wait until it is ready")
    elif answer.status != HTTPStatus.OK:
        yield failed(name, f"{url}/info answers with status {answer.status}", "correct TEXT_ENCODER_URL; see its log")
    else:
        yield _check_info(name, url, answer, model)


def _reason(answer: Answer) -> str:
    """Why a request was refused, in the service's words if it is ours."""
    problem = answer.json()
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return one_line(detail) if isinstance(detail, str) else f"status {answer.status}"


def _check_info(name: str, url: str, answer: Answer, model: Model) -> Check:
    try:
        info = EncoderInfo.model_validate_json(answer.body)
    except ValidationError:
        return failed(name, f"{url}/info is not understood: another program?", "correct TEXT_ENCODER_URL")
    difference = info.mismatch(model.name, model.revision, model.embedding_shape) if model.path else None
    if difference is not None:
        return failed(name, difference, "start both with the same FLUX2_MODEL and FLUX2_REVISION")
    return ok(name, f"{url} serves {info.model}@{info.revision}, embeddings {list(info.embedding_shape)} {info.dtype}")


def check_upsampler(settings: GeneratorSettings) -> Iterator[Check]:
    """The chat model that rewrites prompts, if one is set. Only requests that ask for it need it."""
    if settings.upsampler_url is None:
        return
    name, url = "upsampler", str(settings.upsampler_url).rstrip("/")
    try:
        answer = get(f"{url}/models", settings.upsampler_token)
    except httpx.HTTPError as error:
        yield warning(
            name, f"{url} does not answer ({describe(error)})", "start it, or correct GENERATOR_UPSAMPLER_URL"
        )
        return
    if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        yield warning(name, f"{url} refuses the token (status {answer.status})", "set GENERATOR_UPSAMPLER_TOKEN")
        return
    said = answer.json()
    models = [entry.get("id") for entry in said["data"] if isinstance(entry, dict)] if _is_list_of_models(said) else []
    if models and settings.upsampler_model not in models:
        detail = f"{url} has {', '.join(map(str, models[:5]))}, not {settings.upsampler_model!r}"
        yield warning(name, detail, "set GENERATOR_UPSAMPLER_MODEL; some servers take any name")
    else:
        yield ok(name, f"{url} answers")


def _is_list_of_models(said: Any) -> bool:
    return isinstance(said, dict) and isinstance(said.get("data"), list)
