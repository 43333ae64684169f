"""The consumer's end against a producer that says what the test wants, over real sockets.

Whatever the producer does, the client gets the model's own tokens, and nothing stays held.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from tests.engine.rig import Rig, ids, request, running, until
from tests.tiny import VOCAB, generate
from twostroke.api.lifecycle import Lifecycle
from twostroke.engine.engine import Admitted, Job, Update
from twostroke.kv.keys import prompt_key
from twostroke.kv.pool import Lease
from twostroke.links.shm import SharedMemoryLink
from twostroke.messages import (
    SECRET_HEADER,
    Alive,
    Attach,
    Confirm,
    Confirmed,
    Ended,
    Event,
    MemoryFile,
    Opened,
    Output,
    Published,
    Request,
    Sampled,
    Token,
    encode,
)
from twostroke.worker.consumer import Peer, Pull

PROMPT = list(range(10, 50))  # 2 blocks and a half
COUNT = 8
SILENCE = 0.25  # seconds: what silence costs a test; a loaded machine must not take as long for one reply
PATIENT = 20.0

Step = Event | bytes | Callable[[], Awaitable[None]]


class Cut(Exception):
    """Break the connection off here."""


async def cut() -> None:
    raise Cut


async def hang() -> None:
    await asyncio.sleep(3600)


class Producer:
    """A scripted producer. Its pool and the prompt's blocks in it are real."""

    def __init__(self, rig: Rig, lease: Lease, first: Output) -> None:
        self.rig = rig
        self.slots = list(lease.slots)
        self.first = first
        self.opened = Opened((rig.memory.address,))
        self.script: Sequence[Step] = []
        self.attached: list[Attach] = []
        self.confirms: list[Confirm] = []
        self.headers: list[str | None] = []
        self.refusal: web.Response | None = None
        self.on_confirm: Callable[[Confirm], Awaitable[web.StreamResponse]] = self.alive
        self.left = asyncio.Event()  # the consumer closed its stream, or took it whole

    def usual(self) -> list[Event]:
        """What a real producer says."""
        return [self.opened, self.published(0, 2), Sampled(self.first), self.published(2, 3), Ended()]

    def published(self, first: int, end: int) -> Published:
        return Published(first, self.slots[first:end])

    @property
    def released(self) -> bool:
        return any(confirm.release for confirm in self.confirms)

    async def alive(self, confirm: Confirm) -> web.StreamResponse:
        return web.Response(body=encode(Confirmed(True)))

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.get(SECRET_HEADER))
        self.attached.append(msgspec.json.decode(await request.read(), type=Attach))
        if self.refusal is not None:
            return self.refusal
        reply = web.StreamResponse()
        await reply.prepare(request)
        try:
            for step in self.script:
                if isinstance(step, bytes):
                    await reply.write(step)
                elif isinstance(step, Event):
                    await reply.write(encode(step) + b"\n")
                else:
                    await step()
        except Cut:
            assert request.transport is not None
            request.transport.abort()
        finally:
            self.left.set()
        return reply

    async def _confirm(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.get(SECRET_HEADER))
        confirm = msgspec.json.decode(await request.read(), type=Confirm)
        self.confirms.append(confirm)
        try:
            return await self.on_confirm(confirm)
        except Cut:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its URL."""
        app = web.Application()
        app.router.add_post("/internal/handover/attach", self._attach)
        app.router.add_post("/internal/handover/confirm", self._confirm)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class Stage:
    """A consumer's engine, and a producer to pull from."""

    def __init__(self, directory: Path, rig: Rig, producer: Producer, session: aiohttp.ClientSession, url: str) -> None:
        self.directory = directory
        self.rig = rig
        self.producer = producer
        self.url = url
        self.session = session
        self.link = SharedMemoryLink(rig.memory.slots)
        self.patience = 60.0  # seconds
        self.takes_first = True
        self.lifecycle = Lifecycle("consumer")
        self.updates: list[Update] = []

    async def begin(self, request: Request, silence: float) -> tuple[Job, "asyncio.Task[None]", AsyncIterator[Update]]:
        """Submit a request and start to pull its blocks."""
        job = self.rig.engine.submit(request, loads=True)
        updates = job.updates()
        admitted = await anext(updates)
        assert isinstance(admitted, Admitted)
        peer = Peer(self.session, self.url, secret="s3cret", silence=silence)
        pull = Pull(
            job,
            admitted,
            "h/0",
            0,
            engine=self.rig.engine,
            links=[self.link],
            peer=peer,
            patience=self.patience,
            takes_first=self.takes_first,
            lifecycle=self.lifecycle,
        )
        return job, asyncio.create_task(pull.run()), updates

    async def tokens(
        self, script: Sequence[Step], *, count: int = COUNT, silence: float = PATIENT, salt: str = ""
    ) -> list[int]:
        """What the client gets when the producer follows ``script``."""
        self.producer.script = script
        one = request(PROMPT, count, salt=salt)
        job, pulling, updates = await self.begin(one, silence)
        async with asyncio.timeout(15):
            outputs = [update async for update in updates if isinstance(update, Output)]
            await pulling
        self.rig.engine.abort(job)  # as a worker does, whatever the outcome
        self.events = [event.event for event in self.lifecycle.timeline(one.http_id)]
        return ids(outputs)

    async def check(self, script: Sequence[Step], *, complete: bool, silence: float = PATIENT) -> None:
        """The tokens are right, and the hand-over was or was not complete."""
        assert await self.tokens(script, silence=silence) == generate(self.directory, PROMPT, COUNT)
        assert ("kv_complete" in self.events, "fallback" in self.events) == (complete, not complete)
        await until(lambda: self.rig.counts.leased == 0)


