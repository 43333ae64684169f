"""What a tier is: a place that stores whole blocks by key, and decides nothing but what it evicts.

Bytes pass through two narrow ends, so that a tier knows neither pools nor models: it writes what a ``Source`` gives it,
and gives what it read and verified to a ``Target``; where a tier is memory or files, source and target do that
themselves, there. Both are called in a tier's own threads.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from twostroke.kv.copying import copy
from twostroke.kv.direct import Extent
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import Bytes
from twostroke.messages import PoolAddress
from twostroke.store.format import Corrupt, Sealed, verify

Register = Callable[[Bytes], Callable[[], None]]  # makes memory one that a GPU copies from and to, until that is called


class TierFailed(Exception):
    """The tier cannot be used now. ``str`` says why."""


class Place(NamedTuple):
    """A slot of a pool that other processes on its machine may be able to map."""

    pool: PoolAddress
    slot: int


class Source(Protocol):
    """Where blocks come from that a tier is to store."""

    def block(self, index: int) -> Sealed | None:
        """The block of the ``index``-th key, good until the same thread asks again. None: it is not to be had."""
        ...

    def fill(self, indexes: Sequence[int], memory: Bytes, slots: Sequence[int]) -> list[bytes | None]:
        """Write blocks into these slots of the tier's memory, ``[slots, block_bytes]``, all at once where that is
        faster: the digest of each, or None.
        """
        digests: list[bytes | None] = []
        for index, slot in zip(indexes, slots, strict=True):
            block = self.block(index)
            if block is not None:
                copy(memory[slot], block.payload)
            digests.append(block and block.digest)
        return digests

    def save(self, index: int, extent: Extent, head: Callable[[bytes], None] | None = None) -> bytes | None:
        """Write a block into a file, after ``head`` was told its digest: that, or None. ``OSError``."""
        block = self.block(index)
        if block is None:
            return None
        extent.load(block.payload)
        if head is not None:
            head(block.digest)
        extent.flush()
        return block.digest

    def where(self, index: int) -> Place | None:
        """Where other processes find its bytes; None if they do not, or not any more. What was read there is the block
        if this is the same afterwards.
        """
        ...


class Target(Protocol):
    """Where blocks go that a tier has read and verified."""

    def place(self, index: int, block: Sealed) -> bool:
        """Take the block of the ``index``-th key; its bytes may change after this. False: nobody wants it any more."""
        ...

    def take(
        self, indexes: Sequence[int], memory: Bytes, slots: Sequence[int], digests: Sequence[bytes]
    ) -> list[bool | Corrupt]:
        """Verify and ``place`` blocks that lie in these slots of the tier's memory, ``[slots, block_bytes]``, all at
        once where that is faster.
        """
        results: list[bool | Corrupt] = []
        for index, slot, digest in zip(indexes, slots, digests, strict=True):
            try:
                results.append(self.place(index, verify(Sealed(memory[slot].data, digest))))
            except Corrupt as error:
                results.append(error)
        return results

    def fetch(self, index: int, extent: Extent, digest: Callable[[], bytes]) -> bool:
        """Read a block out of a file, verify and ``place`` it. ``digest``: what it must have, known once it is read.

        Raises:
            Corrupt: it is damaged, or another one.
            OSError: it cannot be read.
        """
        payload = extent.read()
        return self.place(index, verify(Sealed(payload, digest())))


class Usage(Struct, frozen=True):
    """How full a tier is, and what became of blocks since it was opened."""

    capacity: int  # bytes it may use
    used: int  # bytes
    blocks: int
    evictions: int
    damaged: int  # blocks that did not verify
    pinned: int = 0


class Entry(NamedTuple):
    """A stored block, as people see it."""

    key: BlockKey
    length: int  # bytes
    written: float | None  # unix seconds; None is not known
    pinned: bool = False
    error: str | None = None  # why it is none, once it was verified


@runtime_checkable
class Managed(Protocol):
    """A tier whose blocks people may look at, pin and remove while it is used. On the event loop, like ``Tier``; all
    raise ``TierFailed``.
    """

    async def entries(self) -> list[Entry]:
        """Every block."""
        ...

    async def pin(self, keys: Sequence[BlockKey], pinned: bool) -> int:
        """Those of these blocks that are here are never evicted, or may be again: how many. They fill the budget."""
        ...

    async def drop(self, keys: Sequence[BlockKey]) -> int:
        """Give up blocks, pinned ones too; those that are being read, when they are read. How many there were."""
        ...


class Tier(Protocol):
    """Stores blocks of one layout. Every method is called on the event loop and is never cancelled: whoever has no
    time to wait for it lets it go on, having told source or target that nothing is wanted any more.
    """

    name: str

    async def open(self) -> None:
        """Be ready, with the blocks that are there already. Also called again after a failure.

        Raises:
            TierFailed: it cannot be.
        """
        ...

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Which of the blocks are here, each as good as asked for. ``TierFailed`` if it cannot be told."""
        ...

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """Give blocks to ``target``, in any order. How many of the first ones arrived whole; the others are not here.

        Raises:
            TierFailed: the tier is broken; what was placed is good.
        """
        ...

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """Store blocks that are not here yet, evicting others. How many of them all are here then.

        Raises:
            TierFailed: the tier is broken; what is here is good.
        """
        ...

    def usage(self) -> Usage:
        """The present account."""
        ...

    async def close(self) -> None:
        """Let go of everything. What is stored stays where it outlives the process."""
        ...


