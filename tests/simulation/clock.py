"""An event loop whose time passes only while nobody has anything to do, and nodes that can be stopped and killed."""

import asyncio
import gc
import heapq
import random
import warnings
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

Coro = Coroutine[Any, Any, Any]


class Node:
    """One process: all that runs in its context."""

    def __init__(self, name: str, *, inside: bool = True) -> None:
        """``inside`` the cluster, or a client."""
        self.name = name
        self.inside = inside
        self.dead = False
        self.paused = False
        self.parked: list[asyncio.Handle] = []  # what it would have done while it was paused
        self.tasks: list[asyncio.Task[Any]] = []  # kept, so that nothing of a dead one is finalized before the end

    def run(self, coro: Coro) -> "asyncio.Task[Any]":
        """Start a task of this process."""
        context = copy_context()
        context.run(HERE.set, self)
        task = asyncio.get_running_loop().create_task(coro, context=context)
        self.tasks.append(task)
        return task


HERE: ContextVar[Node | None] = ContextVar("HERE", default=None)


class Stuck(Exception):
    """Virtual time ran out, or nothing will ever happen any more."""


class _Handle(asyncio.TimerHandle):
    """A callback to come, without what asyncio's own do for real loops."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: tuple[object, ...], loop: "Loop", context: Context | None
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._context = copy_context() if context is None else context
        self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True


class Loop(asyncio.BaseEventLoop):
    """Runs callbacks in order of their time. What a stopped node would do waits; a dead one does nothing any more."""

    def __init__(self, limit: float) -> None:
        """``limit``: seconds of virtual time, after which it is ``Stuck``."""
        super().__init__()
        self.now = 0.0
        self._limit = limit
        self._timers: list[tuple[float, int, _Handle]] = []  # a heap; the second number keeps the order of equals
        self._turn = 0

    def time(self) -> float:
        return self.now

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, self, context)
        self._turn += 1
        heapq.heappush(self._timers, (when, self._turn, handle))
        return handle

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing will ever happen any more")
            self.now = max(self.now, timers[0][0])
            if self.now > self._limit:
                raise Stuck(f"{self._limit:.0f} s have passed")
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            node = handle._context.get(HERE)
            if node is None:
                handle._run()
            elif node.paused and not node.dead:
                node.parked.append(handle)
            elif not node.dead:
                handle._run()

    def resume(self, node: Node) -> None:
        """Let a stopped node go on where it was."""
        node.paused = False
        self._ready.extend(node.parked)  # type: ignore[attr-defined]
        node.parked.clear()

    def forget(self) -> None:
        """Finalize, with nobody hearing of it, what is left pending."""
        self.call_soon = lambda *_, **__: asyncio.Handle(print, (), self)  # type: ignore[method-assign]
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._ready.clear()  # type: ignore[attr-defined]
        self._timers.clear()
        asyncio._set_running_loop(self)
        try:
            tasks.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of coroutines that never began
                gc.collect()  # what is finalized lets go of more, for the next schedule's
        finally:
            asyncio._set_running_loop(None)
        self.close()

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)  # there is one thread

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: object) -> "asyncio.Future[Any]":
        """At once: what a thread does would take real time, in which any virtual time could pass."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - for whoever awaits it
            done.set_exception(error)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What was left pending by nodes that died is of no interest; errors show in the outcome."""

    def _process_events(self, event_list: object) -> None: ...
    def _write_to_self(self) -> None: ...


class Dice:
    """All chance of a schedule comes from its seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def delay(self, mean: float) -> float:
        """Seconds; usually about ``mean``, now and then very much more."""
        many = 100 if self.random.random() < 0.02 else 1
        return self.random.expovariate(1 / mean) * many

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability
