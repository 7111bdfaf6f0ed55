"""A server's port is ours from its choice on, long before the server listens at it."""

from __future__ import annotations

import socket

from searche1.types import UserError


def hold_port(host: str, port: int, *, setting: str) -> socket.socket:
    """A bound socket that does not listen; 0 is a free port. `setting` is what a user changes for another one.

    Between a choice and a server's start lie seconds of loading, in which Linux would give a free port to any
    connection. While this socket is open it does not, but a server may still listen there: Linux lets several sockets
    have a port while at most one listens, if all ask for SO_REUSEADDR, as servers do. Raises UserError.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise UserError(
            f"{setting}: cannot listen on {host}:{port} ({error.strerror}); choose another port, or 0 for a free one"
        ) from error
    return held