@pytest.fixture
async def stage(tiny_model: Callable[[str], Path]) -> AsyncIterator[Stage]:
    directory = tiny_model("Qwen3ForCausalLM")
    async with running(directory) as p, running(directory) as d, aiohttp.ClientSession() as session:
        lease = p.engine.lease()
        (first,) = await p.outputs(p.engine.submit(request(PROMPT, 1), exports=lease))
        producer = Producer(p, lease, first)
        async with producer.serving() as url:
            stage = Stage(directory, d, producer, session, url)
            yield stage
            stage.link.close()
            p.engine.release(lease)


# -- what goes well --------------------------------------------------------------------------------------------------


async def test_a_hand_over(stage: Stage) -> None:
    producer = stage.producer
    await stage.check(producer.usual(), complete=True)
    fingerprint = stage.rig.model.layout.fingerprint
    assert producer.attached == [Attach("h/0", 0, fingerprint, 0, prompt_key(fingerprint, "", PROMPT))]
    assert [(confirm.blocks, confirm.release) for confirm in producer.confirms] == [(2, False), (3, True)]
    assert {confirm.instance for confirm in producer.confirms} == {producer.rig.memory.address.instance}
    assert set(producer.headers) == {"s3cret"}


async def test_what_was_pulled_is_not_computed(stage: Stage) -> None:
    """Only the blocks differ from a model that computes: so these tokens come from the producer's pool."""
    other = [3] * len(PROMPT)
    lease = stage.producer.rig.engine.lease()
    (first,) = await stage.producer.rig.outputs(stage.producer.rig.engine.submit(request(other, 1), exports=lease))
    stage.producer.slots, stage.producer.first = list(lease.slots), first
    tokens = await stage.tokens(stage.producer.usual())
    assert "kv_complete" in stage.events
    assert tokens == generate(stage.directory, other, COUNT)
    stage.producer.rig.engine.release(lease)


@pytest.mark.parametrize("order", ["token last", "block by block", "all at once", "with signs of life"])
async def test_other_orders_that_go_well(stage: Stage, order: str) -> None:
    p = stage.producer
    blocks: list[Event] = [p.published(at, at + 1) for at in range(3)]
    scripts: dict[str, list[Event]] = {
        "token last": [p.opened, p.published(0, 3), Sampled(p.first), Ended()],
        "block by block": [p.opened, blocks[0], blocks[1], Sampled(p.first), blocks[2], Ended()],
        "all at once": [p.opened, Sampled(p.first), p.published(0, 3), Ended()],
        "with signs of life": [Alive(), p.opened, Alive(), blocks[0], Alive(), *blocks[1:], Alive(), Sampled(p.first)],
    }
    await stage.check(scripts[order], complete=True)
    assert p.released


