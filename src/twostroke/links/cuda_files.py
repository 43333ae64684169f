"""Between files and a GPU's slots, past the host's memory where the machine has GPUDirect Storage (KvikIO).

A block goes through memory on the GPU that belongs to the thread: a read that hangs in a dead file system must not hold
a slot, and storage sees no memory but that. The copy from there to the slot takes as good as no time.

Without the driver of GPUDirect Storage KvikIO copies through host memory ("compatibility mode"): the same path, for
tests, and no faster than ours.
"""

import fcntl
import importlib
import logging
import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from twostroke.errors import StartupError
from twostroke.kv.cuda_copies import addresses, copy
from twostroke.kv.cuda_digest import Digests
from twostroke.kv.direct import Extent, pages
from twostroke.kv.pool import Slot

log = logging.getLogger(__name__)


def wanted(choice: str) -> bool:
    """Whether files shall be read and written by the GPU: ``--gds on`` or ``auto``, where the machine can.

    Raises:
        StartupError: it shall, and KvikIO is not installed.
    """
    if choice == "off" or (choice == "auto" and find_spec("kvikio") is None):
        return False
    try:
        defaults = importlib.import_module("kvikio.defaults")
    except (ImportError, OSError) as error:
        if choice == "auto":
            log.info("going without GPUDirect Storage: %s", error)
            return False
        raise StartupError(f"--gds on needs KvikIO: pip install 'twostroke[gds]' ({error})") from error
    emulated: bool = defaults.is_compat_mode_preferred()
    if choice == "auto" and emulated:
        return False
    for way in ("read", "write"):  # where it has to emulate, past the page cache too
        defaults.set(f"auto_direct_io_{way}", True)
    log.info("tiers in files use KvikIO, %s GPUDirect Storage", "without" if emulated else "with")
    return True


class _Open:
    """A file that KvikIO has opened."""

    def __init__(self, fd: int) -> None:
        """``fd``: ours, of the same file. ``RuntimeError``."""
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        self.file: Any = importlib.import_module("kvikio").CuFile(f"/proc/self/fd/{fd}", "r+" if writes else "r")

    def close(self) -> None:
        """See ``Closeable``."""
        self.file.close()


class CudaFiles:
    """See ``Files``."""

    def __init__(self, slots: torch.Tensor, stream: "torch.cuda.Stream") -> None:
        """``slots``: ``uint8 [num_slots, block_bytes]``, contiguous on this thread's GPU."""
        self._slots = slots
        self._size = slots.shape[1]
        self._stream = stream
        self._memory = torch.empty(pages(self._size), dtype=torch.uint8, device=slots.device)
        self._here = addresses(self._memory.data_ptr(), [0], self._size)
        self._length = np.full(1, self._size, np.uint64)
        self._digests = Digests(self._memory[: self._size].view(1, -1))
        self._works = True

    def read(self, extent: Extent) -> bytes | None:
        """See ``Files.read``."""
        if not self._works:
            return None
        extent.read_head()
        try:
            count = extent.file.opened(_Open).file.raw_read(self._memory, file_offset=extent.offset)
        except RuntimeError as error:  # whatever it was: if it was the file, the host will find out
            self._give_up(error)
            return None
        if count < len(self._memory):
            self._give_up(f"{count} of {len(self._memory)} bytes were read")
            return None
        return self._digest()

    def store(self, slot: Slot) -> None:
        """See ``Files.store``."""
        copy(addresses(self._slots.data_ptr(), [slot], self._size), self._here, self._length, self._stream.cuda_stream)
        self._stream.synchronize()

    def load(self, slot: Slot) -> bytes:
        """See ``Files.load``."""
        copy(self._here, addresses(self._slots.data_ptr(), [slot], self._size), self._length, self._stream.cuda_stream)
        return self._digest()

    def write(self, extent: Extent) -> bool:
        """See ``Files.write``."""
        if not self._works:
            return False
        extent.write_head()
        try:
            count = extent.file.opened(_Open).file.raw_write(self._memory, file_offset=extent.offset)
        except RuntimeError as error:
            self._give_up(error)
            return False
        if count < len(self._memory):
            self._give_up(f"{count} of {len(self._memory)} bytes were written")
        return bool(count == len(self._memory))

    def _digest(self) -> bytes:
        with torch.cuda.stream(self._stream):
            self._digests.start([0])
        self._stream.synchronize()
        return self._digests.finish(1)[0]

    def _give_up(self, why: object) -> None:
        log.warning("KvikIO is given up, files go through host memory: %s", why)
        self._works = False
