"""The memory of a CPU worker's pool: an anonymous file that same-host peers can map, and that dies with its owner.

The file is a ``memfd``: it has no name in any file system, so not even ``kill -9`` leaves it behind. A peer opens it
as ``/proc/<pid>/fd/<fd>`` (same user required) and checks the stamp in its header, because a pid can be reused.
"""

import errno
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

from twostroke.errors import HandoverFailed, MemoryTooSmall
from twostroke.messages import MemoryFile, PoolAddress

HEADER = mmap.PAGESIZE  # one page, so that slots start aligned
_MAGIC = b"twostroke-pool-1:"
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # madvise(2), Linux 5.14; not yet in Python's mmap
_STEP = 64 << 20  # bytes that are populated in one call, which holds the GIL

Bytes = npt.NDArray[np.uint8]


@cache
def host_id() -> str:
    """Names this machine's running kernel and our pid namespace: only processes that agree on both find each other's
    memory. Containers mostly do not.
    """
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{Path('/proc/self/ns/pid').stat().st_ino}"


def started(pid: int) -> bytes | None:
    """When a process started, in clock ticks since boot, since a pid alone can be reused. None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()  # the command's name, in brackets, may hold anything
    return None if state in b"ZX" else fields[18]


class SlotMemory(Protocol):
    """A pool's memory, wherever it is."""

    address: PoolAddress  # where same-host peers read it

    def close(self) -> None:
        """Give the memory back. Nobody may use its slots any more."""
        ...


class Area:
    """Memory for slots, which need not be known yet. All of it is taken at once, which takes seconds for some GiB; it
    is given back once nothing refers to it or views it any more.
    """

    def __init__(self, size: int, what: str = "a KV pool", advice: str = "lower --kv-memory") -> None:
        """``size``: bytes, without the header; ``what`` and ``advice``: for the error.

        Raises:
            MemoryTooSmall: the machine has not enough memory left.
        """
        size += HEADER
        free = psutil.virtual_memory().available
        if size > free:
            raise MemoryTooSmall(
                f"{what} of {size / 2**20:.0f} MiB does not fit into the {free / 2**20:.0f} MiB of memory that are "
                f"free: {advice}"
            )
        self.fd = os.memfd_create("twostroke-pool", os.MFD_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        # Every page now: taken one by one by page faults, memory would come at 0.5 GB/s while requests wait.
        try:
            _populate(self.map, _POPULATE_WRITE)
        except OSError as error:
            raise MemoryTooSmall(f"{what} of {size / 2**20:.0f} MiB does not fit into memory: {error}") from error


class PoolMemory:
    """``num_slots`` slots of ``block_bytes`` bytes that this process owns and same-host peers may read."""

    def __init__(self, num_slots: int, block_bytes: int, instance: str, area: Area | None = None) -> None:
        """``area``: what the slots are cut out of; by default one of their own.

        Raises:
            MemoryTooSmall: the machine has not enough memory left for all slots.
        """
        self._own = Area(num_slots * block_bytes) if area is None else None
        area = self._own or area
        assert area is not None
        stamp = _MAGIC + instance.encode() + b"\0"
        area.map[: len(stamp)] = stamp
        self._fd = area.fd
        slots: Bytes = np.frombuffer(area.map, np.uint8, num_slots * block_bytes, HEADER)
        self.slots = slots.reshape(num_slots, block_bytes)
        self.address = PoolAddress(
            host=host_id(),
            pid=os.getpid(),
            instance=instance,
            num_slots=num_slots,
            block_bytes=block_bytes,
            memory=MemoryFile(self._fd),
        )

    def close(self) -> None:
        """Give the memory back once nothing views it any more, unless it is somebody else's area."""
        if self._own is not None:
            self._own.close()


def _populate(memory: mmap.mmap, advice: int) -> None:
    """Have all pages in place. An older kernel takes them one by one when they are touched."""
    try:
        for start in range(0, len(memory), _STEP):
            memory.madvise(advice, start, min(_STEP, len(memory) - start))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # whatever the peer names: a pipe must not make us wait


def map_peer(address: PoolAddress) -> Bytes:
    """The slots of a peer on this machine, read-only, ``uint8 [num_slots, block_bytes]``. Unmapped when dropped.

    Raises:
        HandoverFailed: the peer is gone, not who the address says, or its pool is no memory file.
    """
    memory = address.memory
    if not isinstance(memory, MemoryFile):
        raise HandoverFailed(f"the peer's pool is {memory.kind}, ours {MemoryFile.kind}: they exchange no blocks")
    size = HEADER + address.num_slots * address.block_bytes
    try:
        with open(f"/proc/{address.pid}/fd/{memory.fd}", "rb", opener=_open_at_once) as file:
            view = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
            _populate(view, _POPULATE_READ)
    except (OSError, ValueError) as error:
        raise HandoverFailed(f"the peer's pool cannot be mapped: {error}") from error
    stamp = _MAGIC + address.instance.encode() + b"\0"
    if view[: len(stamp)] != stamp:
        raise HandoverFailed("the peer's pool belongs to another instance")
    slots: Bytes = np.frombuffer(view, np.uint8, offset=HEADER)
    return slots.reshape(address.num_slots, address.block_bytes)
