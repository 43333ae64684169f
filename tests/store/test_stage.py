"""A tier in use: how fast it is taken to be, and when it is tried again."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.engine.rig import until
from tests.store.blocks import BYTES, Given, Taken, keys
from twostroke.store import choice
from twostroke.store.stage import Stage
from twostroke.store.tier import MemoryTier, Target

SOME = keys(*range(20))


class Delayed(MemoryTier):
    """Every read takes so long."""

    seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []  # blocks of each

    async def get(self, keys: Sequence[bytes], target: Target) -> int:
        self.reads.append(len(keys))
        await asyncio.sleep(self.seconds)
        return await super().get(keys, target)


@asynccontextmanager
async def staged(tier: MemoryTier, patience: float = 5.0) -> AsyncIterator[Stage]:
    """In service, with ``SOME`` in it."""
    stage = Stage(tier, BYTES, patience)
    await stage.open()
    await stage.put(SOME, Given(SOME))
    yield stage
    await stage.close()


async def test_a_tiers_first_read_is_not_its_speed() -> None:
    """It makes connections and maps memory: a worker that took it for the speed would never read again."""
    async with staged(MemoryTier()) as stage:
        known = []
        for _ in range(2):
            assert await stage.get(SOME[:2], Taken()) == 2
            known.append(stage.reads.rate(time.monotonic()) is not None)
        assert known == [False, True]


async def test_a_stall_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody loads from a tier that is too slow; a few blocks are read for nobody, but not before the stall is old."""
    tier = Delayed()
    async with staged(tier) as stage:
        for tier.seconds in (0.0, 0.2):
            await stage.get(SOME, Taken())
        stalled, tier.seconds = stage.reads.rate(time.monotonic()), 0.0
        assert stalled is not None
        assert stalled < len(SOME) / 0.2
        stage.explore(SOME)
        await asyncio.sleep(0)
        assert len(tier.reads) == 2, "it was measured just now"
        monkeypatch.setattr(choice, "OLD_SECONDS", 0.0)
        for _ in range(3):
            stage.explore(SOME)  # one at a time
        await until(lambda: (stage.reads.rate(time.monotonic()) or 0) > 10 * stalled)
        assert tier.reads == [len(SOME)] * 3


async def test_a_tier_that_opens_but_hangs_is_tried_less_and_less_often() -> None:
    """Each try costs a request its patience."""
    tier = Delayed()
    async with staged(tier, patience=0.02) as stage:
        tier.seconds, stage._backoff = 1.0, 0.01
        waits = []
        for _ in range(3):
            assert await stage.get(SOME, Taken()) == 0
            waits.append(stage._backoff)
            await until(lambda: stage.in_service)
        assert waits == [0.01, 0.02, 0.04]
        tier.seconds = 0.0
        assert await stage.get(SOME, Taken()) == len(SOME)
        assert stage._backoff == 1.0