async def test_known_blocks_are_not_asked_for(stage: Stage) -> None:
    await stage.rig.tokens(request(PROMPT, 2))
    p = stage.producer
    await stage.check([p.opened, Sampled(p.first), p.published(2, 3), Ended()], complete=True)
    assert p.attached[0].have == 2
    assert [confirm.blocks for confirm in p.confirms] == [3]


async def test_the_first_token_does_not_wait_for_the_blocks(stage: Stage) -> None:
    p, seen = stage.producer, asyncio.Event()

    async def wait() -> None:
        await seen.wait()

    p.script = [p.opened, Sampled(p.first), wait, p.published(0, 3), Ended()]
    job, pulling, updates = await stage.begin(request(PROMPT, COUNT), PATIENT)
    outputs = []
    async for update in updates:
        if isinstance(update, Output):
            outputs.append(update)
            seen.set()
    await pulling
    assert ids(outputs) == generate(stage.directory, PROMPT, COUNT)
    stage.rig.engine.abort(job)


@pytest.mark.parametrize("order", ["token first", "blocks first"])
async def test_a_first_token_that_is_not_ours_is_not_taken(stage: Stage, order: str) -> None:
    """Every block is, and the engine computes the last prompt token again to sample after it."""
    stage.takes_first = False
    p = stage.producer
    p.first = Output([Token((p.first.tokens[0].id + 1) % VOCAB)])
    ends: list[Event] = (
        [p.published(2, 3), Sampled(p.first)] if order == "blocks first" else [Sampled(p.first), p.published(2, 3)]
    )
    await stage.check([p.opened, p.published(0, 2), *ends, Ended()], complete=True)
    assert [(confirm.blocks, confirm.release) for confirm in p.confirms] == [(2, False), (3, True)]


async def test_a_first_token_that_is_the_last(stage: Stage) -> None:
    p = stage.producer
    assert await stage.tokens([p.opened, Sampled(p.first), hang], count=1) == generate(stage.directory, PROMPT, 1)
    assert p.released
    assert stage.rig.counts.leased == 0


async def test_a_first_token_that_is_the_last_releases_the_producer_though_its_client_is_gone(stage: Stage) -> None:
    """The reply is complete, so the worker ends the pull: the producer must be told all the same."""
    p = stage.producer
    p.script = [p.opened, Sampled(p.first), hang]
    asked, go = asyncio.Event(), asyncio.Event()

    async def slowly(confirm: Confirm) -> web.StreamResponse:
        asked.set()
        p.confirms.pop()
        await go.wait()
        p.confirms.append(confirm)
        return await p.alive(confirm)

    p.on_confirm = slowly
    job, pulling, updates = await stage.begin(request(PROMPT, 1), PATIENT)
    async for _ in updates:
        pass
    pulling.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    stage.rig.engine.abort(job)
    await until(lambda: p.released)


# -- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_lease_that_had_ended_when_the_blocks_were_read(stage: Stage) -> None:
    """They were in the middle of being overwritten: nothing of them may count."""
    p = stage.producer
    p.rig.memory.slots[p.slots] = 63

    async def dead(confirm: Confirm) -> web.StreamResponse:
        return web.Response(body=encode(Confirmed(False)))

    p.on_confirm = dead
    await stage.check(p.usual(), complete=False)


async def test_a_lease_that_ended_between_two_reads(stage: Stage) -> None:
    p = stage.producer
    p.rig.memory.slots[p.slots[2]] = 63

    async def once(confirm: Confirm) -> web.StreamResponse:
        return web.Response(body=encode(Confirmed(len(p.confirms) == 1)))

    p.on_confirm = once
    await stage.check(p.usual(), complete=False)


