"""The worker process: the service behind the API. One event loop, one engine thread, the same for every role."""

import asyncio
import logging
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import aiohttp
import msgspec
import uvloop

from twostroke.api.http import KEEP_ALIVE
from twostroke.api.lifecycle import Gauges, Lifecycle, StoreCollector
from twostroke.api.server import build_app
from twostroke.api.service import Load
from twostroke.api.serving import bind, serve, settled
from twostroke.config import WorkerConfig, cluster_secret, is_loopback
from twostroke.engine.engine import MEASURED_TOKENS, Admitted, Job, Progress, Update
from twostroke.errors import EngineFailed, NoRoom, NotFound, Overloaded, RequestError, Unavailable
from twostroke.links.link import Failures
from twostroke.messages import (
    ForeignTicket,
    Join,
    KvTransfer,
    Manage,
    Managed,
    ModelCard,
    Output,
    Request,
    Role,
    Sampling,
    Slots,
    Ticket,
    WorkerInfo,
    WorkerState,
    Writing,
)
from twostroke.store.management import manage
from twostroke.store.store import Store
from twostroke.tokenizer import Tokenizer
from twostroke.worker.announcer import Announcer
from twostroke.worker.consumer import Peer, Pull
from twostroke.worker.internal import internal_routes
from twostroke.worker.loading import Loaded, load
from twostroke.worker.offload import Fetch, Offload, Writer
from twostroke.worker.producer import Producer
from twostroke.worker.tasks import end
from twostroke.worker.tickets import Tickets

log = logging.getLogger(__name__)
_SHUTDOWN_SECONDS = 3.0
_PATIENCE = 4  # silences, after which a producer that is not at work and writes nothing new into the store is given up
_HELD_SHARE = 8  # of the pool, the part that may be held while it is written into the store
TURN_SECONDS = 5e-5  # after which a thread gives the interpreter to one that waits: the engine, and so a GPU, soonest
_LOOK_SECONDS = 0.05  # between looks at what a draining worker still has to finish
_NO_SLOTS = Slots(total=0, free=0, cached=0, leased=0)


