"""Addresses of a server."""

from __future__ import annotations

import ipaddress
import socket


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