@pytest.mark.parametrize("status", [401, 404, 409, 500, 503])
async def test_a_confirmation_that_is_refused(stage: Stage, status: int) -> None:
    async def refuse(confirm: Confirm) -> web.StreamResponse:
        return web.Response(status=status, body=b"no")

    stage.producer.on_confirm = refuse
    await stage.check(stage.producer.usual(), complete=False)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"yes", b"{}", b'{"alive": "true"}', b'{"alive": true, "more": 1}', b"\xff", b'{"\xff": 1}', b"[" * 60_000,
        b'{"alive": true}' + b" " * 2000,
    ],
)  # fmt: skip
async def test_a_confirmation_that_is_nonsense(stage: Stage, body: bytes) -> None:
    async def babble(confirm: Confirm) -> web.StreamResponse:
        return web.Response(body=body)

    stage.producer.on_confirm = babble
    await stage.check(stage.producer.usual(), complete=False)


async def test_a_confirmation_that_breaks_off(stage: Stage) -> None:
    async def break_off(confirm: Confirm) -> web.StreamResponse:
        raise Cut

    stage.producer.on_confirm = break_off
    await stage.check(stage.producer.usual(), complete=False)


async def test_a_confirmation_that_does_not_come(stage: Stage) -> None:
    async def silent(confirm: Confirm) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    stage.producer.on_confirm = silent
    await stage.check(stage.producer.usual(), complete=False, silence=SILENCE)


@pytest.mark.parametrize("after", range(4))
async def test_silence(stage: Stage, after: int) -> None:
    """Before the first event, and after each of the others."""
    await stage.check([*stage.producer.usual()[:after], hang], complete=False, silence=SILENCE)


@pytest.mark.parametrize("after", range(1, 4))
async def test_alive_without_progress(stage: Stage, after: int) -> None:
    """A producer that only ever says that it is there is given up too."""
    stage.patience = SILENCE
    signs: list[Step] = [Alive(), partial(asyncio.sleep, SILENCE / 4)] * 20
    await stage.check([*stage.producer.usual()[:after], *signs, hang], complete=False)


@pytest.mark.parametrize("after", range(4))
async def test_an_error_of_the_producer(stage: Stage, after: int) -> None:
    await stage.check([*stage.producer.usual()[:after], Ended("the prefill failed")], complete=False)


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("how", ["ended", "closed", "cut"])
async def test_too_early_an_end(stage: Stage, after: int, how: str) -> None:
    ends: dict[str, list[Step]] = {"ended": [Ended()], "closed": [], "cut": [cut]}
    await stage.check([*stage.producer.usual()[:after], *ends[how]], complete=False)


@pytest.mark.parametrize("how", ["ended", "closed", "cut", "error"])
async def test_every_block_came_but_no_first_token(stage: Stage, how: str) -> None:
    ends: dict[str, list[Step]] = {"ended": [Ended()], "closed": [], "cut": [cut], "error": [Ended("lost")]}
    p = stage.producer
    assert await stage.tokens([p.opened, p.published(0, 3), *ends[how]]) == generate(stage.directory, PROMPT, COUNT)
    assert "fallback" in stage.events


@pytest.mark.parametrize("seed", range(5))
async def test_events_that_are_lost_repeated_or_out_of_order(stage: Stage, seed: int) -> None:
    """Nobody who tells the truth about its blocks can make the answer wrong, whatever order it comes in."""
    chance, p = random.Random(seed), stage.producer
    for salt in map(str, range(12)):  # so that no block is known from before
        events: list[Event] = [
            p.opened,
            *(p.published(at, at + 1) for at in range(3)),
            Sampled(p.first),
            Alive(),
            Ended(),
        ]
        script = [event for event in events for _ in range(chance.choice([0, 1, 1, 1, 1, 2]))]
        for _ in range(chance.choice([0, 0, 1, 3])):
            at, to = chance.randrange(len(script)), chance.randrange(len(script))
            script.insert(to, script.pop(at))
        assert await stage.tokens(script, salt=salt) == generate(stage.directory, PROMPT, COUNT), script
        assert {"kv_complete", "fallback"} & set(stage.events)
        await until(lambda: stage.rig.counts.leased == 0)


