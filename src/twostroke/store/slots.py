"""A tier made of equal slots in some medium: the index, eviction and pins are the same in memory and on disk."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from twostroke.kv.direct import NO_ROOM, Extent
from twostroke.kv.keys import BlockKey
from twostroke.kv.memory import Bytes
from twostroke.store.eviction import Policy, Quotas
from twostroke.store.format import Corrupt
from twostroke.store.shelf import Shelf
from twostroke.store.threads import Threads
from twostroke.store.tier import Entry, Source, Target, TierFailed, Usage, leading

log = logging.getLogger(__name__)
_Job = tuple[int, BlockKey, int]  # a block's number in its source, and the slot that it goes to
PAUSE_SECONDS = 30.0  # without writing after the medium was full or read-only


class Medium(Protocol):
    """Where slots are. All methods may block and are called in the tier's threads, at most once at a time for a slot.

    Each may raise ``OSError``.
    """

    slot_bytes: int  # that a slot takes of the budget

    def open(self) -> list[tuple[BlockKey, int]]:
        """Be ready, anew if it was before: blocks that are here already and their slots, the oldest first. The slots
        are 0 … ``size`` - 1.
        """
        ...

    def size(self) -> int:
        """How many slots there are."""
        ...

    def grow(self) -> int:
        """Make more slots if the budget allows; how many there are now. Never called twice at once."""
        ...

    def forget(self, slot: int) -> None:
        """What is in the slot is not to be found any more."""
        ...

    def close(self) -> None:
        """Let go of everything. What outlives the process stays."""
        ...


@runtime_checkable
class Device(Medium, Protocol):
    """A medium that is files."""

    def payload(self, slot: int) -> Extent:
        """Where a slot's bytes are."""
        ...

    def digest(self, slot: int, key: BlockKey) -> bytes:
        """What their digest must be. ``Corrupt`` if another block is there."""
        ...

    def label(self, slot: int, key: BlockKey, digest: bytes) -> None:
        """This block was written into the slot."""
        ...


@runtime_checkable
class Memory(Medium, Protocol):
    """A medium that is memory: who has the other end of a copy makes it."""

    slots: Bytes  # uint8 [slots, slot_bytes], once it is open
    digests: list[bytes]  # of what the slots hold


@runtime_checkable
class Lasting(Protocol):
    """A medium whose blocks outlive the process, and with them which of them are pinned."""

    def commit(self, slots: Sequence[int]) -> None:
        """What was written into these slots is to be found at the next ``open``."""
        ...

    def pin(self, slots: Sequence[int], pinned: bool) -> None:
        """What is in these slots is, or is not, to be pinned at the next ``open``. ``OSError``."""
        ...

    def pinned(self) -> set[int]:
        """Slots whose blocks were pinned when it was opened."""
        ...


@runtime_checkable
class Provisional(Source, Protocol):
    """Whose blocks count only if it says so after they were read. What was stored is not to be found before that."""

    async def kept(self) -> bool:
        """Whether they were the blocks that they are to be. It does not take long, whatever becomes of who knows."""
        ...


