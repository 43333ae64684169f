"""How a transfer that only knows host memory gets at slots: directly, or through one pinned block for a GPU's pool."""

from collections.abc import Callable
from typing import Protocol

import torch

from twostroke.kv.memory import Bytes
from twostroke.kv.pool import Slot


class Staging(Protocol):
    """Access to slots for one thread, one slot at a time."""

    def load(self, slot: Slot) -> memoryview:
        """The slot's bytes. Good until the next call."""
        ...

    def space(self, slot: Slot) -> memoryview:
        """Where the slot's new bytes are to be written. Good until the next call."""
        ...

    def store(self, slot: Slot) -> None:
        """The bytes in ``space`` are complete: when this returns, the slot holds them."""
        ...


class HostStaging:
    """Slots in host memory: read and written in place."""

    def __init__(self, slots: Bytes) -> None:
        self._slots = slots

    def load(self, slot: Slot) -> memoryview:
        """See ``Staging.load``."""
        view: memoryview = self._slots[slot].data
        return view

    space = load

    def store(self, slot: Slot) -> None:
        """They are there already."""


class DeviceStaging:
    """Slots in a GPU's memory: each goes through one block of pinned memory, on a stream that waits for no other."""

    def __init__(self, slots: torch.Tensor) -> None:
        self._slots = slots
        self._stream = torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(slots.shape[1], dtype=torch.uint8, pin_memory=True)

    def load(self, slot: Slot) -> memoryview:
        """See ``Staging.load``."""
        self._copy(self._pinned, self._slots[slot])
        return self.space(slot)

    def space(self, slot: Slot) -> memoryview:
        """See ``Staging.space``."""
        view: memoryview = self._pinned.numpy().data
        return view

    def store(self, slot: Slot) -> None:
        """See ``Staging.store``."""
        self._copy(self._slots[slot], self._pinned)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


def staging(slots: torch.Tensor) -> Callable[[], Staging]:
    """Makes access to a pool, ``uint8 [num_slots, block_bytes]``, for each thread that asks."""
    if slots.is_cuda:
        return lambda: DeviceStaging(slots)
    return lambda: HostStaging(slots.numpy())