@pytest.mark.parametrize("part", range(20))
async def test_a_connection_cut_at_any_byte(stage: Stage, part: int) -> None:
    events = stage.producer.usual()
    whole = b"".join(encode(event) + b"\n" for event in events)
    last = len(whole) - len(encode(events[-1])) - len(encode(events[-2])) - 3  # before the last block is complete
    await stage.check([whole[: last * part // 19], cut], complete=False)


GARBAGE = {
    "text": b"nonsense\n",
    "empty line": b"\n",
    "no object": b"[1, 2]\n",
    "no type": b"{}\n",
    "unknown type": b'{"type": "other"}\n',
    "unknown field": b'{"type": "alive", "more": 1}\n',
    "not UTF-8": b'{"type": "ended", "error": "\xff"}\n',
    "negative slot": b'{"type": "published", "first": 0, "slots": [-1]}\n',
    "huge number": b'{"type": "published", "first": 99999999999999999999, "slots": []}\n',
    "deep": b"[" * 100_000 + b"\n",
    "zeros": bytes(1000) + b"\n",
    "endless line": b"x" * (33 << 20),
}


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage(stage: Stage, kind: str, after: int) -> None:
    if kind == "endless line" and after:
        return
    await stage.check([*stage.producer.usual()[:after], GARBAGE[kind], hang], complete=False)


def broken(p: Producer) -> dict[str, list[Event]]:
    """Well-formed events that break the protocol."""
    (pool,), first = p.opened.pools, p.first
    a, b, c, sampled = p.published(0, 1), p.published(1, 2), p.published(2, 3), Sampled(p.first)
    replace = msgspec.structs.replace

    def opened(**fields: object) -> Opened:
        return Opened((replace(pool, **fields),))

    def token(*tokens: Token) -> Sampled:
        return Sampled(replace(first, tokens=list(tokens)))

    return {
        "blocks before a pool": [a, p.opened],
        "a token before a pool": [sampled, p.opened],
        "opened twice": [p.opened, a, p.opened],
        "a gap": [p.opened, a, c],
        "the wrong beginning": [p.opened, b],
        "the same again": [p.opened, a, a],
        "backwards": [p.opened, p.published(0, 2), b],
        "too many blocks": [p.opened, Published(0, [*p.slots, p.slots[0]])],
        "too many in the end": [p.opened, p.published(0, 2), Published(2, [p.slots[2], p.slots[0]])],
        "a slot outside": [p.opened, a, Published(1, [pool.num_slots])],
        "slots outside an overstated pool": [opened(num_slots=10**6), Published(0, [10**5])],
        "blocks of another size": [opened(block_bytes=pool.block_bytes // 2), a],
        "another instance": [opened(instance="stranger"), a],
        "another machine": [opened(host="elsewhere"), a],
        "no such process": [opened(pid=2**31 - 1), a],
        "no such file": [opened(memory=MemoryFile(10**6)), a],
        "two first tokens": [p.opened, sampled, sampled],
        "no token": [p.opened, token()],
        "two tokens at once": [p.opened, token(Token(1), Token(2))],
        "a token outside the vocabulary": [p.opened, token(Token(VOCAB))],
        "a negative token": [p.opened, token(Token(-1))],
    }


@pytest.mark.parametrize(
    "kind",
    [
        "blocks before a pool", "a token before a pool", "opened twice", "a gap", "the wrong beginning",
        "the same again", "backwards", "too many blocks", "too many in the end", "a slot outside",
        "slots outside an overstated pool", "blocks of another size", "another instance", "another machine",
        "no such process", "no such file", "two first tokens", "no token", "two tokens at once",
        "a token outside the vocabulary", "a negative token",
    ],
)  # fmt: skip
async def test_a_broken_protocol(stage: Stage, kind: str) -> None:
    await stage.check([*broken(stage.producer)[kind], hang], complete=False)


REFUSALS = {
    "conflict": (409, b'{"error": {"message": "layouts differ", "type": "conflict_error"}}'),
    "no secret": (401, b'{"error": {"message": "internal endpoints need the cluster secret"}}'),
    "starting": (503, b"{}"),
    "no text": (500, b""),
    "no JSON": (502, b"<html>bad gateway</html>"),
    "no error object": (500, b"[]"),
    "deep": (500, b"[" * 60_000),
    "large": (500, b"x" * (1 << 20)),
}


@pytest.mark.parametrize("kind", REFUSALS)
async def test_a_refused_attach(stage: Stage, kind: str) -> None:
    status, body = REFUSALS[kind]
    stage.producer.refusal = web.Response(status=status, body=body)
    await stage.check([], complete=False)
    assert not stage.producer.confirms, "nothing was leased, so there is nothing to release"


async def test_the_reason_of_a_refusal_is_stamped(stage: Stage) -> None:
    stage.producer.refusal = web.Response(status=409, body=REFUSALS["conflict"][1])
    one = request(PROMPT, 1)
    job, pulling, updates = await stage.begin(one, PATIENT)
    assert len([update async for update in updates]) > 1
    await pulling
    (fallback,) = (event for event in stage.lifecycle.timeline(one.http_id) if event.event == "fallback")
    assert "layouts differ" in str(fallback.detail["reason"])
    assert fallback.detail["verified_blocks"] == 0
    stage.rig.engine.abort(job)


async def test_no_producer_there(stage: Stage) -> None:
    stage.url = "http://127.0.0.1:1"
    await stage.check([], complete=False)


async def test_a_producer_that_is_lost_in_the_middle_is_released_all_the_same(stage: Stage) -> None:
    """Its stream broke, but perhaps only that: its slots need not wait for the lease to expire."""
    await stage.check([*stage.producer.usual()[:2], cut], complete=False)
    assert stage.producer.released


# -- the client leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(4))
async def test_the_client_leaves(stage: Stage, after: int) -> None:
    """At once on both sides: the job ends, the producer is told, the stream is closed."""
    p, reached = stage.producer, asyncio.Event()

    async def wait() -> None:
        reached.set()
        await hang()

    p.script = [*p.usual()[:after], wait]
    job, pulling, updates = await stage.begin(request(PROMPT, COUNT), PATIENT)
    await reached.wait()
    await until(lambda: len(p.confirms) == (1 if after > 1 else 0))
    if after > 2:
        assert isinstance(await anext(updates), Output)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    stage.rig.engine.abort(job)
    assert stage.rig.counts.leased == 0
    assert job.sequence.finish == "abort"
    async with asyncio.timeout(5):
        await p.left.wait()
    assert p.released or after == 0 or not p.confirms


async def test_the_client_leaves_while_blocks_are_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots are held until nothing writes into them any more."""
    p = stage.producer
    begun, go = asyncio.Event(), asyncio.Event()
    read = stage.link.read

    async def slow(*arguments: object) -> None:
        begun.set()
        while not go.is_set():  # as the link does it: cancellation waits
            try:
                await go.wait()
            except asyncio.CancelledError:
                cancelled.append(stage.rig.counts.leased)
        await read(*arguments)  # type: ignore[arg-type]
        raise asyncio.CancelledError

    cancelled: list[int] = []
    monkeypatch.setattr(stage.link, "read", slow)
    p.script = [*p.usual()[:2], hang]
    job, pulling, updates = await stage.begin(request(PROMPT, COUNT), PATIENT)
    await begun.wait()
    pulling.cancel()
    await until(lambda: bool(cancelled))
    assert stage.rig.counts.leased == 3
    assert not pulling.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert stage.rig.counts.leased == 0
    async with aclosing(updates):  # type: ignore[type-var]
        stage.rig.engine.abort(job)


async def test_many_at_once(stage: Stage) -> None:
    """One link, one session, one engine: each pull by itself."""
    p = stage.producer
    p.script = p.usual()

    async def one() -> list[int]:
        job, pulling, updates = await stage.begin(request(PROMPT, COUNT, salt=str(len(p.attached))), PATIENT)
        outputs = [update async for update in updates if isinstance(update, Output)]
        await pulling
        stage.rig.engine.abort(job)
        return ids(outputs)

    assert await asyncio.gather(*(one() for _ in range(8))) == [generate(stage.directory, PROMPT, COUNT)] * 8
