"""Direct I/O: whole pages between files and aligned memory, past the page cache."""

import errno
import mmap
import os
import threading
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from twostroke.kv.copying import copy_digested

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # nothing can be written, but read
PAGE = mmap.PAGESIZE  # alignment of memory, offsets and sizes; a multiple of every disk's sector
_HUGE = 2 << 20  # bytes of a huge page
_LONG = 64 << 10  # bytes, from which on one is worth it
_RING = 8 << 20  # bytes of a thread's buffers


_local = threading.local()


class Closeable(Protocol):
    """What somebody else has opened of a file."""

    def __init__(self, fd: int) -> None:
        """``fd``: ours, of the same file."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


Opened = TypeVar("Opened", bound=Closeable)


class File:
    """An open file, which has an owner; and what others, who move bytes by themselves, have opened of it."""

    def __init__(self, fd: int) -> None:
        """``fd``: is ours from now on."""
        self.fd = fd
        self._lock = threading.Lock()
        self._others: dict[type[Closeable], Closeable] = {}

    def opened(self, kind: type[Opened]) -> Opened:
        """The one of this kind, made out of the file descriptor if there is none yet."""
        with self._lock:
            found = self._others.get(kind)
            if found is None:
                found = self._others[kind] = kind(self.fd)
        assert isinstance(found, kind), "kept by its kind"
        return found

    def close(self) -> None:
        """Close it, and what was opened of it."""
        for other in self._others.values():
            other.close()
        os.close(self.fd)


class Extent(NamedTuple):
    """Where a block's payload is in a file: in whole pages."""

    file: File
    offset: int
    size: int  # bytes of the payload
    head: memoryview | None = None  # what stands in front of it: who reads or writes the payload does so with that too

    def read(self) -> memoryview:
        """The payload; good until this thread reads or writes another. ``OSError``."""
        buffer, head = _buffer(self.size), self.head
        if head is None or os.preadv(self.file.fd, [head, buffer], self.offset - len(head)) < len(head) + len(buffer):
            self.read_head()
            read_at(self.file.fd, buffer, self.offset)
        return buffer[: self.size]

    def read_head(self) -> None:
        """Read no more than that. ``OSError``."""
        if self.head is not None:
            read_at(self.file.fd, self.head, self.offset - len(self.head))

    def load(self, payload: memoryview) -> bytes:
        """Copy a payload into this thread's buffers, for ``flush`` to write it; its xxh3-128. Direct I/O out of a pool,
        whose pages are small, would take longer, and what it writes might be another block by then.
        """
        _local.loaded = _buffer(self.size)
        return copy_digested(_local.loaded[: self.size], payload)

    def flush(self) -> None:
        """Write what this thread has loaded last. ``OSError``."""
        buffer, head = _local.loaded, self.head
        if head is None or os.pwritev(self.file.fd, [head, buffer], self.offset - len(head)) < len(head) + len(buffer):
            self.write_head()
            write_at(self.file.fd, buffer, self.offset)

    def write_head(self) -> None:
        """Write no more than that. ``OSError``."""
        if self.head is not None:
            write_at(self.file.fd, self.head, self.offset - len(self.head))


def _buffer(size: int) -> memoryview:
    """This thread's whole pages, for so many bytes: others each time, as far as there are. A disk is slow to write into
    lines that a core's cache still has from the block before.
    """
    length = pages(size)
    ring = getattr(_local, "ring", None)
    if ring is None or len(ring) < length:
        ring = _local.ring = aligned(max(_RING, size))
        _local.next = 0
    start = _local.next if _local.next + length <= len(ring) else 0
    _local.next = start + length
    buffer: memoryview = ring[start : start + length]
    return buffer


def pages(size: int) -> int:
    """``size`` bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def aligned(size: int) -> memoryview:
    """Zeroed memory of whole pages that starts at one, for at least ``size`` bytes. For a long one the kernel is asked
    for huge pages: direct I/O between a disk and a few long pieces takes half the time of that with many small ones.
    """
    if size < _LONG:
        return memoryview(mmap.mmap(-1, max(pages(size), PAGE)))
    whole = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that has none
        whole.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(whole, np.uint8).ctypes.data % _HUGE
    return memoryview(whole)[start : start + pages(size)]


def open_direct(path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
    """A file descriptor with ``O_DIRECT``, or without it where the file system has no such thing. ``OSError``."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset`` on. ``OSError`` if the file ends before that."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file is cut off")
        done += count


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of ``buffer`` at ``offset``. ``OSError``."""
    done = 0
    while done < len(buffer):
        count = os.pwritev(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "nothing could be written")
        done += count
