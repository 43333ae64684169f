"""The router's view of its workers: who they are, whether they are there, and how they come and go.

Each worker is asked for its ``WorkerInfo`` once a heartbeat. A worker process is a record of its own: when a URL
answers under a new instance, a fresh ``Worker`` takes its place, and requests that the old one still counts cannot
disturb it. A worker that is not ready becomes so only if it agrees with all that are (``agreement.py``).
"""

import asyncio
import logging
import time
from collections.abc import Sequence

import aiohttp
import msgspec

from twostroke.errors import Conflict, NotFound, Overloaded, Unauthorized, WorkerLost
from twostroke.messages import PROTOCOL, SECRET_HEADER, Assign, Drain, Join, Leave, Role, WorkerInfo, decode, encode
from twostroke.router.agreement import disagreement
from twostroke.router.policy import Pool
from twostroke.router.worker import UPSTREAM_ERRORS, Worker

log = logging.getLogger(__name__)

POOLS: dict[Role, Pool] = {"prefill": "prefill", "decode": "decode", "both": "colocated"}
START_SECONDS = 120.0  # a worker that has never answered counts as starting for so long, then as lost
SILENCE = 3.0  # seconds in which a worker must answer a heartbeat, or it is lost with all that it does
FORGET_SECONDS = 60.0  # a worker that had joined and is lost for so long is forgotten; it joins again if it wakes up
MAX_WORKERS = 1024
_EAGER_SECONDS = 0.2  # between looks at a worker that is not ready
_MAX_INFO = 64 << 10  # bytes
_NOT_AN_ANSWER = (*UPSTREAM_ERRORS, ValueError)


