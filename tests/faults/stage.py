"""What a row of the matrix works with, and what it comes to."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import aiohttp
import pytest

from tests.e2e.system import client, post
from tests.faults.fleet import SECRET, Fleet, Fleets, Json, Model, events
from twostroke.messages import SECRET_HEADER

PROMPT, TOKENS = 600, 12  # a prompt of ten chunks
STREAM_PROMPT, STREAM_TOKENS = 100, 150
_PROMPTS = 4  # different ones
_COMPLETE = 'twostroke_handovers_total{outcome="complete"}'


@dataclass
class Outcome:
    """How one run of a row went, other than well."""

    exact: int = 0  # answers that are the fault-free ones
    errors: int = 0  # explicit errors
    added: list[float] = field(default_factory=list)  # seconds that an answer took longer than without a fault
    freed: list[float] = field(default_factory=list)  # seconds until nothing was held


class Stage:
    """One run of a row: a running fleet, and a client."""

    def __init__(self, fleet: Fleet, model: Model, session: aiohttp.ClientSession, repeat: int) -> None:
        self.fleet = fleet
        self.session = session
        self.random = random.Random(repeat)
        self.outcome = Outcome()
        self._model = model

    def body(self, prompt: int = PROMPT, tokens: int = TOKENS, **more: object) -> Json:
        """A greedy completion of a prompt of so many tokens, none of whose blocks any worker has."""
        ids = self._model.prompt(prompt * _PROMPTS + self.random.randrange(_PROMPTS), prompt)
        body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_salt": uuid4().hex}
        return {**body, **more}

    def expected(self, body: Json) -> str:
        """The fault-free answer."""
        return self._model.text(body["prompt"], body["max_tokens"])

    def probe(self) -> Json:
        """A request that fits everywhere."""
        return self.body(200)

    async def exactly(self, body: Json | None = None, *, timed: bool = True) -> str:
        """Ask, and get the fault-free answer; the request's id."""
        body = body or self.body()
        expected = self.expected(body)
        start, id_ = time.monotonic(), uuid4().hex
        status, reply = await post(self.session, f"{self.fleet.url}/v1/completions", body, x_request_id=id_)
        took = time.monotonic() - start
        assert status == 200, reply
        assert reply["choices"][0]["text"] == expected
        self.outcome.exact += 1
        if timed:
            self.outcome.added.append(max(0.0, took - self.fleet.usual))
        return id_

    async def exactly_or_refused(self, body: Json) -> None:
        """Ask, and get the fault-free answer or an explicit error."""
        status, reply = await post(self.session, f"{self.fleet.url}/v1/completions", body, x_request_id=uuid4().hex)
        if status == 200:
            assert reply["choices"][0]["text"] == self.expected(body)
            self.outcome.exact += 1
        else:
            assert status in (429, 502, 503, 504), (status, reply)
            assert reply["error"]["message"], reply
            self.outcome.errors += 1

    async def streamed(self, at_third: Callable[[], Awaitable[None]], body: Json | None = None) -> str:
        """Stream the fault-free answer; something happens as three events have come. The request's id."""
        body = body or self.body(STREAM_PROMPT, STREAM_TOKENS)
        expected, text, seen, last, gap = self.expected(body), "", 0, time.monotonic(), 0.0
        id_ = uuid4().hex
        async for event in events(self.session, self.fleet.url, body, id_):
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            gap, last = max(gap, time.monotonic() - last), time.monotonic()
            seen += 1
            if seen == 3:
                await at_third()
        assert text == expected
        self.outcome.exact += 1
        self.outcome.added.append(gap)
        return id_

    async def timeline(self, id_: str) -> list[Json]:
        """What router and workers remember of a request."""
        async with self.session.get(f"{self.fleet.url}/debug/requests/{id_}") as reply:
            events: list[Json] = (await reply.json())["events"]
        return events

    async def reasons(self, id_: str, event: str) -> list[str]:
        """Why this happened to a request."""
        return [e["detail"].get("reason", "") for e in await self.timeline(id_) if e["event"] == event]

    async def decoding(self) -> str:
        """The decode worker that has something to do."""
        for name in self.fleet.workers:
            if name.startswith("decode") and (await self.fleet.system.info(self.session, name))["running"]:
                return name
        raise AssertionError("nobody decodes")

    async def freed(self, workers: Sequence[str] = ()) -> None:
        """Note how long it takes until nothing is held."""
        self.outcome.freed.append(await self.fleet.freed(self.session, workers))


Play = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """One row of the matrix."""

    fault: str
    promise: str
    kind: str  # of fleet
    play: Play
    pending: bool = False  # what it promises is not there yet

    async def run(self, fleets: Fleets, repeat: int) -> Outcome:
        """Play it once. Afterwards nothing is left, and the next request is served.

        Raises:
            AssertionError: a promise was broken. The fleet is given up.
        """
        try:
            async with _client(self.kind) as session, asyncio.timeout(120):
                fleet = fleets.get(self.kind)
                await warm(self.kind, fleet, fleets.model, session)
                stage = Stage(fleet, fleets.model, session, repeat)
                await self.play(stage)
                fleet.heal()
                await stage.exactly(stage.probe(), timed=False)
                await read_once(stage)
                await fleet.clean(session)
                return stage.outcome
        except BaseException:
            fleets.drop(self.kind)
            raise


@asynccontextmanager
async def _client(kind: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with client({SECRET_HEADER: SECRET} if kind == "tcp" else None) as session:
        yield session


async def warm(kind: str, fleet: Fleet, model: Model, session: aiohttp.ClientSession) -> None:
    """Once a fleet: how long an answer takes without faults, and what processes hold that have nothing to do."""
    if fleet.usual:
        return
    stage = Stage(fleet, model, session, -1)
    for _ in range(4):
        await stage.exactly(stage.probe() if "small" in kind else stage.body())  # so far, an answer takes no time
    fleet.usual = statistics.median(stage.outcome.added)
    await read_once(stage)
    await fleet.clean(session)


async def read_once(stage: Stage) -> None:
    """Until every decode worker, also one that was started in another's place, has read blocks: what it opens for that,
    it keeps.
    """
    decode = [name for name in stage.fleet.workers if name.startswith("decode")]
    while not all([await stage.fleet.metric(stage.session, name, _COMPLETE) for name in decode]):
        await stage.exactly(stage.probe(), timed=False)


ROWS: list[Row] = []


def row(fault: str, promise: str, kind: str, *, pending: bool = False) -> Callable[[Play], Play]:
    """A row of the matrix, played by the function."""

    def register(play: Play) -> Play:
        ROWS.append(Row(fault, promise, kind, play, pending))
        return play

    return register


def happened(condition: object, what: str) -> None:
    """The fault itself did take place, or the row proves nothing."""
    if not condition:
        pytest.fail(f"the fault did not happen: {what}")
