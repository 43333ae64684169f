"""What is in the files of disk and directory tiers, seen from outside: for ``twostroke kv``.

A folder of a disk tier is changed only while no worker owns it. A shared directory has no owner: blocks are taken out
of it as any node would.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from twostroke.errors import StartupError
from twostroke.kv.direct import PAGE, aligned, open_direct, read_at
from twostroke.kv.keys import KEY_BYTES, BlockKey
from twostroke.store.disk import SUFFIX, lock, unowned
from twostroke.store.format import HEADER_BYTES, Corrupt, Header, Sealed, check, unpack, verify
from twostroke.store.segment import Segment
from twostroke.store.tier import Entry

_HEX = frozenset("0123456789abcdef")
_STALE_SECONDS = 3600.0
_PINNED = "pinned"


class Folder(Protocol):
    """The blocks of one layout in one place."""

    path: Path
    kind: str  # "disk" or "dir"
    fingerprint: str
    owned: bool  # by a worker that runs

    def entries(self, *, verified: bool = False) -> Iterator[Entry]:
        """Its blocks. ``verified``: read as a whole. Those that cannot be read have an ``error``."""
        ...

    def size(self) -> int:
        """Bytes of all of its files."""
        ...

    def collect(self) -> int:
        """Remove what is damaged, unfinished or quarantined. How many."""
        ...

    def pin(self, keys: Collection[BlockKey] | None, pinned: bool) -> int:
        """Those of these blocks that are here, or all, are never evicted, or may be again. How many."""
        ...


class DiskFolder:
    """See ``Folder``."""

    kind = "disk"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = path.name[:32]
        self.owned = not unowned(path)

    def entries(self, *, verified: bool = False) -> Iterator[Entry]:
        """See ``Folder.entries``."""
        for _, _, entry in self._slots(verified):
            yield entry

    def size(self) -> int:
        """See ``Folder.size``."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def collect(self) -> int:
        """See ``Folder.collect``."""
        if self.owned:
            return 0
        bad = [(segment, slot) for segment, slot, entry in self._slots(verified=True) if entry.error is not None]
        for name, slot in bad:
            if slot is None:
                (self.path / name).unlink()
                continue
            with _Opened(self.path, name, bytes.fromhex(self.fingerprint)) as segment:
                segment.forget(slot)
        return len(bad)

    def pin(self, keys: Collection[BlockKey] | None, pinned: bool) -> int:
        """See ``Folder.pin``."""
        if self.owned:
            return 0
        slots: dict[str, list[int]] = {}
        for name, slot, entry in self._slots(verified=False):
            if slot is not None and (keys is None or entry.key in keys):
                slots.setdefault(name, []).append(slot)
        for name, some in slots.items():
            with _Opened(self.path, name, bytes.fromhex(self.fingerprint)) as segment:
                segment.pin(some, pinned)
        return sum(map(len, slots.values()))

    def _slots(self, verified: bool) -> Iterator[tuple[str, int | None, Entry]]:
        for file in sorted(self.path.glob(f"*{SUFFIX}")):
            try:
                with _Opened(self.path, file.name, bytes.fromhex(self.fingerprint)) as segment:
                    for slot, header in segment.headers():
                        read = lambda: Sealed(segment.payload(slot).read(), header.digest)  # noqa: B023, E731
                        error = _error(read) if verified else None
                        yield file.name, slot, Entry(header.key, header.length, header.written, header.pinned, error)
            except Corrupt as broken:
                yield file.name, None, Entry(b"", 0, 0.0, error=f"{file.name}: {broken}")


