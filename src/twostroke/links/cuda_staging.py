"""Slots in a GPU's memory, for transfers that know host memory only."""

from collections.abc import Sequence

import numpy as np
import torch
from cuda.bindings import runtime

from twostroke.kv.cuda_copies import Addresses, addresses, copy
from twostroke.kv.cuda_digest import Digests
from twostroke.kv.cuda_memory import call
from twostroke.kv.memory import Bytes
from twostroke.kv.pool import Slot
from twostroke.links.cuda_files import CudaFiles
from twostroke.links.staging import Files


class CudaStaging:
    """See ``Staging``. Copies run on a stream that waits for no other: whoever has the slots has waited for the kernels
    that write them. From and to memory that is registered with CUDA the GPU copies by itself, else the driver helps.
    Digests are the GPU's work: what went over the link both ways is covered, and no core reads it for that.
    """

    def __init__(self, slots: torch.Tensor, *, files: bool = False) -> None:
        """``slots``: ``uint8 [num_slots, block_bytes]``, contiguous on a GPU, which this thread will be on. ``files``:
        whether it is to read and write files by itself.
        """
        self._slots = slots
        self._size = slots.shape[1]
        call(runtime.cudaSetDevice(slots.device.index))
        self._stream = torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
        self._own = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
        self._own_address = addresses(self._own.data_ptr(), [0], self._size)
        self._sizes = np.full(Digests.MOST, self._size, np.uint64)
        self._digests: Digests | None = None  # links do without
        self.files: Files | None = CudaFiles(slots, self._stream) if files else None

    def load(self, slot: Slot) -> memoryview:
        """See ``Staging.load``."""
        self._copy(self._own_address, self._at([slot]))
        self._stream.synchronize()
        return self.space(slot)

    def space(self, slot: Slot) -> memoryview:
        """See ``Staging.space``."""
        view: memoryview = self._own.numpy().data
        return view

    def store(self, slot: Slot) -> None:
        """See ``Staging.store``."""
        self._copy(self._at([slot]), self._own_address)
        self._stream.synchronize()

    def read(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """See ``Staging.read``."""
        return self._move(slots, self._places(memory, places), inwards=False)

    def write(self, slots: Sequence[Slot], memory: Bytes, places: Sequence[int]) -> list[bytes]:
        """See ``Staging.write``."""
        return self._move(slots, self._places(memory, places), inwards=True)

    def _at(self, slots: Sequence[Slot]) -> Addresses:
        return addresses(self._slots.data_ptr(), slots, self._size)

    def _places(self, memory: Bytes, places: Sequence[int]) -> Addresses:
        assert memory.shape[1] == self._size, "a place is as large as a slot"
        assert memory.flags.c_contiguous, "places lie one behind the other"
        return addresses(memory.ctypes.data, places, self._size)

    def _copy(self, targets: Addresses, sources: Addresses) -> None:
        """Start copying whole blocks, at most ``Digests.MOST``. ``RuntimeError`` if the GPU fails."""
        copy(targets, sources, self._sizes[: len(targets)], self._stream.cuda_stream)

    def _move(self, slots: Sequence[Slot], hosts: Addresses, *, inwards: bool) -> list[bytes]:
        """Copy between slots and addresses in host memory; digests of what the slots have then. ``RuntimeError`` if the
        GPU fails; nothing is under way then.
        """
        if self._digests is None:
            self._digests = Digests(self._slots)
        digests = list[bytes]()
        for first in range(0, len(slots), Digests.MOST):
            some = slots[first : first + Digests.MOST]
            ours, theirs = self._at(some), hosts[first : first + Digests.MOST]
            try:
                with torch.cuda.stream(self._stream):
                    self._copy(ours, theirs) if inwards else self._copy(theirs, ours)
                    self._digests.start(some)
            finally:
                self._stream.synchronize()  # releases the GIL
            digests += self._digests.finish(len(some))
        return digests
