"""The producer's end over a real engine: whoever comes first, however it ends, nothing stays held."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tests.engine.rig import Rig, request, running, until
from tests.tiny import generate
from twostroke.engine.engine import Job, Progress, Update
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk
from twostroke.errors import Conflict, EngineFailed, HandoverFailed
from twostroke.kv.board import CELLS, Board, alive
from twostroke.kv.keys import prompt_key
from twostroke.kv.pool import Lease
from twostroke.messages import (
    PROTOCOL,
    Abandon,
    Alive,
    Attach,
    Confirm,
    Ended,
    Event,
    Opened,
    Output,
    Published,
    Sampled,
    Token,
)
from twostroke.worker.producer import Producer

PROMPT = list(range(10, 50))  # 2 blocks and a half
DEPTHS = pytest.mark.parametrize("depth", [1, 2])
LONG = 60.0  # seconds: a test that waits so long fails


class Stage:
    """A producer and its engine."""

    def __init__(
        self,
        rig: Rig,
        *,
        lease_seconds: float,
        attach_timeout: float,
        heartbeat: float,
        progress: float,
        board: Board | None = None,
    ) -> None:
        self.rig = rig
        self.instance = rig.memory.address.instance
        self.producer = Producer(
            rig.engine, (rig.memory.address,), lease_seconds=lease_seconds, attach_timeout=attach_timeout,
            queue_timeout=60.0,
            heartbeat=heartbeat, progress_timeout=progress, board=board,
        )  # fmt: skip

    def produce(self, prompt: list[int] = PROMPT, attempt: int = 0) -> AsyncGenerator[tuple[Job, Update], None]:
        return self.producer.produce(request(prompt, 1), "h/0", attempt)

    async def produced(self, attempt: int = 0) -> list[Update]:
        """Run a whole prefill."""
        async with aclosing(self.produce(attempt=attempt)) as updates:
            return [update async for _, update in updates]

    def attach(
        self, *, have: int = 0, attempt: int = 0, prompt: list[int] = PROMPT, **fields: object
    ) -> AsyncGenerator[Event, None]:
        fingerprint = self.rig.model.layout.fingerprint
        message = Attach("h/0", attempt, fingerprint, have, prompt_key(fingerprint, "", prompt))
        return self.producer.attach(msgspec.structs.replace(message, **fields), "127.0.0.1")

    async def attached(self, *, have: int = 0, attempt: int = 0) -> list[Event]:
        """Take a whole stream of events."""
        async with aclosing(self.attach(have=have, attempt=attempt)) as events:
            return [event async for event in events if not isinstance(event, Alive)]

    def confirm(
        self, blocks: int = 0, *, release: bool = False, attempt: int = 0, instance: str = "", handover: str = "h/0"
    ) -> bool:
        message = Confirm(handover, attempt, instance or self.instance, blocks, release)
        return self.producer.confirm(message).alive

    @property
    def leased(self) -> int:
        return self.rig.counts.leased


@pytest.fixture
def llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("LlamaForCausalLM")


@asynccontextmanager
async def staged(
    directory: Path,
    *,
    lease_seconds: float = LONG,
    attach_timeout: float = LONG,
    heartbeat: float = LONG,
    progress: float = LONG,
    depth: int = 1,
    board: Board | None = None,
) -> AsyncIterator[Stage]:
    """``running`` checks the account at the end; no hand-over may be open then either."""
    async with running(directory, budget=16, depth=depth) as rig:
        stage = Stage(
            rig,
            lease_seconds=lease_seconds,
            attach_timeout=attach_timeout,
            heartbeat=heartbeat,
            progress=progress,
            board=board,
        )
        yield stage
        assert stage.producer.open == 0


def blocks(events: list[Event]) -> list[int]:
    """The slots that were published, which must follow upon each other."""
    slots: list[int] = []
    start = next((event.first for event in events if isinstance(event, Published)), 0)
    for event in events:
        if isinstance(event, Published):
            assert event.first == start + len(slots)
            slots += event.slots
    return slots


def first_token(directory: Path) -> int:
    return generate(directory, PROMPT, 1)[0]


def check_stream(stage: Stage, events: list[Event], first: int) -> None:
    """A stream that went well."""
    assert events[0] == Opened((stage.rig.memory.address,))
    assert events[-1] == Ended()
    assert len(set(blocks(events))) == 3
    (sampled,) = (event for event in events if isinstance(event, Sampled))
    assert sampled.output.tokens[0].id == first


def slowed(rig: Rig) -> asyncio.Event:
    """No step after the first is done before this event."""
    go, loop, launch, steps = asyncio.Event(), asyncio.get_running_loop(), rig.model.launch, iter(range(10**6))

    class Slowed(NamedTuple):
        step: Launched

        def tokens(self) -> list[Token]:
            if next(steps):
                asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
            return self.step.tokens()

    rig.model.launch = lambda chunks: Slowed(launch(chunks))  # type: ignore[method-assign]
    return go


# -- all orders of arrival -------------------------------------------------------------------------------------------


@DEPTHS
async def test_the_consumer_comes_first(llama: Path, depth: int) -> None:
    async with staged(llama, depth=depth) as stage:
        consumer = asyncio.create_task(stage.attached())
        await until(lambda: stage.producer.open == 1)
        updates = await stage.produced()
        events = await consumer
        check_stream(stage, events, first_token(llama))
        assert isinstance(updates[-1], Output)
        assert updates[-1].finish == "length"
        assert stage.leased == 3
        assert stage.confirm(3)
        assert stage.confirm(3, release=True)
        assert stage.leased == 0


@DEPTHS
async def test_the_request_comes_first(llama: Path, depth: int) -> None:
    async with staged(llama, depth=depth) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        await until(lambda: stage.leased == 3)
        consumer = asyncio.create_task(stage.attached())
        await asyncio.sleep(0.02)
        go.set()
        check_stream(stage, await consumer, first_token(llama))
        await computing
        assert stage.confirm(3, release=True)


async def test_serial_the_consumer_comes_when_prefill_is_done(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        assert stage.leased == 3
        events = await stage.attached()
        check_stream(stage, events, first_token(llama))
        assert [type(event) for event in events] == [Opened, Sampled, Published, Ended]
        assert stage.confirm(3, release=True)


@DEPTHS
async def test_blocks_are_published_while_prefill_runs(llama: Path, depth: int) -> None:
    """And what is published holds the prompt's KV."""
    async with staged(llama, depth=depth) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        async with aclosing(stage.attach()) as events:
            assert isinstance(await anext(events), Opened)
            published = await asyncio.wait_for(anext(events), 5)
            assert isinstance(published, Published)
            assert (published.first, len(published.slots)) == (0, 1)
            assert stage.confirm(1)
            assert not stage.confirm(2), "the second block is not there yet"
            go.set()
            rest = [event async for event in events]
        assert len(blocks(rest)) == 2
        await computing
        assert stage.confirm(3, release=True)


