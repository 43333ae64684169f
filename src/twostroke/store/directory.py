"""The shared-directory tier: one file a block, in any directory that many workers, also on many machines, can reach.

::

    <path>/<layout fingerprint>/<last two digits of the key>/<key>      a page with the header, then the payload
    <path>/<layout fingerprint>/pinned/<key>                            an empty file: nobody evicts this block
    <path>/<layout fingerprint>/tmp/                                    files that are being written
    <path>/<layout fingerprint>/bad/                                    files that did not verify, the last few

There is no master and no lock. A block is written under another name and renamed, so it is there as a whole or not at
all. Two who write the same block write the same bytes. Whoever finds more than the budget removes the oldest; that a
file is gone by the time it is read means that the block is not there. What is pinned makes others go instead, and where
all is pinned nothing more is written.
"""

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from twostroke.kv.direct import NO_ROOM, PAGE, Extent, File, aligned, open_direct, pages
from twostroke.kv.keys import NOBODY, BlockKey, tenant_of
from twostroke.store.format import HEADER_BYTES, Corrupt, Header, check, pack, unpack
from twostroke.store.inspection import SharedFolder, key_of
from twostroke.store.threads import Threads
from twostroke.store.tier import Entry, Source, Target, TierFailed, Usage, leading

log = logging.getLogger(__name__)
_THREADS = 8  # on a network's file system each waits most of the time
_SCAN_SECONDS = 5.0  # between looks at what others have written, while we write
_TOUCH_SECONDS = 60.0  # a file that was used is marked as used at most this often
PAUSE_SECONDS = 30.0  # without writing after the file system was full
_STALE_SECONDS = 3600.0  # after which an unfinished file is somebody's who died
_MOST_BAD = 16  # damaged files that are kept
_SPARE = 0.95  # of the budget is left in place when something has to go
Result = TypeVar("Result")
_NAMES = frozenset(f"{number:02x}" for number in range(256))


