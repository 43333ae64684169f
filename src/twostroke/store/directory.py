"""The shared-directory tier: one file a block, in any directory that many workers, also on many machines, can reach.

::

    <path>/<layout fingerprint>/<first two digits of the key>/<key>     a page with the header, then the payload
    <path>/<layout fingerprint>/tmp/                                     files that are being written
    <path>/<layout fingerprint>/bad/                                     files that did not verify, the last few

There is no master and no lock. A block is written under another name and renamed, so it is there as a whole or not at
all. Two who write the same block write the same bytes. Whoever finds more than the budget removes the oldest; that a
file is gone by the time it is read means that the block is not there.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from twostroke.kv.copying import copy
from twostroke.kv.keys import BlockKey
from twostroke.store.direct import NO_ROOM, PAGE, aligned, open_direct, pages, read_at, write_at
from twostroke.store.format import HEADER_BYTES, Corrupt, Header, Sealed, check, pack, unpack, verify
from twostroke.store.threads import Threads
from twostroke.store.tier import Source, Target, TierFailed, Usage

log = logging.getLogger(__name__)
_THREADS = 8  # on a network's file system each waits most of the time
_SCAN_SECONDS = 5.0  # between looks at what others have written, while we write
_TOUCH_SECONDS = 60.0  # a file that was used is marked as used at most this often
PAUSE_SECONDS = 30.0  # without writing after the file system was full
_STALE_SECONDS = 3600.0  # after which an unfinished file is somebody's who died
_MOST_BAD = 16  # damaged files that are kept
_SPARE = 0.95  # of the budget is left in place when something has to go
_NAMES = frozenset(f"{number:02x}" for number in range(256))


class DirectoryTier:
    """See ``Tier``. What it knows is a cache of what is in the directory: the files themselves decide."""

    def __init__(self, path: Path, block_bytes: int, fingerprint: str, capacity: int | None = None) -> None:
        """``capacity``: bytes of files under ``path``, of all layouts, about; ``None`` is no limit."""
        self.name = "dir"
        self._root = path
        self._path = path / fingerprint
        self._block_bytes = block_bytes
        self._fingerprint = bytes.fromhex(fingerprint)
        self._capacity = capacity
        self._file_bytes = PAGE + pages(block_bytes)
        self._threads = Threads(_THREADS, self.name)
        self._local = threading.local()
        self._known: dict[BlockKey, float] = {}  # blocks that were there, and when they were last marked as used
        self._others = 0  # bytes of other layouts
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
                block = self._read(keys[index])
            except (Corrupt, OSError) as error:
                return error
            return target.place(index, block)

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
        return next((index for index, result in enumerate(results) if result is not True), len(results))

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""
        if time.monotonic() < self._paused:
            return sum(key in self._known for key in keys)
        try:
            await self._threads.run(lambda: self._make_room(len(keys)))
            stored = await self._threads.each(lambda i: self._store(keys[i], source, i), len(keys))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise TierFailed(str(error)) from error
            log.warning("%s: nothing is written for %.0f s: %s", self._root, PAUSE_SECONDS, error.strerror)
            self._paused = time.monotonic() + PAUSE_SECONDS
            return sum(key in self._known for key in keys)
        return sum(stored)

    def usage(self) -> Usage:
        """See ``Tier.usage``. As of the last look, and of our own doing since."""
        used = len(self._known) * self._file_bytes + self._others
        return Usage(self._capacity or 0, used, len(self._known), self._evictions, self._damaged)

    async def close(self) -> None:
        """See ``Tier.close``."""
        self._threads.close()

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
                if len(file) == 32:
                    key = bytes.fromhex(file)
                    known[key] = self._known.get(key, 0.0)
        self._known, self._scanned = known, time.monotonic()
        if self._capacity is not None:
            others = (path for path in self._root.iterdir() if path != self._path and path.is_dir())
            self._others = sum(file.stat().st_size for path in others for file in path.glob("??/*"))

    def _make_room(self, count: int) -> None:
        """Before so many blocks are written: remove what would be above the budget, whoever wrote it."""
        os.stat(self._path / "tmp")  # raises if the directory was removed under us
        if self._capacity is None:
            return
        if time.monotonic() > self._scanned + _SCAN_SECONDS:
            self._scan()
        needed = count * self._file_bytes
        if len(self._known) * self._file_bytes + self._others + needed <= self._capacity:
            return
        keep = min(int(self._capacity * _SPARE), self._capacity - needed)
        files = sorted(self._files(), reverse=True)  # the youngest first
        for _, size, file in files:
            keep -= size
            if keep < 0:
                file.unlink(missing_ok=True)
                self._evictions += 1
        self._scan()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each block of any layout was used last, its bytes, its file."""
        for file in self._root.glob("*/??/*"):
            try:
                stat = file.stat()
            except FileNotFoundError:  # somebody else has evicted it
                continue
            yield stat.st_mtime, stat.st_size, file

    def _file(self, key: BlockKey) -> Path:
        name = key.hex()
        return self._path / name[:2] / name

    def _exists(self, key: BlockKey) -> bool:
        try:
            os.stat(self._file(key))
        except FileNotFoundError:
            return False
        return True

    def _read(self, key: BlockKey) -> Sealed:
        fd = open_direct(str(self._file(key)), os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != self._file_bytes:
                raise Corrupt("the file has another size")
            buffer = self._buffer()
            read_at(fd, buffer, 0)
        finally:
            os.close(fd)
        header = unpack(buffer[:HEADER_BYTES])
        check(header, key, self._fingerprint, self._block_bytes)
        return verify(Sealed(buffer[PAGE : PAGE + self._block_bytes], header.digest))

    def _store(self, key: BlockKey, source: Source, index: int) -> bool:
        if self._exists(key):
            self._known.setdefault(key, 0.0)
            return True
        block = source.block(index)
        if block is None:
            return False
        buffer = self._buffer()
        buffer[:HEADER_BYTES] = pack(Header(key, self._fingerprint, self._block_bytes, int(time.time()), block.digest))
        copy(buffer[PAGE : PAGE + self._block_bytes], block.payload)
        temporary, file = self._path / "tmp" / uuid.uuid4().hex, self._file(key)
        try:
            fd = open_direct(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_at(fd, buffer, 0)
            finally:
                os.close(fd)
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

    def _mark(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            try:
                os.utime(self._file(key))
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
            self._file(key).rename(bad / f"{key.hex()}-{uuid.uuid4().hex[:8]}")
        except FileNotFoundError:
            return
        for file in sorted(bad.iterdir(), key=_age)[_MOST_BAD:]:
            file.unlink(missing_ok=True)

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = aligned(self._file_bytes)
        buffer: memoryview = self._local.buffer
        return buffer


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
