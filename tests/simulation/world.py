"""One schedule: a cluster, clients, faults, all from one seed; and what must hold whatever happened."""

import asyncio
import gc
import json
import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import aiohttp
import msgspec
from starlette.routing import compile_path

from tests.simulation.clock import Dice, Loop, Node, Stuck
from tests.simulation.model import LAYOUT, VOCAB, SimBoard, SimEngine, SimLink, SimModel, address, answer
from tests.simulation.network import Network, Upstream
from twostroke.api.server import build_app
from twostroke.config import RouterConfig, Schedule, WorkerConfig
from twostroke.kv.pool import Pool
from twostroke.links.staging import Staging
from twostroke.messages import ModelCard
from twostroke.router.router import Router
from twostroke.tokenizer import Tokenizer
from twostroke.worker.internal import internal_routes
from twostroke.worker.loading import Loaded
from twostroke.worker.producer import Producer
from twostroke.worker.worker import Worker

LIMIT = 900.0  # seconds of virtual time in which everything must have ended
ARRIVALS = 1.0  # seconds in which the clients come, and the faults
SETTLE = 60.0  # seconds after which nothing may be held any more
CONFIG = WorkerConfig(lease_seconds=1.0, queue_timeout=60.0, progress_timeout=20.0)


class Silent:
    """Instead of ``Lifecycle``: nobody reads stamps or metrics here."""

    def __init__(self, _name: str) -> None: ...
    def stamp(self, _id: str, _event: str, **_detail: object) -> None: ...
    def tokens(self, _id: str, _count: int) -> None: ...
    def received(self, _link: str, _blocks: int, _size: int) -> None: ...
    def watch(self, _gauges: object) -> None: ...
    def collect(self, _collector: object) -> None: ...


_compiled = cache(compile_path)  # every process has the same pages


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.of_bytes()


def _no_staging() -> Staging:
    raise AssertionError("without a store, nobody asks for it")


@dataclass
class Process:
    """A worker."""

    node: Node
    worker: Worker
    engine: SimEngine


@dataclass
class Outcome:
    """What became of a schedule."""

    seed: int
    exact: int = 0
    errors: int = 0
    left: int = 0  # clients that left
    faults: int = 0
    seconds: float = 0.0  # virtual
    wrong: list[str] = field(default_factory=list)  # promises that were broken
    trace: list[str] = field(default_factory=list)


class World:
    """The cluster of a schedule."""

    def __init__(self, seed: int, outcome: Outcome, loop: Loop, *, verbose: bool) -> None:
        self.dice = Dice(seed)
        self.outcome = outcome
        self.loop = loop
        self._verbose = verbose
        self.network = Network(self.dice, self.say)
        self.pools: dict[str, list[list[int]]] = {}
        self.boards: dict[str, SimBoard | None] = {}  # by instance; None: it has to be asked
        self.workers: dict[str, Process] = {}
        self.router = Node("router")
        pick = self.dice.random
        self.prefill = [f"p{i}" for i in range(pick.randint(1, 2))]
        self.decode = [f"d{i}" for i in range(pick.randint(1, 2))]
        self.slots = {name: pick.choice((10, 12, 16, 40)) for name in (*self.prefill, *self.decode)}
        self.step_seconds = pick.choice((0.0005, 0.002, 0.01))
        self.copy_seconds = pick.choice((0.0005, 0.005, 0.03))  # of a slot, over the link
        self.copies_whole = self.dice.chance(0.5)  # a read that was begun is not broken off, as over shared memory
        self.bursts = [pick.uniform(0.1, ARRIVALS) for _ in range(2)]  # when most clients come
        self.leaving, self.patience = 0.3, 0.2  # how many clients leave early, within how many seconds
        if self.dice.chance(0.2):  # a storm: everybody at once, to where there is hardly any room, over a slow link
            self.prefill, self.decode = ["p0"], ["d0"]
            self.slots["d0"], self.copy_seconds, self.copies_whole = 10, 0.05, True
            self.bursts, self.leaving, self.patience = self.bursts[:1] * 2, 0.5, 1.0
        self._starts = 0

    def say(self, text: str) -> None:
        if self._verbose:
            self.outcome.trace.append(f"{self.loop.now:10.5f} {text}")

    def start(self) -> None:
        """All workers and the router."""
        for name in (*self.prefill, *self.decode):
            self.start_worker(name)
        self.start_router()

    def start_worker(self, name: str) -> None:
        """A new process at its address."""
        self._starts += 1
        node, slots = Node(name), self.slots[name]
        worker = Worker(msgspec.structs.replace(CONFIG, name=name), f"http://{name}", "")
        worker._instance = instance = f"{name}.{self._starts}"
        memory = [[self.dice.random.getrandbits(60) for _ in range(LAYOUT.block_tokens)] for _ in range(slots)]
        engine = SimEngine(SimModel(memory), Pool(slots), self.dice, self.step_seconds)
        offer = address(instance, slots)
        link = SimLink(memory, self.pools, self)
        board = self.boards[instance] = SimBoard(instance) if self.dice.chance(0.5) else None
        card = ModelCard("simulated", VOCAB, slots * LAYOUT.block_tokens, frozenset(), 0)
        worker._loaded = Loaded(card, _tokenizer(), engine, None, board, (link,), (), (offer,), _no_staging, ())  # type: ignore[arg-type]
        worker._session = self.network.session(node)  # type: ignore[assignment]
        worker.producer = Producer(
            engine,
            (offer,),
            lease_seconds=CONFIG.lease_seconds,
            attach_timeout=CONFIG.attach_timeout,
            queue_timeout=CONFIG.queue_timeout,
            heartbeat=CONFIG.handover_timeout / 4,
            progress_timeout=CONFIG.progress_timeout,
            board=board,
        )
        worker._state = "ready"
        app = build_app(worker, worker.lifecycle, max_body=1 << 20, routes=internal_routes(worker, ""))
        self.pools[instance] = memory
        self.workers[name] = Process(node, worker, engine)
        self.network.nodes[name] = node, app
        node.run(engine.step_for_ever())
        self.say(f"start {instance} with {slots} slots")

    def start_router(self) -> None:
        """A new process at its address."""
        self.router = node = Node("router")
        prefill, decode = (tuple(f"http://{name}" for name in names) for names in (self.prefill, self.decode))
        schedule: Schedule = self.dice.random.choice(("concurrent", "concurrent", "serial"))
        config = RouterConfig(prefill, decode, schedule=schedule)
        session = self.network.session(node)
        with patch("twostroke.router.relay.Upstream", lambda: Upstream(session)):
            router = Router(config, session, secret="")  # type: ignore[arg-type]
        self.network.nodes["router"] = node, router.app
        node.run(router.watch())
        self.say(f"start router, {config.schedule}")

    # -- clients -------------------------------------------------------------------------------------------------

    async def ask(self, number: int) -> None:
        """One client: exactly one reply, the right one or an explicit error; or it leaves."""
        pick, loop = self.dice.random, self.loop
        await asyncio.sleep(pick.choice((*self.bursts, pick.uniform(0.1, ARRIVALS))))
        shared = pick.choice((0, 0, 4, 8))
        prompt = [7] * shared + [pick.randrange(VOCAB) for _ in range(pick.randint(1, 20))]
        count = pick.randint(1, 8)
        params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": params, "stream": self.dice.chance(0.6)}
        patience = pick.uniform(0.0, self.patience) if self.dice.chance(self.leaving) else None
        started = loop.now
        try:
            async with asyncio.timeout(patience):
                status, ids, error = await self._post(body)
        except TimeoutError:
            self.outcome.left += 1
            self.say(f"client {number} left")
            return
        except aiohttp.ClientError as broken:  # the router died
            status, ids, error = 0, [], repr(broken)
        self.say(f"client {number}: {status} {ids} {error} after {loop.now - started:.3f} s")
        if error:
            self.outcome.errors += 1
            if status == 0 and not self.router_lost:
                self.outcome.wrong.append(f"client {number} has neither an answer nor an explicit error: {error}")
            if status == 500:
                self.outcome.wrong.append(f"client {number}: {error}")
        elif ids == answer(prompt, count):
            self.outcome.exact += 1
        else:
            self.outcome.wrong.append(f"client {number} got {ids} instead of {answer(prompt, count)}")

    router_lost = False

    async def _post(self, body: dict[str, Any]) -> tuple[int, list[int], str]:
        """Status, token ids, and what an explicit error says."""
        session = self.network.session(Node("client", inside=False))
        async with session.post("http://router/generate", data=json.dumps(body).encode()) as reply:
            if not body["stream"] or reply.status != 200:
                got = json.loads(await reply.read())
                return reply.status, got.get("output_ids", []), got.get("error", {}).get("message", "")
            last: dict[str, Any] = {}
            ended = False
            async for line in reply.content:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    last = json.loads(line[6:])
            error = last.get("error", {}).get("message", "")
            if not ended and not error:
                raise aiohttp.ClientPayloadError("the stream has no end")
            return reply.status, last.get("output_ids", []), error

    # -- faults --------------------------------------------------------------------------------------------------

    async def fail(self) -> None:
        """One fault of a random kind, at a random time; it is over after a while."""
        pick, faults = self.dice.random, self.network.faults
        busy = [burst + pick.uniform(0.0, 0.2) for burst in self.bursts]
        await asyncio.sleep(pick.choice((*busy, pick.uniform(0.1, ARRIVALS))))
        kind = pick.choice(("kill", "kill", "stop", "stop", "router", "refused", "cut", "silenced", "doubled"))
        name = pick.choice((*self.prefill, *self.decode))
        lasts = pick.choice((0.01, 0.5, 4.0))
        self.outcome.faults += 1
        self.say(f"fault: {kind} {name} for {lasts} s")
        if kind in ("kill", "router"):
            node = self.workers[name].node if kind == "kill" else self.router
            self.router_lost = self.router_lost or kind == "router"
            node.dead = True
            self.network.broken_by(node)
            await asyncio.sleep(lasts)
            if kind == "kill":
                self.start_worker(name)
            else:
                self.start_router()
        elif kind == "stop":
            node = self.workers[name].node
            node.paused = True
            await asyncio.sleep(lasts)
            self.loop.resume(node)
        else:
            setattr(faults, kind, {"refused": 0.3, "cut": 0.05, "silenced": 0.03, "doubled": 0.5}[kind])
            await asyncio.sleep(lasts)
            setattr(faults, kind, 0.0)

    # -- a schedule ----------------------------------------------------------------------------------------------

    async def play(self) -> None:
        """Everything happens; then nothing may be left."""
        pick = self.dice.random
        self.start()
        clients = [asyncio.create_task(self.ask(number)) for number in range(pick.randint(3, 7))]
        faults = [asyncio.create_task(self.fail()) for _ in range(pick.choice((0, 1, 1, 2, 3)))]
        await asyncio.gather(*clients, *faults)
        await self.settled()

    async def settled(self) -> None:
        """Until nothing is held, at most for ``SETTLE`` seconds."""
        ends = self.loop.now + SETTLE
        while left := [text for process in self.workers.values() if (text := self.held(process))]:
            if self.loop.now > ends:
                self.outcome.wrong += left
                return
            await asyncio.sleep(0.5)

    def held(self, process: Process) -> str:
        """What a worker holds though nobody needs it."""
        load, worker, producer = process.engine.load(), process.worker, process.worker.producer
        slots = load.slots
        if slots.free + slots.cached != slots.total or load.running or load.waiting:
            return f"{process.node.name} holds {load}"
        if worker._jobs or worker._pulled or process.engine._jobs or (producer and producer.open):
            return f"{process.node.name} has jobs or hand-overs left"
        tasks = [task for task in process.node.tasks if not task.done()]
        if len(tasks) > 1:  # the engine's
            return f"{process.node.name} has {len(tasks) - 1} tasks left"
        if (engine := process.node.tasks[0]).done():
            return f"{process.node.name}: its engine ended: {engine.exception()!r}"
        return ""


