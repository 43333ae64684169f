"""The store over scripted tiers: where blocks are found, how they sink, and what is done about tiers that fail."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.engine.rig import until
from tests.store.blocks import BYTES, Given, Taken, keys
from twostroke.store import stage as stages
from twostroke.store.store import Store
from twostroke.store.tier import MemoryTier, Source, Target


class Held:
    """See ``Hold``."""

    def __init__(self, origin: "Origin", asked: Sequence[bytes]) -> None:
        self.keys = [key for key in asked if key in origin.here]
        self.source = Given(self.keys)
        self._origin = origin
        origin.held += 1
        origin.most = max(origin.most, len(self.keys))

    def release(self) -> None:
        self._origin.held -= 1


class Origin:
    """A pool that has these blocks."""

    def __init__(self, *numbers: int) -> None:
        self.here = set(keys(*numbers))
        self.held = 0
        self.most = 0

    def hold(self, asked: Sequence[bytes]) -> Held:
        return Held(self, asked)


class Slow(MemoryTier):
    """Every call waits until it may go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.go = asyncio.Event()
        self.calls = 0

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        self.calls += 1
        await self.go.wait()
        return await super().contains(keys)

    async def get(self, keys: Sequence[bytes], target: Target) -> int:
        await self.go.wait()
        return await super().get(keys, target)

    async def put(self, keys: Sequence[bytes], source: Source) -> int:
        await self.go.wait()
        return await super().put(keys, source)


@asynccontextmanager
async def running(origin: Origin, *tiers: MemoryTier, patience: float = 5.0, most: int = 4) -> AsyncIterator[Store]:
    store = Store(tiers, BYTES, patience=patience, most=most)
    await store.open(origin)
    yield store
    await store.close()
    assert not origin.held


async def test_each_block_is_found_in_the_first_tier_that_has_it() -> None:
    one, two, three = MemoryTier("a"), MemoryTier("b"), MemoryTier("c")
    await one.put(keys(1, 4), Given(keys(1, 4)))
    await two.put(keys(1, 2, 3), Given(keys(1, 2, 3)))
    await three.put(keys(3, 5, 7), Given(keys(3, 5, 7)))
    async with running(Origin(), one, two, three) as store:
        assert await store.find(keys(1, 2, 3, 4, 5, 6, 7)) == [0, 1, 1, 0, 2]
        assert await store.find(keys(6, 1)) == []
        assert await store.find([]) == []


async def test_what_is_offered_sinks_into_every_tier() -> None:
    one, two = MemoryTier("a"), MemoryTier("b")
    origin = Origin(*range(10))
    async with running(origin, one, two) as store:
        store.offer(keys(*range(10)))
        await store.settle()
        for tier in (one, two):
            assert all(await tier.contains(keys(*range(10))))
        assert origin.most <= 4
        store.offer(keys(*range(10)))
        await store.settle()
        assert [report.written for report in store.reports()] == [10, 10]


async def test_what_the_pool_lost_meanwhile_comes_from_a_tier_above_or_is_dropped() -> None:
    one, two = MemoryTier("a"), Slow("b")
    origin = Origin(1, 2)
    async with running(origin, one, two) as store:
        store.offer(keys(1, 2, 3))
        await until(lambda: len(one.blocks) == 2)
        origin.here.clear()
        two.go.set()
        await store.settle()
        assert set(two.blocks) == set(keys(1, 2))
        assert [report.dropped for report in store.reports()] == [1, 1]
        target = Taken()
        assert await store.get(1, keys(1, 2), target) == 2
        assert target.right(keys(1, 2))


async def test_a_slow_tier_holds_up_nothing_but_itself() -> None:
    one, two = MemoryTier("a"), Slow("b")
    async with running(Origin(*range(50)), one, two) as store:
        store.offer(keys(*range(50)))
        await until(lambda: len(one.blocks) == 50)
        assert not two.blocks
        two.go.set()
        await store.settle()
        assert len(two.blocks) == 50


async def test_more_than_can_wait_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostroke.store.store._MOST_PENDING", 8)
    one = Slow("a")
    async with running(Origin(*range(50)), one) as store:
        store.offer(keys(*range(50)))
        one.go.set()
        await store.settle()
        assert set(one.blocks) == set(keys(*range(42, 50)))
        assert store.reports()[0].dropped == 42


async def test_lifting_brings_blocks_into_the_first_tier() -> None:
    one, two = MemoryTier("a"), MemoryTier("b")
    await two.put(keys(*range(9)), Given(keys(*range(9))))
    await one.put(keys(3), Given(keys(3)))
    async with running(Origin(), one, two) as store:
        some = keys(*range(9))
        await store.lift(some, await store.find(some))
        assert await store.find(some) == [0] * 9
        assert [report.hits for report in store.reports()] == [0, 0], "nobody's request was served"


async def test_a_tier_that_does_not_answer_is_out_of_service_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_FIRST_BACKOFF", 0.02)
    one, two = Slow("a"), MemoryTier("b")
    await two.put(keys(1), Given(keys(1)))
    async with running(Origin(), one, two, patience=0.05) as store:
        store.stages[0]._backoff = 0.02
        assert await store.find(keys(1)) == [1]
        report = store.reports()[0]
        assert (report.in_service, report.faults) == (False, 1)
        calls = one.calls
        assert await store.find(keys(1)) == [1]
        assert one.calls == calls
        one.go.set()
        await until(lambda: store.reports()[0].in_service)


@pytest.mark.parametrize("when", ["open", "find", "get", "put"])
async def test_a_tier_that_fails_comes_back_when_it_can(when: str) -> None:
    one = MemoryTier("a")
    await one.put(keys(1), Given(keys(1)))
    origin = Origin(2)
    if when == "open":
        one.fails = "broken"
    async with running(origin, one) as store:
        store.stages[0]._backoff = 0.02
        one.fails = "broken"
        match when:
            case "find":
                assert await store.find(keys(1)) == []
            case "get":
                assert await store.get(0, keys(1), Taken()) == 0
            case "put":
                store.offer(keys(2))
                await store.settle()
        report = store.reports()[0]
        assert (report.in_service, report.reason) == (False, "broken")
        assert await store.find(keys(1)) == []
        assert await store.get(0, keys(1), Taken()) == 0
        store.offer(keys(2))
        await store.settle()
        assert store.reports()[0].dropped >= 1
        one.fails = ""
        await until(lambda: store.reports()[0].in_service)
        assert await store.find(keys(1)) == [0]


async def test_backoff_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep: Callable[[float], object] = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)  # type: ignore[misc]

    one = MemoryTier("a")
    one.fails = "broken"
    async with running(Origin(), one) as store:
        monkeypatch.setattr(stages.asyncio, "sleep", note)  # type: ignore[attr-defined]
        store.stages[0]._revival.cancel()  # type: ignore[union-attr]
        store.stages[0]._revival = None
        store.stages[0]._revive()
        for _ in range(200):
            await sleep(0)  # type: ignore[misc]
            if len(slept) > 8:
                break
        one.fails = ""
    assert slept[:7] == [1, 2, 4, 8, 16, 32, 60]


def test_a_call_to_a_fast_tier_is_longer() -> None:
    store = Store([MemoryTier("memory")], 1 << 20, most=500)
    assert store.reach(None) == store.reach(100.0) == store.batch == 32, "32 MiB"
    assert store.reach(10_000.0) == 100, "what it moves in a hundredth of a second"
    assert store.reach(1e6) == 500, "but no more than may be held"
