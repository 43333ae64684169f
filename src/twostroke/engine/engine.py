"""The engine: one thread that steps. Each step is planned, launched, waited for and committed. Where the device
computes by itself, the next step is planned and launched before the present one is waited for. The rest talks to the
thread through a lock that is never held while the model runs.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from twostroke.engine.model import Model
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk, Scheduler, Sequence, State
from twostroke.errors import DeviceLost, EngineFailed, OutOfMemory, Overloaded, RequestError, Unavailable
from twostroke.kv.keys import BlockKey, root_key
from twostroke.kv.pool import Lease, Pool, Slot
from twostroke.messages import FinishReason, Output, Request, Slots, Token

MEASURED_TOKENS = 32  # in a step at least, for its time to say how fast prompts are computed

log = logging.getLogger(__name__)


class Admitted(NamedTuple):
    """The sequence holds these slots, in block order; the KV of its first ``computed`` tokens is there.

    ``again`` after it was preempted.
    """

    slots: list[int]
    computed: int
    again: bool = False


class Progress(NamedTuple):
    """Some of the prompt is computed: its first ``computed`` tokens; 0 as the first chunk starts."""

    computed: int


Update = Admitted | Progress | Output | RequestError


class Job:
    """A sequence in the engine, as the event loop sees it: updates arrive in order, the last one ends it."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.admitted = False  # at least once
        self.started = False  # whether its first chunk was planned; the engine thread's
        self.given = False  # whether its first token came from elsewhere; the event loop's
        self._updates: asyncio.Queue[Update] = asyncio.Queue()

    def push(self, update: Update) -> None:
        """Append an update. Only from the event loop."""
        self._updates.put_nowait(update)

    async def updates(self, patience: float | None = None) -> AsyncIterator[Update]:
        """Every update up to and including the one that finishes the sequence; an error is raised.

        Args:
            patience: seconds until the sequence must have its slots; ``None`` is for ever.

        Raises:
            Overloaded: it has none by then.
            RequestError: the engine failed.
        """
        try:
            async with asyncio.timeout(patience):
                update = await self._updates.get()
        except TimeoutError:
            raise Overloaded(f"no slots became free within {patience:.0f} s") from None
        while True:
            if isinstance(update, RequestError):
                raise update
            yield update
            if isinstance(update, Output) and update.finish:
                return
            update = await self._updates.get()


class Load(NamedTuple):
    """What the engine has to do, for the router's choice and for metrics."""

    running: int
    waiting: int
    queued_tokens: int  # still to compute before every sequence decodes
    slots: Slots


class _Step(NamedTuple):
    """A step under way."""

    launched: Launched
    tokens: int  # of prefill
    begun: float  # monotonic


