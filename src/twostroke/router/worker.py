"""One worker process as the router sees it: what it said last, and what this router has there."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

import aiohttp
from msgspec import Struct

from twostroke.messages import Slots, WorkerInfo
from twostroke.router.breaker import Breaker, BreakerState
from twostroke.router.policy import ANSWER_TOKENS, Pool

State = Literal["starting", "ready", "draining", "lost", "refused"]
UPSTREAM_ERRORS = (aiohttp.ClientError, OSError)  # a timeout is an OSError


class WorkerReport(Struct, frozen=True):
    """One entry of ``GET /workers``. ``role`` is what the router uses the worker for."""

    id: str
    role: Pool
    url: str
    pid: int
    instance: str
    state: State
    detail: str
    slots: Slots
    link: str
    running: int
    waiting: int
    in_flight: int  # requests of this router
    model: str
    threads: int
    device: str
    breaker: BreakerState = "closed"
    joined: bool = False  # it announced itself; else the router was started with its URL


class Hold:
    """One request at one worker. Its end is told by the ``with`` that it is from."""

    __slots__ = ("_begun", "_worker", "failed", "queued", "resident")

    def __init__(self, worker: "Worker", queued: int, resident: int) -> None:
        self.queued, self.resident = queued, resident
        self.failed = False  # set it if the reply shows that the worker is not well
        self._worker = worker
        self._begun = False

    def begin(self) -> bool:
        """The answer begins: the prompt is computed, only its KV stays. False if it had begun already."""
        if self._begun:
            return False
        self._begun = True
        self._worker.queued_here -= self.queued
        self.queued = 0
        return True


class Wait:
    """Somebody's wait for a worker, which can be ended from elsewhere."""

    __slots__ = ("error", "over", "timeout")

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.timeout = timeout
        self.error: Exception | None = None
        self.over = False

    def end(self, error: Exception | None = None) -> None:
        """End it with this error, or as a timeout; unless it is over."""
        if not self.over:
            self.error = error
            self.timeout.reschedule(asyncio.get_running_loop().time())


class Worker:
    """One worker process. Only the registry changes its state, only holders of it change its counts."""

    def __init__(
        self, url: str, pool: Pool, *, joined: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = url
        self.pool: Pool = pool
        self.announced = pool  # what it said, or the router was started with
        self.joined = joined
        self.state: State = "starting"
        self.detail = "has not answered yet"
        self.info: WorkerInfo | None = None
        self.breaker = Breaker()
        self.in_flight = 0
        self.queued_here = 0
        self.lost_at: float | None = None
        self._clock = clock
        self._resident_here = 0
        self._foreign_queued = 0
        self._foreign_resident = 0
        self._waits: set[Wait] = set()

    @property
    def id(self) -> str:
        return self.info.id if self.info else self.url

    @property
    def key(self) -> str:
        """Names the process."""
        return self.info.instance if self.info else self.url

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.breaker.allows(self._clock())

    @property
    def queued(self) -> int:
        """Tokens to compute: ours by the size of their bodies, and what others had there at the last heartbeat."""
        return self.queued_here + self._foreign_queued

    @property
    def resident(self) -> int:
        """Tokens whose KV is held: ours by the size of their bodies, and what others had at the last heartbeat."""
        return self._resident_here + self._foreign_resident

    def heard(self, info: WorkerInfo) -> None:
        """Believe what the worker says of itself."""
        self.info, self.state, self.detail, self.lost_at = info, info.state, info.detail, None
        self._foreign_queued = max(0, info.queued_tokens - self.queued_here)
        self._foreign_resident = max(0, info.slots.leased * info.block_tokens - self._resident_here)

    def refuse(self, info: WorkerInfo, why: str) -> None:
        """It is there, and cannot be used beside the others."""
        self.info, self.state, self.detail, self.lost_at = info, "refused", why, None

    def lose(self, why: str) -> None:
        """It is not there."""
        if self.state != "lost":
            self.lost_at = self._clock()
        self.state, self.detail = "lost", why

    @contextmanager
    def held(self, tokens: int, *, computes: bool = True, answers: bool = True) -> Iterator[Hold]:
        """Count one request with this many prompt tokens as in flight.

        The breaker is told how it ends: an upstream error is a failure, a cancellation or anything else tells nothing.

        Args:
            computes: the worker computes the prompt, else it gets the blocks.
            answers: it decodes too.
        """
        hold = Hold(self, tokens if computes else 0, tokens + ANSWER_TOKENS if answers else tokens)
        trying = self.breaker.taken(self._clock())
        self.in_flight += 1
        self.queued_here += hold.queued
        self._resident_here += hold.resident
        try:
            yield hold
        except UPSTREAM_ERRORS:
            self.breaker.failed(self._clock(), trying=trying)
            raise
        except BaseException:
            if hold.failed:
                self.breaker.failed(self._clock(), trying=trying)
            else:
                self.breaker.dropped(trying=trying)
            raise
        else:
            if hold.failed:
                self.breaker.failed(self._clock(), trying=trying)
            else:
                self.breaker.succeeded(trying=trying)
        finally:
            self.in_flight -= 1
            self.queued_here -= hold.queued
            self._resident_here -= hold.resident

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[Wait]:
        """Wait for this worker, as long as it is not given up.

        Raises:
            TimeoutError: it was; or whatever the wait was ended with.
        """
        wait: Wait | None = None
        try:
            async with asyncio.timeout(None) as timeout:
                wait = Wait(timeout)
                self._waits.add(wait)
                try:
                    yield wait
                finally:
                    wait.over = True
                    self._waits.discard(wait)
        except TimeoutError:
            if wait is not None and wait.error is not None:
                raise wait.error from None
            raise

    def give_up(self) -> None:
        """End everybody's wait for this worker: it will not answer, or is no more."""
        while self._waits:
            self._waits.pop().end()

    def report(self) -> WorkerReport:
        info = self.info
        return WorkerReport(
            id=self.id,
            role=self.pool,
            url=self.url,
            pid=info.pid if info else 0,
            instance=info.instance if info else "",
            state=self.state,
            detail=self.detail,
            slots=info.slots if info else Slots(total=0, free=0, cached=0, leased=0),
            link=info.link if info else "",
            running=info.running if info else 0,
            waiting=info.waiting if info else 0,
            in_flight=self.in_flight,
            model=info.model if info else "",
            threads=info.threads if info else 0,
            device=info.device if info else "",
            breaker=self.breaker.state(self._clock()),
            joined=self.joined,
        )
