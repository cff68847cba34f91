"""HTTP connections with limits on their number, and on the time that slow clients take.

uvicorn limits neither how long a request's head may take to arrive, nor how long a client may leave a response unread.
"""

import asyncio
import itertools
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 15.0
"""Time for the head of a request to arrive, in seconds."""
SEND_S = 30.0
MIN_SENT_BYTES = 64 * 2**10
"""A connection is closed if its client takes fewer than ``MIN_SENT_BYTES`` of a response within ``SEND_S``."""
PEER_SHARE = 0.75
"""Largest share of all connections that one client address may have."""
IPV6_PREFIX = 64
"""Addresses with this prefix in common count as one client, because a client gets all of them."""


class ConnectionLimit:
    """Limits the number of open connections, in total and of one client address.

    At the limit, a new connection replaces the one that has waited longest for its client: those that have sent no
    request since the last response, and those whose request is incomplete. Clients with the most connections lose
    theirs first. If every connection serves a request, the new one is closed.
    """

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._max_of_peer = max(1, int(max_connections * PEER_SHARE))
        self._peers: dict[str, dict[LimitedProtocol, None]] = {}  # each in the order of the last response
        self._num_open = 0

    @property
    def num_open(self) -> int:
        return self._num_open

    def add(self, connection: "LimitedProtocol") -> None:
        """Count a new connection; close another one, or this one, if there are too many."""
        own = self._peers.setdefault(connection.peer, {})
        own[connection] = None
        self._num_open += 1
        if len(own) > self._max_of_peer:
            self._close_one([own], connection)
        elif self._num_open > self._max_connections:
            self._close_one(sorted(self._peers.values(), key=len, reverse=True), connection)

    def reduce(self, num_free: int) -> None:
        """Lower the limit, and close waiting connections, so that there are ``num_free`` fewer than now."""
        self._max_connections = max(1, self._num_open - num_free)
        self._max_of_peer = max(1, int(self._max_connections * PEER_SHARE))
        waiting = [each for peer in self._peers.values() for each in peer if each.is_waiting]
        for connection in waiting[: max(0, self._num_open - self._max_connections)]:
            self.discard(connection)
            connection.transport.abort()

    def discard(self, connection: "LimitedProtocol") -> None:
        """Stop counting a connection that is closed."""
        own = self._peers.get(connection.peer, {})
        if connection not in own:
            return
        del own[connection]
        self._num_open -= 1
        if not own:
            del self._peers[connection.peer]

    def touch(self, connection: "LimitedProtocol") -> None:
        """Note that a response on ``connection`` was sent."""
        own = self._peers.get(connection.peer, {})
        if connection in own:
            del own[connection]
            own[connection] = None

    def _close_one(self, groups: "list[dict[LimitedProtocol, None]]", new: "LimitedProtocol") -> None:
        others = (each for each in itertools.chain.from_iterable(groups) if each is not new)
        victim = next((each for each in others if each.is_waiting), new)
        self.discard(victim)
        victim.transport.abort()


class Timer:
    """Calls a function once after some time, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, function, *args)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with a ``ConnectionLimit`` and time limits for heads and for reading responses."""

    def __init__(self, *args: Any, limit: ConnectionLimit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peer = ""
        """The client's address, or its network."""
        self._limit = limit
        self._head_timer = Timer(self.loop)
        self._send_timer = Timer(self.loop)

    @property
    def is_waiting(self) -> bool:
        """Whether the connection waits for its client: for a request, the rest of one, or to be closed."""
        if self.transport.is_closing():
            return True
        if self._has_no_request:
            return self.transport.get_write_buffer_size() == 0  # else the last response is still being sent
        return self.cycle.more_body

    @property
    def _has_no_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = peer_of(self.client[0] if self.client else "")
        self._watch_head()
        self._limit.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.discard(self)
        self._head_timer.stop()
        self._send_timer.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit.touch(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        self._send_timer.stop()
        super().resume_writing()

    def _watch_head(self) -> None:
        """Close the connection unless a request begins in time; between requests, uvicorn's timer runs at first."""
        if not self._has_no_request:
            self._head_timer.stop()
        elif not self._head_timer.is_running and self.timeout_keep_alive_task is None:
            self._head_timer.start(HEAD_S, self.transport.abort)

    def _watch_sending(self) -> None:
        num_left = self.transport.get_write_buffer_size()
        self._send_timer.start(SEND_S, self._check_sending, num_left)

    def _check_sending(self, num_left_before: int) -> None:
        if self.transport.get_write_buffer_size() > num_left_before - MIN_SENT_BYTES:
            self.transport.abort()
        else:
            self._watch_sending()


def peer_of(host: str) -> str:
    """Return the client that an address belongs to: itself, or the network of an IPv6 address."""
    try:
        address = ip_address(host)
    except ValueError:  # such as the name of a Unix socket
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(IPv6Network((address.packed, IPV6_PREFIX), strict=False))
    return host
