"""How a transfer that only knows host memory gets at slots: in place, or from and to a GPU's memory."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from twostroke.config import GdsChoice
from twostroke.kv.copying import copy_digested
from twostroke.kv.direct import Extent
from twostroke.kv.memory import Bytes
from twostroke.kv.pool import Slot


class Files(Protocol):
    """Moves blocks between files and memory of its own that lies beside the slots, for one thread."""

    def read(self, extent: Extent) -> bytes | None:
        """Read a block's payload, and what is in front of it. Its xxh3-128; None if this does not work here.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def store(self, slot: Slot) -> None:
        """What was read is copied into the slot when this returns."""
        ...

    def load(self, slot: Slot) -> bytes:
        """Copy a slot's block, to ``write`` it; its xxh3-128."""
        ...

    def write(self, extent: Extent) -> bool:
        """Write it, and what is in front of it. False if this does not work here. ``OSError``."""
        ...


class Staging(Protocol):
    """Access to slots for one thread: one through memory of its own, or several from and to other memory."""

    files: Files | None  # a way past the host's memory, where there is one

    def load(self, slot: Slot) -> memoryview:
        """The slot's bytes. Good until the next call."""
        ...

    def space(self, slot: Slot) -> memoryview:
        """Where the slot's new bytes are to be written. Good until the next call."""
        ...

    def store(self, slot: Slot) -> None:
        """The bytes in ``space`` are complete: when this returns, the slot holds them."""
        ...

    def read(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """Copy slots to these places in ``memory``, ``[places, block_bytes]``. The xxh3-128 of what each slot holds."""
        ...

    def write(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """Copy from these places in ``memory`` into slots. The xxh3-128 of what each slot holds then."""
        ...


class HostStaging:
    """Slots in host memory: read and written in place."""

    files: Files | None = None

    def __init__(self, slots: Bytes) -> None:
        self._slots = slots

    def load(self, slot: Slot) -> memoryview:
        """See ``Staging.load``."""
        view: memoryview = self._slots[slot].data
        return view

    space = load

    def store(self, slot: Slot) -> None:
        """They are there already."""

    def read(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """See ``Staging.read``."""
        return [copy_digested(memory[place], self._slots[slot]) for slot, place in zip(slots, places, strict=True)]

    def write(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """See ``Staging.write``."""
        return [copy_digested(self._slots[slot], memory[place]) for slot, place in zip(slots, places, strict=True)]


def staging(slots: torch.Tensor, gds: GdsChoice = "off") -> Callable[[], Staging]:
    """Makes access to a pool, ``uint8 [num_slots, block_bytes]``, for each who asks. ``gds``: whether a GPU shall read
    and write files by itself. ``StartupError`` if it shall, and cannot.
    """
    if slots.is_cuda:
        from twostroke.links.cuda_files import wanted
        from twostroke.links.cuda_staging import CudaStaging  # it needs what only a GPU's machine has

        files = wanted(gds)
        return lambda: CudaStaging(slots, files=files)
    return lambda: HostStaging(slots.numpy())


def warm(access: Callable[[], Staging], block_bytes: int) -> None:
    """Read a slot for nobody, so that nobody waits for what this thread needs to be made and compiled."""
    access().read([0], np.empty((1, block_bytes), np.uint8), [0])


def of_thread(make: Callable[[], Staging]) -> Callable[[], Staging]:
    """The calling thread's own access, made when it first asks."""
    local = threading.local()

    def own() -> Staging:
        if not hasattr(local, "staging"):
            local.staging = make()
        access: Staging = local.staging
        return access

    return own