async def test_the_first_token_is_not_kept_back_by_the_last_blocks(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        kinds = [type(event) for event in await stage.attached()]
        assert kinds.index(Sampled) < len(kinds) - 1 - kinds[::-1].index(Published)
        assert stage.confirm(3, release=True)


@pytest.mark.parametrize("have", [1, 2, 3])
async def test_known_blocks_are_not_published(llama: Path, have: int) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        events = await stage.attached(have=have)
        assert len(blocks(events)) == 3 - have
        assert all(event.first >= have for event in events if isinstance(event, Published))
        assert events[-1] == Ended()
        assert stage.confirm(3, release=True)


async def test_cached_tokens_are_told(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.rig.tokens(request(PROMPT, 2))
        await stage.produced()
        (sampled,) = (event for event in await stage.attached() if isinstance(event, Sampled))
        assert sampled.output.cached_tokens == 32
        assert stage.confirm(3, release=True)


async def test_a_silent_prefill_shows_that_it_lives(llama: Path) -> None:
    async with staged(llama, heartbeat=0.01) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        async with aclosing(stage.attach()) as events:
            kinds = [type(await anext(events)) for _ in range(5)]
            assert kinds == [Opened, Published, Alive, Alive, Alive] or kinds.count(Alive) >= 2
            go.set()
            async for _ in events:
                pass
        await computing
        assert stage.confirm(3, release=True)


async def test_an_engine_that_is_stuck_does_not_count_as_alive(llama: Path) -> None:
    async with staged(llama, heartbeat=0.01, progress=0.1) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        async with aclosing(stage.attach()) as events:
            signs = 0
            with suppress(TimeoutError):
                while signs < 100:
                    async with asyncio.timeout(2.0):
                        signs += isinstance(await anext(events), Alive)
            assert signs < 100, "it goes on"
        go.set()
        with suppress(HandoverFailed):
            await computing


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"fingerprint": "0" * 32}, {"protocol": PROTOCOL + 1}])
async def test_another_layout_or_protocol_is_refused(llama: Path, fields: dict[str, Any]) -> None:
    async with staged(llama) as stage:
        with pytest.raises(Conflict, match="layouts differ"):
            await anext(stage.attach(**fields))