class SharedFolder:
    """See ``Folder``."""

    kind = "dir"
    owned = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = path.name

    def entries(self, *, verified: bool = False) -> Iterator[Entry]:
        """See ``Folder.entries``."""
        pinned = self.pinned()
        for file in sorted(self.path.glob("??/*")):
            try:
                entry = self._entry(file, verified)
                yield entry._replace(pinned=entry.key in pinned)
            except FileNotFoundError:  # evicted meanwhile
                continue

    def size(self) -> int:
        """See ``Folder.size``."""
        return sum(file.stat().st_size for file in self.path.glob("*/*"))

    def collect(self) -> int:
        """See ``Folder.collect``."""
        gone = list(self.path.glob("bad/*"))
        gone += [self._pin(key) for key in self.pinned() if not self.file(key).exists()]
        gone += [file for file in self.path.glob("tmp/*") if time.time() - file.stat().st_mtime > _STALE_SECONDS]
        gone += [file for file in self.path.glob("??/*") if self._entry(file, verified=True).error is not None]
        for file in gone:
            file.unlink(missing_ok=True)
        return len(gone)

    def evict(self, keep: int) -> int:
        """Remove the least recently used blocks until they take ``keep`` bytes at most, or all others are pinned. How
        many.
        """
        pinned = self.pinned()
        files = [(key_of(file.name) in pinned, stat.st_mtime, stat.st_size, file) for file, stat in self._stats()]
        removed = 0
        for spared, _, size, file in sorted(files, reverse=True):
            keep -= size
            if keep < 0 and not spared:
                file.unlink(missing_ok=True)
                removed += 1
        return removed

    def file(self, key: BlockKey) -> Path:
        """Where a block is, or would be. Folders go by the hash in its key: its tenant's blocks are in all of them."""
        name = key.hex()
        return self.path / name[-2:] / name

    def pinned(self) -> set[BlockKey]:
        """Blocks that are not evicted, whether or not they are here."""
        with suppress(FileNotFoundError):
            return {key for name in os.listdir(self.path / _PINNED) if (key := key_of(name)) is not None}
        return set()

    def pin(self, keys: Collection[BlockKey] | None, pinned: bool) -> int:
        """See ``Folder.pin``."""
        if keys is None:
            keys = [key for file in self.path.glob("??/*") if (key := key_of(file.name)) is not None]
        here = [key for key in keys if self.file(key).exists()]
        if here:
            (self.path / _PINNED).mkdir(exist_ok=True)
        for key in here:
            if pinned:
                self._pin(key).touch()
            else:
                self._pin(key).unlink(missing_ok=True)
        return len(here)

    def drop(self, keys: Collection[BlockKey]) -> int:
        """Remove blocks, pinned ones too. How many."""
        count = 0
        for key in keys:
            self._pin(key).unlink(missing_ok=True)
            count += self.file(key).exists()
            self.file(key).unlink(missing_ok=True)
        return count

    def _pin(self, key: BlockKey) -> Path:
        return self.path / _PINNED / key.hex()

    def _stats(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self.path.glob("??/*"):
            try:
                yield file, file.stat()
            except FileNotFoundError:
                continue

    def _entry(self, file: Path, verified: bool) -> Entry:
        stat = file.stat()
        key = key_of(file.name) or b""
        fd = open_direct(str(file), os.O_RDONLY)
        try:
            buffer = aligned(stat.st_size if verified else PAGE)
            if stat.st_size < PAGE:
                return Entry(key, 0, stat.st_mtime, error="it is cut off")
            read_at(fd, buffer[: stat.st_size // PAGE * PAGE] if verified else buffer, 0)
        finally:
            os.close(fd)
        try:
            header = unpack(buffer[:HEADER_BYTES])
            check(header, key, bytes.fromhex(self.fingerprint), header.length)
        except Corrupt as broken:
            return Entry(key, 0, stat.st_mtime, error=str(broken))
        error = _error(lambda: _payload(buffer, header)) if verified else None
        return Entry(key, header.length, header.written, error=error)


def key_of(name: str) -> BlockKey | None:
    """The block that a file of this name holds; None if it is no name of a block."""
    return bytes.fromhex(name) if len(name) == 2 * KEY_BYTES and set(name) <= _HEX else None


def folders(path: Path) -> list[Folder]:
    """Everything that tiers have left under a path.

    Raises:
        StartupError: there is no such directory.
    """
    if not path.is_dir():
        raise StartupError(f"{path} is no directory")
    found: list[Folder] = []
    for one in sorted(path.iterdir()):
        if not one.is_dir() or len(one.name) < 32 or not set(one.name[:32]) <= _HEX:
            continue
        if len(one.name) == 32 and (one / "tmp").is_dir():
            found.append(SharedFolder(one))
        elif one.name[32:33] == "-":
            found.append(DiskFolder(one))
    return found


def clear(folder: Folder) -> bool:
    """Remove all of it. False if a worker uses it."""
    if isinstance(folder, DiskFolder):
        directory = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not lock(directory):
                return False
            shutil.rmtree(folder.path)
        finally:
            os.close(directory)
        return True
    shutil.rmtree(folder.path)
    return True


class _Opened:
    """A segment, open for a while."""

    def __init__(self, folder: Path, name: str, fingerprint: bytes) -> None:
        self._folder = folder
        self._name = name
        self._fingerprint = fingerprint

    def __enter__(self) -> Segment:
        directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            size = Segment.payload_bytes(directory, self._name)
            self._segment = Segment.open(directory, self._name, size, self._fingerprint)
        finally:
            os.close(directory)
        return self._segment

    def __exit__(self, *_: object) -> None:
        self._segment.close()


def _payload(buffer: memoryview, header: Header) -> Sealed:
    if len(buffer) < PAGE + header.length:
        raise Corrupt("it is cut off")
    return Sealed(buffer[PAGE : PAGE + header.length], header.digest)


def _error(read: Callable[[], Sealed]) -> str | None:
    try:
        verify(read())
    except (Corrupt, OSError) as error:
        return str(error)
    return None