class DirectoryTier:
    """See ``Tier``. What it knows is a cache of what is in the directory: the files themselves decide."""

    def __init__(self, path: Path, block_bytes: int, fingerprint: str, capacity: int | None = None) -> None:
        """``capacity``: bytes of files under ``path``, of all layouts, about; ``None`` is no limit."""
        self.name = "dir"
        self.quota: int | None = None  # bytes that a tenant may have here
        self._root = path
        self._path = path / fingerprint
        self._folder = SharedFolder(self._path)
        self._block_bytes = block_bytes
        self._fingerprint = bytes.fromhex(fingerprint)
        self._capacity = capacity
        self._file_bytes = PAGE + pages(block_bytes)
        self._threads = Threads(_THREADS, self.name)
        self._local = threading.local()
        self._known: dict[BlockKey, float] = {}  # blocks that were there, and when they were last marked as used
        self._others = 0  # bytes of other layouts
        self._pinned = 0  # blocks, when we looked
        self._scanned = 0.0
        self._paused = 0.0  # until when nothing is written
        self._evictions = 0
        self._damaged = 0

    async def open(self) -> None:
        """See ``Tier.open``."""
        try:
            await self._threads.run(self._open)
        except OSError as error:
            raise TierFailed(str(error)) from error

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """See ``Tier.contains``. Beyond the first block that is missing, nobody looks very far."""
        found = [key in self._known for key in keys]
        unknown = [index for index, here in enumerate(found) if not here]
        done, step = 0, 1
        while done < len(unknown):
            some = unknown[done : done + step]
            try:
                there = await self._threads.each(lambda i, some=some: self._exists(keys[some[i]]), len(some))  # type: ignore[misc]
            except OSError as error:
                raise TierFailed(str(error)) from error
            for index, here in zip(some, there, strict=True):
                found[index] = here
                if here:
                    self._known[keys[index]] = 0.0
            if not all(there):
                break
            done, step = done + step, 2 * step
        return found

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """See ``Tier.get``."""

        def fetch(index: int) -> bool | Corrupt | OSError:
            try:
                return self._fetch(keys[index], target, index)
            except (Corrupt, OSError) as error:
                return error

        results = await self._threads.each(fetch, len(keys))
        now = time.monotonic()
        used: list[BlockKey] = []
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, FileNotFoundError):
                self._known.pop(key, None)
            elif isinstance(result, Corrupt):
                await self._quarantine(key, result)
            elif isinstance(result, OSError):
                raise TierFailed(str(result)) from result
            elif self._known.get(key, 0.0) + _TOUCH_SECONDS < now:
                self._known[key] = now
                used.append(key)
        await self._threads.run(lambda: self._mark(used))
        return leading(results)

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""
        if time.monotonic() < self._paused:
            return sum(key in self._known for key in keys)
        try:
            new = await self._threads.run(lambda: self._make_room(keys))
            stored = await self._threads.each(lambda i: self._store(keys[i], source, i, new), len(keys))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise TierFailed(str(error)) from error
            log.warning("%s: nothing is written for %.0f s: %s", self._root, PAUSE_SECONDS, error.strerror)
            self._paused = time.monotonic() + PAUSE_SECONDS
            return sum(key in self._known for key in keys)
        return sum(stored)

    async def entries(self) -> list[Entry]:
        """See ``Managed.entries``."""
        return await self._manage(lambda: list(self._folder.entries()))

    async def pin(self, keys: Sequence[BlockKey], pinned: bool) -> int:
        """See ``Managed.pin``."""
        count = await self._manage(lambda: self._folder.pin(keys, pinned))
        await self._manage(self._scan)
        return count

    async def drop(self, keys: Sequence[BlockKey]) -> int:
        """See ``Managed.drop``."""
        for key in keys:
            self._known.pop(key, None)
        return await self._manage(lambda: self._folder.drop(keys))

    def usage(self) -> Usage:
        """See ``Tier.usage``. As of the last look, and of our own doing since."""
        used = len(self._known) * self._file_bytes + self._others
        return Usage(self._capacity or 0, used, len(self._known), self._evictions, self._damaged, self._pinned)

    async def close(self) -> None:
        """See ``Tier.close``."""
        self._threads.close()

    async def _manage(self, work: Callable[[], Result]) -> Result:
        try:
            return await self._threads.run(work)
        except OSError as error:
            raise TierFailed(str(error)) from error

    # -- in threads ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        for name in ("tmp", "bad"):
            (self._path / name).mkdir(parents=True, exist_ok=True)
        for file in (self._path / "tmp").iterdir():
            if _age(file) > _STALE_SECONDS:
                file.unlink(missing_ok=True)
        self._scan()

    def _scan(self) -> None:
        """Learn what is there: names only, so that it is quick."""
        known: dict[BlockKey, float] = {}
        for name in _NAMES & set(os.listdir(self._path)):
            for file in _list(self._path / name):
                if (key := key_of(file)) is not None:
                    known[key] = self._known.get(key, 0.0)
        self._known, self._scanned = known, time.monotonic()
        self._pinned = len(self._folder.pinned() & known.keys())
        if self._capacity is not None:
            others = (path for path in self._root.iterdir() if path != self._path and path.is_dir())
            self._others = sum(file.stat().st_size for path in others for file in path.glob("??/*"))

    def _make_room(self, asked: Sequence[BlockKey]) -> Collection[BlockKey]:
        """Before these blocks are written: remove what would be above quota or budget, whoever wrote it, but none of
        them. Those that are not here, and for which there is room then.
        """
        os.stat(self._path / "tmp")  # raises if the directory was removed under us
        if (self._capacity is not None or self.quota is not None) and time.monotonic() > self._scanned + _SCAN_SECONDS:
            self._scan()
        keys, here = [key for key in asked if key not in self._known], set(asked) & self._known.keys()
        if self.quota is not None:
            keys = self._within_quota(keys, here, self.quota // self._file_bytes)
        if self._capacity is not None:
            keys = self._within_budget(keys, here, self._capacity)
        return set(keys)

    def _within_quota(self, keys: list[BlockKey], here: Set[BlockKey], most: int) -> list[BlockKey]:
        """What there is room for when no tenant has more than so many blocks; its own oldest ones go first."""
        has, wants = Counter(map(tenant_of, self._known)), Counter(map(tenant_of, keys))
        for tenant in wants.keys() - {NOBODY}:
            if (above := has[tenant] + wants[tenant] - most) > 0:
                own = [self._folder.file(key) for key in self._known if tenant_of(key) == tenant]
                has[tenant] -= self._evict(own, max(0, len(own) - above) * self._file_bytes, here)
        fits = []
        for key in keys:
            has[tenant_of(key)] += 1
            if tenant_of(key) == NOBODY or has[tenant_of(key)] <= most:
                fits.append(key)
        return fits

    def _within_budget(self, keys: list[BlockKey], here: Set[BlockKey], budget: int) -> list[BlockKey]:
        needed = len(keys) * self._file_bytes
        if len(self._known) * self._file_bytes + self._others + needed > budget:
            self._evict(self._root.glob("*/??/*"), min(int(budget * _SPARE), budget - needed), here)
            self._scan()
        room = budget - self._others - len(self._known) * self._file_bytes
        return keys[: max(0, room // self._file_bytes)]

    def _evict(self, files: Iterable[Path], keep: int, needed: Set[BlockKey]) -> int:
        """Remove the oldest of these files, until they have at most ``keep`` bytes, and how many that were. What is
        pinned stays, and what is needed.
        """
        pinned = {path: SharedFolder(path).pinned() for path in self._root.iterdir() if path.is_dir()}
        here: list[tuple[bool, float, int, Path]] = []
        for file in files:
            with suppress(FileNotFoundError):  # somebody else has evicted it
                stat = file.stat()
                key = key_of(file.name)
                spared = key in needed or key in pinned.get(file.parent.parent, ())
                here.append((spared, stat.st_mtime, stat.st_size, file))
        evicted = 0
        for spared, _, size, file in sorted(here, reverse=True):  # what is pinned, then the youngest
            keep -= size
            if keep < 0 and not spared:
                file.unlink(missing_ok=True)
                self._known.pop(key_of(file.name) or b"", None)
                evicted += 1
        self._evictions += evicted
        return evicted

    def _exists(self, key: BlockKey) -> bool:
        try:
            os.stat(self._folder.file(key))
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, key: BlockKey, target: Target, index: int) -> bool:
        file, page = File(open_direct(str(self._folder.file(key)), os.O_RDONLY)), self._page()

        def digest() -> bytes:
            header = unpack(page[:HEADER_BYTES])
            check(header, key, self._fingerprint, self._block_bytes)
            return header.digest

        try:
            if os.fstat(file.fd).st_size != self._file_bytes:
                raise Corrupt("the file has another size")
            return target.fetch(index, Extent(file, PAGE, self._block_bytes, page), digest)
        finally:
            file.close()

    def _store(self, key: BlockKey, source: Source, index: int, new: Collection[BlockKey]) -> bool:
        if self._exists(key):
            self._known.setdefault(key, 0.0)
            return True
        if key not in new:
            return False
        temporary, file = self._path / "tmp" / uuid.uuid4().hex, self._folder.file(key)
        try:
            if not self._write(temporary, key, source, index):
                temporary.unlink(missing_ok=True)
                return False
            try:
                temporary.rename(file)
            except FileNotFoundError:
                file.parent.mkdir(exist_ok=True)
                temporary.rename(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._known[key] = time.monotonic()
        return True

    def _write(self, path: Path, key: BlockKey, source: Source, index: int) -> bool:
        """A new file with the block. False: it is not to be had."""
        file, page = File(open_direct(str(path), os.O_RDWR | os.O_CREAT | os.O_EXCL)), self._page()

        def head(digest: bytes) -> None:
            page[:HEADER_BYTES] = pack(Header(key, self._fingerprint, self._block_bytes, int(time.time()), digest))

        try:
            return source.save(index, Extent(file, PAGE, self._block_bytes, page), head) is not None
        finally:
            file.close()

    def _mark(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            try:
                os.utime(self._folder.file(key))
            except OSError:  # it is gone, or not ours: nothing that matters
                continue

    async def _quarantine(self, key: BlockKey, why: Corrupt) -> None:
        log.warning("%s: block %s is damaged: %s", self._root, key.hex(), why)
        self._damaged += 1
        self._known.pop(key, None)
        try:
            await self._threads.run(lambda: self._set_aside(key))
        except OSError as error:
            raise TierFailed(str(error)) from error

    def _set_aside(self, key: BlockKey) -> None:
        bad = self._path / "bad"
        try:
            self._folder.file(key).rename(bad / f"{key.hex()}-{uuid.uuid4().hex[:8]}")
        except FileNotFoundError:
            return
        for file in sorted(bad.iterdir(), key=_age)[_MOST_BAD:]:
            file.unlink(missing_ok=True)

    def _page(self) -> memoryview:
        """This thread's, for a header."""
        if not hasattr(self._local, "page"):
            self._local.page = aligned(PAGE)
        page: memoryview = self._local.page
        return page


def _list(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _age(file: Path) -> float:
    """Seconds since a file was written; 0 if it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