class Worker:
    """Serves one model. It has no role of its own: tickets say which end of a hand-over a request is."""

    def __init__(self, config: WorkerConfig, url: str, secret: str) -> None:
        self._config = config
        self._url = url
        self._secret = secret
        self._instance = uuid.uuid4().hex
        self._state: WorkerState = "starting"
        self._detail = "starting"
        self._assigned: Role | None = None
        self._loaded: Loaded | None = None
        self._session: aiohttp.ClientSession | None = None
        self._writing: Counter[Writing] = Counter()  # hand-overs whose blocks go through the store
        self._jobs: set[Job] = set()  # what runs
        self._failures = Failures()
        self._pulled: dict[str, asyncio.Event] = {}  # request id of a prompt's first choice → its blocks are here
        self._offload: Offload | None = None
        self._tickets = Tickets(self._instance, secret, config.bootstrap_hosts, alone=is_loopback(config.host))
        self.producer: Producer | None = None
        self.leaving = asyncio.Event()  # it is told to drain
        self._leave_at = 0.0  # on the monotonic clock, whatever is still going on
        self._announcer: Announcer | None = None
        self.lifecycle = Lifecycle(config.name)
        self.lifecycle.watch(self._gauges)

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self, died: asyncio.Event) -> None:
        """Load the model and be ready; ``died`` is set if the engine ever ends by itself.

        Raises:
            StartupError: the worker cannot start.
        """
        loop = asyncio.get_running_loop()
        # In a thread that ends: were it kept, its OpenMP threads would compete with the engine's at every operation.
        with ThreadPoolExecutor(1) as loader:
            loaded = await loop.run_in_executor(loader, load, self._config, self._instance, self._secret, self._say)
        loaded.engine.start(loop, died.set)
        self._say("warming up")
        await _warm_up(loaded)
        if loaded.tiers:
            self._say("opening the store")
            slots = loaded.engine.load().slots.total
            store = Store(loaded.tiers, loaded.engine.model.layout.block_bytes, most=max(1, slots // _HELD_SHARE))
            self._offload = Offload(loaded.engine, store, loaded.staging, self.lifecycle, loaded.memory.address)
            self.lifecycle.collect(StoreCollector(store.reports))
            await self._offload.open()
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE))
        self.producer = Producer(
            loaded.engine,
            loaded.offers,
            lease_seconds=self._config.lease_seconds,
            attach_timeout=self._config.attach_timeout,
            queue_timeout=self._config.queue_timeout,
            heartbeat=self._config.handover_timeout / 4,
            progress_timeout=self._config.progress_timeout,
            board=loaded.board,
        )
        loaded.serve(self.producer.exported)
        self._loaded = loaded
        if not self.leaving.is_set():
            self._state = "ready"
            self._say("serving")
        self._announcer = Announcer(self._session, self._config.routers, self._join, self._secret)

    def drain(self, seconds: float | None = None) -> None:
        """Take no new requests from now on, and leave when nothing is left to finish, or in ``seconds``.

        What runs goes on, and whoever consumes our blocks gets them. Until then peers and routers are answered. Told
        again, only the time changes.
        """
        patience = self._config.drain_timeout if seconds is None else seconds
        self._state, self._leave_at = "draining", time.monotonic() + patience
        self._say("finishing what it has, then it leaves")
        self.leaving.set()
        if self._announcer is not None:
            self._announcer.announce()

    def assign(self, role: Role) -> None:
        """Remember what routers shall use this worker for. Nothing else changes: tickets say what to do."""
        self._assigned = role

    def writes(self, message: Writing) -> bool:
        """Whether this worker is at work on that hand-over, whose blocks go through the store."""
        return message in self._writing

    async def drained(self) -> None:
        """Wait until nothing is left to finish, or it is time to leave anyway."""
        while time.monotonic() < self._leave_at and self._busy():  # noqa: ASYNC110 - no one event ends it
            await asyncio.sleep(_LOOK_SECONDS)
        if self._announcer is not None:
            await self._announcer.leave()

    async def stop(self) -> None:
        """Let go of everything."""
        self._state, self._detail = "draining", "shutting down"
        if self._announcer is not None:
            self._announcer.close()
        if self.producer is not None:
            self.producer.close()
        if self._session is not None:
            await self._session.close()
        if self._loaded is not None:
            await asyncio.to_thread(self._loaded.engine.stop)
            if self._offload is not None:
                await self._offload.close()
            self._loaded.close()

    def _say(self, detail: str) -> None:
        self._detail = detail
        log.info("%s", detail)

    # -- the service behind the API ------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``Service``."""
        return self._ready().tokenizer

    def card(self) -> ModelCard:
        """See ``Service``."""
        return self._ready().card

    def health(self) -> tuple[str, str]:
        """See ``Service``."""
        return self._state, self._detail

    async def generate(self, request: Request, ticket: Ticket | None) -> AsyncGenerator[Output, None]:
        """See ``Service``. With a ticket, the prompt's blocks come from its peer as far as they can."""
        loaded = self._admit(request)
        consumes = ticket is not None and ticket.peer is not None and request.choice == 0
        pulls = consumes and self._config.link != "store"
        here = asyncio.Event()  # the prompt's blocks are
        if pulls:
            self._pulled[request.id] = here
        elif ticket is not None:
            await self._first_choice(request)
        fetch = None if pulls else await self._fetch(request, ticket if consumes else None)
        loads, keys = pulls or bool(fetch and fetch.loads), fetch.keys if fetch else ()
        job = loaded.engine.submit(request, loads=loads, reloads=fetch is not None, keys=keys)
        if pulls and ticket is not None and not ticket.waits and request.prompt_index == 0 and not job.admitted:
            # Whoever routes can choose another worker, and spare the prefill. Later prompts of a batch may wait: they
            # might never fit at once.
            loaded.engine.abort(job)
            self._pull_ended(request, here)
            self.lifecycle.stamp(request.id, "failed", reason="no room")
            raise NoRoom("no slots are free for this prompt now")
        self._jobs.add(job)
        pull: asyncio.Task[None] | None = None
        if fetch:
            fetch.submitted(job)
        outcome, outputs = "aborted", 0
        try:
            async for update in job.updates(self._config.queue_timeout):
                self._observe(job, update, first=not (outputs or request.output))
                if fetch:
                    fetch.observe(job, update)
                if isinstance(update, Output):
                    outputs += len(update.tokens)
                    outcome = "finished" if update.finish else outcome
                    yield update
                elif isinstance(update, Admitted) and pulls and ticket is not None and pull is None:
                    pull = asyncio.create_task(self._pull(loaded, job, update, ticket, here))
        except RequestError as error:
            outcome = "failed"
            self.lifecycle.stamp(request.id, outcome, reason=error.code or error.kind)
            raise
        finally:
            if outcome != "failed":
                reason = job.sequence.finish or "abort"
                self.lifecycle.stamp(request.id, outcome, reason=reason, output_tokens=outputs)
            await end(pull)
            if fetch:
                await fetch.end()
            if pulls:
                self._pull_ended(request, here)
            loaded.engine.abort(job)
            self._jobs.discard(job)

    async def produce(self, requests: Sequence[Request], ticket: Ticket) -> list[Output]:
        """See ``Service``."""
        return await asyncio.gather(*(self._produce(request, ticket) for request in requests))

    def load(self) -> Load:
        """See ``Service``."""
        engine = self._ready().engine
        load = engine.load()
        held = load.slots.leased * engine.model.layout.block_tokens
        return Load(load.running, load.waiting, held + load.queued_tokens)

    def ticket(self, word: ForeignTicket, *, insider: bool) -> Ticket:
        """See ``Service``."""
        return self._tickets.read(word, self._config.role, insider=insider)

    def transfer(self, ticket: Ticket, host: str, port: int) -> KvTransfer:
        """See ``Service``."""
        return self._tickets.transfer(ticket, host, port)

    def abort(self, requests: Sequence[Request]) -> None:
        """See ``Service``."""
        for job in self._jobs:
            if any(job.sequence.request is request for request in requests):
                job.push(Output([], "abort"))

    # -- for routers and peers -----------------------------------------------------------------------------------

    def info(self) -> WorkerInfo:
        """What a router wants to know."""
        loaded = self._loaded
        load = loaded.engine.load() if loaded else None
        return WorkerInfo(
            id=self._config.name,
            instance=self._instance,
            role=self._config.role,
            url=self._url,
            pid=os.getpid(),
            state=self._state,
            detail=self._detail,
            model=loaded.card.name if loaded else "",
            fingerprint=loaded.engine.model.layout.fingerprint if loaded else "",
            link=(", ".join(pool.memory.link for pool in loaded.offers) or self._config.link) if loaded else "",
            slots=load.slots if load else _NO_SLOTS,
            running=load.running if load else 0,
            waiting=load.waiting if load else 0,
            queued_tokens=load.queued_tokens if load else 0,
            device=str(loaded.engine.model.device) if loaded else self._config.engine.device,
            dtype=loaded.engine.model.layout.dtype if loaded else "",
            block_tokens=loaded.engine.model.layout.block_tokens if loaded else 0,
            assigned=self._assigned,
            threads=loaded.engine.model.threads if loaded else self._config.engine.threads,
        )

    async def manage(self, order: Manage) -> Managed:
        """What people ask of our store (``twostroke kv``).

        Raises:
            NotFound: there is none.
        """
        if self._offload is None:
            raise NotFound("this worker has no store (--store)")
        if order.prompt is not None:
            keys = self._offload.keys(self.tokenizer.encode(order.prompt), order.salt)
            order = msgspec.structs.replace(order, keys=[key.hex() for key in keys])
        layout = self._ready().engine.model.layout.fingerprint
        return Managed(await manage(self._offload.store.stages, layout, order))

    # -- inside --------------------------------------------------------------------------------------------------

    def _join(self) -> Join:
        return Join(self._url, self._instance, self._config.role, self._state)

    def _busy(self) -> bool:
        """Whether anybody still needs this worker."""
        return bool(self._jobs or (self.producer is not None and self.producer.open))

    def _ready(self) -> Loaded:
        if self._loaded is None or self._state != "ready":
            raise Unavailable(f"the worker is {self._state}: {self._detail}")
        return self._loaded

    def _admit(self, request: Request) -> Loaded:
        loaded = self._ready()
        if len(self._jobs) >= self._config.max_queue:
            raise Overloaded(f"{len(self._jobs)} requests are under way already; this worker takes no more")
        self.lifecycle.stamp(request.id, "received", prompt_tokens=len(request.prompt))
        return loaded

    async def _first_choice(self, request: Request) -> None:
        """Wait until the first choice of this prompt has brought its blocks; this choice then finds them here."""
        first = f"{request.http_id}/{request.prompt_index}/0"
        if first in self._pulled:
            await self._pulled[first].wait()

    def _pull_ended(self, request: Request, here: asyncio.Event) -> None:
        """Nobody need wait for these blocks any more. A newer attempt of the request may have taken its place."""
        here.set()
        if self._pulled.get(request.id) is here:
            del self._pulled[request.id]

    async def _pull(self, loaded: Loaded, job: Job, admitted: Admitted, ticket: Ticket, here: asyncio.Event) -> None:
        request = job.sequence.request
        pull = Pull(
            job,
            admitted,
            _handover(request, ticket),
            ticket.attempt,
            engine=loaded.engine,
            links=loaded.links,
            peer=self._peer(ticket),
            patience=self._config.queue_timeout,
            # P did not know how many tokens D wants at least, so it may have sampled an end that D must not take.
            takes_first=ticket.same_body or not request.sampling.min_tokens,
            lifecycle=self.lifecycle,
            failures=self._failures,
        )
        try:
            await pull.run()
        except Exception:  # nobody awaits this task: what it does not foresee must still end the request
            log.exception("the hand-over of request %s failed", request.id)
            job.push(EngineFailed("the hand-over failed; the worker's log says how"))
        here.set()

    async def _fetch(self, request: Request, ticket: Ticket | None = None) -> Fetch | None:
        """What the store can do for a request that is about to be submitted; with a ticket, its blocks come through the
        store. None without a store.
        """
        if self._offload is None:
            return None
        if ticket is None:
            return await self._offload.prepare(request, self._config.queue_timeout)
        silence = self._config.handover_timeout
        peer, message = self._peer(ticket), Writing(_handover(request, ticket), ticket.attempt)
        writer = Writer(lambda: peer.writing(message), silence, _PATIENCE * silence, self._config.queue_timeout)
        return self._offload.follow(request, writer)

    def _peer(self, ticket: Ticket) -> Peer:
        assert self._session, "a ready worker has a session"
        assert ticket.peer, "a consumer is told its producer"
        return Peer(self._session, ticket.peer, secret=self._secret, silence=self._config.handover_timeout)

    async def _produce(self, request: Request, ticket: Ticket) -> Output:
        assert self.producer is not None, "a ready worker has a producer"
        one_token = msgspec.structs.replace(request.sampling, max_tokens=1)
        handover = _handover(request, ticket)
        if self._config.link == "store":
            writing = Writing(handover, ticket.attempt)
            self._writing[writing] += 1
            try:
                return await self._write(msgspec.structs.replace(request, sampling=one_token))
            finally:
                self._writing -= Counter([writing])
        try:
            self._admit(request)
        except RequestError as error:
            self.producer.refuse(handover, ticket.attempt, error.message)
            raise
        request = msgspec.structs.replace(request, sampling=one_token)
        fetch = await self._fetch(request)
        produced = self.producer.produce(request, handover, ticket.attempt, loads=bool(fetch and fetch.loads))
        try:
            async with aclosing(produced) as updates:
                async for job, update in updates:
                    self._observe(job, update, first=True)
                    if fetch:
                        fetch.observe(job, update)
        finally:
            if fetch:
                await fetch.end()
        self.lifecycle.stamp(request.id, "finished", reason="handover", output_tokens=1)
        assert isinstance(update, Output), "the last update is the first token"
        return update

    async def _write(self, request: Request) -> Output:
        """Compute a prompt, whose blocks reach the consumer through the store. The first token."""
        async with aclosing(self.generate(request, None)) as outputs:
            async for output in outputs:
                return output
        raise EngineFailed("no token was sampled")

    def _observe(self, job: Job, update: Update, *, first: bool) -> None:
        """Stamp what an update means in a request's life."""
        sequence = job.sequence
        stamp, id_ = self.lifecycle.stamp, sequence.request.id
        match update:
            case Admitted():
                stamp(id_, "readmitted" if update.again else "admitted", slots=len(update.slots))
            case Progress(0):
                stamp(id_, "prefill_started", cached_tokens=sequence.cached)
            case Output() if first and update.tokens:
                if not job.given:  # else the producer sampled it; the engine may decode already when we see it
                    stamp(id_, "prefill_ended")
                stamp(id_, "first_token")
            case _:
                pass

    def _gauges(self) -> Gauges:
        tasks = len(asyncio.all_tasks())
        if self._loaded is None or self.producer is None:
            return Gauges(0, 0, tasks=tasks)
        load = self._loaded.engine.load()
        return Gauges(load.running, load.waiting, load.slots, self.producer.open, tasks)


