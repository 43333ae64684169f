"""How fast this engine prefills, measured step by step."""

import time
from collections import deque

_LEAST = 32  # tokens in a step below which it says nothing about prefill
_WEIGHT = 0.2  # of the newest step


class Pace:
    """Tokens a second of the steps that prefill, as a running average. The engine thread's; anybody may read it."""

    def __init__(self) -> None:
        self.rate: float | None = None  # tokens a second; None while nothing was measured
        self._launches: deque[float] = deque()
        self._committed = 0.0

    def launched(self, begun: float) -> None:
        """A step was launched, at this time of ``time.perf_counter``."""
        self._launches.append(begun)

    def committed(self, tokens: int) -> None:
        """The oldest step is over; it computed this many tokens. With several under way, they take turns."""
        now = time.perf_counter()
        begun = self._launches.popleft()
        seconds, self._committed = now - max(begun, self._committed), now
        if tokens >= _LEAST and seconds > 0:
            rate = tokens / seconds
            self.rate = rate if self.rate is None else self.rate + _WEIGHT * (rate - self.rate)