class Registry:
    """All workers: those that the router was told of in their given order, then those that joined."""

    def __init__(
        self, urls: Sequence[tuple[str, Pool]], session: aiohttp.ClientSession, *, secret: str, heartbeat: float
    ) -> None:
        self.workers = [Worker(url, pool) for url, pool in urls]
        self._session = session
        self._headers = {SECRET_HEADER: secret} if secret else {}
        self._heartbeat = heartbeat
        self._started = time.monotonic()
        self._tasks: asyncio.TaskGroup | None = None

    # -- looking -------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Poll every worker, also those that join, until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            for worker in self.workers:
                self._tasks.create_task(self._watch(worker.url))
            await asyncio.Event().wait()

    def at(self, url: str) -> Worker | None:
        """The worker at this URL."""
        return next((worker for worker in self.workers if worker.url == url), None)

    def find(self, name: str) -> Worker:
        """The worker with this id or URL.

        Raises:
            NotFound: there is none.
            Conflict: several have this id.
        """
        found = [worker for worker in self.workers if name in (worker.id, worker.url)]
        if not found:
            known = ", ".join(worker.id for worker in self.workers) or "none"
            raise NotFound(f"there is no worker {name!r}; there are: {known}")
        if len(found) > 1:
            raise Conflict(f"{len(found)} workers are called {name!r}: name one by its URL, such as {found[0].url}")
        return found[0]

    def lose(self, worker: Worker, why: str) -> None:
        """Send nothing more to ``worker`` until it answers a heartbeat again."""
        if worker.state != "lost":
            log.warning("worker %s (%s) is lost: %s", worker.id, worker.url, why)
        worker.lose(why)

    def waited_for(self) -> list[Worker]:
        """Workers that are neither ready nor lost: the system is not whole until they are."""
        return [worker for worker in self.workers if worker.state in ("starting", "draining")]

    async def look(self) -> None:
        """Ask every worker now."""
        await asyncio.gather(*(self.poll(worker.url) for worker in self.workers))

    async def poll(self, url: str) -> None:
        """Ask the worker at ``url`` once, and believe its answer."""
        asked = self.at(url)
        before = asked.assignments if asked else 0
        try:
            info = await self._ask(url)
        except _NOT_AN_ANSWER as error:
            if worker := self.at(url):
                silent = isinstance(error, TimeoutError)
                self._missed(worker, f"no answer to a heartbeat for {SILENCE:.0f} s" if silent else _words(error))
                if silent:
                    worker.give_up()
        else:
            if worker := self.at(url):
                if worker is asked and worker.assignments != before:  # the answer may be older than what was said since
                    info = msgspec.structs.replace(info, assigned=None)
                self._heard(worker, info)

    async def _watch(self, url: str) -> None:
        while worker := self.at(url):
            await self.poll(url)
            if worker.joined and worker.lost_at and time.monotonic() - worker.lost_at > FORGET_SECONDS:
                self._forget(worker)
            await asyncio.sleep(self._heartbeat if worker.ready else min(self._heartbeat, _EAGER_SECONDS))

    async def _ask(self, url: str) -> WorkerInfo:
        timeout = aiohttp.ClientTimeout(total=SILENCE)
        async with self._session.get(f"{url}/internal/info", headers=self._headers, timeout=timeout) as reply:
            if reply.status == 401:
                raise ValueError(
                    f"the worker at {url} refuses this router's cluster secret: set the same TWOSTROKE_SECRET on both"
                )
            if reply.status != 200:
                raise ValueError(f"it answers /internal/info with status {reply.status}")
            info = decode(await reply.content.read(_MAX_INFO), WorkerInfo)
        if info.protocol != PROTOCOL:
            raise ValueError(
                f"worker {info.id} at {url} speaks protocol {info.protocol}, this router {PROTOCOL}: run one version"
            )
        return info

    def _missed(self, worker: Worker, why: str) -> None:
        young = time.monotonic() - self._started < START_SECONDS
        if worker.info is None and worker.state == "starting" and young:
            worker.detail = f"has not answered yet ({why})"
        else:
            self.lose(worker, why)

    def _heard(self, worker: Worker, info: WorkerInfo) -> None:
        if worker.info and worker.info.instance != info.instance:
            log.warning("worker %s (%s) came back as a new process", worker.id, worker.url)
            self.lose(worker, "there is a new process in its place")
            worker.give_up()
            worker = self._replace(worker)
        self._take_over(worker, info)
        if worker.state not in ("ready", "draining") and (why := self._disagreement(info, worker.pool, worker.url)):
            if worker.state != "refused":
                log.warning("refused: %s", why)
            worker.refuse(info, why)
        else:
            worker.heard(info)

    def _take_over(self, worker: Worker, info: WorkerInfo) -> None:
        """A worker knows which role it was given, perhaps by another router, or by one that this one has replaced."""
        if info.assigned is None or (pool := POOLS[info.assigned]) == worker.pool:
            return
        if why := self._disagreement(info, pool, worker.url):
            log.warning("worker %s cannot be used for %s, as it was told: %s", info.id, pool, why)
        else:
            worker.pool = pool

    def _replace(self, worker: Worker) -> Worker:
        """A record for the new process at this URL. What the router was told of the old one holds for it too."""
        fresh = Worker(worker.url, worker.pool, joined=worker.joined)
        fresh.announced = worker.announced
        self.workers[self.workers.index(worker)] = fresh
        return fresh

    def _disagreement(self, info: WorkerInfo, pool: Pool, url: str) -> str | None:
        present = [other for other in self.workers if other.url != url and other.state in ("ready", "draining")]
        info = msgspec.structs.replace(info, url=url)
        named = ((msgspec.structs.replace(o.info, url=o.url), o.pool) for o in present if o.info)
        return disagreement(info, pool, named)

    # -- coming, going, changing -----------------------------------------------------------------------------------

    async def join(self, message: Join, url: str) -> Worker:
        """A worker says that it is there, at ``url``. Its role counts when it is new, or was announced otherwise.

        Raises:
            Conflict: it cannot serve beside the others, is another process, or speaks another protocol.
            WorkerLost: it cannot be reached from here.
            Overloaded: there are too many workers.
        """
        if message.protocol != PROTOCOL:
            raise Conflict(
                f"the worker at {url} speaks protocol {message.protocol}, this router {PROTOCOL}: run one version"
            )
        pool, worker = POOLS[message.role], self.at(url)
        if worker is None:
            return await self._admit(url, pool)
        if worker.announced != pool and worker.joined:
            self._fit(worker, pool)
            worker.pool = worker.announced = pool
        if worker.key != message.instance or worker.state != message.state:
            await self.poll(url)
            worker = self.at(url) or worker
        if worker.state == "refused":
            raise Conflict(worker.detail)
        return worker

    def leave(self, message: Leave, url: str) -> None:
        """A worker has nothing left to do here. A URL that the router was started with is watched on."""
        worker = self.at(url)
        if worker is None or worker.key != message.instance:
            return
        log.info("worker %s (%s) has left", worker.id, url)
        if worker.joined:
            self._forget(worker)
        worker.lose("it was drained, and left")

    async def assign(self, worker: Worker, message: Assign) -> None:
        """Use a worker for something else from now on. Its requests do not notice; it remembers, for other routers.

        Raises:
            Conflict: in that role it would have to exchange blocks with workers that have another layout.
            WorkerLost: it cannot be told.
        """
        pool = POOLS[message.role]
        self._fit(worker, pool)
        await self._tell(worker, "/internal/role", message)
        worker.pool = pool
        worker.assignments += 1

    async def drain(self, worker: Worker, message: Drain) -> None:
        """Have a worker finish and leave, and send it nothing more.

        Raises:
            WorkerLost: it cannot be told.
        """
        await self._tell(worker, "/internal/drain", message)
        if worker.state == "ready":
            worker.state, worker.detail = "draining", "was told to finish and leave"

    def _fit(self, worker: Worker, pool: Pool) -> None:
        if worker.info and (why := self._disagreement(worker.info, pool, worker.url)):
            raise Conflict(why)

    async def _tell(self, worker: Worker, path: str, message: Drain | Assign) -> None:
        url, timeout = worker.url + path, aiohttp.ClientTimeout(total=SILENCE)
        try:
            async with self._session.post(url, data=encode(message), headers=self._headers, timeout=timeout) as reply:
                if reply.status == 401:
                    raise Unauthorized(f"worker {worker.id} refuses this router's cluster secret")
                if reply.status != 200:
                    raise WorkerLost(f"worker {worker.id} does not do as it is told: status {reply.status}")
        except UPSTREAM_ERRORS as error:
            raise WorkerLost(f"worker {worker.id} cannot be told: {_words(error)}") from error

    async def _admit(self, url: str, pool: Pool) -> Worker:
        if len(self.workers) >= MAX_WORKERS:
            raise Overloaded(f"this router has {len(self.workers)} workers already", retry_after=60)
        try:
            info = await self._ask(url)
        except _NOT_AN_ANSWER as error:
            raise WorkerLost(f"this router cannot use the worker at {url}: {_words(error)}") from error
        announced, pool = pool, POOLS[info.assigned] if info.assigned else pool
        if why := self._disagreement(info, pool, url):
            raise Conflict(why)
        if (worker := self.at(url)) is None:  # it said so twice
            worker = Worker(url, pool, joined=True)
            worker.announced = announced
            self.workers.append(worker)
            log.info("worker %s (%s) joined for %s", info.id, url, pool)
            worker.heard(info)
            if self._tasks is not None:
                self._tasks.create_task(self._watch(url))
        return worker

    def _forget(self, worker: Worker) -> None:
        self.workers = [other for other in self.workers if other is not worker]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