async def _warm_up(loaded: Loaded) -> None:
    """Have kernels compiled and weights in memory before anybody waits for them, and the engine's speed measured."""
    sampling = Sampling(max_tokens=2, seed=0, temperature=0, ignore_eos=True)
    for size in (2, min(2 * MEASURED_TOKENS, loaded.card.max_model_len - 2)):
        async for _ in loaded.engine.submit(Request("warm-up/0/0", [0] * max(1, size), sampling)).updates():
            pass


def _handover(request: Request, ticket: Ticket) -> str:
    """Its name, the same at both ends."""
    return f"{ticket.id}/{request.prompt_index}"


def run(config: WorkerConfig) -> int:
    """Serve until a signal; the exit status. Raises ``StartupError`` if it cannot start."""
    return uvloop.run(_run(config))


async def _leave(worker: Worker) -> None:
    await worker.leaving.wait()
    await worker.drained()


async def _run(config: WorkerConfig) -> int:
    secret = cluster_secret()
    sock = bind(config.host, config.port)
    host, port = sock.getsockname()[:2]
    worker = Worker(config, f"http://{host}:{port}", secret)
    app = build_app(
        worker,
        worker.lifecycle,
        max_body=config.max_body,
        routes=internal_routes(worker, secret),
        api_keys=config.api_keys,
    )
    stop, died = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve(app, sock, shutdown_seconds=_SHUTDOWN_SECONDS, stop=stop, drain=worker.drain))
    starting = asyncio.create_task(worker.start(died))
    dying = asyncio.create_task(died.wait())
    leaving = asyncio.create_task(_leave(worker))
    try:
        await asyncio.wait({serving, starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            settled()
            sys.setswitchinterval(TURN_SECONDS)
            await asyncio.wait({serving, dying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if died.is_set():
            log.critical("the engine thread ended: the worker cannot go on")
        return 1 if died.is_set() else 0
    finally:
        stop.set()
        for task in (dying, starting, leaving):
            task.cancel()
        await asyncio.wait({serving, starting, leaving})
        await worker.stop()
