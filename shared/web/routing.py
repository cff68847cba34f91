"""ASGI middleware before the routes: the path prefix of a proxy, trailing slashes, and HEAD."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux2_shared.settings import PATH_PREFIX

Network = IPv4Network | IPv6Network


class ProxyPrefix:
    """Middleware for a service behind a proxy that publishes it below a path prefix, whether or not it removes it.

    Every link starts with the scope's ``root_path``: the prefix in ``X-Forwarded-Prefix`` of a trusted proxy, else the
    configured one, else the server's. The scope's path is completed to start with it, as ASGI requires.
    """

    def __init__(self, app: ASGIApp, root_path: str, trusted_proxies: Sequence[Network]) -> None:
        self._app = app
        self._root_path = root_path
        self._trusted_proxies = trusted_proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = self._forwarded_prefix(scope) or self._root_path or scope.get("root_path", "").rstrip("/")
            path: str = scope["path"]
            if not f"{path}/".startswith(f"{prefix}/"):
                path = prefix + path
            scope.update(root_path=prefix, path=path)  # in place, because of the middleware around this one
        await self._app(scope, receive, send)

    def _forwarded_prefix(self, scope: Scope) -> str:
        """Return the prefixes that a trusted proxy has removed, joined; empty if there are none, or one is invalid."""
        host = (scope.get("client") or ("", 0))[0]
        if not is_in(host, self._trusted_proxies):
            return ""
        parts = ",".join(Headers(scope=scope).getlist("x-forwarded-prefix")).split(",")
        prefix = "".join(part.strip().rstrip("/") for part in parts)
        return prefix if PATH_PREFIX.fullmatch(prefix) else ""


def is_in(host: str, networks: Sequence[Network]) -> bool:
    """Return whether the host is an address in one of the networks."""
    try:
        address = ip_address(host)
    except ValueError:  # such as the name of a Unix socket
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:  # an IPv4 client of an IPv6 socket
        address = address.ipv4_mapped
    return any(address in network for network in networks)


class LenientRouting:
    """Middleware that ignores a trailing slash, and answers HEAD wherever there is a route for GET.

    Instead of a redirect, whose address would contain the client's ``Host``, the resource itself is sent. HEAD gets the
    headers of GET without its body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = scope.get("root_path", "").rstrip("/")
            # In place, because the middleware around this one reads the route that will be added.
            scope.update(root_path=prefix, path=prefix + (scope["path"].removeprefix(prefix).rstrip("/") or "/"))
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def receive_until_started() -> Message:
            return {"type": "http.disconnect"} if has_started else await receive()

        async def send_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True  # a stream of events ends because its client seems to have left
                scope["method"] = "HEAD"
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        scope["method"] = "GET"  # in place, as above
        try:
            await self._app(scope, receive_until_started, send_headers)
        finally:
            scope["method"] = "HEAD"
