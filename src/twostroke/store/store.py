"""The store: tiers in order, the fastest first. Blocks that the pool has made findable sink into every tier, in the
background; a prefix is looked up in all tiers at once, and each of its blocks comes from the first tier that has it.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from twostroke.kv.keys import BlockKey
from twostroke.messages import TierReport
from twostroke.store.format import Sealed
from twostroke.store.stage import Stage
from twostroke.store.tier import Place, Source, Target, Tier

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a tier may take for one call
_BATCH_BYTES = 32 << 20  # of one call
_MOST_BLOCKS = 64  # of one call
_CALL_SECONDS = 0.01  # that a call to a fast tier may be longer for, so that making it takes no time to speak of
_MOST_PENDING = 1 << 16  # blocks that wait to be written into a tier


class Hold(Protocol):
    """Blocks that the pool has, held in it until ``release``."""

    @property
    def keys(self) -> Sequence[BlockKey]:
        """Of what was asked for, those that are there."""
        ...

    @property
    def source(self) -> Source:
        """Gives them, in the order of ``keys``."""
        ...

    def release(self) -> None:
        """Let go of them; the source gives nothing any more."""
        ...


class Origin(Protocol):
    """The pool that the store lies under."""

    def hold(self, keys: Sequence[BlockKey]) -> Hold:
        """Hold those of the blocks that the pool has now."""
        ...


class Store:
    """Tiers in order. All methods are called on the event loop."""

    def __init__(
        self, tiers: Sequence[Tier], block_bytes: int, *, most: int = _MOST_BLOCKS, patience: float = PATIENCE
    ) -> None:
        """``most``: blocks that may be held in the pool at once while they are written."""
        self.stages = [Stage(tier, block_bytes, patience) for tier in tiers]
        self.block_bytes = block_bytes
        self.batch = max(1, min(most, _MOST_BLOCKS, _BATCH_BYTES // block_bytes))  # blocks of one call
        self._most = most
        self._pending: list[OrderedDict[BlockKey, None]] = [OrderedDict() for _ in tiers]  # by stage
        self._wake = [asyncio.Event() for _ in tiers]
        self._idle = [asyncio.Event() for _ in tiers]
        self._sinks: list[asyncio.Task[None]] = []

    async def open(self, origin: Origin) -> None:
        """Open all tiers, and begin to write what is offered. A tier that cannot be opened is tried again later."""
        await asyncio.gather(*(stage.open() for stage in self.stages))
        for idle in self._idle:
            idle.set()
        self._sinks = [asyncio.create_task(self._sink(level, origin)) for level in range(len(self.stages))]

    async def close(self) -> None:
        """Stop writing, and let go of all tiers."""
        for sink in self._sinks:
            sink.cancel()
        await asyncio.gather(*self._sinks, return_exceptions=True)
        await asyncio.gather(*(stage.close() for stage in self.stages))

    async def find(self, keys: Sequence[BlockKey], *, wanted: bool = True) -> list[int]:
        """For each block of the longest prefix that is in any tier: the first tier that has it.

        ``wanted``: those that are not there count as misses.
        """
        found = await asyncio.gather(*(stage.contains(keys) for stage in self.stages))
        for stage, here in zip(self.stages, found, strict=True):
            stage.count("misses", wanted * (len(keys) - sum(here)))
        where: list[int] = []
        with suppress(ValueError):  # of ``index``: no tier has it
            for here in zip(*found, strict=True):
                where.append(here.index(True))
        return where

    async def get(self, level: int, keys: Sequence[BlockKey], target: Target, patience: float | None = None) -> int:
        """Blocks from one tier: how many of the first arrived. See ``Stage.get``."""
        got = await self.stages[level].get(keys, target, patience)
        self.stages[level].count("hits", got)
        return got

    async def lift(self, keys: Sequence[BlockKey], where: Sequence[int]) -> None:
        """Bring blocks from lower tiers, each from the one that ``where`` names, into the first."""
        for level in range(1, len(self.stages)):
            below = [key for key, place in zip(keys, where, strict=True) if place == level]
            for first in range(0, len(below), self.batch):
                relay = Relay(below[first : first + self.batch])
                await self.stages[level].get(below[first : first + self.batch], relay)
                relay.end()
                await self.stages[0].put(relay.keys, relay)

    def offer(self, keys: Sequence[BlockKey], *, below: int = 0) -> None:
        """These blocks can be found in the pool: every tier from level ``below`` on shall have them. Does not wait."""
        queues = list(zip(self.stages, self._pending, self._wake, self._idle, strict=True))
        for stage, pending, wake, idle in queues[below:]:
            idle.clear()
            for key in keys:
                pending[key] = None
            while len(pending) > _MOST_PENDING:
                pending.popitem(last=False)
                stage.count("dropped", 1)
            wake.set()

    async def settle(self) -> None:
        """Wait until nothing waits to be written."""
        await asyncio.gather(*(idle.wait() for idle in self._idle))

    def reach(self, rate: float | None) -> int:
        """Blocks of one call to a tier that moves so many a second."""
        return max(self.batch, min(self._most, int((rate or 0) * _CALL_SECONDS)))

    def reports(self) -> list[TierReport]:
        """What became of each tier so far."""
        return [stage.report() for stage in self.stages]

    # -- inside --------------------------------------------------------------------------------------------------

    async def _sink(self, level: int, origin: Origin) -> None:
        """Write what is offered into one tier, in order, for ever. Tiers do not wait for each other."""
        pending, wake, idle = self._pending[level], self._wake[level], self._idle[level]
        while True:
            if not pending:
                idle.set()
                await wake.wait()
            wake.clear()
            most = self.reach(self.stages[level].writes.rate(time.monotonic()))
            batch = [pending.popitem(last=False)[0] for _ in range(min(most, len(pending)))]
            await self._write(level, batch, origin)

    async def _write(self, level: int, keys: Sequence[BlockKey], origin: Origin) -> None:
        stage = self.stages[level]
        if not stage.in_service:
            stage.count("dropped", len(keys))
            return
        here = await stage.contains(keys)
        keys = [key for key, present in zip(keys, here, strict=True) if not present]
        if not keys:
            return
        hold = origin.hold(keys)
        try:
            stored = await stage.put(hold.keys, hold.source) if hold.keys else 0
        finally:
            hold.release()
        held = set(hold.keys)
        lost = [key for key in keys if key not in held]  # the pool has evicted them already
        stored += await self._demote(level, lost) if lost else 0
        stage.count("dropped", len(keys) - stored)

    async def _demote(self, level: int, keys: Sequence[BlockKey]) -> int:
        """Blocks that only tiers above still have. How many this one has then."""
        stored = 0
        for above in range(level):
            relay = Relay(keys)
            await self.stages[above].get(keys, relay)
            relay.end()
            if relay.keys:
                stored += await self.stages[level].put(relay.keys, relay)
                keys = [key for key in keys if key not in relay.blocks]
        return stored


class Relay(Source, Target):
    """Copies of blocks on their way from one tier to another: a target first, then a source."""

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        self.blocks: dict[BlockKey, Sealed] = {}
        self.keys: list[BlockKey] = []  # of what came, in order
        self._asked = keys
        self._open = True

    def place(self, index: int, block: Sealed) -> bool:
        """See ``Target.place``."""
        if self._open:
            self.blocks[self._asked[index]] = Sealed(memoryview(bytes(block.payload)), block.digest)
        return self._open

    def end(self) -> None:
        """Nothing more comes."""
        self._open = False
        blocks = self.blocks = dict(self.blocks)
        self.keys = [key for key in self._asked if key in blocks]

    def block(self, index: int) -> Sealed | None:
        """See ``Source.block``."""
        return self.blocks[self.keys[index]]

    def where(self, index: int) -> Place | None:
        """See ``Source.where``."""
        return None
