"""Load or recompute: how many of a prefix's blocks are worth loading. Pure; and what is measured to decide it."""

from collections.abc import Sequence
from typing import NamedTuple

OLD_SECONDS = 10.0  # after which a measurement says little
_WEIGHT = 0.3  # of the newest measurement


class Average:
    """A running average of amounts a second, in which recent measurements weigh most, and old ones nothing."""

    def __init__(self) -> None:
        self.rate = 0.0  # amount a second
        self.amount = 0.0  # the latest
        self._last: float | None = None  # when that was measured

    def measured(self, amount: float, seconds: float, now: float) -> None:
        """``amount`` took ``seconds``. ``now``: on any clock, in seconds."""
        rate = amount / max(seconds, 1e-9)
        self.rate = rate if self.old(now) else self.rate + _WEIGHT * (rate - self.rate)
        self.amount, self._last = amount, now

    def old(self, now: float) -> bool:
        """Whether it should be measured again before anything is decided by it for good."""
        return self._last is None or now - self._last > OLD_SECONDS


class Speed:
    """How fast a tier moves blocks. What a call takes beside them makes a call for few say little about one for many:
    each size, by powers of two, has an average of its own. The very first call is none: there is a connection to make,
    or memory to map.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, Average] = {}
        self._began = False

    def measured(self, blocks: int, seconds: float, now: float) -> None:
        """A call for so many ``blocks`` took ``seconds``. ``now``: on any clock, in seconds."""
        if self._began:
            self._sizes.setdefault(blocks.bit_length(), Average()).measured(blocks, seconds, now)
        self._began = True

    def rate(self, now: float) -> float | None:
        """Blocks a second in the calls that are fastest; None while nothing was measured."""
        return max((size.rate for size in self._recent(now).values()), default=None)

    def seconds(self, blocks: int, now: float) -> float | None:
        """What a call for so many takes; None while nothing was measured. Of a size that was not, the best case: as
        long as a call for fewer, or as much less than one for more.
        """
        sizes, size = self._recent(now), blocks.bit_length()
        if not sizes:
            return None
        smaller = max((one for one in sizes if one < size), default=None)
        if size not in sizes and smaller is not None:
            return sizes[smaller].amount / sizes[smaller].rate
        return blocks / sizes[min(one for one in sizes if one >= size)].rate

    def old(self, blocks: int, now: float) -> bool:
        """Whether a call for so many should be measured (again)."""
        size = self._sizes.get(blocks.bit_length())
        return size is None or size.old(now)

    def _recent(self, now: float) -> dict[int, Average]:
        """Those that are not old, if there are any."""
        return {size: one for size, one in self._sizes.items() if not one.old(now)} or self._sizes


class Run(NamedTuple):
    """Blocks behind each other that take equally long to load."""

    blocks: int
    seconds: float | None  # each; None if nobody knows yet


class Choice(NamedTuple):
    """How many of the blocks to load, and why, for people."""

    blocks: int
    why: str


def choose(loads: Sequence[Run], compute: float | None) -> Choice:
    """How many of the first blocks to load so that loading them and computing the others takes the least time.

    Args:
        loads: the blocks, in order.
        compute: seconds to compute one; ``None`` if nobody knows yet.
    """
    if compute is None:
        return Choice(sum(run.blocks for run in loads), "prefill is not measured yet")
    best, saved, most, count = 0, 0.0, 0.0, 0
    for blocks, seconds in loads:
        saved += blocks * (compute - (seconds or 0.0))
        count += blocks
        if saved >= most:
            best, most = count, saved
    known = [(blocks, seconds) for blocks, seconds in loads if seconds is not None]
    mean = sum(blocks * seconds for blocks, seconds in known) / (sum(blocks for blocks, _ in known) or 1)
    speed = f"{1e3 * mean:.3g} ms" if known else "unmeasured"
    return Choice(best, f"to load a block takes {speed}, to compute it {1e3 * compute:.3g} ms")
