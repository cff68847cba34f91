"""ASGI middleware against web pages that use a visitor's browser to reach this service.

A page of any site can make a browser send forms to ``localhost`` or into a private network, and can read responses if
its own name resolves to this service's address (DNS rebinding). Browsers tell such requests apart by their headers.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flux2_shared.errors import CrossSiteRequest, UnknownHost
from flux2_shared.web.problem import problem_response

ANY = "*"
OWN_RELATIONS = {"same-origin", "none"}
"""Values of ``Sec-Fetch-Site``: a page of this service, and the user, for instance by a bookmark."""
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::(?P<port>\d{0,5}))?", re.ASCII | re.IGNORECASE)
"""The value of ``Host`` (RFC 9110, 7.2)."""
PRIVATE_SUFFIXES = (".localhost", ".internal", ".svc", ".cluster.local")
"""Ends of names that no one can register, so that they cannot be used for DNS rebinding."""
DEFAULT_PORTS = (":80", ":443")
MAX_SHOWN_CHARS = 100
MAX_CACHED_HOSTS = 128


class SiteCheck:
    """Middleware that refuses other sites' requests and unknown hosts.

    Args:
        app: the next app.
        allowed_hosts: further names of this service, ``*.example.com`` for all below a domain, or ``*`` for any name.
        allowed_origins: origins whose pages may send requests, such as ``https://app.example.com``, or ``*`` for all.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str], allowed_origins: Sequence[str]) -> None:
        self._app = app
        # Clients use few names, so each is looked at once.
        self._is_known_host = lru_cache(MAX_CACHED_HOSTS)(partial(is_known_host, allowed=allowed_hosts))
        self._allowed_origins = set(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin, relation = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
        is_allowed = scope["method"] in SAFE_METHODS or self._allowed_origins & {origin, ANY}
        # Only trustworthy URLs get Sec-Fetch-Site; for others the origin is compared with the host.
        is_own = origin is None or is_same_host(origin, host or "") if relation is None else relation in OWN_RELATIONS
        app = self._app
        if host is not None and not self._is_known_host(host):
            detail = f"host: {host[:MAX_SHOWN_CHARS]} is not a known name of this service; see ALLOWED_HOSTS"
            app = problem_response(Request(scope), UnknownHost(detail, param="host"))
        elif not is_allowed and not is_own:
            detail = f"origin: pages of {(origin or 'another site')[:MAX_SHOWN_CHARS]} must not send requests"
            error = CrossSiteRequest(f"{detail}; see ALLOWED_ORIGINS", param="origin")
            app = problem_response(Request(scope), error)
        await app(scope, receive, send)


def is_known_host(host: str, allowed: Sequence[str]) -> bool:
    """Return whether the value of ``Host`` is an address, a private name, or an allowed one."""
    if ANY in allowed:
        return True
    parsed = HOST.fullmatch(host)
    if parsed is None:
        return False
    name = parsed["name"].lower().rstrip(".")
    # A name without a dot cannot be registered, and the owner of an address is known.
    if "." not in name or is_address(name) or name.endswith(PRIVATE_SUFFIXES):
        return True
    return any(name == each.lower() or (each[:2] == "*." and name.endswith(each[1:].lower())) for each in allowed)


def is_address(name: str) -> bool:
    """Return whether the name of a host is an IP address."""
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_same_host(origin: str, host: str) -> bool:
    """Return whether an origin has the name and port of a ``Host``. Its scheme may be that of a proxy."""
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:
        return False
    return without_default_port(netloc) == without_default_port(host) != ""


def without_default_port(netloc: str) -> str:
    """Remove a port that URLs omit."""
    lower = netloc.lower()
    return next((lower.removesuffix(port) for port in DEFAULT_PORTS if lower.endswith(port)), lower)
