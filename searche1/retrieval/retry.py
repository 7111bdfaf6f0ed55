"""When to ask an HTTP server again, and after how long."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = (429, 500, 502, 503, 504)
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 8.0
MAX_RETRY_AFTER_S = 60.0

_jitter = random.Random()  # its own generator: pauses must not shift anyone's seeded numbers


def pause_s(num_faults: int, *, first_s: float = FIRST_PAUSE_S, retry_after: str | None = None) -> float:
    """Seconds to wait after `num_faults` in a row: doubled each time, with jitter, and what the server asks for."""
    backoff = min(MAX_PAUSE_S, first_s * 2 ** min(num_faults - 1, 10))
    return max(backoff * _jitter.uniform(0.5, 1.0), retry_after_s(retry_after))


def retry_after_s(value: str | None) -> float:
    """A Retry-After header, seconds or a date, in seconds from now; 0 if there is none that can be read."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if seconds == seconds else 0.0  # NaN is no time