class Engine:
    """Runs sequences on a model. All methods but ``__init__`` and ``start`` may be called from any thread."""

    def __init__(self, model: Model, pool: Pool, *, max_batch: int, token_budget: int) -> None:
        self.model = model
        self._pool = pool
        self.scheduler = Scheduler(
            pool,
            block_tokens=model.layout.block_tokens,
            max_batch=min(max_batch, token_budget),
            token_budget=token_budget,
            eos=model.eos,
        )
        self._lock = threading.Condition()
        self._jobs: dict[Sequence, Job] = {}
        self._stopping = False
        self._ended = 0.0  # when the last step did, monotonic; the engine thread's
        self._speed = 0.0  # tokens a second of prefill; 0 is unknown
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._died: Callable[[], None] = lambda: None
        self._published: Callable[[list[BlockKey]], None] | None = None

    def watch(self, published: Callable[[list[BlockKey]], None]) -> None:
        """From now on, ``published`` is told on the loop which blocks have become findable."""
        self._published = published

    def start(self, loop: asyncio.AbstractEventLoop, died: Callable[[], None]) -> None:
        """Start stepping. Updates of jobs are delivered on ``loop``; so is ``died``, should the thread ever end."""
        self._loop, self._died = loop, died
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present step."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    # -- jobs ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        *,
        loads: bool = False,
        reloads: bool = False,
        exports: Lease | None = None,
        keys: Seq[BlockKey] = (),
    ) -> Job:
        """Queue a request. ``loads``: once it has slots, wait for ``loaded`` and ``resume``; ``reloads``: also whenever
        it has slots again after it was preempted. ``keys``: of its first blocks, as far as they are known.
        """
        root = root_key(self.model.layout.fingerprint, request.salt)
        job = Job(Sequence(request, root, loads=loads, reloads=reloads, exports=exports, keys=keys))
        with self._lock:
            self._jobs[job.sequence] = job
            self.scheduler.add(job.sequence)
            self._admit()  # now, not at the next step: a load can start while the present step runs
            self._lock.notify()
        return job

    def abort(self, job: Job) -> None:
        """End a job whatever it is doing; no update follows. Ending it twice is harmless."""
        with self._lock:
            if self._jobs.pop(job.sequence, None) is not None:
                self.scheduler.abort(job.sequence)
                self._admit()
                self._lock.notify()

    def loaded(self, job: Job, tokens: int, *, stored: bool = False) -> None:
        """The KV of the first ``tokens`` tokens is in the job's slots, verified. ``stored``: of an earlier request."""
        with self._lock:
            self.scheduler.loaded(job.sequence, tokens, stored=stored)
            self._deliver([(job, Progress(tokens))])

    def ending(self, job: Job, token: Token) -> FinishReason | None:
        """Whether ``token``, as the next one, ends the job."""
        return self.scheduler.ending(job.sequence, token.id)

    def resume(self, job: Job, first: Token | None) -> None:
        """Nothing more is loaded; the engine computes the rest, after ``first`` if that token is known already."""
        with self._lock:
            self.scheduler.resume(job.sequence, first)
            self._lock.notify()

    def lease(self) -> Lease:
        """An empty lease on the engine's pool."""
        return self._pool.lease()

    def borrow(self, job: Job) -> Lease | None:
        """Another hold on the slots of a job that loads: they can be written whatever becomes of the job. None if it
        does not load any more.
        """
        with self._lock:
            if job.sequence.state is not State.LOADING:
                return None
            lease = self._pool.lease()
            lease.share(job.sequence.slots())
            return lease

    def has(self, keys: Seq[BlockKey]) -> set[BlockKey]:
        """Which of the blocks are in the pool."""
        with self._lock:
            return set(self._pool.find(keys))

    def hold(self, keys: Seq[BlockKey]) -> tuple[Lease, dict[BlockKey, Slot]]:
        """A hold on those of the blocks that are in the pool, and where they are."""
        with self._lock:
            lease, found = self._pool.lease(), self._pool.find(keys)
            lease.share(list(found.values()))
            return lease, found

    def release(self, lease: Lease) -> None:
        """End a lease. Its slots may now serve waiting sequences."""
        with self._lock:
            lease.release()
            self._admit()
            self._lock.notify()

    def load(self) -> Load:
        """The present load."""
        with self._lock:
            scheduler = self.scheduler
            everybody = [*scheduler.running, *scheduler.waiting]
            return Load(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                queued_tokens=sum(len(sequence.tokens) - sequence.computed for sequence in everybody),
                slots=self._pool.counts(),
            )

    @property
    def stepped(self) -> float:
        """When the last step ended, monotonic; 0 before the first."""
        return self._ended

    @property
    def speed(self) -> float:
        """KV bytes that this engine computes a second when it does nothing but prefill; 0 while that is unknown."""
        return self._speed * self.model.layout.token_bytes

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        flying: deque[_Step] = deque()
        try:
            self.model.enter_thread()
            while (chunks := self._plan(wait=not flying)) is not None:
                if chunks:
                    self._launch(chunks, flying)
                if flying and (not chunks or len(flying) == self.model.depth):
                    self._commit(flying.popleft())
        except DeviceLost:
            log.exception("the device is lost")
            self._end(Unavailable("the device of this worker is lost"))
        finally:
            if not self._stopping and self._loop is not None:
                self._loop.call_soon_threadsafe(self._died)

    def _plan(self, *, wait: bool) -> list[Chunk] | None:
        """The next step; ``None`` when the engine stops. While nothing can be computed: ``wait``, or an empty step."""
        with self._lock:
            while not self._stopping:
                self._admit()
                if chunks := self.scheduler.plan():
                    self._announce(chunks)
                    return chunks
                if not wait:
                    return []
                self._check()
                self._lock.wait()
            return None

    def _launch(self, chunks: list[Chunk], flying: deque["_Step"]) -> None:
        begun = time.monotonic()
        try:
            flying.append(
                _Step(self.model.launch(chunks), sum(chunk.size for chunk in chunks if chunk.size > 1), begun)
            )
        except OutOfMemory as error:
            largest = max(chunks, key=lambda chunk: chunk.size).sequence
            log.warning("out of memory in a step of %d tokens; its largest request fails", sum(c.size for c in chunks))
            self._fail(error, largest)
        except DeviceLost:
            raise
        except Exception:
            log.exception("a step of %d sequences failed", len(chunks))
            self._fail(EngineFailed("the model failed on this request's step; the worker's log says how"))

    def _commit(self, step: "_Step") -> None:
        tokens = step.launched.tokens()
        self._measure(step)
        with self._lock:
            updates: list[tuple[Job, Update]] = []
            for sequence, token in self.scheduler.commit(tokens):
                job = self._jobs[sequence]
                if token is None:
                    updates.append((job, Progress(sequence.computed)))
                else:
                    updates.append((job, Output([token], sequence.finish, sequence.cached)))
                if sequence.finish:
                    del self._jobs[sequence]
            self._deliver(updates)

    def _measure(self, step: "_Step") -> None:
        """Steps compute one after the other, so one that was launched early began when the last one ended."""
        now = time.monotonic()
        seconds, self._ended = now - max(step.begun, self._ended), now
        if step.tokens >= MEASURED_TOKENS:
            speed = step.tokens / max(seconds, 1e-6)
            self._speed = speed if not self._speed else 0.8 * self._speed + 0.2 * speed

    def _fail(self, error: RequestError, blamed: Sequence | None = None) -> None:
        """The newest step in flight is not computed: ``blamed``, or all of it, ends with this error."""
        with self._lock:
            sequences = self.scheduler.fail(None if blamed is None else [blamed])
            failed = [self._jobs.pop(sequence, None) for sequence in sequences]
            self._deliver([(job, error) for job in failed if job is not None])

    def _end(self, error: RequestError) -> None:
        """Nothing is computed any more: every job ends with this error."""
        with self._lock:
            while self.scheduler.flight:
                self.scheduler.fail()
            for sequence in self._jobs:
                self.scheduler.abort(sequence)
            self._deliver([(job, error) for job in self._jobs.values()])
            self._jobs.clear()

    # -- under the lock ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        updates: list[tuple[Job, Update]] = []
        for sequence in self.scheduler.admit():
            job = self._jobs[sequence]
            updates.append((job, Admitted(list(sequence.slots()), sequence.computed, job.admitted)))
            job.admitted = True
        self._deliver(updates)

    def _announce(self, chunks: list[Chunk]) -> None:
        jobs = [job for chunk in chunks if (job := self._jobs.get(chunk.sequence)) and not job.started]
        for job in jobs:
            job.started = True
        self._deliver([(job, Progress(0)) for job in jobs])

    def _deliver(self, updates: list[tuple[Job, Update]]) -> None:
        """One wake-up of the event loop for all updates of a step."""
        if self._loop is None or self._loop.is_closed():
            return
        if updates:
            self._loop.call_soon_threadsafe(_push_all, updates)
        if fresh := self.scheduler.fresh:
            self.scheduler.fresh = []
            if self._published is not None:
                self._loop.call_soon_threadsafe(self._published, fresh)

    def _check(self) -> None:
        """The account must balance whenever nothing is computed."""
        slots = self._pool.counts()
        if slots.free + slots.cached + slots.leased != slots.total:
            log.critical("slots do not add up: %s", slots)


def _push_all(updates: list[tuple[Job, Update]]) -> None:
    for job, update in updates:
        job.push(update)
