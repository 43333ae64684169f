"""Direct I/O: whole pages between files and aligned memory, past the page cache."""

import errno
import mmap
import os

import numpy as np

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # nothing can be written, but read
PAGE = mmap.PAGESIZE  # alignment of memory, offsets and sizes; a multiple of every disk's sector


def pages(size: int) -> int:
    """``size`` bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def aligned(size: int) -> memoryview:
    """Zeroed memory of whole pages that starts at one, for at least ``size`` bytes."""
    return memoryview(mmap.mmap(-1, max(pages(size), PAGE)))


def is_aligned(memory: memoryview) -> bool:
    """Whether these are whole pages, which direct I/O takes as they are."""
    return len(memory) % PAGE == 0 and np.frombuffer(memory, np.uint8).ctypes.data % PAGE == 0


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
