"""The router's view of its workers: who they are, whether they are there, and how much each has to do.

Each worker is asked for its ``WorkerInfo`` once a heartbeat. A worker process is a record of its own: when a URL
answers under a new instance, a fresh ``Worker`` takes its place, and requests that the old one still counts cannot
disturb it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

import aiohttp
from msgspec import Struct

from twostroke.messages import PROTOCOL, SECRET_HEADER, Slots, WorkerInfo, decode
from twostroke.router.policy import Pool

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "lost"]

START_SECONDS = 120.0  # a worker that has never answered counts as starting for so long, then as lost
SILENCE = 3.0  # seconds in which a worker must answer a heartbeat, or it is lost with all that it does
_EAGER_SECONDS = 0.2  # between looks at a worker that is not ready
_MAX_INFO = 64 << 10  # bytes
_BYTES_A_TOKEN = 4  # of a request body, roughly; loads are only compared with each other


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


class Worker:
    """One worker process. Only the registry changes its state, only holders of it change its counts."""

    def __init__(self, url: str, pool: Pool) -> None:
        self.url = url
        self.pool: Pool = pool
        self.state: State = "starting"
        self.detail = "has not answered yet"
        self.info: WorkerInfo | None = None
        self.in_flight = 0
        self._tokens_in_flight = 0
        self._foreign_requests = 0
        self._foreign_tokens = 0
        self._waits: set[asyncio.Timeout] = set()

    @property
    def id(self) -> str:
        return self.info.id if self.info else self.url

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def requests(self) -> int:
        """Ours, exactly, and what others had there at the last heartbeat."""
        return self.in_flight + self._foreign_requests

    @property
    def tokens(self) -> int:
        """Ours by the size of their bodies, and what others had there at the last heartbeat."""
        return self._tokens_in_flight + self._foreign_tokens

    def heard(self, info: WorkerInfo) -> None:
        """Believe what the worker says of itself."""
        self.info, self.state, self.detail = info, info.state, info.detail
        self._foreign_requests = max(0, info.running + info.waiting - self.in_flight)
        self._foreign_tokens = max(0, info.queued_tokens - self._tokens_in_flight)

    @contextmanager
    def held(self, body_bytes: int) -> Iterator[None]:
        """Count one request of this size as in flight."""
        tokens = body_bytes // _BYTES_A_TOKEN
        self.in_flight += 1
        self._tokens_in_flight += tokens
        try:
            yield
        finally:
            self.in_flight -= 1
            self._tokens_in_flight -= tokens

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Wait for this worker, as long as it is not given up.

        Raises:
            TimeoutError: it was.
        """
        async with asyncio.timeout(None) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    def give_up(self) -> None:
        """End everybody's wait for this worker: it will not answer, or is no more."""
        while self._waits:
            self._waits.pop().reschedule(asyncio.get_running_loop().time())

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
        )


class Registry:
    """All workers that the router was told of, in their given order."""

    def __init__(
        self, urls: Sequence[tuple[str, Pool]], session: aiohttp.ClientSession, *, secret: str, heartbeat: float
    ) -> None:
        self.workers = [Worker(url, pool) for url, pool in urls]
        self._session = session
        self._headers = {SECRET_HEADER: secret} if secret else {}
        self._heartbeat = heartbeat
        self._started = time.monotonic()

    async def watch(self) -> None:
        """Poll every worker until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for place in range(len(self.workers)):
                tasks.create_task(self._watch(place))

    def lose(self, worker: Worker, why: str) -> None:
        """Send nothing more to ``worker`` until it answers a heartbeat again."""
        if worker.state != "lost":
            log.warning("worker %s (%s) is lost: %s", worker.id, worker.url, why)
        worker.state, worker.detail = "lost", why

    def waited_for(self) -> list[Worker]:
        """Workers that are neither ready nor lost: the system is not whole until they are."""
        return [worker for worker in self.workers if worker.state in ("starting", "draining")]

    async def look(self) -> None:
        """Ask every worker now."""
        await asyncio.gather(*(self.poll(place) for place in range(len(self.workers))))

    async def poll(self, place: int) -> None:
        """Ask the worker at ``place`` once, and believe its answer."""
        worker = self.workers[place]
        try:
            info = await self._ask(worker.url)
        except TimeoutError:
            self._missed(worker, f"no answer to a heartbeat for {SILENCE:.0f} s")
            worker.give_up()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._missed(worker, str(error) or type(error).__name__)
        else:
            self._heard(place, info)

    async def _watch(self, place: int) -> None:
        while True:
            await self.poll(place)
            ready = self.workers[place].ready
            await asyncio.sleep(self._heartbeat if ready else min(self._heartbeat, _EAGER_SECONDS))

    async def _ask(self, url: str) -> WorkerInfo:
        timeout = aiohttp.ClientTimeout(total=SILENCE)
        async with self._session.get(f"{url}/internal/info", headers=self._headers, timeout=timeout) as reply:
            if reply.status == 401:
                raise ValueError("it refuses the cluster secret: set the same TWOSTROKE_SECRET on both")
            if reply.status != 200:
                raise ValueError(f"it answers /internal/info with status {reply.status}")
            info = decode(await reply.content.read(_MAX_INFO), WorkerInfo)
        if info.protocol != PROTOCOL:
            raise ValueError(f"it speaks protocol {info.protocol}, this router {PROTOCOL}: run one version")
        return info

    def _missed(self, worker: Worker, why: str) -> None:
        young = time.monotonic() - self._started < START_SECONDS
        if worker.info is None and worker.state == "starting" and young:
            worker.detail = f"has not answered yet ({why})"
        else:
            self.lose(worker, why)

    def _heard(self, place: int, info: WorkerInfo) -> None:
        worker = self.workers[place]
        if worker.info and worker.info.instance != info.instance:
            log.warning("worker %s (%s) came back as a new process", worker.id, worker.url)
            self.lose(worker, "there is a new process in its place")
            worker.give_up()
            worker = self.workers[place] = Worker(worker.url, worker.pool)
        worker.heard(info)
