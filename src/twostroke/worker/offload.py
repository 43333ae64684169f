"""Between engine and store: a request's prefix is loaded into its slots, and what the pool has sinks into the store."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from twostroke.api.lifecycle import Lifecycle
from twostroke.engine.engine import Admitted, Engine, Job, Update
from twostroke.errors import EngineFailed, HandoverFailed
from twostroke.kv.copying import copy, copy_digested, kernels
from twostroke.kv.direct import Extent
from twostroke.kv.keys import BlockKey, block_keys, root_key
from twostroke.kv.memory import Bytes
from twostroke.kv.pool import Slot
from twostroke.links.staging import Staging
from twostroke.messages import Output, PoolAddress, Request
from twostroke.store.choice import Run, choose
from twostroke.store.format import Corrupt, Sealed, seal
from twostroke.store.store import Hold, Store
from twostroke.store.tier import Place, Source, Target
from twostroke.worker.flights import Flight, Flights
from twostroke.worker.tasks import end

log = logging.getLogger(__name__)
_TRIAL_BLOCKS = 4  # loaded from a tier of unknown speed before anything else is decided
_POLL_SECONDS = (0.005, 0.25)  # between looks at what a producer has written: at least, at most
_POLL_SHARE = 0.02  # of the time since it last wrote something: prompts that wait in its queue ask seldom
_LEAST_PATIENCE = 0.5  # seconds that a load may take, however fast computing would be


class _Gate:
    """Lets threads through until it is closed; who closes it waits for those inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed it so far."""
        return self._open

    def enter(self) -> bool:
        """Whether one may go in; then ``leave`` must follow."""
        with self._changed:
            self._inside += self._open
            return self._open

    def leave(self) -> None:
        """Out again."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody is inside when this returns, and nobody enters any more. Inside, one copies a few blocks."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._inside)


class SlotsEnd(Source, Target):
    """Slots of the pool as the source or target of a tier, until they are ``close``d."""

    def __init__(self, slots: Sequence[Slot], staging: Callable[[], Staging], pool: PoolAddress | None = None) -> None:
        """``pool``: where other processes find the slots, if they do."""
        self._pool = pool
        self._slots = slots
        self._staging = staging
        self._gate = _Gate()

    def block(self, index: int) -> Sealed | None:
        """See ``Source.block``."""
        if not self._gate.enter():
            return None
        try:
            return seal(self._staging().load(self._slots[index]))
        finally:
            self._gate.leave()

    def fill(self, indexes: Sequence[int], memory: Bytes, slots: Sequence[int]) -> list[bytes | None]:
        """See ``Source.fill``."""
        if not self._gate.enter():
            return [None] * len(indexes)
        try:
            return [*self._staging().read([self._slots[index] for index in indexes], memory, slots)]
        finally:
            self._gate.leave()

    def save(self, index: int, extent: Extent, head: Callable[[bytes], None] | None = None) -> bytes | None:
        """See ``Source.save``."""
        if not self._gate.enter():
            return None
        try:
            staging, slot = self._staging(), self._slots[index]
            files = staging.files
            digest = extent.load(staging.load(slot)) if files is None else files.load(slot)
        finally:
            self._gate.leave()
        if head is not None:
            head(digest)
        if files is None:
            extent.flush()
        elif not files.write(extent):
            return super().save(index, extent, head)
        return digest

    def where(self, index: int) -> Place | None:
        """See ``Source.where``."""
        return Place(self._pool, self._slots[index]) if self._pool is not None and self._gate.is_open else None

    def place(self, index: int, block: Sealed) -> bool:
        """See ``Target.place``."""
        if not self._gate.enter():
            return False
        try:
            staging, slot = self._staging(), self._slots[index]
            copy(staging.space(slot), block.payload)
            staging.store(slot)
            return True
        finally:
            self._gate.leave()

    def take(
        self, indexes: Sequence[int], memory: Bytes, slots: Sequence[int], digests: Sequence[bytes]
    ) -> list[bool | Corrupt]:
        """See ``Target.take``. They count only once the tier has said that they came."""
        if not self._gate.enter():
            return [False] * len(indexes)
        try:
            arrived = self._staging().write([self._slots[index] for index in indexes], memory, slots)
        finally:
            self._gate.leave()
        both = zip(digests, arrived, strict=True)
        return [wanted == came or Corrupt("its bytes are damaged") for wanted, came in both]

    def fetch(self, index: int, extent: Extent, digest: Callable[[], bytes]) -> bool:
        """See ``Target.fetch``."""
        files = self._staging().files
        came = None if files is None else files.read(extent)
        if files is None or came is None:
            return self._fetch(index, extent, digest)
        if came != digest():
            raise Corrupt("its bytes are damaged")
        if not self._gate.enter():
            return False
        try:
            files.store(self._slots[index])
        finally:
            self._gate.leave()
        return True

    def _fetch(self, index: int, extent: Extent, digest: Callable[[], bytes]) -> bool:
        """By way of this thread's buffers. Like ``take``, it verifies what has come."""
        payload = extent.read()
        if not self._gate.enter():
            return False
        try:
            staging, slot = self._staging(), self._slots[index]
            if copy_digested(staging.space(slot), payload) != digest():
                raise Corrupt("its bytes are damaged")
            staging.store(slot)
            return True
        finally:
            self._gate.leave()

    def close(self) -> None:
        """The slots are neither read nor written any more when this returns."""
        self._gate.close()


