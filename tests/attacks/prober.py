"""Asks for ``/health/live`` over a new connection every 20 ms until its input ends, and prints how long each took.

A program of its own, so that what the attacker computes does not delay it.
"""

import contextlib
import select
import socket
import sys
import time

NO_ANSWER_S = 10.0


def probe(port: int) -> float:
    """The seconds until the status line was there."""
    began = time.perf_counter()
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=NO_ANSWER_S) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        if connection.recv(64).startswith(b"HTTP/1.1 200"):
            return time.perf_counter() - began
    return NO_ANSWER_S


def main() -> None:
    port = int(sys.argv[1])
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        print(probe(port))


if __name__ == "__main__":
    main()
