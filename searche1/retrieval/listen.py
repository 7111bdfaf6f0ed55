"""The socket of a server: bound before anything slow is loaded."""

from __future__ import annotations

import ipaddress
import socket

from searche1.types import UserError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: the port is ours before the slow loading, and 0 is a free one."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot serve the retriever on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """Where a client finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://{host}:{port}/retrieve"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
