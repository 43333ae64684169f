"""A tier in use: every call with a deadline, out of service after a failure until it works again, all of it counted."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from twostroke.kv.keys import BlockKey
from twostroke.messages import TierReport
from twostroke.store.choice import Speed
from twostroke.store.format import Sealed
from twostroke.store.tier import Source, Target, Tier, TierFailed

log = logging.getLogger(__name__)
Result = TypeVar("Result")

LOOKUP_SECONDS = 1.0  # a request is not admitted before it was looked up
OPEN_SECONDS = 60.0  # a tier that has not opened by then is tried again later
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0  # seconds


class Stage:
    """One tier of a store. Its tasks outlive their callers: a tier is never interrupted, only no longer waited for."""

    def __init__(self, tier: Tier, block_bytes: int, patience: float) -> None:
        """``patience``: seconds that any call may take."""
        self.tier = tier
        self.name = tier.name
        self.reads = Speed()
        self.writes = Speed()
        self._block_bytes = block_bytes
        self._patience = patience
        self._reason: str | None = "not opened"
        self._backoff = _FIRST_BACKOFF  # seconds; longer until a block moves: a tier that opens may hang all the same
        self._tasks: set[asyncio.Task[Any]] = set()
        self._revival: asyncio.Task[None] | None = None
        self._exploration: asyncio.Task[int] | None = None
        self._counts: dict[str, float] = {}

    @property
    def in_service(self) -> bool:
        """Whether it may be asked."""
        return self._reason is None

    async def open(self) -> None:
        """Have it open; if it cannot be, try again and again in the background."""
        try:
            await self._open()
        except TierFailed:
            self._revive()

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Which of the blocks it has; none if it is not in service."""
        if not self.in_service or not keys:
            return [False] * len(keys)
        try:
            return await self._guard(self.tier.contains(keys), min(self._patience, LOOKUP_SECONDS))
        except TierFailed:
            return [False] * len(keys)

    async def get(self, keys: Sequence[BlockKey], target: Target, patience: float | None = None) -> int:
        """How many of the first blocks arrived whole, in the time that there is. After that, ``target`` must take no
        more if this was cut short.
        """
        if not self.in_service:
            return 0
        start = time.perf_counter()
        try:
            got = await self._guard(self.tier.get(keys, target), min(patience or self._patience, self._patience))
        except TierFailed:
            return 0
        seconds = time.perf_counter() - start
        if got:
            self.reads.measured(got, seconds, time.monotonic())
            self._backoff = _FIRST_BACKOFF
        self.count("read_bytes", got * self._block_bytes)
        self.count("read_seconds", seconds)
        return got

    def explore(self, keys: Sequence[BlockKey]) -> None:
        """It was too slow for anybody to load these blocks, and only loads measure it: lest that last for ever, read
        them for nobody, beside the requests, once the latest measurement of so many is old. Does not wait.
        """
        if self.reads.old(len(keys), time.monotonic()) and (self._exploration is None or self._exploration.done()):
            self._exploration = asyncio.create_task(self.get(keys, _Nowhere()))

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """How many of the blocks it has now."""
        if not self.in_service:
            return 0
        start = time.perf_counter()
        try:
            stored = await self._guard(self.tier.put(keys, source), self._patience)
        except TierFailed:
            return 0
        seconds = time.perf_counter() - start
        if stored:
            self.writes.measured(stored, seconds, time.monotonic())
            self._backoff = _FIRST_BACKOFF
        self.count("written", stored)
        self.count("written_bytes", stored * self._block_bytes)
        self.count("write_seconds", seconds)
        return stored

    async def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """What people ask of the tier, which may take long. ``TierFailed``."""
        return await self._guard(call, OPEN_SECONDS)

    def count(self, what: str, amount: float) -> None:
        """Add to a field of ``TierReport``."""
        self._counts[what] = self._counts.get(what, 0) + amount

    def report(self) -> TierReport:
        """The present account."""
        usage = msgspec.structs.asdict(self.tier.usage())
        return TierReport(self.name, self.in_service, self._reason or "", **usage, **self._counts)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Let go of the tier, if it lets us."""
        self._reason = "closed"
        for task in (self._revival, self._exploration):
            if task is not None:
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._patience)
        closing = asyncio.create_task(self.tier.close())
        await asyncio.wait([closing], timeout=self._patience)
        if not closing.done():
            log.warning("%s: it does not close", self.name)

    # -- inside --------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._guard(self.tier.open(), OPEN_SECONDS)
        self._reason = None
        log.info("%s: in service, with %d blocks", self.name, self.tier.usage().blocks)

    async def _guard(self, call: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """What the call comes to within so many seconds; a failure takes the tier out of service."""
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            self._fail(f"no answer within {seconds:.3g} s")
            raise TierFailed(self._reason or "")
        try:
            return task.result()
        except TierFailed as error:
            self._fail(str(error))
            raise

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TierFailed):
            log.error("%s: a call failed", self.name, exc_info=error)

    def _fail(self, reason: str) -> None:
        self.count("faults", 1)
        if self._reason is None:
            log.warning("%s: out of service: %s", self.name, reason)
        if self._reason != "closed":
            self._reason = reason
            self._revive()

    def _revive(self) -> None:
        if self._revival is None or self._revival.done():
            self._revival = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        while not self.in_service:
            await asyncio.sleep(self._backoff)
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
            try:
                await self._open()
            except TierFailed as error:
                log.debug("%s: still out of service: %s", self.name, error)


class _Nowhere(Target):
    """See ``Target``: a block takes as long as on its way into a slot."""

    def place(self, index: int, block: Sealed) -> bool:
        """See ``Target.place``."""
        bytes(block.payload)
        return True
