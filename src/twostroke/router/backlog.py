"""Requests that wait: how many may, how long it takes, and who is next when a decode worker has room again."""

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from itertools import count

from twostroke.errors import Overloaded

_STARTS = 64  # latest first bytes, whose rate says how long to wait
_RATE_SECONDS = 30.0  # that a rate is remembered
_MOST_SECONDS = 60  # of Retry-After
_STEP = 0.02  # seconds in which a worker without room says so; until then, whoever is next waits


class Backlog:
    """Requests without a first byte. Bounded: beyond ``limit``, new ones are told when to come back."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting = 0
        self._limit = limit
        self._clock = clock
        self._starts: deque[float] = deque(maxlen=_STARTS)

    def enter(self) -> "Place":
        """One more request waits.

        Raises:
            Overloaded: too many do.
        """
        if self.waiting >= self._limit:
            raise Overloaded(
                f"{self.waiting} requests wait already; this router takes no more", retry_after=self.retry_after()
            )
        return Place(self)

    def retry_after(self) -> int:
        """Seconds, 1 to 60, in which as many requests as wait now were begun lately."""
        now = self._clock()
        while self._starts and now - self._starts[0] > _RATE_SECONDS:
            self._starts.popleft()
        if len(self._starts) < 2:
            return 1 if not self.waiting else min(_MOST_SECONDS, 5)
        seconds = self.waiting * (now - self._starts[0]) / len(self._starts)
        return max(1, min(_MOST_SECONDS, math.ceil(seconds)))

    def _leave(self, *, served: bool) -> None:
        self.waiting -= 1
        if served:
            self._starts.append(self._clock())


class Place:
    """One waiting request's. It ends once: with the first byte, or without."""

    __slots__ = ("_backlog", "_over")

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._over = False
        backlog.waiting += 1

    def leave(self, *, served: bool) -> None:
        """The request waits no more. Only the first call counts."""
        if not self._over:
            self._over = True
            self._backlog._leave(served=served)


class Line:
    """Requests that found every decode worker without room, in order of arrival.

    When there may be room again the first one tries. If no worker has refused it shortly after, so does the next: one
    that is refused keeps its place at the head.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # a heap
        self._next: asyncio.TimerHandle | None = None

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        while self._waiting and self._waiting[0][1].done():
            heapq.heappop(self._waiting)  # its request is gone
        return bool(self._waiting)

    def number(self) -> int:
        """A place at the end."""
        return next(self._numbers)

    async def turn(self, number: int, patience: float) -> None:
        """Wait for the turn of ``number``.

        Raises:
            Overloaded: it did not come within ``patience`` seconds.
        """
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (number, turn))
        try:
            async with asyncio.timeout(patience):
                await turn
        except TimeoutError:
            raise Overloaded(f"no decode worker had room within {patience:.0f} s", retry_after=5) from None
        finally:
            if not turn.done():
                turn.cancel()

    def refused(self) -> None:
        """There was no room after all: nobody else need try until something changes."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def room(self) -> None:
        """There may be room: a request has ended, or time has passed."""
        if self._next is None:
            self._wake()

    def _wake(self) -> None:
        self._next = None
        if self:
            heapq.heappop(self._waiting)[1].set_result(None)
            self._next = asyncio.get_running_loop().call_later(_STEP, self._wake)