@cache
def _prepared() -> None:
    """What exists before the first schedule need not be looked at by each one's garbage collection."""
    _tokenizer()
    gc.collect()
    gc.freeze()


def simulate(seed: int, *, verbose: bool = False) -> Outcome:
    """Play the schedule of a seed."""
    _prepared()
    outcome, loop = Outcome(seed), Loop(LIMIT)
    gc.disable()  # or what dead processes leave would be finalized in the middle of others' work
    silenced = logging.root.manager.disable
    if silenced < logging.CRITICAL:
        logging.disable(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch("starlette.routing.compile_path", _compiled))
            for module in ("worker.worker", "router.router"):
                stack.enter_context(patch(f"twostroke.{module}.Lifecycle", Silent))
            stack.enter_context(patch.object(time, "monotonic", loop.time))
            _play(World(seed, outcome, loop, verbose=verbose), outcome, loop)
        with patch.object(sys, "unraisablehook", lambda _: None):
            loop.forget()
    finally:
        if silenced < logging.CRITICAL:
            logging.disable(silenced)
        gc.enable()
    return outcome


def _play(world: World, outcome: Outcome, loop: Loop) -> None:
    try:
        loop.run_until_complete(world.play())
    except Stuck as stuck:
        outcome.wrong.append(f"deadlock: {stuck}")
    except Exception as error:  # noqa: BLE001 - of the simulated code: a finding like any other
        outcome.wrong.append(f"unexpected: {error!r}")
    outcome.seconds = loop.now