class _Hold:
    """See ``Hold``."""

    def __init__(
        self, engine: Engine, keys: Sequence[BlockKey], staging: Callable[[], Staging], pool: PoolAddress | None
    ) -> None:
        self._engine = engine
        self._lease, found = engine.hold(keys)
        self.keys = list(found)
        self.source = SlotsEnd(list(found.values()), staging, pool)

    def release(self) -> None:
        """See ``Hold.release``."""
        self.source.close()
        self._engine.release(self._lease)


class Writer(NamedTuple):
    """The worker that writes a prompt's blocks into a shared tier, as the one that waits for them sees it."""

    at_work: Callable[[], Awaitable[bool]]  # whether it still computes the prompt; ``HandoverFailed`` if it is gone
    silence: float  # seconds without a new block after which it is asked
    patience: float  # seconds without a new block, and without knowing it at work, after which it is given up
    longest: float  # seconds without a new block after which it is given up, at work or not


class _Load:
    """How far the blocks of one job have come."""

    def __init__(self, job: Job, keys: Sequence[BlockKey], slots: Sequence[Slot], have: int) -> None:
        """``have``: blocks that are in the slots already."""
        self.job = job
        self.keys = keys
        self.slots = slots
        self.have = self.first = have
        self.where: list[int] = []  # the tier of each of the first blocks
        self.tiers: dict[str, int] = {}  # how many came from which
        self.why = ""
        self.seconds = 0.0  # that tiers took

    def came(self, count: int, tier: str) -> None:
        """So many more blocks are in their slots."""
        self.have += count
        self.tiers[tier] = self.tiers.get(tier, 0) + count


