"""When a worker that answers heartbeats, and fails requests, is left alone. Pure: whoever asks brings the time.

::

    CLOSED ──``FAILURES`` in a row──▶ OPEN ──its time is over──▶ HALF_OPEN: one request may try
      ▲                                ▲                             │
      │                                └───────── it fails ──────────┤
      └──────────────────────── it succeeds ─────────────────────────┘

Each time that the try fails, the worker is left alone for twice as long.
"""

from typing import Literal

FAILURES = 3  # in a row
FIRST_SECONDS = 1.0
MOST_SECONDS = 30.0

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Of one worker process. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.failures = 0  # since the last success
        self._until: float | None = None  # open, and what is in the future; half-open, and what is past
        self._seconds = FIRST_SECONDS
        self._trying = False

    def state(self, now: float) -> BreakerState:
        """What it is at this time."""
        if self._until is None:
            return "closed"
        return "open" if now < self._until else "half-open"

    def allows(self, now: float) -> bool:
        """Whether the worker may get one more request."""
        return self._until is None or (now >= self._until and not self._trying)

    def taken(self, now: float) -> bool:
        """A request goes to the worker. Whether it is the one that tries: its end must be told with ``trying``."""
        trying = self._until is not None and self.allows(now)
        self._trying = self._trying or trying
        return trying

    def succeeded(self, *, trying: bool = False) -> None:
        """A request was answered. If it was sent before the breaker opened, that proves nothing about now."""
        if trying or self._until is None:
            self.failures = 0
            self._until, self._seconds, self._trying = None, FIRST_SECONDS, False

    def failed(self, now: float, *, trying: bool = False) -> None:
        """A request failed by the worker's fault."""
        self.failures += 1
        if trying:
            self._trying = False
            self._seconds = min(2 * self._seconds, MOST_SECONDS)
            self._until = now + self._seconds
        elif self._until is None and self.failures >= FAILURES:
            self._until = now + self._seconds

    def dropped(self, *, trying: bool = False) -> None:
        """A request ended without telling anything of the worker: its client left, or another worker failed."""
        if trying:
            self._trying = False
