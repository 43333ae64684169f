"""Slots in a GPU's memory, for transfers that know host memory only."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from cuda.bindings import runtime

from twostroke.kv import cuda_digest
from twostroke.kv.cuda_memory import call
from twostroke.kv.pool import Slot

_MOST = 256  # blocks of one digest


class CudaStaging:
    """See ``Staging``. Copies run on a stream that waits for no other: whoever has the slots has waited for the kernels
    that write them. From and to memory that is registered with CUDA the GPU copies by itself, else the driver helps.
    Digests are the GPU's work: what went over the link both ways is covered, and no core reads it for that.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        """``slots``: ``uint8 [num_slots, block_bytes]``, contiguous on a GPU, which this thread will be on."""
        self._slots = slots
        self._size = slots.shape[1]
        call(runtime.cudaSetDevice(slots.device.index))
        self._stream = torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
        self._own = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
        self._index = torch.empty(_MOST, dtype=torch.int64, pin_memory=True)
        self._sums = torch.empty(_MOST, 8, dtype=torch.int64, pin_memory=True)
        self._keys = cuda_digest.keys(slots.device)
        torch.cuda.synchronize(slots.device)
        self._digests([0])  # so that nobody waits for the kernel to be compiled

    def load(self, slot: Slot) -> memoryview:
        """See ``Staging.load``."""
        self._copy([(self._own.data_ptr(), self._at(slot))], runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._stream.synchronize()
        return self.space(slot)

    def space(self, slot: Slot) -> memoryview:
        """See ``Staging.space``."""
        view: memoryview = self._own.numpy().data
        return view

    def store(self, slot: Slot) -> None:
        """See ``Staging.store``."""
        self._copy([(self._at(slot), self._own.data_ptr())], runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
        self._stream.synchronize()

    def read(self, slots: Sequence[Slot], targets: Sequence[memoryview]) -> list[bytes]:
        """See ``Staging.read``."""
        pairs = zip(map(_address, targets), map(self._at, slots), strict=True)
        self._copy(pairs, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        return self._digests(slots)

    def write(self, slots: Sequence[Slot], sources: Sequence[memoryview]) -> list[bytes]:
        """See ``Staging.write``."""
        pairs = zip(map(self._at, slots), map(_address, sources), strict=True)
        self._copy(pairs, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
        return self._digests(slots)

    def _at(self, slot: Slot) -> int:
        return self._slots.data_ptr() + slot * self._size

    def _copy(self, pairs: Iterable[tuple[int, int]], kind: runtime.cudaMemcpyKind) -> None:
        """Start copying, from the second address of each pair to the first; neighbours in both memories together.
        ``RuntimeError`` if the GPU fails; nothing is under way then.
        """
        runs: list[tuple[int, int, int]] = []
        for target, source in pairs:
            if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (target, source):
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + self._size)
            else:
                runs.append((target, source, self._size))
        try:
            for target, source, size in runs:
                call(runtime.cudaMemcpyAsync(target, source, size, kind, self._stream.cuda_stream))
        except BaseException:
            self._stream.synchronize()
            raise

    def _digests(self, slots: Sequence[Slot]) -> list[bytes]:
        """Of slots, once everything is copied. ``RuntimeError`` if the GPU fails."""
        digests: list[bytes] = []
        for first in range(0, len(slots), _MOST):
            some = slots[first : first + _MOST]
            self._index[: len(some)] = torch.tensor(some)
            with torch.cuda.stream(self._stream):
                index = self._index[: len(some)].to(self._slots.device, non_blocking=True)
                sums = torch.empty(len(some), 8, dtype=torch.int64, device=index.device)
                cuda_digest.start(self._slots, index, self._keys, sums)
                self._sums[: len(some)].copy_(sums, non_blocking=True)
            self._stream.synchronize()  # releases the GIL
            digests += cuda_digest.finish(self._sums[: len(some)].numpy().view(np.uint64), self._size)
        return digests


def _address(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
