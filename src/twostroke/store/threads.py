"""A few threads that a tier's copies and I/O run in, so that they never hold up the event loop.

They are daemons: a thread that hangs in a dead file system must not keep the process from ending.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")
_Job = Callable[[], None]


class Threads:
    """``count`` threads, started when they are first needed."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._started = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns or raises, called in one of the threads."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - passed on to whoever waits
                _tell(loop, future.set_exception, error)
            else:
                _tell(loop, future.set_result, result)

        if self._started < self.count:
            self._started += 1
            name = f"{self._name}-{self._started}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        self._jobs.put(job)
        return await asyncio.shield(future)

    async def all(self, work: Callable[[], object]) -> None:
        """Have each thread call ``work`` once."""
        together = threading.Barrier(self.count)

        def one() -> None:
            together.wait()
            work()

        await asyncio.gather(*(self.run(one) for _ in range(self.count)))

    async def each(self, work: Callable[[int], Result], count: int) -> list[Result]:
        """What ``work`` makes of 0 … count - 1, by as many threads as there are. Ends when all of it has ended.

        Raises:
            Exception: the first that was raised; what was not begun by then is not done.
        """
        return await self.runs(lambda run: [work(index) for index in run], count, 1)

    async def runs(self, work: Callable[[range], Sequence[Result]], count: int, most: int) -> list[Result]:
        """The same for runs of up to ``most`` numbers at once, of which ``work`` makes as many results."""
        left = deque(range(first, min(first + most, count)) for first in range(0, count, most))
        results: dict[int, Result] = {}

        def some() -> None:
            while True:
                try:
                    run = left.popleft()
                except IndexError:
                    return
                try:
                    results.update(zip(run, work(run), strict=True))
                except BaseException:
                    left.clear()
                    raise

        parts = [self.run(some) for _ in range(min(self.count, len(left)))]
        for outcome in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return [results[index] for index in range(count)]

    def close(self) -> None:
        """The threads end with what they have been given."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], value: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(what, value)
