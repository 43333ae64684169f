"""The memory of a CPU worker's pool: an anonymous file that same-host peers can map, and that dies with its owner.

The file is a ``memfd``: it has no name in any file system, so not even ``kill -9`` leaves it behind. A peer opens it
as ``/proc/<pid>/fd/<fd>`` (same user required) and checks the stamp in its header, because a pid can be reused.
"""

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from twostroke.errors import HandoverFailed, MemoryTooSmall
from twostroke.messages import PoolAddress

HEADER = mmap.PAGESIZE  # one page, so that slots start aligned
_MAGIC = b"twostroke-pool-1:"
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # madvise(2), Linux 5.14; not yet in Python's mmap

Bytes = npt.NDArray[np.uint8]


def host_id() -> str:
    """Names this machine's running kernel: memory files can only be shared among processes that agree on it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class PoolMemory:
    """``num_slots`` slots of ``block_bytes`` bytes that this process owns and same-host peers may read."""

    def __init__(self, num_slots: int, block_bytes: int, instance: str) -> None:
        """Raises ``MemoryTooSmall`` if the machine has not enough memory left for all slots."""
        size = HEADER + num_slots * block_bytes
        free = psutil.virtual_memory().available
        if size > free:
            raise MemoryTooSmall(
                f"a KV pool of {size / 2**20:.0f} MiB does not fit into the {free / 2**20:.0f} MiB of memory that are "
                "free: lower --kv-memory"
            )
        self._fd = os.memfd_create("twostroke-pool", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        # Every page now: taken one by one by page faults, memory would come at 0.5 GB/s while requests wait.
        try:
            _populate(self._map, _POPULATE_WRITE)
        except OSError as error:
            raise MemoryTooSmall(f"a KV pool of {size / 2**20:.0f} MiB does not fit into memory: {error}") from error
        stamp = _MAGIC + instance.encode()
        self._map[: len(stamp)] = stamp
        self.slots: Bytes = np.frombuffer(self._map, np.uint8, offset=HEADER).reshape(num_slots, block_bytes)
        self.address = PoolAddress(
            host=host_id(),
            pid=os.getpid(),
            fd=self._fd,
            instance=instance,
            num_slots=num_slots,
            block_bytes=block_bytes,
        )

    def close(self) -> None:
        """Give the memory back once nothing views it any more."""
        os.close(self._fd)


def _populate(memory: mmap.mmap, advice: int) -> None:
    """Have all pages in place. An older kernel takes them one by one when they are touched."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def has_pool(address: PoolAddress) -> bool:
    """Whether a process still keeps a file where the address says."""
    return os.path.lexists(f"/proc/{address.pid}/fd/{address.fd}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # whatever the peer names: a pipe must not make us wait


def map_peer(address: PoolAddress) -> Bytes:
    """A peer's slots, read-only, ``uint8 [num_slots, block_bytes]``. Unmapped when the array is dropped.

    Raises:
        HandoverFailed: the peer is gone, on another machine, or not who the address says.
    """
    if address.host != host_id():
        raise HandoverFailed("the peer's pool is on another machine: shared memory cannot reach it")
    size = HEADER + address.num_slots * address.block_bytes
    try:
        with open(f"/proc/{address.pid}/fd/{address.fd}", "rb", opener=_open_at_once) as file:
            view = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
            _populate(view, _POPULATE_READ)
    except (OSError, ValueError) as error:
        raise HandoverFailed(f"the peer's pool cannot be mapped: {error}") from error
    stamp = _MAGIC + address.instance.encode() + b"\0"
    if view[: len(stamp)] != stamp:
        raise HandoverFailed("the peer's pool belongs to another instance")
    slots: Bytes = np.frombuffer(view, np.uint8, offset=HEADER)
    return slots.reshape(address.num_slots, address.block_bytes)
