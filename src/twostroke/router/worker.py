"""One worker process as the router sees it: what it said last, and what this router has there."""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
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
    """One request at one worker: a context manager, whose end is the request's.

    The breaker is told how it ends: an upstream error is a failure, a cancellation or anything else tells nothing.
    """

    __slots__ = ("_begun", "_queued", "_resident", "_trying", "_worker", "failed")

    def __init__(self, worker: "Worker", queued: int, resident: int) -> None:
        self._worker, self._queued, self._resident = worker, queued, resident
        self._begun = self._trying = False
        self.failed = False  # set it if the reply shows that the worker is not well

    def begin(self) -> bool:
        """The answer begins: the prompt is computed, only its KV stays. False if it had begun already."""
        if self._begun:
            return False
        self._begun = True
        self._worker.queued_here -= self._queued
        self._queued = 0
        return True

    def __enter__(self) -> "Hold":
        worker = self._worker
        self._trying = worker.breaker.taken(worker.clock())
        worker.in_flight += 1
        worker.queued_here += self._queued
        worker.resident_here += self._resident
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        worker = self._worker
        worker.in_flight -= 1
        worker.queued_here -= self._queued
        worker.resident_here -= self._resident
        if self.failed or isinstance(error, UPSTREAM_ERRORS):
            worker.breaker.failed(worker.clock(), trying=self._trying)
        elif error is None:
            worker.breaker.succeeded(trying=self._trying)
        else:
            worker.breaker.dropped(trying=self._trying)


class Wait:
    """Somebody's wait for a worker, an asynchronous context manager. It can be ended from elsewhere."""

    __slots__ = ("_error", "_timeout", "_waits")

    def __init__(self, waits: "dict[Wait, None]") -> None:
        self._waits = waits
        self._timeout = asyncio.timeout(None)
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """End it with this error, or as a timeout; unless it is over."""
        if self in self._waits:
            self._waits.pop(self, None)
            self._error = error
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> "Wait":
        await self._timeout.__aenter__()
        self._waits[self] = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waits.pop(self, None)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._error is not None:
                raise self._error from None
            raise


class Worker:
    """One worker process. Only the registry changes its state, only holders of it change its counts."""

    def __init__(
        self, url: str, pool: Pool, *, joined: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = url
        self.pool: Pool = pool
        self.announced = pool  # what it said, or the router was started with
        self.assignments = 0  # roles that it was given by way of this router
        self.joined = joined
        self.state: State = "starting"
        self.detail = "has not answered yet"
        self.info: WorkerInfo | None = None
        self.breaker = Breaker()
        self.in_flight = 0
        self.queued_here = 0
        self.lost_at: float | None = None
        self.clock = clock
        self.resident_here = 0
        self._foreign_queued = 0
        self._foreign_resident = 0
        self._waits: dict[Wait, None] = {}  # in the order in which they began

    @property
    def id(self) -> str:
        return self.info.id if self.info else self.url

    @property
    def key(self) -> str:
        """Names the process."""
        return self.info.instance if self.info else self.url

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.breaker.allows(self.clock())

    @property
    def queued(self) -> int:
        """Tokens to compute: ours by the size of their bodies, and what others had there at the last heartbeat."""
        return self.queued_here + self._foreign_queued

    @property
    def resident(self) -> int:
        """Tokens whose KV is held: ours by the size of their bodies, and what others had at the last heartbeat."""
        return self.resident_here + self._foreign_resident

    def heard(self, info: WorkerInfo) -> None:
        """Believe what the worker says of itself."""
        self.info, self.state, self.detail, self.lost_at = info, info.state, info.detail, None
        self._foreign_queued = max(0, info.queued_tokens - self.queued_here)
        self._foreign_resident = max(0, info.slots.leased * info.block_tokens - self.resident_here)

    def refuse(self, info: WorkerInfo, why: str) -> None:
        """It is there, and cannot be used beside the others."""
        self.info, self.state, self.detail, self.lost_at = info, "refused", why, None

    def lose(self, why: str) -> None:
        """It is not there."""
        if self.state != "lost":
            self.lost_at = self.clock()
        self.state, self.detail = "lost", why

    def held(self, tokens: int, *, computes: bool = True, answers: bool = True) -> Hold:
        """Count one request with this many prompt tokens as in flight.

        Args:
            computes: the worker computes the prompt, else it gets the blocks.
            answers: it decodes too.
        """
        return Hold(self, tokens if computes else 0, tokens + ANSWER_TOKENS if answers else tokens)

    def alive(self) -> Wait:
        """Wait for this worker, as long as it is not given up.

        Raises:
            TimeoutError: it was; or whatever the wait was ended with.
        """
        return Wait(self._waits)

    def give_up(self) -> None:
        """End everybody's wait for this worker: it will not answer, or is no more."""
        for wait in tuple(self._waits):
            wait.end()

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
            breaker=self.breaker.state(self.clock()),
            joined=self.joined,
        )
