"""An HTTP request in two halves, so that both sides work between them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

UNQUOTED = "/%:@!$&'()*+,;=~"  # of a path; what is quoted already stays so

# What sending and reading raise when there is no answer.
NO_ANSWER = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    text: str

    def json(self) -> Any:
        """Raises ValueError if it is none."""
        return json.loads(self.text)


class Pending:
    """A request that is sent, and whose answer is read when somebody wants it.

    No thread waits meanwhile: in Python it would take turns with the work that this one does. Each request has a
    connection of its own, so none is used that the server may be closing, and a proxy never sees it.
    """

    def __init__(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        request: Any = None,
        timeout_s: float,
    ) -> None:
        """Send `request`, JSON unless it is None, to `url`; `timeout_s` is of every wait. Raises NO_ANSWER."""
        address = urlsplit(url)
        assert address.hostname is not None
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        # With a port, else the last part of an IPv6 address is taken for one.
        self._connection = kind(address.hostname, address.port or kind.default_port, timeout=timeout_s)
        body = b"" if request is None else json.dumps(request).encode()
        content = {} if request is None else {"Content-Type": "application/json"}
        try:
            path = quote(address.path, safe=UNQUOTED)
            self._connection.request(method, path, body, {**headers, **content, "Connection": "close"})
        except BaseException:
            self._connection.close()
            raise

    def answer(self) -> Answer:
        """Wait for it. Once; raises NO_ANSWER."""
        try:
            with self._connection.getresponse() as response:  # which has the connection, once it is there
                return Answer(response.status, response.read().decode(errors="replace"))
        finally:
            self._connection.close()