class Offload:
    """The store of one worker, and what it does for its requests."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        staging: Callable[[], Staging],
        lifecycle: Lifecycle,
        pool: PoolAddress | None = None,
    ) -> None:
        """``staging``: the calling thread's access to the engine's pool; ``pool``: where other processes on this
        machine find it, if it is host memory.
        """
        self._pool = pool
        self.store = store
        self._engine = engine
        self._lifecycle = lifecycle
        self._staging = staging
        self._flights = Flights()

    async def open(self) -> None:
        """Open the tiers, and let what becomes findable in the pool sink into them."""
        await asyncio.to_thread(self._compile)
        await self.store.open(self)
        self._engine.watch(self._published)

    async def close(self) -> None:
        """Let go of the tiers. The engine has stopped, or goes on without a store."""
        await self.store.close()

    def keys(self, tokens: Sequence[int], salt: str) -> list[BlockKey]:
        """Of the full blocks of a prompt."""
        return block_keys(root_key(self._engine.model.layout.fingerprint, salt), tokens, self._block_tokens)

    def hold(self, keys: Sequence[BlockKey]) -> Hold:
        """See ``Origin.hold``."""
        return _Hold(self._engine, keys, self._staging, self._pool)

    async def prepare(self, request: Request, patience: float) -> "Fetch":
        """Find out what of a prompt can be loaded, before it is submitted. Whoever needs blocks that another request is
        about to bring waits for that, at most ``patience`` seconds: they are computed once.
        """
        keys = self._keys(request)
        where = await self.store.find(keys)
        here = self._here(keys, where)
        try:
            async with asyncio.timeout(patience):
                while await self._flights.wait(keys, here, request.priority):
                    where = await self.store.find(keys)
                    here = self._here(keys, where)
        except TimeoutError:
            here = self._here(keys, where)
        missing = [key for key in keys if key not in here]
        return Fetch(self, keys, where, self._flights.begin(missing, request.priority))

    def follow(self, request: Request, producer: Writer) -> "Fetch":
        """Before a request is submitted whose prompt another worker is computing, and writing into a shared tier."""
        keys = self._keys(request)
        here = self._here(keys, [])
        flight = self._flights.begin([key for key in keys if key not in here], request.priority)
        return Fetch(self, keys, [], flight, producer)

    async def load(
        self, job: Job, admitted: Admitted, where: Sequence[int] | None = None, producer: Writer | None = None
    ) -> None:
        """Bring what is worth loading into the slots of a job that loads, and let it go on with that.

        ``where``: the tier of each block of the prompt that is in the store; looked up if it is not given. With a
        ``producer``, blocks that it is yet to write are waited for. On cancellation nothing writes into the slots any
        more once this is done.
        """
        lease = self._engine.borrow(job)
        if lease is None:
            return
        try:
            load = _Load(job, self._keys_of(job), lease.slots, admitted.computed // self._block_tokens)
            if producer is None:
                load.where = list(await self.store.find(load.keys) if where is None else where)
                await self._load(load)
            else:
                await self._follow(load, producer)
            if load.where:
                self._stamp(load)
        finally:
            self._engine.release(lease)
        if job.sequence.finish is None:
            self._engine.resume(job, None)

    # -- inside --------------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        """What copies blocks, so that no request waits for it."""
        kernels()

    def _published(self, keys: list[BlockKey]) -> None:
        self._flights.land(keys)
        self.store.offer(keys)

    @property
    def _block_tokens(self) -> int:
        return self._engine.model.layout.block_tokens

    def _here(self, keys: Sequence[BlockKey], where: Sequence[int]) -> set[BlockKey]:
        return self._engine.has(keys) | set(keys[: len(where)])

    def _keys(self, request: Request) -> list[BlockKey]:
        tokens = [*request.prompt, *request.output]
        return self.keys(tokens[: self._reusable(tokens) * self._block_tokens], request.salt)

    def _keys_of(self, job: Job) -> list[BlockKey]:
        """Of a job that loads: its tokens do not change, and the engine knows its keys."""
        return job.sequence.keys[: self._reusable(job.sequence.tokens)]

    def _reusable(self, tokens: Sequence[int]) -> int:
        """Blocks that need not be computed: the last token's does, since its logits are needed."""
        return (len(tokens) - 1) // self._block_tokens

    async def _load(self, load: _Load, *, more: bool = False) -> None:
        """As much of what is in the store as is worth it; ``more`` blocks are about to come."""
        while load.have < len(load.where):
            level, have = load.where[load.have], load.have
            count, load.why = self._worthwhile(load.where[have:], more=more)
            if not count:
                beyond = zip(load.keys[have:], load.where[have:], strict=False)
                same = [key for key, place in beyond if place == level]
                self.store.stages[level].explore(same[: self._batch(level)])
                break
            end = have + next((i for i, other in enumerate(load.where[have : have + count]) if other != level), count)
            end = min(end, have + self._batch(level))
            begun = time.monotonic()
            got = await self._fetch(level, load.keys[have:end], load.slots[have:end])
            load.seconds += time.monotonic() - begun
            if got:
                load.came(got, self.store.stages[level].name)
                self._engine.loaded(load.job, load.have * self._block_tokens, stored=True)
            if load.have < end:  # evicted or damaged meanwhile, or the tier has failed: is there another one?
                again = await self.store.find(load.keys[load.have :])
                if not got and again[:1] == [level]:
                    break
                load.where = [*load.where[: load.have], *again]

    async def _follow(self, load: _Load, producer: Writer) -> None:
        """Block after block, as the producer writes them. Given up when nothing new comes for too long, or sooner when
        the producer is not there any more.
        """
        quiet = asked = at_work = time.monotonic()
        while load.have < len(load.keys):
            load.where = [*load.where[: load.have], *[0] * (load.have - len(load.where))]
            load.where += await self.store.find(load.keys[load.have : load.have + self.store.batch], wanted=False)
            have, now = load.have, time.monotonic()
            await self._load(load, more=True)
            if load.have > have:
                quiet = now
                continue
            if load.have < len(load.where):  # it is there, and not worth loading, or cannot be had
                break
            reason = ""
            if now - quiet > producer.longest or now - max(quiet, at_work) > producer.patience:
                reason = f"nothing new for {now - quiet:.0f} s"
            elif now - max(quiet, asked) > producer.silence:
                asked = now
                try:
                    at_work = now if await producer.at_work() else at_work
                except HandoverFailed as error:
                    reason = f"the producer is gone: {error.message}"
            if reason:
                self._lifecycle.stamp(load.job.sequence.request.id, "fallback", reason=reason)
                break
            await asyncio.sleep(min(max(_POLL_SECONDS[0], _POLL_SHARE * (now - quiet)), _POLL_SECONDS[1]))

    def _stamp(self, load: _Load) -> None:
        loaded = load.have - load.first
        self._lifecycle.stamp(
            load.job.sequence.request.id,
            "store",
            found_blocks=len(load.where),
            pool_blocks=load.first,
            loaded_blocks=loaded,
            bytes=loaded * self.store.block_bytes,
            tiers=", ".join(f"{name} {count}" for name, count in load.tiers.items()),
            load_ms=round(load.seconds * 1e3, 3),
            why=load.why,
        )

    def _worthwhile(self, where: Sequence[int], *, more: bool) -> tuple[int, str]:
        """How many of the blocks to load, each from the tier where it is; ``more`` are about to come, so that a call
        for few of them takes no longer because they are few.
        """
        if where.count(where[0]) == len(where):  # as nearly always
            levels = [(where[0], len(where))]
        else:
            levels = [(level, len(list(group))) for level, group in groupby(where)]
        of_level, loads, now = Counter[int](), list[Run](), time.monotonic()
        for level, count in levels:
            of_level[level] += count
        for level, count in levels:
            blocks = self._batch(level) if more else min(of_level[level], self._batch(level))
            seconds = self.store.stages[level].reads.seconds(blocks, now)
            loads.append(Run(count, None if seconds is None else seconds / blocks))
        return choose(loads, self._compute_seconds)

    @property
    def _compute_seconds(self) -> float | None:
        """To compute a block."""
        speed = self._engine.speed
        return self.store.block_bytes / speed if speed else None

    def _batch(self, level: int) -> int:
        rate = self.store.stages[level].reads.rate(time.monotonic())
        return self.store.reach(rate) if rate else _TRIAL_BLOCKS

    async def _fetch(self, level: int, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> int:
        """How many of the first blocks came into the slots, in twice the time that computing them would take."""
        seconds = self._compute_seconds
        patience = None if seconds is None else max(_LEAST_PATIENCE, 2 * len(keys) * seconds)
        target = SlotsEnd(slots, self._staging)
        try:
            return await self.store.get(level, keys, target, patience)
        finally:
            target.close()


class Fetch:
    """What the store does for one request, from before it is submitted until it has ended."""

    def __init__(
        self,
        offload: Offload,
        keys: list[BlockKey],
        where: list[int],
        flight: Flight,
        producer: Writer | None = None,
    ) -> None:
        """``keys``: of all blocks of the prompt that can be loaded. ``where``: for each of the longest prefix of them
        that is in the store, the first tier that has it.
        """
        self._offload = offload
        self.keys = keys
        self._producer = producer
        self._where = where
        self._flight = flight
        self._task: asyncio.Task[None] | None = None

    @property
    def loads(self) -> bool:
        """Whether there is anything to load, or will be."""
        return bool(self._where) or self._producer is not None

    def submitted(self, job: Job) -> None:
        """The request's job waits, or has slots already."""
        if self._where and not job.sequence.slots():  # meanwhile, bring its blocks into the first tier
            keys = self.keys[: len(self._where)]
            self._task = asyncio.create_task(self._offload.store.lift(keys, self._where))

    def observe(self, job: Job, update: Update) -> None:
        """Something happened to the job."""
        match update:
            case Admitted() if update.again or self.loads:
                self._task = asyncio.create_task(self._load(job, update, self._task))
            case Output():
                self._flight.end()

    async def end(self) -> None:
        """Nothing is loaded any more when this returns."""
        self._flight.end()
        await end(self._task)

    async def _load(self, job: Job, admitted: Admitted, before: asyncio.Task[None] | None) -> None:
        await end(before)
        stale = admitted.again or before is not None  # it was preempted, or blocks were moved while it waited
        try:
            producer = None if admitted.again else self._producer
            await self._offload.load(job, admitted, None if stale else self._where, producer)
        except Exception:  # nobody awaits this task: what it does not foresee must still end the request
            log.exception("request %s could not be loaded", job.sequence.request.id)
            job.push(EngineFailed("the store failed; the worker's log says how"))
