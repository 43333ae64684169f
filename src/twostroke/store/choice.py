"""Load or recompute: how many of a prefix's blocks are worth loading. Pure; and what is measured to decide it."""

from collections.abc import Sequence
from typing import NamedTuple

OLD_SECONDS = 10.0  # after which a measurement says little
_WEIGHT = 0.3  # of the newest measurement


class Average:
    """A running average of amounts a second, in which recent measurements weigh most, and old ones nothing. The very
    first is not one: there is a connection to make, or memory to map.
    """

    def __init__(self) -> None:
        self.rate: float | None = None  # amount a second; None while nothing was measured
        self._last: float | None = None  # when the latest measurement, or the very first, was made

    def measured(self, amount: float, seconds: float, now: float) -> None:
        """``amount`` took ``seconds``. ``now``: on any clock, in seconds."""
        if self._last is not None:
            rate = amount / max(seconds, 1e-9)
            self.rate = rate if self.rate is None or self.old(now) else self.rate + _WEIGHT * (rate - self.rate)
        self._last = now

    def old(self, now: float) -> bool:
        """Whether it should be measured again before anything is decided by it for good."""
        return self._last is None or now - self._last > OLD_SECONDS


class Choice(NamedTuple):
    """How many of the blocks to load, and why, for people."""

    blocks: int
    why: str


def choose(loads: Sequence[float | None], compute: float | None) -> Choice:
    """How many of the first blocks to load so that loading them and computing the others takes the least time.

    Args:
        loads: seconds to load each block in turn; ``None`` if nobody knows yet.
        compute: seconds to compute one; ``None`` if nobody knows yet.
    """
    if compute is None:
        return Choice(len(loads), "prefill is not measured yet")
    best, saved, most = 0, 0.0, 0.0
    for index, load in enumerate(loads):
        saved += compute - (load or 0.0)
        if saved >= most:
            best, most = index + 1, saved
    known = [load for load in loads if load is not None]
    speed = f"{1e3 * sum(known) / len(known):.3g} ms" if known else "unmeasured"
    return Choice(best, f"to load a block takes {speed}, to compute it {1e3 * compute:.3g} ms")