def leading(came: Iterable[object]) -> int:
    """What ``Tier.get`` returns: how many of the first ones are True."""
    return sum(1 for _ in takewhile(lambda one: one is True, came))


class MemoryTier:
    """The twin for tests: a dictionary. ``fails`` makes every call fail."""

    def __init__(self, name: str = "memory", capacity: int = 1 << 30) -> None:
        self.name = name
        self.blocks: dict[BlockKey, tuple[bytes, bytes]] = {}  # payload and digest
        self.fails = ""
        self._pinned: set[BlockKey] = set()
        self._capacity = capacity
        self._damaged = 0
        self._evictions = 0

    async def open(self) -> None:
        """See ``Tier.open``."""
        self._check()

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """See ``Tier.contains``."""
        self._check()
        return [key in self.blocks for key in keys]

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """See ``Tier.get``."""
        for index, key in enumerate(keys):
            self._check()
            if key not in self.blocks:
                return index
            payload, digest = self.blocks[key]
            try:
                block = verify(Sealed(memoryview(payload), digest))
            except Corrupt:
                self._damaged += 1
                del self.blocks[key]
                return index
            if not target.place(index, block):
                return index
        return len(keys)

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""
        for index, key in enumerate(keys):
            self._check()
            block = None if key in self.blocks else source.block(index)
            if block is not None:
                while self._used + len(block.payload) > self._capacity:
                    victim = next((one for one in self.blocks if one not in self._pinned), None)
                    if victim is None:
                        break
                    del self.blocks[victim]
                    self._evictions += 1
                else:
                    self.blocks[key] = bytes(block.payload), block.digest
        return sum(key in self.blocks for key in keys)

    async def entries(self) -> list[Entry]:
        """See ``Managed.entries``."""
        self._check()
        return [Entry(key, len(one[0]), None, key in self._pinned) for key, one in self.blocks.items()]

    async def pin(self, keys: Sequence[BlockKey], pinned: bool) -> int:
        """See ``Managed.pin``."""
        self._check()
        here = self.blocks.keys() & set(keys)
        self._pinned = self._pinned | here if pinned else self._pinned - here
        return len(here)

    async def drop(self, keys: Sequence[BlockKey]) -> int:
        """See ``Managed.drop``."""
        self._check()
        self._pinned.difference_update(keys)
        return sum(self.blocks.pop(key, None) is not None for key in keys)

    def usage(self) -> Usage:
        """See ``Tier.usage``."""
        return Usage(self._capacity, self._used, len(self.blocks), self._evictions, self._damaged, len(self._pinned))

    async def close(self) -> None:
        """See ``Tier.close``."""

    @property
    def _used(self) -> int:
        return sum(len(payload) for payload, _ in self.blocks.values())

    def _check(self) -> None:
        if self.fails:
            raise TierFailed(self.fails)
