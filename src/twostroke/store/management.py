"""What people ask of a running store (``twostroke kv``): to look at its blocks, pin, check or remove them."""

import heapq
from collections.abc import Sequence

from twostroke.kv.keys import BlockKey
from twostroke.messages import Manage, ManagedTier, StoredBlock
from twostroke.store.format import Sealed
from twostroke.store.stage import Stage
from twostroke.store.tier import Entry, Managed, Target, TierFailed

MOST_LISTED = 500  # blocks in one answer
_BATCH = 64  # blocks that are read, or removed, in one call


async def manage(stages: Sequence[Stage], layout: str, order: Manage) -> list[ManagedTier]:
    """Do it on those of the tiers that are meant. What is wrong with one of them is said in its answer."""
    meant = [stage for stage in stages if order.tier in (None, stage.name)]
    most = min(order.limit, MOST_LISTED // max(1, len(meant)))
    return [await _Desk(stage, layout, most).serve(order) for stage in meant]


class _Desk:
    """One tier, for one order."""

    def __init__(self, stage: Stage, layout: str, most: int) -> None:
        self._stage = stage
        self._layout = layout
        self._most = most

    async def serve(self, order: Manage) -> ManagedTier:
        tier = self._stage.tier
        if order.action == "stats":
            return self._answer()
        if not isinstance(tier, Managed):
            return self._answer(problem="its own server keeps these blocks: ask that")
        if not self._stage.in_service:
            return self._answer(problem="it is out of service")
        try:
            return await self._do(tier, order)
        except TierFailed as error:
            return self._answer(problem=str(error))

    async def _do(self, tier: Managed, order: Manage) -> ManagedTier:
        if order.keys is not None:
            keys: Sequence[BlockKey] = [bytes.fromhex(key) for key in order.keys]
            entries: Sequence[Entry] = ()
        else:
            entries = await self._stage.run(tier.entries())
            keys = [entry.key for entry in entries]
        match order.action:
            case "ls":
                shown = heapq.nlargest(self._most, entries, key=lambda entry: entry.written or 0.0)
                return self._answer(blocks=[StoredBlock(e.key.hex(), e.length, e.written, e.pinned) for e in shown])
            case "pin" | "unpin":
                return self._answer(changed=await self._stage.run(tier.pin(keys, order.action == "pin")))
            case "clear":
                parts = [keys[first : first + _BATCH] for first in range(0, len(keys), _BATCH)]
                return self._answer(changed=sum([await self._stage.run(tier.drop(part)) for part in parts]))
            case _:  # what does not verify is removed by the tier itself, when it is read
                before = self._stage.tier.usage().damaged
                good = await self._read(keys)
                damaged = self._stage.tier.usage().damaged - before
                return self._answer(good=good, damaged=damaged, changed=damaged)

    async def _read(self, keys: Sequence[BlockKey]) -> int:
        """How many of the blocks are whole."""
        good = 0
        for first in range(0, len(keys), _BATCH):
            some = keys[first : first + _BATCH]
            whole = Whole()
            await self._stage.run(self._stage.tier.get(some, whole))
            for index in set(range(len(some))) - whole.indices:  # behind one that is gone, or gone itself
                await self._stage.run(self._stage.tier.get([some[index]], one := Whole()))
                good += len(one.indices)
            good += len(whole.indices)
        return good

    def _answer(self, **what: object) -> ManagedTier:
        return ManagedTier(self._stage.report(), self._layout, **what)  # type: ignore[arg-type]


class Whole(Target):
    """See ``Target``: notes which blocks came."""

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def place(self, index: int, block: Sealed) -> bool:
        """See ``Target.place``."""
        self.indices.add(index)
        return True
