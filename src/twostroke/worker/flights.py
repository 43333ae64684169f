"""Prompts under way: whoever needs blocks that another request is about to bring waits for them, and computes the rest.

Only the event loop touches this.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence

from twostroke.kv.keys import BlockKey


class Flight:
    """One request that brings blocks of its prompt, from ``Flights.begin`` until ``end``."""

    def __init__(self, flights: "Flights", keys: Sequence[BlockKey], priority: int) -> None:
        self.priority = priority
        self._flights = flights
        self._keys = keys

    def end(self) -> None:
        """It brings nothing more. Ending it twice is harmless."""
        self._flights.land(key for key in self._keys if self._flights.leader(key) is self)


class Flights:
    """Who brings which block. The first one who needs it does; others may wait for that."""

    def __init__(self) -> None:
        self._leaders: dict[BlockKey, Flight] = {}
        self._landed: dict[BlockKey, asyncio.Event] = {}  # of keys that somebody waits for

    def __len__(self) -> int:
        return len(self._leaders)

    def leader(self, key: BlockKey) -> Flight | None:
        """Who brings this block, if anybody does."""
        return self._leaders.get(key)

    def begin(self, keys: Sequence[BlockKey], priority: int) -> Flight:
        """Bring those of these blocks that nobody brings yet."""
        flight = Flight(self, [key for key in keys if key not in self._leaders], priority)
        for key in flight._keys:
            self._leaders[key] = flight
        return flight

    def land(self, keys: Iterable[BlockKey]) -> None:
        """These blocks are here, or will not be brought after all."""
        for key in list(keys):
            self._leaders.pop(key, None)
            landed = self._landed.pop(key, None)
            if landed is not None:
                landed.set()

    async def wait(self, keys: Sequence[BlockKey], here: Collection[BlockKey], priority: int) -> bool:
        """If the first of ``keys`` that is not ``here`` is being brought by somebody who is not served after us, wait
        until the last such block has landed. Whether we have waited.
        """
        missing = next((index for index, key in enumerate(keys) if key not in here), len(keys))
        last: BlockKey | None = None
        for key in keys[missing:]:
            flight = self._leaders.get(key)
            if flight is None or flight.priority > priority:
                break
            last = key
        if last is None:
            return False
        await self._landed.setdefault(last, asyncio.Event()).wait()
        return True
