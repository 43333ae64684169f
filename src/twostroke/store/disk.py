"""The disk tier: segments of slots in a directory, read and written past the page cache.

``<path>/<layout fingerprint>-<owner>/<number>.segment``. One process owns such a folder, by a lock that the kernel
drops with the process. It is named after the worker, so that a restarted one takes over what is there.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twostroke.errors import MemoryTooSmall
from twostroke.kv.direct import NO_ROOM, PAGE, Extent
from twostroke.kv.keys import BlockKey
from twostroke.store.eviction import Lru, Policy
from twostroke.store.format import Corrupt
from twostroke.store.segment import Segment
from twostroke.store.slots import SlotTier

log = logging.getLogger(__name__)
DISK_THREADS = 8  # that read, and as many that write
_SEGMENTS = 32  # of a full tier, about
RETRY_SECONDS = 30.0  # between attempts to grow on a full disk
_MOST_OWNERS = 64  # of one name
_SPECIAL = re.compile(r"[^A-Za-z0-9.-]")  # not in the name of a folder
SUFFIX = ".segment"


class _Folder:
    """See ``Medium``. It grows by whole segments, whose space is reserved: that the disk is full later does no harm."""

    def __init__(self, path: Path, block_bytes: int, fingerprint: str, budget: int, owner: str) -> None:
        self._path = path
        self._owner = _SPECIAL.sub("_", owner)
        self._block_bytes = block_bytes
        self._fingerprint = fingerprint
        self._budget = budget
        self._slots = max(1, (budget // _SEGMENTS - 2 * PAGE) // Segment.file_bytes(1, block_bytes))  # of a new segment
        self.slot_bytes = Segment.file_bytes(self._slots, block_bytes) // self._slots
        self._directory: int | None = None  # open, and locked
        self._segments: list[Segment] = []
        self._places: list[tuple[Segment, int]] = []  # by slot
        self._next = 0  # number of the next file
        self._retry = 0.0
        self._pinned: set[int] = set()  # slots, as of the start

    def open(self) -> list[tuple[BlockKey, int]]:
        """See ``Medium.open``."""
        self.close()
        self._path.mkdir(parents=True, exist_ok=True)
        self._directory = self._own()
        self._clear_out()
        keys: list[BlockKey] = []
        slots: list[npt.NDArray[np.int64]] = []
        times: list[npt.NDArray[np.uint64]] = []
        self._pinned = set()
        for name in self._names():
            self._next = max(self._next, int(name.removesuffix(SUFFIX)) + 1)
            try:
                segment = Segment.open(self._directory, name, self._block_bytes, bytes.fromhex(self._fingerprint))
            except Corrupt as error:
                log.warning("%s: %s is dropped: %s", self._path, name, error)
                os.unlink(name, dir_fd=self._directory)
                continue
            if self._used() + segment.size > self._budget:  # it was larger at an earlier start
                segment.close()
                os.unlink(name, dir_fd=self._directory)
                continue
            first = self._add(segment)
            index = segment.index()
            keys += index.keys
            slots.append(index.slots + first)
            times.append(index.written)
            self._pinned.update((index.pinned + first).tolist())
        if not keys:
            return []
        order = np.argsort(np.concatenate(times), kind="stable")
        return list(zip([keys[place] for place in order], np.concatenate(slots)[order].tolist(), strict=True))

    def size(self) -> int:
        """See ``Medium.size``."""
        return len(self._places)

    def grow(self) -> int:
        """See ``Medium.grow``. On a full disk it goes on with what it has."""
        assert self._directory is not None, "it is open"
        self._check()
        if self._used() + Segment.file_bytes(self._slots, self._block_bytes) > self._budget:
            return self.size()
        if time.monotonic() < self._retry:
            return self.size()
        name, layout = f"{self._next:06d}{SUFFIX}", bytes.fromhex(self._fingerprint)
        try:
            segment = Segment.create(self._directory, name, self._slots, self._block_bytes, layout)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            log.warning("%s: the tier stays at %d blocks: %s", self._path, self.size(), error.strerror)
            self._retry = time.monotonic() + RETRY_SECONDS
            return self.size()
        self._next += 1
        self._add(segment)
        return self.size()

    def payload(self, slot: int) -> Extent:
        """See ``Device.payload``."""
        segment, at = self._places[slot]
        return segment.payload(at)

    def digest(self, slot: int, key: BlockKey) -> bytes:
        """See ``Device.digest``."""
        segment, at = self._places[slot]
        return segment.digest(at, key)

    def label(self, slot: int, key: BlockKey, digest: bytes) -> None:
        """See ``Device.label``."""
        segment, at = self._places[slot]
        segment.label(at, key, digest)

    def commit(self, slots: Sequence[int]) -> None:
        """See ``Lasting.commit``."""
        self._check()
        for segment, places in self._by_segment(slots).items():
            segment.commit(places)

    def forget(self, slot: int) -> None:
        """See ``Medium.forget``."""
        segment, at = self._places[slot]
        segment.forget(at)

    def pin(self, slots: Sequence[int], pinned: bool) -> None:
        """See ``Lasting.pin``."""
        self._check()
        for segment, places in self._by_segment(slots).items():
            segment.pin(places, pinned)

    def pinned(self) -> set[int]:
        """See ``Lasting.pinned``."""
        return self._pinned

    def close(self) -> None:
        """See ``Medium.close``."""
        for segment in self._segments:
            segment.close()
        self._segments, self._places, self._next = [], [], 0
        if self._directory is not None:
            os.close(self._directory)  # and with it the lock
            self._directory = None

    def _own(self) -> int:
        """A folder of this layout that nobody else owns, open and locked."""
        for number in range(_MOST_OWNERS):
            path = self._path / "-".join([self._fingerprint, self._owner, *([str(number)] if number else [])])
            path.mkdir(exist_ok=True)
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if lock(directory):
                return directory
            os.close(directory)
        raise OSError(errno.EBUSY, f"{_MOST_OWNERS} workers use {self._path} already")

    def _clear_out(self) -> None:
        """What nobody owns any more, of other models say, counts against the budget: the oldest of it goes."""
        left: list[tuple[float, Path, int]] = []
        for path in self._path.iterdir():
            if path.is_dir() and not path.is_symlink() and not self._is_ours(path):
                files = list(path.glob(f"*{SUFFIX}"))
                if files and unowned(path):
                    newest = max(file.stat().st_mtime for file in files)
                    left.append((newest, path, sum(file.stat().st_size for file in files)))
        room = self._budget - sum(os.stat(name, dir_fd=self._directory).st_size for name in self._names())
        for _, path, size in sorted(left, reverse=True):
            room -= size
            if room < Segment.file_bytes(self._slots, self._block_bytes):
                log.warning("%s: %s is dropped: nobody uses it, and the budget is full", self._path, path.name)
                shutil.rmtree(path, ignore_errors=True)

    def _is_ours(self, path: Path) -> bool:
        assert self._directory is not None, "it is open"
        return os.path.samestat(path.stat(), os.fstat(self._directory))

    def _names(self) -> list[str]:
        assert self._directory is not None, "it is open"
        return sorted(name for name in os.listdir(self._directory) if name.removesuffix(SUFFIX).isdecimal())

    def _add(self, segment: Segment) -> int:
        first = len(self._places)
        self._segments.append(segment)
        self._places += [(segment, slot) for slot in range(segment.slots)]
        self.slot_bytes = self._used() // len(self._places)  # those of an earlier start may have had another budget
        return first

    def _used(self) -> int:
        return sum(segment.size for segment in self._segments)

    def _by_segment(self, slots: Sequence[int]) -> dict[Segment, list[int]]:
        found: dict[Segment, list[int]] = {}
        for slot in slots:
            segment, at = self._places[slot]
            found.setdefault(segment, []).append(at)
        return found

    def _check(self) -> None:
        """Files that were removed under us can be read and written, but nobody finds them again."""
        assert self._directory is not None, "it is open"
        if os.fstat(self._directory).st_nlink == 0 or any(segment.removed for segment in self._segments):
            raise OSError(errno.ENOENT, f"{self._path} was removed")


def lock(directory: int) -> bool:
    """Own an open folder until it is closed. False if somebody else does."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unowned(path: Path) -> bool:
    """Whether no running worker owns this folder."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return lock(directory)
    finally:
        os.close(directory)


def disk_tier(
    path: Path, block_bytes: int, fingerprint: str, capacity: int, owner: str, policy: Callable[[], Policy] = Lru
) -> SlotTier:
    """A tier of at most ``capacity`` bytes of files under ``path``. ``owner``: our name, the same after a restart.

    Raises:
        MemoryTooSmall: it would not hold one block.
    """
    if capacity < Segment.file_bytes(1, block_bytes):
        raise MemoryTooSmall(f"a disk tier of {capacity:,} bytes does not hold one block of {block_bytes:,}")
    folder = _Folder(path, block_bytes, fingerprint, capacity, owner)
    return SlotTier("disk", folder, policy, capacity=capacity, threads=DISK_THREADS)