async def test_a_consumer_with_another_prompt_is_refused_and_the_right_one_still_served(llama: Path) -> None:
    """Clients pass vLLM's words on, and may send the two ends what they like: no block may get another one's name."""
    async with staged(llama) as stage:
        await stage.produced()
        for other in (PROMPT[:-1], [*PROMPT[:-1], 0], [*PROMPT, 0]):
            with pytest.raises(Conflict, match="different prompts"):
                await anext(stage.attach(prompt=other))
        check_stream(stage, await stage.attached(), first_token(llama))
        assert stage.confirm(3, release=True)


async def test_a_request_for_another_prompt_than_its_consumer_waits_for(llama: Path) -> None:
    async with staged(llama) as stage:
        waiting = asyncio.create_task(_drain(stage, "h/0"))
        await until(lambda: stage.producer.open == 1)
        with pytest.raises(Conflict, match="different prompts"):
            async for _ in stage.produce(PROMPT[::-1]):
                pass
        assert (await waiting)[-1] == Ended("the producer and the consumer were sent different prompts")
        assert stage.leased == 0


async def test_a_second_consumer_is_refused_and_the_first_not_disturbed(llama: Path) -> None:
    async with staged(llama) as stage:
        first = asyncio.create_task(stage.attached())
        await until(lambda: stage.producer.open == 1)
        with pytest.raises(Conflict, match="has a consumer already"):
            await anext(stage.attach())
        await stage.produced()
        check_stream(stage, await first, first_token(llama))
        with pytest.raises(Conflict, match="has a consumer already"):
            await anext(stage.attach())
        assert stage.confirm(3, release=True)


