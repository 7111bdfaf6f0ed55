"""Addresses of servers, checked before anything is asked of them."""

from __future__ import annotations

from urllib.parse import urlsplit

from searche1.types import UserError


def http_address(url: str, *, setting: str, example: str) -> str:
    """`url` without a slash at its end. Raises UserError, which names the setting, unless it has scheme and host."""
    try:
        address = urlsplit(url)
        _ = address.port  # is parsed only now
    except ValueError as error:
        raise UserError(f"{setting} is {url!r}, which is no address ({error}); give one such as {example}") from error
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"{setting} is {url!r}; give an address such as {example}")
    return url.rstrip("/")