class SlotTier:
    """See ``Tier`` and ``Managed``. The index is touched on the event loop alone; threads only move bytes of slots that
    are held.
    """

    def __init__(
        self,
        name: str,
        medium: Device | Memory,
        policy: Callable[[], Policy],
        *,
        capacity: int,
        threads: int,
        at_once: int = 1,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """``capacity``: bytes that the medium may use. ``threads``: that read, and as many that write. ``at_once``:
        blocks that one moves at once, of a medium that is memory. ``prepare``: what each of them does at ``open``.
        """
        self.name = name
        self.quota: int | None = None  # bytes that a tenant may have here, from the next ``open`` on
        self._medium: Medium = medium
        self._memory = medium if isinstance(medium, Memory) else None
        self._device = medium if isinstance(medium, Device) else None
        self._lasting = medium if isinstance(medium, Lasting) else None
        self._policy = policy
        self._capacity = capacity
        self._threads = Threads(threads, name)
        self._readers = Threads(threads, f"{name}-read")  # what a request waits for is not behind what nobody does
        self._at_once = at_once
        self._prepare = prepare
        self._shelf = Shelf(0, policy())
        self._paused = 0.0  # until when nothing is written
        self._damaged = 0
        self._evictions = 0  # of earlier shelves
        self._growing = asyncio.Lock()
        self._using = 0  # calls that hold slots of the present shelf
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """See ``Tier.open``."""
        await self._idle.wait()  # nothing may write into slots that are handed out anew
        try:
            found = await self._threads.run(self._medium.open)
            if self._prepare is not None:
                await asyncio.gather(self._threads.all(self._prepare), self._readers.all(self._prepare))
        except OSError as error:
            raise TierFailed(_why(error)) from error
        self._evictions += self._shelf.evictions
        most = None if self.quota is None else self.quota // self._medium.slot_bytes
        self._shelf = Shelf(self._medium.size(), self._policy(), Quotas(most, self._policy))
        self._shelf.restore(found, () if self._lasting is None else self._lasting.pinned())

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """See ``Tier.contains``."""
        return self._shelf.contains(keys)

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """See ``Tier.get``."""
        shelf, slots = self._shelf, self._shelf.pin(keys)

        self._use(1)
        try:
            results = await self._readers.runs(
                lambda run: self._load(target, run, keys, slots), len(slots), self._run(len(slots))
            )
        finally:
            shelf.unpin(keys[: len(slots)], slots)
            self._use(-1)
        await self._give_up([i for i, result in enumerate(results) if isinstance(result, Corrupt)], keys, slots)
        try:
            _check(results)
        except OSError as error:
            raise TierFailed(_why(error)) from error
        return leading(results)

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""
        shelf, lasting = self._shelf, self._lasting
        missing = [i for i, here in enumerate(shelf.contains(keys)) if not here]
        if not missing or time.monotonic() < self._paused:
            return len(keys) - len(missing)
        taken: list[_Job] = []
        written: dict[BlockKey, int] = {}
        self._use(1)
        try:
            await self._make_room(len(missing))
            slots = shelf.take([keys[index] for index in missing])
            taken = [(index, keys[index], slots.pop(keys[index])) for index in missing if keys[index] in slots]
            results = await self._threads.runs(
                lambda run: self._store(source, [taken[i] for i in run]), len(taken), self._run(len(taken))
            )
            digests = {job: result for job, result in zip(taken, results, strict=True) if isinstance(result, bytes)}
            if digests and (not isinstance(source, Provisional) or await source.kept()):
                if lasting is not None:
                    await self._threads.run(lambda: self._label(digests, lasting))
                written = {key: slot for _, key, slot in digests}
            _check(results)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise TierFailed(_why(error)) from error
            log.warning("%s: nothing is written for %.0f s: %s", self.name, PAUSE_SECONDS, _why(error))
            self._paused = time.monotonic() + PAUSE_SECONDS
        finally:
            # From the last to the first, so that a prefix is evicted after what depends on it.
            shelf.publish([*reversed(written)])
            shelf.cancel([key for _, key, _ in taken if key not in written])
            self._use(-1)
        return len(keys) - len(missing) + len(written)

    async def entries(self) -> list[Entry]:
        """See ``Managed.entries``."""
        shelf = self._shelf
        return [Entry(key, self._medium.slot_bytes, None, key in shelf.protected) for key in shelf.slots()]

    def is_pinned(self, key: BlockKey) -> bool:
        """Whether this block is here, and pinned."""
        return key in self._shelf.protected

    async def pin(self, keys: Sequence[BlockKey], pinned: bool) -> int:
        """See ``Managed.pin``."""
        shelf = self._shelf
        found = shelf.protect(keys) if pinned else shelf.expose(keys)
        lasting = self._lasting
        if found and lasting is not None:
            held = [key for key in found if shelf.pin([key])]
            self._use(1)
            try:
                await self._threads.run(lambda: lasting.pin([found[key] for key in held], pinned))
            except OSError as error:
                raise TierFailed(_why(error)) from error
            finally:
                shelf.unpin(held, [found[key] for key in held])
                self._use(-1)
        return len(found)

    async def drop(self, keys: Sequence[BlockKey]) -> int:
        """See ``Managed.drop``."""
        shelf = self._shelf
        held = {key: slots[0] for key in keys if (slots := shelf.pin([key]))}
        for key in held:
            shelf.discard(key, bad=False)

        def forget() -> None:
            for slot in held.values():
                self._medium.forget(slot)

        self._use(1)
        try:
            await self._threads.run(forget)
        except OSError as error:
            raise TierFailed(_why(error)) from error
        finally:
            shelf.unpin(held.keys(), held.values())  # only now may the slots be written again
            self._use(-1)
        return len(held)

    def usage(self) -> Usage:
        """See ``Tier.usage``."""
        shelf = self._shelf
        used = (shelf.total - shelf.free) * self._medium.slot_bytes
        return Usage(
            self._capacity, used, shelf.stored, self._evictions + shelf.evictions, self._damaged, len(shelf.protected)
        )

    async def close(self) -> None:
        """See ``Tier.close``."""
        await self._idle.wait()
        await self._threads.run(self._medium.close)
        self._threads.close()
        self._readers.close()

    async def _make_room(self, count: int) -> None:
        """Have the medium grow until ``count`` slots are free, or it cannot."""
        async with self._growing:
            while self._shelf.free < count:
                size = await self._threads.run(self._medium.grow)
                if size == self._shelf.total:
                    break
                self._shelf.extend(size)

    def _run(self, count: int) -> int:
        """How many of so many blocks a thread takes at once."""
        return max(1, min(self._at_once, count // (2 * self._threads.count)))

    def _load(
        self, target: Target, run: range, keys: Sequence[BlockKey], slots: Sequence[int]
    ) -> Sequence[bool | Corrupt | OSError]:
        """These of the blocks, to ``target``."""
        if (memory := self._memory) is not None:
            ours = slots[run.start : run.stop]
            return target.take(run, memory.slots, ours, [memory.digests[slot] for slot in ours])
        assert self._device is not None, "it is one or the other"
        results: list[bool | Corrupt | OSError] = []
        for index in run:
            try:
                digest = partial(self._device.digest, slots[index], keys[index])
                results.append(target.fetch(index, self._device.payload(slots[index]), digest))
            except (Corrupt, OSError) as error:
                results.append(error)
        return results

    def _store(self, source: Source, jobs: Sequence[_Job]) -> list[bytes | OSError | None]:
        """Blocks, by their number in ``source``, into slots: their digests, None of those that are not to be had."""
        if (memory := self._memory) is not None:
            slots = [slot for _, _, slot in jobs]
            digests = source.fill([index for index, _, _ in jobs], memory.slots, slots)
            for slot, digest in zip(slots, digests, strict=True):
                memory.digests[slot] = digest or b""
            return [*digests]
        assert self._device is not None, "it is one or the other"
        results: list[bytes | OSError | None] = []
        for index, _, slot in jobs:
            try:
                results.append(source.save(index, self._device.payload(slot)))
            except OSError as error:
                results.append(error)
        return results

    def _label(self, digests: Mapping[_Job, bytes], lasting: Lasting) -> None:
        """What was stored is to be found at the next ``open``."""
        assert self._device is not None, "what lasts is files"
        for (_, key, slot), digest in digests.items():
            self._device.label(slot, key, digest)
        lasting.commit([slot for _, _, slot in digests])

    async def _give_up(self, damaged: Sequence[int], keys: Sequence[BlockKey], slots: Sequence[int]) -> None:
        """Blocks that did not verify are never looked at again."""
        for index in damaged:
            if self._shelf.slots().get(keys[index]) != slots[index]:
                continue  # it was dropped while it was read
            log.warning("%s: block %s in slot %d is damaged", self.name, keys[index].hex(), slots[index])
            self._damaged += 1
            self._shelf.discard(keys[index])
            try:
                await self._threads.run(lambda slot=slots[index]: self._medium.forget(slot))  # type: ignore[misc]
            except OSError as error:
                raise TierFailed(_why(error)) from error

    def _use(self, change: int) -> None:
        self._using += change
        self._idle.clear() if self._using else self._idle.set()


def _check(results: Sequence[object]) -> None:
    """Raise the first ``OSError`` among them."""
    for result in results:
        if isinstance(result, OSError):
            raise result


def _why(error: OSError) -> str:
    return error.strerror or str(error)