async def test_a_second_request_is_refused(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        with pytest.raises(Conflict, match="under way"):
            await stage.produced()
        stage.producer.close()


async def test_another_attempt_is_refused_on_either_side(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced(attempt=1)
        with pytest.raises(Conflict, match="is attempt 1"):
            await anext(stage.attach(attempt=0))
        assert not stage.confirm(0, attempt=0)
        stage.producer.close()
    async with staged(llama) as stage:
        consumer = asyncio.create_task(stage.attached(attempt=1))
        await until(lambda: stage.producer.open == 1)
        with pytest.raises(Conflict, match="as attempt 1"):
            await stage.produced(attempt=0)
        stage.producer.close()
        await consumer


@pytest.mark.parametrize("end", ["release", "leave", "attempt", "close"])
async def test_the_board_says_that_a_lease_has_ended_before_its_slots_are_free(llama: Path, end: str) -> None:
    board = Board("owner")
    async with staged(llama, board=board) as stage:
        await stage.produced()
        events = stage.attach()
        opened = await anext(events)
        assert isinstance(opened, Opened)
        posted = opened.posted
        assert posted is not None
        assert alive(board.cells, posted)
        order: list[bool] = []
        release = stage.rig.engine.release

        def released(lease: Lease) -> None:
            order.append(alive(board.cells, posted))
            release(lease)

        stage.rig.engine.release = released  # type: ignore[method-assign]
        match end:
            case "release":
                assert stage.confirm(3, release=True)
            case "leave":  # as a consumer does that has everything
                assert [type(await anext(events)) for _ in range(2)] == [Sampled, Published]
                assert not order
                await events.aclose()
            case "attempt":
                await stage.produced(attempt=1)
            case _:
                stage.producer.close()
        assert order[:1] == [False]
        assert not alive(board.cells, posted)
        await events.aclose()
        stage.producer.close()
        assert len(board._free) == CELLS
    board.close()


async def test_a_dead_lease_is_not_confirmed(llama: Path) -> None:
    async with staged(llama) as stage:
        assert not stage.confirm(), "nobody knows it"
        await stage.produced()
        await stage.attached()
        assert not stage.confirm(3, instance="before the restart")
        assert not stage.confirm(3, attempt=1)
        assert not stage.confirm(3, handover="h/1")
        assert not stage.confirm(4), "more blocks than there are"
        assert stage.confirm(3, release=True)
        assert not stage.confirm(3)
        assert not stage.confirm(3, release=True)


async def test_what_the_router_gives_up_is_let_go_at_once(llama: Path) -> None:
    """Though it is computed, and no consumer ever came; but only that attempt."""
    async with staged(llama) as stage:
        await stage.produced()
        for message in (Abandon("h", 1), Abandon("other", 0), Abandon("h/0", 0)):
            stage.producer.abandon(message)
        assert stage.leased
        stage.producer.abandon(Abandon("h", 0))
        assert not stage.leased
        with pytest.raises(Conflict, match="gave it up"):
            await anext(stage.attach())


async def test_what_the_router_gives_up_before_it_begins_does_not_begin(llama: Path) -> None:
    """Its word comes on another connection than its request, and may overtake that."""
    async with staged(llama) as stage:
        for message in (Abandon("h", 0), Abandon("other", 1)):
            stage.producer.abandon(message)
        with pytest.raises(Conflict, match="gave it up"):
            await stage.produced()
        with pytest.raises(Conflict, match="gave it up"):
            await anext(stage.attach())
        assert (stage.producer.open, stage.leased) == (0, 0)
        await stage.produced(attempt=1)
        assert stage.leased
        stage.producer.abandon(Abandon("h", 1))


async def test_who_comes_late_is_told(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        await stage.attached()
        assert stage.confirm(3, release=True)
        with pytest.raises(Conflict, match="is over"):
            await anext(stage.attach())


async def test_a_new_attempt_may_use_the_same_producer(llama: Path) -> None:
    """The router tries again when a decode worker was lost: same hand-over, next attempt, perhaps the same producer."""
    async with staged(llama) as stage:
        await stage.produced()
        await stage.attached()
        assert stage.confirm(3, release=True)
        await stage.produced(attempt=1)
        check_stream(stage, await stage.attached(attempt=1), first_token(llama))
        assert stage.confirm(3, release=True, attempt=1)
        with pytest.raises(Conflict, match="is over"):
            await anext(stage.attach(attempt=1))


async def test_a_newer_attempt_takes_the_place_of_an_older_one(llama: Path) -> None:
    async with staged(llama) as stage:
        go = slowed(stage.rig)
        old = asyncio.create_task(stage.produced())
        consumer = asyncio.create_task(stage.attached())
        await until(lambda: stage.leased == 3)
        new = asyncio.create_task(stage.attached(attempt=1))
        assert (await consumer)[-1] == Ended("attempt 1 took its place")
        go.set()
        with pytest.raises(HandoverFailed):
            await old
        assert not stage.confirm()
        await stage.produced(attempt=1)
        check_stream(stage, await new, first_token(llama))
        assert stage.confirm(3, release=True, attempt=1)


# -- early ends ------------------------------------------------------------------------------------------------------


async def test_nobody_comes_for_the_blocks(llama: Path) -> None:
    async with staged(llama, lease_seconds=0.05) as stage:
        await stage.produced()
        await until(lambda: stage.producer.open == 0)
        assert stage.leased == 0
        with pytest.raises(Conflict, match="expired"):
            await anext(stage.attach())


async def test_the_request_does_not_come(llama: Path) -> None:
    async with staged(llama, attach_timeout=0.05) as stage:
        events = await asyncio.wait_for(stage.attached(), 5)
        assert events == [Opened((stage.rig.memory.address,)), Ended("the producer gave up waiting for the request")]


async def test_a_consumer_that_takes_too_long_to_read_loses_its_lease(llama: Path) -> None:
    async with staged(llama, lease_seconds=0.05) as stage:
        computing = asyncio.create_task(stage.produced())
        await stage.attached()
        await computing
        await until(lambda: stage.producer.open == 0)
        assert not stage.confirm(3)


async def test_a_confirmation_renews_the_lease(llama: Path) -> None:
    async with staged(llama, lease_seconds=0.3) as stage:
        await stage.produced()
        await stage.attached()
        for _ in range(5):
            await asyncio.sleep(0.1)
            assert stage.confirm(3)
        assert stage.confirm(3, release=True)


async def test_the_consumer_leaves_during_prefill(llama: Path) -> None:
    async with staged(llama) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        async with aclosing(stage.attach()) as events:
            await anext(events)
            await until(lambda: stage.leased == 3)
        go.set()
        with pytest.raises(HandoverFailed, match="consumer left"):
            await asyncio.wait_for(computing, 5)
        await until(lambda: stage.leased == 0)
        assert not stage.confirm()


async def test_the_consumer_needs_nothing_more_during_prefill(llama: Path) -> None:
    async with staged(llama) as stage:
        go = slowed(stage.rig)
        computing = asyncio.create_task(stage.produced())
        async with aclosing(stage.attach()) as events:
            await anext(events)
            await until(lambda: stage.leased == 3)
            assert stage.confirm(0, release=True)
            go.set()
            rest = [event async for event in events]
        assert isinstance(rest[-1], Ended)
        assert rest[-1].error
        with pytest.raises(HandoverFailed):
            await computing
        await until(lambda: stage.leased == 0)


async def test_the_consumer_leaves_before_the_request_comes(llama: Path) -> None:
    async with staged(llama) as stage:
        async with aclosing(stage.attach()) as events:
            await anext(events)
        assert stage.producer.open == 0


async def test_the_consumer_leaves_before_its_stream_ended(llama: Path) -> None:
    async with staged(llama) as stage:
        await stage.produced()
        async with aclosing(stage.attach()) as events:
            await anext(events)
        assert stage.leased == 0


@DEPTHS
async def test_the_router_leaves_during_prefill(llama: Path, depth: int) -> None:
    async with staged(llama, depth=depth) as stage:
        go = slowed(stage.rig)
        async with aclosing(stage.produce()) as updates:
            async for _, update in updates:
                if update == Progress(16):
                    break
            consumer = asyncio.create_task(stage.attached())
            await asyncio.sleep(0.01)
        go.set()
        assert (await consumer)[-1] == Ended("the prefill was aborted")
        await until(lambda: stage.leased == 0)


async def test_a_failed_prefill_is_told_to_both(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with staged(llama) as stage:

        def fail(chunks: Seq[Chunk]) -> Launched:
            raise RuntimeError("broken")

        monkeypatch.setattr(stage.rig.model, "launch", fail)
        consumer = asyncio.create_task(stage.attached())
        await until(lambda: stage.producer.open == 1)
        with pytest.raises(EngineFailed) as failure:
            await stage.produced()
        assert (await consumer)[-1] == Ended(failure.value.message)


async def test_a_refused_request_is_told_to_a_consumer_that_waits(llama: Path) -> None:
    async with staged(llama) as stage:
        consumer = asyncio.create_task(stage.attached())
        await until(lambda: stage.producer.open == 1)
        stage.producer.refuse("h/0", 0, "too much to do")
        assert (await consumer)[-1] == Ended("too much to do")


async def test_a_refused_request_is_told_to_a_consumer_that_comes(llama: Path) -> None:
    async with staged(llama) as stage:
        stage.producer.refuse("h/0", 0, "too much to do")
        with pytest.raises(Conflict, match="too much to do"):
            await anext(stage.attach())


async def test_close_ends_every_hand_over(llama: Path) -> None:
    async with staged(llama) as stage:
        engine = stage.rig.engine
        await stage.produced()  # held
        go = slowed(stage.rig)
        expected = asyncio.create_task(_drain(stage, "expected/0"))
        computing = asyncio.create_task(_compute(stage, "computing/0"))
        await until(lambda: stage.producer.open == 3 and engine.load().running == 1)
        stage.producer.close()
        go.set()
        assert (await expected)[-1] == Ended("the producer shuts down")
        with pytest.raises(HandoverFailed):
            await computing
        await until(lambda: stage.leased == 0)


async def _drain(stage: Stage, handover: str) -> list[Event]:
    return [event async for event in stage.attach(handover=handover)]


async def _compute(stage: Stage, handover: str) -> None:
    async for _ in stage.producer.produce(request(PROMPT[::-1], 1), handover, 0):
        pass


async def test_many_hand_overs_at_once(llama: Path) -> None:
    async with staged(llama) as stage:
        fingerprint = stage.rig.model.layout.fingerprint

        async def one(number: int) -> None:
            handover, prompt = f"many/{number}", [number + 1, *PROMPT]
            attach = Attach(handover, 0, fingerprint, 0, prompt_key(fingerprint, "", prompt))

            async def compute() -> None:
                async for _ in stage.producer.produce(request(prompt, 1), handover, 0):
                    pass

            async def consume() -> None:
                events = [event async for event in stage.producer.attach(attach, "127.0.0.1")]
                count = len(blocks(events))
                assert events[-1] == Ended()
                assert stage.confirm(count, release=True, handover=handover)

            await asyncio.gather(compute(), consume())

        await asyncio.gather(*(one(number) for number in range(20)))
        assert stage.leased == 0
